"""Losses over logits against the published formulas, worked in float64 numpy."""

from itertools import count

import numpy as np
import pytest
import torch

from lightning_opt.losses import (
    DIST,
    DKD,
    KD,
    BoundedRegressionKD,
    Linear,
    LogitMSE,
    MultiLevelKD,
    RegressionKD,
    SigmoidKD,
    Signals,
    StandardizedKD,
    Supervision,
)
from lightning_opt.losses.divergence import standardize
from lightning_opt.losses.logit import dkd, kd
from lightning_opt.testing import check_loss

B, T, C = 6, 4, 7
CALLS = count()


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def np_kd(s, t, temperature):
    p, q = softmax(t / temperature), softmax(s / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(axis=-1)


def np_dkd(s, t, labels, alpha, beta, temperature):
    out = np.zeros(len(s))
    for i, label in enumerate(labels):
        p, q = softmax(t[i] / temperature), softmax(s[i] / temperature)
        b_p, b_q = np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]])
        others = np.arange(len(p)) != label
        hat_p, hat_q = p[others] / (1 - p[label]), q[others] / (1 - q[label])
        tckd, nckd = (b_p * np.log(b_p / b_q)).sum(), (hat_p * np.log(hat_p / hat_q)).sum()
        out[i] = temperature**2 * (alpha * tckd + beta * nckd)
    return out


def np_standardize(z):
    return (z - z.mean(axis=-1, keepdims=True)) / z.std(axis=-1, keepdims=True)


def np_dist(s, t, inter, intra, temperature):
    p, q = softmax(t / temperature), softmax(s / temperature)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (inter * rows + intra * columns)


def np_multi_level(s, t, temperatures, instance, batch, classes):
    total = 0.0
    for temperature in temperatures:
        p, q = softmax(t / temperature), softmax(s / temperature)
        total += instance * np_kd(s, t, temperature).mean()
        total += batch * ((q @ q.T - p @ p.T) ** 2).sum() / len(s)
        total += classes * ((q.T @ q - p.T @ p) ** 2).sum() / s.shape[1]
    return total


def np_sigmoid_kd(s, t, temperature):
    p, q = 1 / (1 + np.exp(-t / temperature)), 1 / (1 + np.exp(-s / temperature))
    return temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(axis=-1)


def centred(z):
    return z - z.mean(axis=-1, keepdims=True)


# (loss, formula over (B, C) arrays and labels)
CASES = {
    "kd": (KD(temperature=3.0), lambda s, t, y: np_kd(s, t, 3.0).mean()),
    "kd_schedule": (KD(temperature=Linear(6.0, 2.0)), lambda s, t, y: np_kd(s, t, 4.0).mean()),
    "kd_standardize": (
        KD(temperature=3.0, standardize=True),
        lambda s, t, y: np_kd(np_standardize(s), np_standardize(t), 3.0).mean(),
    ),
    "standardized": (StandardizedKD(), lambda s, t, y: np_kd(np_standardize(s), np_standardize(t), 2.0).mean()),
    "dkd": (
        DKD(alpha=0.7, beta=5.0, temperature=2.0),
        lambda s, t, y: np_dkd(s, t, y, 0.7, 5.0, 2.0).mean(),
    ),
    "dkd_standardize": (
        DKD(temperature=2.0, standardize=True),
        lambda s, t, y: np_dkd(np_standardize(s), np_standardize(t), y, 1.0, 8.0, 2.0).mean(),
    ),
    "dist": (
        DIST(inter=0.5, intra=2.0, temperature=1.5),
        lambda s, t, y: np_dist(s, t, 0.5, 2.0, 1.5),
    ),
    "multi_level": (
        MultiLevelKD(temperatures=(1.0, 3.0), instance=0.5, batch=2.0, classes=3.0),
        lambda s, t, y: np_multi_level(s, t, (1.0, 3.0), 0.5, 2.0, 3.0),
    ),
    "mse": (LogitMSE(), lambda s, t, y: ((s - t) ** 2).mean()),
    "mse_centred": (LogitMSE(center=True), lambda s, t, y: ((centred(s) - centred(t)) ** 2).mean()),
    "sigmoid": (SigmoidKD(temperature=2.0), lambda s, t, y: np_sigmoid_kd(s, t, 2.0).mean()),
    "regression": (RegressionKD(), lambda s, t, y: ((s - t) ** 2).mean()),
}
by_case = pytest.mark.parametrize("name", CASES)


