"""A teacher known by its likeliest classes and the mass of the rest, against formulas in float64 numpy."""

import numpy as np
import pytest
import torch

from lightning_opt.losses import KD, ForwardKL, Signals, Supervision, TopKKL
from lightning_opt.losses.top_k import expand_top_k, top_k_kl, top_k_of
from lightning_opt.testing import check_loss

N, V, K = 5, 12, 4


@pytest.fixture
def pair():
    return np.random.default_rng(0).normal(scale=2.0, size=(2, N, V))


def says(array, dtype=torch.float64):
    return Signals(logits=torch.tensor(array, dtype=dtype))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def lumped(student, teacher, k):
    """KL over the teacher's k likeliest classes and one that stands for all others."""
    values = []
    for q, p in zip(softmax(student), softmax(teacher), strict=True):
        top = np.argsort(-p)[:k]
        p_parts = np.append(p[top], 1 - p[top].sum())
        q_parts = np.append(q[top], 1 - q[top].sum())
        values.append((p_parts * np.log(p_parts / q_parts)).sum())
    return np.array(values)


def full(student, teacher):
    p, q = softmax(teacher), softmax(student)
    return (p * np.log(p / q)).sum(axis=-1)


class TestTopKOf:
    def test_keeps_the_likeliest_and_the_mass_of_the_rest(self, pair):
        kept = top_k_of(torch.tensor(pair[1]), k=K, temperature=2.0)
        p = softmax(pair[1] / 2.0)
        order = np.argsort(-p, axis=-1)[:, :K]
        assert kept.indices.tolist() == order.tolist()
        top = np.take_along_axis(p, order, axis=-1)
        np.testing.assert_allclose(kept.log_probs.numpy(), np.log(top), atol=1e-12)
        np.testing.assert_allclose(kept.tail_log_mass.numpy(), np.log(1 - top.sum(axis=-1)), atol=1e-9)

    def test_a_tiny_tail_is_not_rounded_to_nothing(self):
        kept = top_k_of(torch.tensor([[60.0, 0.0, 0.0]]), k=1)
        assert kept.tail_log_mass.item() == pytest.approx(np.log(2) - 60.0, abs=1e-5)  # 1 - 2 exp(-60) rounds to 1

    @pytest.mark.parametrize("k", [0, V + 1])
    def test_out_of_range(self, k, pair):
        with pytest.raises(ValueError, match=rf"k must be in \[1, {V}\].*not {k}"):
            top_k_of(torch.tensor(pair[1]), k=k)


class TestExpand:
    def test_gives_back_what_was_kept_with_an_even_tail(self, pair):
        kept = top_k_of(torch.tensor(pair[1]), k=K)
        p = expand_top_k(kept, num_classes=V).exp().numpy()
        np.testing.assert_allclose(p.sum(axis=-1), 1.0, atol=1e-12)
        for row, teacher in zip(p, softmax(pair[1]), strict=True):
            top = np.argsort(-teacher)
            np.testing.assert_allclose(row[top[:K]], teacher[top[:K]], atol=1e-12)
            np.testing.assert_allclose(row[top[K:]], teacher[top[K:]].mean(), atol=1e-12)

    def test_round_trip(self, pair):
        kept = top_k_of(torch.tensor(pair[1]), k=K)
        again = top_k_of(expand_top_k(kept, num_classes=V), k=K)
        assert torch.equal(again.indices, kept.indices)
        torch.testing.assert_close(again.log_probs, kept.log_probs)
        torch.testing.assert_close(again.tail_log_mass, kept.tail_log_mass)

    def test_all_classes_kept_is_the_distribution_itself(self, pair):
        kept = top_k_of(torch.tensor(pair[1]), k=V)
        np.testing.assert_allclose(expand_top_k(kept, num_classes=V).exp().numpy(), softmax(pair[1]), atol=1e-12)

    def test_what_is_expanded_serves_any_loss_as_logits(self, pair):
        whole = expand_top_k(top_k_of(torch.tensor(pair[1]), k=V), num_classes=V)
        value = KD(temperature=3.0)(says(pair[0]), Signals(logits=whole), Supervision())
        p, q = softmax(pair[1] / 3.0), softmax(pair[0] / 3.0)
        assert value.item() == pytest.approx(9.0 * (p * np.log(p / q)).sum(axis=-1).mean(), abs=1e-6)


