"""Terms, several teachers as one, and the configurations that build losses."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import lightning_opt.losses
from lightning_opt.losses import (
    KD,
    ConfidenceWeights,
    FixedWeights,
    GeneralizedJSD,
    Linear,
    LogitMSE,
    RKDDistance,
    Signals,
    StandardizedKD,
    Supervision,
    Term,
    combine_teachers,
)
from lightning_opt.losses.teachers import (
    binary_cross_entropy,
    mix_probabilities,
    mix_sigmoids,
    mix_values,
    squared_error,
)

CONF = Path(__file__).parents[2] / "conf" / "loss"
B, T, C, K = 5, 4, 3, 3


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def signals_of(arrays, **features):
    return [Signals(logits=torch.tensor(array), features=features) for array in arrays]


class TestTerm:
    @pytest.mark.parametrize(
        ("loss", "name"),
        [
            (KD(), "kd"),
            (LogitMSE(), "logit_mse"),
            (StandardizedKD(), "standardized_kd"),
            (GeneralizedJSD(), "generalized_jsd"),
            (RKDDistance(), "rkd_distance"),
        ],
    )
    def test_name_is_the_class_in_snake_case(self, loss, name):
        assert Term(loss).name == name
        assert Term(loss, name="mine").name == "mine"

    def test_weight_is_apart_from_the_value(self):
        student, teacher = Signals(logits=torch.tensor([[1.0, 0.0]])), Signals(logits=torch.tensor([[0.0, 0.0]]))
        term = Term(LogitMSE(), weight=Linear(1.0, 3.0))
        assert term(student, teacher, Supervision()).item() == 0.5
        assert [term.weight_at(p) for p in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]

    def test_parameters_of_the_loss_belong_to_it(self):
        class Learning(KD):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

        assert list(Term(Learning()).state_dict()) == ["loss.scale"]

    @pytest.mark.parametrize(
        "options", [{"weight": -1.0}, {"weight": Linear(1.0, -0.5)}, {"name": "a/b"}, {"name": ""}]
    )
    def test_refused(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Term(KD(), **options)


class TestWeights:
    def test_even_and_fixed(self, rng):
        teachers = signals_of(rng.normal(size=(K, B, C)))
        assert FixedWeights()(teachers, Supervision()).numpy() == pytest.approx(np.full((K, B), 1 / 3))
        fixed = FixedWeights([2.0, 1.0, 1.0])(teachers, Supervision()).numpy()
        assert fixed == pytest.approx(np.repeat([[0.5], [0.25], [0.25]], B, axis=1))

    def test_confidence_formula(self, rng):
        logits, labels = rng.normal(size=(K, B, C)) * 3, rng.integers(C, size=B)
        losses = -np.log(softmax(logits)[:, np.arange(B), labels])
        expected = (1 - np.exp(losses) / np.exp(losses).sum(axis=0)) / (K - 1)
        found = ConfidenceWeights()(signals_of(logits), Supervision(labels=torch.tensor(labels))).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-9)
        np.testing.assert_allclose(found.sum(axis=0), 1.0)

    def test_confidence_over_the_tokens_that_count(self, rng):
        logits, labels = rng.normal(size=(2, B, T, C)), rng.integers(C, size=(B, T))
        labels[:, 0] = -100
        mask = rng.random((B, T)) < 0.6
        mask[:, 1] = True
        counts = mask & (labels >= 0)
        each = -np.log(np.take_along_axis(softmax(logits), np.maximum(labels, 0)[None, ..., None], -1))[..., 0]
        losses = np.where(counts, each, 0).sum(-1) / counts.sum(-1)
        facts = Supervision(labels=torch.tensor(labels), mask=torch.tensor(mask))
        found = ConfidenceWeights()(signals_of(logits), facts).numpy()
        np.testing.assert_allclose(found, 1 - softmax(losses, axis=0), atol=1e-9)

    @pytest.mark.parametrize("error", [binary_cross_entropy, squared_error])
    def test_confidence_with_other_errors(self, rng, error):
        logits, labels = rng.normal(size=(2, B, C)), (rng.random((B, C)) < 0.5).astype(float)
        if error is binary_cross_entropy:
            losses = -np.log(np.where(labels == 1, sigmoid(logits), sigmoid(-logits))).mean(-1)
        else:
            losses = ((logits - labels) ** 2).mean(-1)
        found = ConfidenceWeights(error=error)(signals_of(logits), Supervision(labels=torch.tensor(labels))).numpy()
        np.testing.assert_allclose(found, 1 - softmax(losses, axis=0), atol=1e-9)

    def test_one_teacher_has_all_the_weight(self, rng):
        facts = Supervision(labels=torch.zeros(B, dtype=torch.long))
        assert ConfidenceWeights()(signals_of(rng.normal(size=(1, B, C))), facts).tolist() == [[1.0] * B]

    @pytest.mark.parametrize("weights", [[-1.0, 2.0], [0.0, 0.0]])
    def test_refused(self, weights):
        with pytest.raises(ValueError, match="weights"):
            FixedWeights(weights)

    def test_one_number_a_teacher(self, rng):
        with pytest.raises(ValueError, match="2 numbers for 3 teachers"):
            FixedWeights([1.0, 1.0])(signals_of(rng.normal(size=(K, B, C))), Supervision())

    def test_confidence_needs_labels(self, rng):
        with pytest.raises(ValueError, match="labels"):
            ConfidenceWeights()(signals_of(rng.normal(size=(K, B, C))), Supervision())


class TestCombine:
    @pytest.mark.parametrize("shape", [(B, C), (B, T, C)])
    def test_probabilities_are_averaged_sample_by_sample(self, rng, shape):
        logits, weights = rng.normal(size=(K, *shape)), softmax(rng.normal(size=(K, B)), axis=0)
        together = combine_teachers(signals_of(logits), torch.tensor(weights), mix=mix_probabilities)
        expected = (softmax(logits) * weights.reshape(K, B, *[1] * (len(shape) - 1))).sum(0)
        np.testing.assert_allclose(together.logits.softmax(dim=-1).numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(together.logits.exp().numpy(), expected, atol=1e-9)

    def test_yes_and_no_are_averaged_label_by_label(self, rng):
        logits, weights = rng.normal(size=(K, B, C)), softmax(rng.normal(size=(K, B)), axis=0)
        together = combine_teachers(signals_of(logits), torch.tensor(weights), mix=mix_sigmoids)
        expected = (sigmoid(logits) * weights[..., None]).sum(0)
        np.testing.assert_allclose(together.logits.sigmoid().numpy(), expected, atol=1e-9)

    @pytest.mark.parametrize("shape", [(B,), (B, C)])
    def test_numbers_are_averaged(self, rng, shape):
        values, weights = rng.normal(size=(K, *shape)), softmax(rng.normal(size=(K, B)), axis=0)
        together = combine_teachers(signals_of(values), torch.tensor(weights), mix=mix_values)
        expected = (values * weights.reshape(K, B, *[1] * (len(shape) - 1))).sum(0)
        np.testing.assert_allclose(together.logits.numpy(), expected, atol=1e-9)

    def test_a_teacher_of_weight_zero_says_nothing(self, rng):
        logits = rng.normal(size=(2, B, C))
        weights = torch.tensor([[1.0] * B, [0.0] * B], dtype=torch.float64)
        together = combine_teachers(signals_of(logits), weights)
        np.testing.assert_allclose(together.logits.exp().numpy(), softmax(logits[0]), atol=1e-9)

    def test_one_teacher_stays_as_it_is(self, rng):
        (only,) = signals_of(rng.normal(size=(1, B, C)), layer=torch.zeros(B))
        assert combine_teachers([only], torch.ones(1, B)) is only

    def test_features_carry_the_teachers_number(self, rng):
        teachers = signals_of(rng.normal(size=(2, B, C)), layer=torch.zeros(B))
        together = combine_teachers(teachers, torch.full((2, B), 0.5))
        assert list(together.features) == ["0.layer", "1.layer"]

    def test_shapes_must_match(self, rng):
        teachers = [*signals_of(rng.normal(size=(1, B, C))), *signals_of(rng.normal(size=(1, B, C + 1)))]
        with pytest.raises(ValueError, match="one shape"):
            combine_teachers(teachers, torch.full((2, B), 0.5))
        with pytest.raises(ValueError, match="weights have shape"):
            combine_teachers(signals_of(rng.normal(size=(2, B, C))), torch.ones(3, B))
        with pytest.raises(ValueError, match="no teacher"):
            combine_teachers([], torch.ones(0, B))


def targets(node):
    """Return every `_target_` in a configuration."""
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    return [target for value in node for target in targets(value)] if isinstance(node, list) else []


# What only changes the batches (`sampling`) compares nothing.
@pytest.mark.parametrize(
    "path", sorted(p for p in CONF.glob("*.yaml") if "terms:" in p.read_text()), ids=lambda p: p.stem
)
class TestConfigurations:
    def test_builds_terms(self, path):
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        config = OmegaConf.create({"seed": 1, "loss": yaml.safe_load(path.read_text())})
        terms = instantiate(config.loss.terms)
        assert all(isinstance(term, Term) for term in terms.values())
        assert terms

    def test_says_what_it_is_and_which_command_uses_it(self, path):
        text = path.read_text()
        assert text.startswith("# ")
        assert f"loss={path.stem}" in text.splitlines()[0]


def test_every_loss_has_a_configuration():
    classes = {
        name
        for name in lightning_opt.losses.__all__
        if isinstance(getattr(lightning_opt.losses, name), type)
        and issubclass(getattr(lightning_opt.losses, name), lightning_opt.losses.DistillationLoss)
    }
    named = {
        target.rsplit(".", 1)[-1]
        for path in CONF.glob("*.yaml")
        for target in targets(yaml.safe_load(path.read_text()))
    }
    assert classes - named == {"DistillationLoss"}