def arrays(shape=(B, C), seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=shape), scale * rng.normal(size=shape), rng.integers(C, size=shape[:-1])


def says(array, dtype=torch.float64):
    return Signals(logits=torch.tensor(array, dtype=dtype))


def supervision(labels=None, mask=None, progress=0.5):
    return Supervision(
        labels=None if labels is None else torch.tensor(labels),
        mask=None if mask is None else torch.tensor(mask),
        progress=progress,
    )


@by_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])
def test_formula(name, dtype, tolerance):
    loss, formula = CASES[name]
    s, t, y = arrays()
    value = loss(says(s, dtype), says(t, dtype), supervision(y)).item()
    assert value == pytest.approx(formula(s, t, y), rel=tolerance, abs=tolerance)


@by_case
def test_formula_with_a_mask_is_that_of_the_rest(name):
    loss, formula = CASES[name]
    s, t, y = arrays()
    mask = np.array([True, False, True, True, False, True])
    value = loss(says(s), says(t), supervision(y, mask)).item()
    assert value == pytest.approx(formula(s[mask], t[mask], y[mask]), abs=1e-6)


@by_case
def test_tokens_count_one_by_one(name):
    loss, formula = CASES[name]
    s, t, y = arrays((B, T, C))
    mask = np.arange(T) < np.array([[4], [1], [3], [0], [2], [4]])
    value = loss(says(s), says(t), supervision(y, mask)).item()
    assert value == pytest.approx(formula(s[mask], t[mask], y[mask]), abs=1e-6)


@by_case
@pytest.mark.parametrize("shape", [(B, C), (B, T, C)])
def test_behaves(name, shape):
    s, t, y = arrays(shape)
    mask = np.random.default_rng(1).random(shape[:-1]) < 0.6
    check_loss(
        CASES[name][0], says(s, torch.float32), says(t, torch.float32), supervision(y, mask), zero_when_equal=True
    )
    check_loss(CASES[name][0], says(s, torch.float32), says(t, torch.float32), supervision(y))


@by_case
def test_gradient_equals_finite_differences(name):
    s, t, y = arrays((4, 5), scale=1.0)
    y = y % 5
    mask = supervision(y, np.array([True, True, False, True]))
    student = torch.tensor(s, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: CASES[name][0](Signals(logits=x), says(t), mask), (student,))


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(name, dtype):
    s, t, y = arrays()
    student = torch.tensor(np.sign(s) * 1e4, dtype=dtype, requires_grad=True)
    value = CASES[name][0](Signals(logits=student), says(np.sign(t) * 1e4, dtype), supervision(y))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_extreme_logits_have_the_right_value():
    # KL of one-hot against one-hot at a gap of 2e4 is 2e4: nothing may be clamped on the way.
    student, teacher = torch.tensor([[1e4, -1e4, -1e4]]), torch.tensor([[-1e4, 1e4, -1e4]])
    assert kd(student, teacher, temperature=1.0).item() == pytest.approx(2e4)
    # Teacher sure of class 1, student of class 0; the label is 1, so all is in TCKD.
    assert dkd(student, teacher, torch.tensor([1]), temperature=1.0, beta=0.0).item() == pytest.approx(2e4)


@pytest.mark.parametrize("name", ["kd", "kd_standardize", "dkd", "dkd_standardize"])
def test_classes_ruled_out_by_both_count_for_nothing(name):
    loss, formula = CASES[name]
    s, t, y = arrays()
    padding = np.full((B, 2), -np.inf)
    student = torch.tensor(np.concatenate([s, padding], axis=1), requires_grad=True)
    value = loss(Signals(logits=student), says(np.concatenate([t, padding], axis=1)), supervision(y))
    value.backward()
    assert value.item() == pytest.approx(formula(s, t, y), abs=1e-6)
    assert student.grad.isfinite().all()


