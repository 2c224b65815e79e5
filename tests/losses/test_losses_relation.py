"""Losses on relations, and the pairing of layers, against formulas worked in float64 numpy with plain loops."""

import numpy as np
import pytest
import torch

from lightning_opt.errors import ConfigError
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.layers import match_names, pair_names
from lightning_opt.losses.relation import (
    MiniLMRelations,
    RKDAngle,
    RKDDistance,
    relation_kl,
    rkd_angle,
    rkd_distance,
)

NOTHING = Supervision()


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def tensor(array, *, grad=False):
    return torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=grad)


def huber(x):
    x = np.abs(x)
    return np.where(x < 1, 0.5 * x**2, x - 0.5)


def expected_distance(student, teacher):
    def relative(x):
        n = len(x)
        d = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(n)] for i in range(n)])
        return d / (d.sum() / (n * (n - 1)))

    return huber(relative(student) - relative(teacher)).mean()


def expected_angle(student, teacher):
    def cosines(x):
        n, out = len(x), np.zeros((len(x),) * 3)
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    if j not in (i, k):
                        left, right = x[i] - x[j], x[k] - x[j]
                        out[j, i, k] = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        return out

    return huber(cosines(student) - cosines(teacher)).mean()


class TestNames:
    NAMES = ("conv", "layer1.0", "layer1.0.conv", "layer1.1", "layer2.0", "layer2.0:in", "bert.encoder.layer.0.query")

    @pytest.mark.parametrize(
        ("pattern", "found"),
        [
            ("conv", ["conv"]),
            ("layer1.*", ["layer1.0", "layer1.1"]),
            ("layer*.0", ["layer1.0", "layer2.0"]),
            ("layer[2-9].?", ["layer2.0"]),
            ("layer2.*:in", ["layer2.0:in"]),
            ("**.query", ["bert.encoder.layer.0.query"]),
            ("**.conv", ["conv", "layer1.0.conv"]),
            ("*.query", []),
        ],
    )
    def test_patterns(self, pattern, found):
        assert match_names(self.NAMES, pattern) == found

    def test_pairs_in_order(self):
        pairs = pair_names({"b": "y", "a.*": "x.*"}, ["a.0", "a.1", "b"], ["x.3", "x.7", "y"])
        assert pairs == [("b", "y"), ("a.0", "x.3"), ("a.1", "x.7")]

    def test_unequal_counts_name_both_lists(self):
        with pytest.raises(ConfigError, match=r"\['a.0', 'a.1'\].*\['x.3'\]"):
            pair_names({"a.*": "x.*"}, ["a.0", "a.1"], ["x.3"])

    def test_nothing_matched(self):
        with pytest.raises(ConfigError, match="matches 0 modules"):
            pair_names({"q": "x"}, ["a"], ["z"])

    def test_empty_layers(self):
        with pytest.raises(ValueError, match="layers is empty"):
            RKDDistance({})

    def test_taps_and_needs_follow_the_layers(self):
        tapped, plain = RKDDistance({"a": "b", "c": "b"}), RKDDistance()
        assert (tapped.student_taps, tapped.teacher_taps, set(tapped.needs)) == (("a", "c"), ("b",), {"features"})
        assert (plain.student_taps, plain.teacher_taps, set(plain.needs)) == ((), (), {"logits"})


class TestRKD:
    @pytest.mark.parametrize(
        ("fn", "expected"), [(rkd_distance, expected_distance), (rkd_angle, expected_angle)], ids=["distance", "angle"]
    )
    def test_formula(self, rng, fn, expected):
        student, teacher = rng.normal(size=(6, 3)), 4 * rng.normal(size=(6, 5))
        assert fn(tensor(student), tensor(teacher)).item() == pytest.approx(expected(student, teacher), abs=1e-9)

    @pytest.mark.parametrize(
        ("fn", "expected"), [(rkd_distance, expected_distance), (rkd_angle, expected_angle)], ids=["distance", "angle"]
    )
    def test_masked_samples_count_for_nothing(self, rng, fn, expected):
        student, teacher = rng.normal(size=(6, 3)), rng.normal(size=(6, 5))
        keep = np.array([1, 0, 1, 1, 0, 1], dtype=bool)
        value = fn(tensor(student), tensor(teacher), valid=torch.tensor(keep))
        assert value.item() == pytest.approx(expected(student[keep], teacher[keep]), abs=1e-9)

    @pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()])
    def test_equal_samples_have_finite_gradients(self, loss):
        ours = torch.randn(3, 4)[[0, 0, 1, 2]].requires_grad_()
        loss(Signals(logits=ours), Signals(logits=torch.randn(4, 4)), NOTHING).backward()
        assert torch.isfinite(ours.grad).all()
        assert ours.grad.abs().sum() > 0

    def test_on_logits_with_the_logits_mask(self, rng):
        student, teacher = rng.normal(size=(2, 5, 3))
        keep = np.array([1, 1, 0, 1, 1], dtype=bool)
        student[~keep] = np.nan
        ours = tensor(student, grad=True)
        supervision = Supervision(mask=torch.tensor(keep))
        value = RKDDistance()(Signals(logits=ours), Signals(logits=tensor(teacher)), supervision)
        assert value.item() == pytest.approx(expected_distance(student[keep], teacher[keep]), abs=1e-9)
        value.backward()
        assert torch.isfinite(ours.grad).all()

    def test_on_features_of_different_shape(self, rng):
        student, teacher = rng.normal(size=(5, 2, 3, 3)), rng.normal(size=(5, 7))
        ours, theirs = tensor(student, grad=True), tensor(teacher, grad=True)
        args = Signals(logits=ours, features={"a": ours}), Signals(logits=theirs, features={"b": theirs}), NOTHING
        value = RKDAngle({"a": "b"})(*args)
        assert value.item() == pytest.approx(expected_angle(student.reshape(5, -1), teacher), abs=1e-9)
        value.backward()
        assert ours.grad.abs().sum() > 0
        assert theirs.grad is None

    def test_regression_outputs_without_a_class_axis(self, rng):
        student, teacher = rng.normal(size=(2, 6))
        value = RKDDistance()(Signals(logits=tensor(student)), Signals(logits=tensor(teacher)), NOTHING)
        assert value.item() == pytest.approx(expected_distance(student[:, None], teacher[:, None]), abs=1e-9)


