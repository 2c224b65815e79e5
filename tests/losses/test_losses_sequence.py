"""Divergences between token distributions against their definitions, worked in float64 numpy."""

import numpy as np
import pytest
import torch

from lightning_opt.losses import (
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    Signals,
    SkewKL,
    SkewReverseKL,
    Step,
    Supervision,
    TopKKL,
)
from lightning_opt.testing import check_loss

B, T, V = 3, 5, 9
MASK = np.arange(T) < np.array([[5], [2], [4]])


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def np_kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def np_jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * np_kl(p, m) + (1 - beta) * np_kl(q, m)


def np_top_k_kl(p, q, k):
    """Merge all classes but the teacher's k likeliest into one, for both, and take the KL."""
    order = np.argsort(-p, axis=-1)[..., :k]
    kept_p, kept_q = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    merged = [np.concatenate([x, 1 - x.sum(axis=-1, keepdims=True)], axis=-1) for x in (kept_p, kept_q)]
    return np_kl(*merged)


# (loss, formula of teacher p and student q)
CASES = {
    "forward": (ForwardKL(), np_kl),
    "reverse": (ReverseKL(), lambda p, q: np_kl(q, p)),
    "jsd": (GeneralizedJSD(beta=0.5), lambda p, q: np_jsd(p, q, 0.5)),
    "jsd_low": (GeneralizedJSD(beta=0.1), lambda p, q: np_jsd(p, q, 0.1)),
    "jsd_zero": (GeneralizedJSD(beta=0.0), np_kl),
    "jsd_one": (GeneralizedJSD(beta=1.0), lambda p, q: np_kl(q, p)),
    "skew": (SkewKL(alpha=0.1), lambda p, q: np_kl(p, 0.1 * p + 0.9 * q)),
    "skew_reverse": (SkewReverseKL(alpha=0.3), lambda p, q: np_kl(q, 0.3 * q + 0.7 * p)),
    "top_k": (TopKKL(k=3), lambda p, q: np_top_k_kl(p, q, 3)),
}
by_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pair(rng, scale=2.0):
    return scale * rng.normal(size=(B, T, V)), scale * rng.normal(size=(B, T, V))


def says(array, dtype=torch.float64):
    return Signals(logits=torch.tensor(array, dtype=dtype))


@by_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])
def test_formula(rng, name, dtype, tolerance):
    loss, formula = CASES[name]
    s, t = pair(rng)
    value = loss(says(s, dtype), says(t, dtype), Supervision()).item()
    assert value == pytest.approx(formula(softmax(t), softmax(s)).mean(), rel=tolerance, abs=tolerance)


@by_case
def test_only_counted_tokens_count(rng, name):
    loss, formula = CASES[name]
    s, t = pair(rng)
    value = loss(says(s), says(t), Supervision(mask=torch.tensor(MASK))).item()
    assert value == pytest.approx(formula(softmax(t), softmax(s))[MASK].mean(), abs=1e-6)


@by_case
def test_behaves(rng, name):
    s, t = pair(rng)
    facts = Supervision(mask=torch.tensor(MASK))
    check_loss(CASES[name][0], says(s, torch.float32), says(t, torch.float32), facts, zero_when_equal=True)
    check_loss(CASES[name][0], says(s[:, 0], torch.float32), says(t[:, 0], torch.float32), Supervision())


@by_case
def test_gradient_equals_finite_differences(rng, name):
    s, t = rng.normal(size=(2, 2, 2, 5))
    facts = Supervision(mask=torch.tensor([[True, False], [True, True]]))
    student = torch.tensor(s, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: CASES[name][0](Signals(logits=x), says(t), facts), (student,))


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(rng, name, dtype):
    s, t = pair(rng)
    student = torch.tensor(np.sign(s) * 1e4).to(dtype).requires_grad_()
    value = CASES[name][0](Signals(logits=student), says(np.sign(t) * 1e4, dtype), Supervision())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@by_case
def test_a_vocabulary_padded_with_minus_infinity_changes_nothing(rng, name):
    loss, formula = CASES[name]
    s, t = pair(rng)
    padding = np.full((B, T, 3), -np.inf)
    student = torch.tensor(np.concatenate([s, padding], axis=-1), requires_grad=True)
    value = loss(Signals(logits=student), says(np.concatenate([t, padding], axis=-1)), Supervision())
    value.backward()
    assert value.item() == pytest.approx(formula(softmax(t), softmax(s)).mean(), abs=1e-6)
    assert student.grad.isfinite().all()


@by_case
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_token_that_one_network_rules_out_leaves_value_and_gradient_finite(rng, name, who):
    s, t = pair(rng)
    (s if who == "student" else t)[..., 0] = -np.inf
    student = torch.tensor(s, requires_grad=True)
    value = CASES[name][0](Signals(logits=student), says(t), Supervision())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_mixtures_count_a_token_that_the_student_rules_out(rng):
    s, t = pair(rng)
    s[..., 0] = -np.inf
    p, q = softmax(t), softmax(s)
    expected = np_kl(p, 0.1 * p + 0.9 * q).mean()  # finite: the mixture holds a tenth of the teacher
    assert SkewKL(alpha=0.1)(says(s), says(t), Supervision()).item() == pytest.approx(expected, abs=1e-9)


def test_a_nan_is_not_swallowed():
    logits = torch.zeros(1, 2, V)
    spoiled = logits.clone()
    spoiled[0, 0, 0] = float("nan")
    for loss, _ in CASES.values():
        assert loss(Signals(logits=spoiled), Signals(logits=logits), Supervision()).isnan()


def test_temperature_follows_its_schedule(rng):
    s, t = pair(rng)
    loss = ForwardKL(temperature=Step([2.0, 1.0], [0.5]))
    for progress, temperature in ((0.4, 2.0), (0.5, 1.0)):
        value = loss(says(s), says(t), Supervision(progress=progress)).item()
        assert value == pytest.approx(np_kl(softmax(t / temperature), softmax(s / temperature)).mean(), abs=1e-9)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ForwardKL(temperature=0.0), "temperature"),
        (lambda: GeneralizedJSD(beta=1.1), "beta"),
        (lambda: SkewKL(alpha=0.0), "alpha"),
        (lambda: SkewReverseKL(alpha=1.0), "alpha"),
        (lambda: TopKKL(k=0), "k must"),
    ],
)
def test_values_out_of_range(make, named):
    with pytest.raises(ValueError, match=named):
        make()
