"""Losses on features against the published formulas, worked in float64 numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.feature import (
    AttentionTransfer,
    FitNets,
    HiddenStates,
    SimilarityPreserving,
    attention_transfer,
    feature_distance,
    similarity_preserving,
)
from lightning_opt.losses.projectors import make_projector
from lightning_opt.losses.review import ReviewKD, hierarchical_context

NOTHING = Supervision()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensor(array, *, grad=False):
    return torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=grad)


def signals(**features):
    batch = len(next(iter(features.values())))
    return Signals(logits=torch.zeros(batch, 2), features=features)


def unit(x, axis=-1):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def pooled(x, size):
    """Average (B, C, H, W) over equal blocks."""
    b, c, h, w = x.shape
    return x.reshape(b, c, size, h // size, size, w // size).mean(axis=(3, 5))


def tokens_and_mask(rng):
    student, teacher = rng.normal(size=(2, 3, 5, 4))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=bool)
    return student, teacher, mask


class TestFeatureDistance:
    def test_mse_without_mask(self, rng):
        student, teacher = rng.normal(size=(2, 3, 4, 5, 5))
        value = feature_distance(tensor(student), tensor(teacher))
        assert value.item() == pytest.approx(((student - teacher) ** 2).mean(), abs=1e-9)

    @pytest.mark.parametrize("distance", ["mse", "cosine", "normalised_mse"])
    def test_counts_only_real_tokens(self, rng, distance):
        student, teacher, mask = tokens_and_mask(rng)
        s, t = student[mask], teacher[mask]  # (tokens, D): what is left when padding does not exist
        expected = {
            "mse": ((s - t) ** 2).mean(),
            "cosine": (1 - (unit(s) * unit(t)).sum(-1)).mean(),
            "normalised_mse": ((unit(s) - unit(t)) ** 2).sum(-1).mean(),
        }[distance]
        value = feature_distance(tensor(student), tensor(teacher), distance=distance, token_mask=torch.tensor(mask))
        assert value.item() == pytest.approx(expected, abs=1e-9)

    def test_padding_has_no_gradient_even_where_it_is_nan(self, rng):
        student, teacher, mask = tokens_and_mask(rng)
        student[~mask] = np.nan
        ours = tensor(student, grad=True)
        feature_distance(ours, tensor(teacher), token_mask=torch.tensor(mask)).backward()
        assert torch.isfinite(ours.grad).all()
        assert (ours.grad[~torch.tensor(mask)] == 0).all()
        assert (ours.grad[torch.tensor(mask)] != 0).all()

    def test_a_mask_of_another_length_is_refused(self, rng):
        student, teacher, _ = tokens_and_mask(rng)
        with pytest.raises(ValueError, match="mask has shape"):
            feature_distance(tensor(student), tensor(teacher), token_mask=torch.ones(3, 6, dtype=torch.bool))

    def test_conv_reads_the_second_axis_as_channels(self, rng):
        student, teacher = rng.normal(size=(2, 3, 4, 6))
        value = feature_distance(tensor(student), tensor(teacher), distance="cosine", kind="conv")
        expected = (1 - (unit(student, 1) * unit(teacher, 1)).sum(1)).mean()
        assert value.item() == pytest.approx(expected, abs=1e-9)


class TestFitNets:
    def test_equal_widths_need_no_projector(self, rng):
        student, teacher = rng.normal(size=(2, 3, 4, 5, 5))
        ours, theirs = signals(a=tensor(student)), signals(b=tensor(teacher))
        loss = FitNets({"a": "b"})
        loss.build(ours, theirs)
        assert isinstance(loss.projectors[0], nn.Identity)
        assert loss(ours, theirs, NOTHING).item() == pytest.approx(((student - teacher) ** 2).mean(), abs=1e-9)

    def test_pools_the_larger_map(self, rng):
        student, teacher = rng.normal(size=(2, 3, 8, 8)), rng.normal(size=(2, 3, 4, 4))
        expected = ((pooled(student, 4) - teacher) ** 2).mean()
        for s, t in ((student, teacher), (teacher, student)):
            value = FitNets({"a": "b"})(signals(a=tensor(s)), signals(b=tensor(t)), NOTHING)
            assert value.item() == pytest.approx(expected, abs=1e-9)

    def test_sums_over_the_modules_that_a_pattern_matches(self, rng):
        s0, s1, t0, t1 = rng.normal(size=(4, 3, 5))
        ours = signals(**{"layer.0": tensor(s0), "layer.1": tensor(s1)})
        theirs = signals(**{"block.2": tensor(t0), "block.5": tensor(t1)})
        value = FitNets({"layer.*": "block.*"})(ours, theirs, NOTHING)
        assert value.item() == pytest.approx(((s0 - t0) ** 2).mean() + ((s1 - t1) ** 2).mean(), abs=1e-9)

    def test_gradient_reaches_student_and_projector_and_not_the_teacher(self):
        ours, theirs = torch.randn(4, 3, 6, 6, requires_grad=True), torch.randn(4, 5, 3, 3, requires_grad=True)
        loss = FitNets({"a": "b"})
        loss.build(signals(a=ours), signals(b=theirs))
        loss(signals(a=ours), signals(b=theirs), NOTHING).backward()
        assert ours.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters() if p.dim() > 1)
        assert theirs.grad is None

    def test_projector_learns_a_linear_teacher_exactly(self):
        torch.manual_seed(0)
        ours = torch.randn(64, 3)
        theirs = ours @ torch.randn(3, 7) + torch.randn(7)
        loss = FitNets({"a": "b"})
        loss.build(signals(a=ours), signals(b=theirs))
        optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=100)
        optimizer.step(lambda: _backward(loss, signals(a=ours), signals(b=theirs)))
        assert loss(signals(a=ours), signals(b=theirs), NOTHING).item() < 1e-8

    def test_build_twice_keeps_what_was_learnt(self):
        ours, theirs = signals(a=torch.randn(2, 3)), signals(b=torch.randn(2, 5))
        loss = FitNets({"a": "b"})
        loss.build(ours, theirs)
        first = loss.projectors[0]
        loss.build(ours, theirs)
        assert loss.projectors[0] is first
        loss.build(signals(a=torch.randn(2, 4)), theirs)  # the student was shrunk or replaced
        assert loss.projectors[0].in_features == 4

    def test_build_is_a_function_of_the_seed_and_fits_the_state_dict(self):
        ours, theirs = signals(a=torch.randn(2, 3, 4, 4)), signals(b=torch.randn(2, 5, 4, 4))
        losses = [FitNets({"a": "b"}) for _ in range(2)]
        for loss in losses:
            torch.manual_seed(7)
            loss.build(ours, theirs)
        first, second = (loss.state_dict() for loss in losses)
        assert first
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_without_build_differing_widths_are_refused(self):
        with pytest.raises(RuntimeError, match="call build"):
            FitNets({"a": "b"})(signals(a=torch.randn(2, 3)), signals(b=torch.randn(2, 5)), NOTHING)

    def test_bf16_student_feature_through_a_float_projector(self):
        ours, theirs = signals(a=torch.randn(2, 3)), signals(b=torch.randn(2, 5))
        loss = FitNets({"a": "b"})
        loss.build(ours, theirs)
        half = loss(signals(a=ours.features["a"].bfloat16()), theirs, NOTHING)
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(loss(ours, theirs, NOTHING).item(), rel=0.02)


def _backward(loss, ours, theirs):
    loss.zero_grad()
    value = loss(ours, theirs, NOTHING)
    value.backward()
    return value


class TestHiddenStates:
    def test_mask_comes_from_the_supervision(self, rng):
        student, teacher, mask = tokens_and_mask(rng)
        loss = HiddenStates({"a": "b"}, distance="cosine")
        value = loss(signals(a=tensor(student)), signals(b=tensor(teacher)), Supervision(token_mask=torch.tensor(mask)))
        expected = (1 - (unit(student[mask]) * unit(teacher[mask])).sum(-1)).mean()
        assert value.item() == pytest.approx(expected, abs=1e-9)

    def test_unknown_distance(self):
        with pytest.raises(ValueError, match="distance='l3'"):
            HiddenStates({"a": "b"}, distance="l3")

    def test_layouts_and_lengths_that_cannot_be_compared(self):
        loss = HiddenStates({"a": "b"})
        with pytest.raises(ConfigError, match="same layout"):
            loss.build(signals(a=torch.randn(2, 3)), signals(b=torch.randn(2, 3, 4, 4)))
        with pytest.raises(ConfigError, match="7 student tokens"):
            loss(signals(a=torch.randn(2, 7, 3)), signals(b=torch.randn(2, 8, 3)), NOTHING)


class TestAttentionTransfer:
    @staticmethod
    def expected(student, teacher, power=2):
        def attention(x):
            return unit((np.abs(x) ** power).sum(1).reshape(len(x), -1))

        return ((attention(student) - attention(teacher)) ** 2).mean()

    @pytest.mark.parametrize("power", [2, 1])
    def test_maps(self, rng, power):
        student, teacher = rng.normal(size=(3, 4, 6, 6)), rng.normal(size=(3, 7, 6, 6))
        value = attention_transfer(tensor(student), tensor(teacher), power=power)
        assert value.item() == pytest.approx(self.expected(student, teacher, power), abs=1e-9)

    def test_class_pools_and_reaches_the_student_only(self, rng):
        student, teacher = rng.normal(size=(3, 4, 8, 8)), rng.normal(size=(3, 7, 4, 4))
        ours, theirs = tensor(student, grad=True), tensor(teacher, grad=True)
        value = AttentionTransfer({"a": "b"})(signals(a=ours), signals(b=theirs), NOTHING)
        assert value.item() == pytest.approx(self.expected(pooled(student, 4), teacher), abs=1e-9)
        value.backward()
        assert ours.grad.abs().sum() > 0
        assert theirs.grad is None

    def test_tokens_with_padding(self, rng):
        student, teacher, mask = tokens_and_mask(rng)
        total = 0.0
        for s, t, m in zip(student, teacher, mask, strict=True):
            total += ((unit((s[m] ** 2).sum(-1)) - unit((t[m] ** 2).sum(-1))) ** 2).sum()
        value = attention_transfer(tensor(student), tensor(teacher), token_mask=torch.tensor(mask))
        assert value.item() == pytest.approx(total / mask.sum(), abs=1e-9)

    def test_power_must_be_positive(self):
        with pytest.raises(ValueError, match="power=0"):
            AttentionTransfer({"a": "b"}, power=0)


class TestSimilarityPreserving:
    @staticmethod
    def expected(student, teacher):
        grams = [unit(x.reshape(len(x), -1) @ x.reshape(len(x), -1).T) for x in (student, teacher)]
        return ((grams[0] - grams[1]) ** 2).sum() / len(student) ** 2

    def test_formula(self, rng):
        student, teacher = rng.normal(size=(5, 4, 6, 6)), rng.normal(size=(5, 7, 3, 3))
        value = similarity_preserving(tensor(student), tensor(teacher))
        assert value.item() == pytest.approx(self.expected(student, teacher), abs=1e-9)

    def test_padding_counts_for_nothing(self, rng):
        student, teacher, mask = tokens_and_mask(rng)
        loss = SimilarityPreserving({"a": "b"})
        supervision = Supervision(token_mask=torch.tensor(mask))
        blanked = [x * mask[..., None] for x in (student, teacher)]
        student[~mask], teacher[~mask] = 99.0, -99.0
        value = loss(signals(a=tensor(student)), signals(b=tensor(teacher)), supervision)
        assert value.item() == pytest.approx(self.expected(*blanked), abs=1e-9)

    def test_autocast_does_not_coarsen_it(self, rng):
        student, teacher = rng.normal(size=(5, 40)), rng.normal(size=(5, 40))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = similarity_preserving(tensor(student).float(), tensor(teacher).float())
        assert value.item() == pytest.approx(self.expected(student, teacher), rel=1e-5)


class TestReviewKD:
    def test_hierarchical_context(self, rng):
        student, teacher = rng.normal(size=(2, 3, 5, 8, 8))
        terms = [((student - teacher) ** 2).mean()]
        terms += [((pooled(student, n) - pooled(teacher, n)) ** 2).mean() for n in (4, 2, 1)]
        expected = sum(w * x for w, x in zip((1, 0.5, 0.25, 0.125), terms, strict=True)) / 1.875
        assert hierarchical_context(tensor(student), tensor(teacher)).item() == pytest.approx(expected, abs=1e-9)

    def test_small_maps_skip_the_levels_that_do_not_fit(self, rng):
        student, teacher = rng.normal(size=(2, 3, 5, 2, 2))
        levels = ((student - teacher) ** 2).mean(), ((student - teacher).mean(axis=(2, 3)) ** 2).mean()
        value = hierarchical_context(tensor(student), tensor(teacher)).item()
        assert value == pytest.approx((levels[0] + 0.5 * levels[1]) / 1.5, abs=1e-9)

    @staticmethod
    def networks():
        torch.manual_seed(0)
        sizes = {"l1": (4, 8), "l2": (6, 4), "fc": (8, None)}
        ours = {k: torch.randn(3, c, *([n, n] if n else [])).requires_grad_() for k, (c, n) in sizes.items()}
        theirs = {k: torch.randn(3, 2 * c, *([n, n] if n else [])).requires_grad_() for k, (c, n) in sizes.items()}
        loss = ReviewKD({"l1": "l1", "l2": "l2", "fc": "fc"})
        loss.build(signals(**ours), signals(**theirs))
        return ours, theirs, loss

    def test_gradients_reach_every_layer_and_part(self):
        ours, theirs, loss = self.networks()
        loss(signals(**ours), signals(**theirs), NOTHING).backward()
        assert all(x.grad.abs().sum() > 0 for x in ours.values())
        assert all(p.grad is not None for p in loss.parameters())
        assert all(x.grad is None for x in theirs.values())

    def test_a_deep_layer_helps_the_review_of_a_shallow_one(self):
        ours, theirs, loss = self.networks()
        deep = ours["l2"].detach().requires_grad_()
        reviewed_with = [f for f in loss.fusions if f.attend is not None]
        assert len(reviewed_with) == 2
        _, inner = loss.fusions[1](deep, None, torch.Size([4, 4]))
        shallow, _ = loss.fusions[0](ours["l1"], inner, torch.Size([8, 8]))
        assert shallow.shape == theirs["l1"].shape
        shallow.square().sum().backward()
        assert deep.grad.abs().sum() > 0

    def test_trained_fusions_lower_the_loss(self):
        ours, theirs, loss = self.networks()
        args = signals(**ours), signals(**theirs), NOTHING
        optimizer, before = torch.optim.Adam(loss.parameters(), lr=0.01), loss(*args).item()
        for _ in range(30):
            optimizer.zero_grad()
            loss(*args).backward()
            optimizer.step()
        assert loss(*args).item() < 0.7 * before

    def test_tokens_are_refused(self):
        with pytest.raises(ConfigError, match="ReviewKD compares maps"):
            ReviewKD({"a": "b"}).build(signals(a=torch.randn(2, 3, 4)), signals(b=torch.randn(2, 3, 4)))

    def test_must_be_built(self):
        with pytest.raises(RuntimeError, match="call build"):
            ReviewKD({"a": "b"})(signals(a=torch.randn(2, 3)), signals(b=torch.randn(2, 3)), NOTHING)


def test_projector_kinds_fit_layouts():
    with pytest.raises(ConfigError, match="kind='conv'"):
        make_projector(torch.randn(2, 3), torch.randn(2, 4), kind="conv")