def expected_relation(student, teacher, heads, mask):
    def relations(x, head, keep):
        width = x.shape[-1] // heads
        part = x[keep][:, head * width : (head + 1) * width]
        scores = part @ part.T / np.sqrt(width)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        return weight / weight.sum(-1, keepdims=True)

    total = 0.0
    for s, t, keep in zip(student, teacher, mask, strict=True):
        for head in range(heads):
            q, p = relations(s, head, keep), relations(t, head, keep)
            total += (p * np.log(p / q)).sum() / (heads * keep.sum())
    return total / len(student)


class TestMiniLM:
    MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=bool)
    SELF = ("query", "key", "value")

    def test_relation(self, rng):
        student, teacher = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 12))
        value = relation_kl(tensor(student), tensor(teacher), heads=2)
        expected = expected_relation(student, teacher, 2, np.ones((2, 5), dtype=bool))
        assert value.item() == pytest.approx(expected, abs=1e-9)

    def test_padding_relates_to_nothing(self, rng):
        student, teacher = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 12))
        student[~self.MASK] = np.nan
        ours = tensor(student, grad=True)
        value = relation_kl(ours, tensor(teacher), heads=2, token_mask=torch.tensor(self.MASK))
        assert value.item() == pytest.approx(expected_relation(student, teacher, 2, self.MASK), abs=1e-9)
        value.backward()
        assert torch.isfinite(ours.grad).all()
        assert (ours.grad[~torch.tensor(self.MASK)] == 0).all()

    def features(self, rng, prefix, width):
        arrays = rng.normal(size=(3, 2, 5, width))
        return arrays, {f"{prefix}.{name}": tensor(a) for name, a in zip(self.SELF, arrays, strict=True)}

    def test_queries_keys_and_values_with_weights(self, rng):
        (ours, s), (theirs, t) = self.features(rng, "l.1", 4), self.features(rng, "m.5", 8)
        loss = MiniLMRelations({"l.1": "m.5"}, relation_heads=2, projections=self.SELF, weights=(1.0, 2.0, 0.5))
        assert loss.student_taps == ("l.1.query", "l.1.key", "l.1.value")
        args = Signals(logits=torch.zeros(2), features=s), Signals(logits=torch.zeros(2), features=t)
        value = loss(*args, Supervision(token_mask=torch.tensor(self.MASK)))
        expected = sum(
            w * expected_relation(a, b, 2, self.MASK) for w, a, b in zip((1, 2, 0.5), ours, theirs, strict=True)
        )
        assert value.item() == pytest.approx(expected, abs=1e-9)

    def test_several_layers_by_pattern_with_weights(self, rng):
        (a0, s0), (a1, s1) = self.features(rng, "l.0", 4), self.features(rng, "l.1", 4)
        (b0, t0), (b1, t1) = self.features(rng, "m.0", 4), self.features(rng, "m.1", 4)
        loss = MiniLMRelations({"l.*": "m.*"}, relation_heads=2, projections=self.SELF, weights=(1.0, 0.0, 3.0))
        value = loss(
            Signals(logits=torch.zeros(2), features={**s0, **s1}),
            Signals(logits=torch.zeros(2), features={**t0, **t1}),
            NOTHING,
        )
        whole = np.ones((2, 5), dtype=bool)
        expected = sum(
            w * expected_relation(a[kind], b[kind], 2, whole)
            for a, b in ((a0, b0), (a1, b1))
            for kind, w in ((0, 1), (2, 3))
        )
        assert value.item() == pytest.approx(expected, abs=1e-9)

    def test_fused_projection_is_split_in_three(self, rng):
        ours, theirs = rng.normal(size=(3, 2, 5, 4)), rng.normal(size=(3, 2, 5, 4))
        joined = [tensor(np.concatenate(x, axis=-1), grad=True) for x in (ours, theirs)]
        loss = MiniLMRelations(
            {"h.0": "h.3"}, relation_heads=2, fused=True, projections=["attn.c_attn"], weights=(1.0, 2.0, 0.5)
        )
        student = Signals(logits=joined[0], features={"h.0.attn.c_attn": joined[0]})
        teacher = Signals(logits=joined[1], features={"h.3.attn.c_attn": joined[1]})
        value = loss(student, teacher, NOTHING)
        whole = np.ones((2, 5), dtype=bool)
        expected = sum(w * expected_relation(a, b, 2, whole) for w, a, b in zip((1, 2, 0.5), ours, theirs, strict=True))
        assert value.item() == pytest.approx(expected, abs=1e-9)
        value.backward()
        assert joined[0].grad.abs().sum() > 0
        assert joined[1].grad is None

    def test_heads_that_do_not_divide(self, rng):
        with pytest.raises(ConfigError, match="relation_heads=3 does not divide a layer's width 4"):
            relation_kl(torch.randn(2, 5, 4), torch.randn(2, 5, 4), heads=3)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="give 1 each"):
            MiniLMRelations({"a": "b"}, fused=True)
        with pytest.raises(ValueError, match="relation_heads=0"):
            MiniLMRelations({"a": "b"}, relation_heads=0)