def test_dkd_with_the_teachers_own_share_is_kd():
    s, t, y = arrays()
    share = 1 - softmax(t / 2.0)[np.arange(B), y]
    parts = [
        dkd(
            torch.tensor(s[i : i + 1]),
            torch.tensor(t[i : i + 1]),
            torch.tensor(y[i : i + 1]),
            beta=share[i],
            temperature=2.0,
        )
        for i in range(B)
    ]
    np.testing.assert_allclose(torch.cat(parts).numpy(), np_kd(s, t, 2.0), atol=1e-9)


@pytest.mark.parametrize(("progress", "grown"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.9, 1.0)])
def test_dkd_warms_up(progress, grown):
    s, t, y = arrays()
    value = DKD(warmup=0.1)(says(s), says(t), supervision(y, progress=progress)).item()
    assert value == pytest.approx(grown * np_dkd(s, t, y, 1.0, 8.0, 4.0).mean(), abs=1e-9)


def test_dkd_leaves_out_tokens_without_a_label():
    s, t, y = arrays((B, T, C))
    y[:, ::2] = -100
    value = DKD(temperature=2.0)(says(s), says(t), supervision(y)).item()
    assert value == pytest.approx(np_dkd(s[y >= 0], t[y >= 0], y[y >= 0], 1.0, 8.0, 2.0).mean(), abs=1e-9)


def test_dkd_with_two_classes_is_all_in_the_target_part():
    s, t, _ = arrays((B, 2))
    y = np.array([0, 1, 1, 0, 0, 1])
    student = torch.tensor(s, requires_grad=True)
    value = DKD(temperature=1.0)(Signals(logits=student), says(t), supervision(y))
    value.backward()
    assert value.item() == pytest.approx(np_kd(s, t, 1.0).mean(), abs=1e-9)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_standardized_logits_are_exact_in_float64(classes):
    """Also where the number of classes has no exact root: a root in float32 would be off by 1e-8."""
    z = np.random.default_rng(0).normal(size=(4, classes))
    np.testing.assert_allclose(standardize(torch.tensor(z)).numpy(), np_standardize(z), rtol=1e-12, atol=1e-13)
    half = torch.tensor(z).bfloat16()
    wide = standardize(half)
    assert wide.dtype == torch.float32
    np.testing.assert_allclose(wide.double().numpy(), np_standardize(half.double().numpy()), rtol=1e-5, atol=1e-6)


def test_standardized_logits_of_equal_classes_have_a_gradient():
    z = torch.zeros(2, 4, requires_grad=True)
    standardize(z)[:, 0].sum().backward()
    assert z.grad.abs().max() < 1e4
    assert z.grad.any()


def test_dist_of_one_sample_or_constant_predictions_is_finite():
    student = torch.zeros(1, 4, requires_grad=True)
    value = DIST()(Signals(logits=student), says(arrays((1, 4))[1], torch.float32), Supervision())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_dist_ignores_scale_and_offset_of_a_sample_that_kd_minds():
    p = softmax(arrays()[0])
    half = (p + 1.0) / (C + 1.0)  # p, shrunk to the uniform distribution: perfectly correlated
    value = DIST(intra=0.0)(says(np.log(half)), says(np.log(p)), Supervision()).item()
    assert value == pytest.approx(0.0, abs=1e-6)
    assert KD(temperature=1.0)(says(np.log(half)), says(np.log(p)), Supervision()).item() > 0.1