class TestTopKKL:
    @pytest.mark.parametrize("k", [1, K, V - 1])
    def test_formula(self, pair, k):
        kept = top_k_of(torch.tensor(pair[1]), k=k)
        np.testing.assert_allclose(top_k_kl(torch.tensor(pair[0]), *kept).numpy(), lumped(*pair, k), atol=1e-9)
        assert TopKKL(k=k)(says(pair[0]), says(pair[1]), Supervision()).item() == pytest.approx(
            lumped(*pair, k).mean(), abs=1e-6
        )

    def test_temperature_and_mask(self, pair):
        mask = np.array([True, False, True, True, False])
        value = TopKKL(k=K, temperature=2.0)(says(pair[0]), says(pair[1]), Supervision(mask=torch.tensor(mask)))
        assert value.item() == pytest.approx(lumped(*(pair / 2.0), K)[mask].mean(), abs=1e-6)

    def test_grows_with_k_to_the_forward_kl(self, pair):
        """Lumping classes can only lose information (log-sum inequality)."""
        values = [TopKKL(k=k)(says(pair[0]), says(pair[1]), Supervision()).item() for k in range(1, V + 1)]
        assert values == sorted(values)
        assert values[0] < values[-1] - 1e-3
        assert values[-1] == pytest.approx(full(*pair).mean(), abs=1e-6)

    @pytest.mark.parametrize("k", [K, V])
    def test_gradient(self, pair, k):
        teacher = says(pair[1])
        student = torch.tensor(pair[0], requires_grad=True)
        call = lambda logits: TopKKL(k=k)(Signals(logits=logits), teacher, Supervision())  # noqa: E731
        assert torch.autograd.gradcheck(call, student)

    def test_all_classes_kept_has_the_gradient_of_the_forward_kl(self, pair):
        gradients = []
        for loss in (TopKKL(k=V), ForwardKL()):
            student = torch.tensor(pair[0], requires_grad=True)
            loss(Signals(logits=student), says(pair[1]), Supervision()).backward()
            gradients.append(student.grad)
        np.testing.assert_allclose(gradients[0].numpy(), (softmax(pair[0]) - softmax(pair[1])) / N, atol=1e-9)
        torch.testing.assert_close(*gradients)

    def test_a_cached_teacher_gives_the_value_of_a_live_one(self, pair):
        live = TopKKL(k=K)(says(pair[0]), says(pair[1]), Supervision())
        stored = expand_top_k(top_k_of(torch.tensor(pair[1]), k=K), num_classes=V)
        cached = TopKKL(k=K)(says(pair[0]), Signals(logits=stored), Supervision())
        torch.testing.assert_close(cached, live)

    def test_half_precision_storage_is_near(self, pair):
        kept = top_k_of(torch.tensor(pair[1]), k=K)
        halves = (kept.indices, kept.log_probs.half(), kept.tail_log_mass.half())
        value = top_k_kl(torch.tensor(pair[0]), *halves)
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value.numpy(), lumped(*pair, K), atol=2e-2)

    @pytest.mark.parametrize("k", [1, 3])
    def test_huge_logits_stay_finite(self, k):
        student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        value = TopKKL(k=k)(Signals(logits=student), says([[-1e4, 1e4, 0.0]], torch.float32), Supervision())
        value.backward()
        assert value.item() == pytest.approx(2e4)
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize("shape", [(N, V), (2, 3, V)])
    def test_behaves(self, shape):
        generator = torch.Generator().manual_seed(0)
        student, teacher = (Signals(logits=torch.randn(shape, generator=generator)) for _ in range(2))
        mask = torch.ones(shape[:-1], dtype=torch.bool)
        mask[0] = False
        check_loss(TopKKL(k=K), student, teacher, Supervision(mask=mask), zero_when_equal=True)

    def test_k_is_checked(self):
        with pytest.raises(ValueError, match="k must be at least 1, not 0"):
            TopKKL(k=0)
