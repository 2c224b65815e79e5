"""The checker passes a sound model and names each fault of an unsound one."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_opt.testing.models import check_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x))


class Unused(Sound):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Random(Sound):
    def forward(self, x):
        return functional.dropout(super().forward(x), training=True)


class OverTheBatch(Sound):
    def forward(self, x):
        return self.linear(x) - self.linear(x).mean(0)


class Hidden(Sound):
    """Its answer hangs on a number that the saved state does not hold."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(2), persistent=False)

    def __deepcopy__(self, memo):
        other = Hidden()
        other.load_state_dict(self.state_dict())
        return other

    def forward(self, x):
        return super().forward(x) * self.scale


class Uncopiable(Sound):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


class DataDependent(Sound):
    def forward(self, x):
        return super().forward(x) if x[0, 0].item() > 100 else super().forward(x) * 2


class Infinite(Sound):
    def forward(self, x):
        return super().forward(x) / 0.0


class Object(Sound):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Pair(Sound):
    def forward(self, a, b):
        return super().forward(a + b)


def test_a_sound_model_passes_and_is_left_as_it_was():
    model = Sound().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = check_model(model, X, 2)
    assert report.outputs_shape == (3, 2)
    assert report.exportable
    assert report.export_error is None
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("model", "inputs"), [(Object(), X), (Object(), {"x": X}), (Pair(), (X, X)), (Pair(), {"a": X, "b": X})]
)
def test_inputs_and_answers_of_each_form_are_exported(model, inputs):
    assert check_model(model, inputs, 2).export_error is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Unused(), "no gradient reaches 2 trainable parameters, first spare.weight"),
        (Random(), "two calls in eval mode give different logits"),
        (OverTheBatch(), "no gradient reaches 2 trainable parameters"),
        (Hidden(), "a model loaded from the saved state gives other logits"),
        (Uncopiable(), "copy.deepcopy of the model fails: no copies"),
        (Infinite(), "NaN or infinite"),
        (nn.Linear(4, 5), r"logits must be \(3, ..., 2\), got \(3, 5\)"),
        (nn.Linear(4, 2).requires_grad_(False), "no trainable parameter"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_fault_is_named(model, words):
    with pytest.raises(AssertionError, match=words):
        check_model(model, X, 2)


def test_an_answer_that_hangs_on_the_rest_of_the_batch_is_named():
    class Mixed(Sound):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0) * 0.5

    with pytest.raises(AssertionError, match="sample 0 gets other logits alone than in its batch of 3"):
        check_model(Mixed(), X, 2)


def test_a_model_that_cannot_be_exported_passes_with_the_reason():
    report = check_model(DataDependent(), X, 2)
    assert not report.exportable
    assert report.export_error
    assert check_model(DataDependent(), X, 2, export=False).export_error == "not tried"


def test_one_sample_is_too_few():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        check_model(Sound(), X[:1], 2)