class TestRefusals:
    def test_other_classes(self):
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
            KD()(Signals(logits=torch.zeros(2, 3)), Signals(logits=torch.zeros(2, 4)), Supervision())

    def test_a_mask_of_another_shape(self):
        with pytest.raises(ValueError, match="mask"):
            KD()(says(np.zeros((2, 3))), says(np.zeros((2, 3))), Supervision(mask=torch.ones(3, dtype=torch.bool)))

    @pytest.mark.parametrize("loss", [DKD(), BoundedRegressionKD()])
    def test_no_labels(self, loss):
        with pytest.raises(ValueError, match="labels"):
            loss(says(np.zeros((2, 3))), says(np.zeros((2, 3))), Supervision())

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: KD(temperature=0.0), "temperature"),
            (lambda: KD(temperature=Linear(4.0, 0.0)), "temperature"),
            (lambda: KD(temperature=float("nan")), "temperature"),
            (lambda: StandardizedKD(temperature=-1.0), "temperature"),
            (lambda: DKD(alpha=-1.0), "alpha"),
            (lambda: DKD(beta=-1.0), "beta"),
            (lambda: DKD(warmup=1.5), "warmup"),
            (lambda: DIST(inter=-1.0), "inter"),
            (lambda: DIST(intra=-1.0), "intra"),
            (lambda: MultiLevelKD(temperatures=()), "temperatures"),
            (lambda: MultiLevelKD(temperatures=(1.0, -2.0)), "temperatures"),
            (lambda: MultiLevelKD(batch=-1.0), "batch"),
            (lambda: SigmoidKD(temperature=0.0), "temperature"),
            (lambda: BoundedRegressionKD(margin=-0.1), "margin"),
        ],
    )
    def test_values_out_of_range(self, make, says):
        with pytest.raises(ValueError, match=says):
            make()


def test_no_loss_reads_a_mask_on_the_host():
    # On the meta device there are no values to read: anything that waits for one raises.
    s, t, y = (torch.zeros(B, T, C, device="meta"), torch.zeros(B, T, C, device="meta"), torch.zeros(B, T).long())
    facts = Supervision(labels=y.to("meta"), mask=torch.ones(B, T, dtype=torch.bool, device="meta"))
    for loss, _ in CASES.values():
        assert loss(Signals(logits=s), Signals(logits=t), facts).shape == ()


class TestChecker:
    """`check_loss` must catch what it claims to catch."""

    def broken(self, compute):
        class Broken(KD):
            def forward(self, student, teacher, supervision):
                return compute(student, teacher, supervision)

        return Broken()

    @pytest.mark.parametrize(
        ("compute", "says"),
        [
            (lambda s, t, x: s.logits.sum(dim=-1), "not a scalar"),
            (lambda s, t, x: 1.0, "not a tensor"),
            (lambda s, t, x: s.logits.sum() / 0.0, "is -?inf"),
            (lambda s, t, x: s.logits.detach().sum(), "does not require grad"),
            (lambda s, t, x: 0.0 * s.logits.sum() + 1.0, "no gradient"),
            (lambda s, t, x: (s.logits - t.logits).square().mean(), "teacher a gradient"),
            (lambda s, t, x: (s.logits - t.logits.detach()).square().mean(), "masked entries changed"),
            (lambda s, t, x: s.logits.sum() * (1.0 + next(CALLS)), "and then"),
            (lambda s, t, x: s.logits[x.mask].square().sum().sqrt() + 1.0, "mask leaves nothing"),
            (lambda s, t, x: s.logits[x.mask].square().sum(), "where the student says"),
        ],
    )
    def test_a_broken_loss_is_found(self, compute, says):
        s, t, _ = arrays()
        mask = np.array([True, False, True, True, False, True])
        signals = (Signals(logits=torch.tensor(s).float()), Signals(logits=torch.tensor(t).float()))
        with pytest.raises((AssertionError, RuntimeError), match=says):
            check_loss(self.broken(compute), *signals, supervision(mask=mask), zero_when_equal=True)

    def test_a_state_that_is_not_kept_is_found(self):
        class Forgetful(KD):
            def __init__(self):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(()))

            def forward(self, student, teacher, supervision):
                return self.scale * super().forward(student, teacher, supervision)

            def state_dict(self, *args, **kwargs):
                return {}

            def load_state_dict(self, *args, **kwargs):
                return None

        s, t, _ = arrays()
        with pytest.raises(AssertionError, match="round trip"):
            check_loss(Forgetful(), says(s, torch.float32), says(t, torch.float32), Supervision())
