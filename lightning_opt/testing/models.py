"""A checker for models: what training, compression and export here expect of one."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from lightning_opt.forward import Inputs, batch_size_of, map_inputs, predict


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """What `check_model` found out beyond its assertions.

    Attributes:
        outputs_shape: Shape of the logits for the inputs given.
        exportable: Whether torch.export traces the model with a dynamic batch and the program answers alike. Needed
            for structured pruning and for the exported formats.
        export_error: Why not, in one line; None where it works.
    """

    outputs_shape: tuple[int, ...]
    exportable: bool
    export_error: str | None


def check_model(
    model: nn.Module, inputs: Inputs, num_outputs: int, *, rtol: float = 1e-3, atol: float = 1e-4, export: bool = True
) -> ModelCheck:
    """Check that a model can be trained, copied, saved, run in any batch and, where possible, exported.

    The model is left as it came, but for being on its way through one training step's forward and backward: weights,
    buffers and mode are untouched, since a copy is used.

    Args:
        model: The model; it may answer with logits or with an object that holds them.
        inputs: Two samples or more: a tensor, positional tensors or keyword tensors.
        num_outputs: What the last axis of the logits must be.
        rtol: Relative tolerance where the same numbers come by another way.
        atol: Absolute tolerance there.
        export: Also try torch.export, which takes seconds for large models.

    Returns:
        Shape of the answer, and whether torch.export works.

    Raises:
        AssertionError: The model lacks one of these properties; the message says which.
        ValueError: `inputs` hold fewer than two samples.
    """
    if batch_size_of(inputs) < 2:
        raise ValueError(f"inputs must hold at least 2 samples, got {batch_size_of(inputs)}")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = _check_copy(model)
    with torch.random.fork_rng(devices=[]):
        _check_gradients(model, inputs, num_outputs)
    model.load_state_dict(before)
    model.eval()
    with torch.no_grad():
        logits = predict(model, inputs)
        _check_eval(model, inputs, logits, rtol=rtol, atol=atol)
        _check_round_trip(model, inputs, logits)
        error = _export_error(model, inputs, rtol=rtol, atol=atol) if export else "not tried"
    return ModelCheck(outputs_shape=tuple(logits.shape), exportable=error is None, export_error=error)


def _check_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise AssertionError(f"copy.deepcopy of the model fails: {error}") from error


def _check_gradients(model: nn.Module, inputs: Inputs, num_outputs: int) -> None:
    model.train()
    logits = predict(model, inputs)
    shape = tuple(logits.shape)
    assert len(shape) >= 2, f"logits must be (B, ..., {num_outputs}), got {shape}"
    assert (shape[0], shape[-1]) == (batch_size_of(inputs), num_outputs), (
        f"logits must be ({batch_size_of(inputs)}, ..., {num_outputs}), got {shape}"
    )
    assert torch.isfinite(logits).all(), "logits in train mode hold NaN or infinite values"
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trainable, "the model has no trainable parameter"
    model.zero_grad()
    (logits.float() * torch.randn(shape, device=logits.device)).sum().backward()
    lost = [name for name, value in trainable.items() if value.grad is None]
    assert not lost, f"no gradient reaches {len(lost)} trainable parameters, first {lost[0]}"
    wrong = [n for n, value in trainable.items() if value.grad is not None and not torch.isfinite(value.grad).all()]
    assert not wrong, f"the gradient of {wrong[0]} holds NaN or infinite values"
    model.zero_grad()


def _check_eval(model: nn.Module, inputs: Inputs, logits: Tensor, *, rtol: float, atol: float) -> None:
    assert torch.isfinite(logits).all(), "logits in eval mode hold NaN or infinite values"
    assert torch.equal(predict(model, inputs), logits), "two calls in eval mode give different logits"
    for i in (0, batch_size_of(inputs) - 1):
        alone = predict(model, map_inputs(inputs, partial(_rows, start=i, stop=i + 1)))
        torch.testing.assert_close(
            alone[0],
            logits[i],
            rtol=rtol,
            atol=atol,
            msg=f"sample {i} gets other logits alone than in its batch of {len(logits)}",
        )


def _rows(value: Tensor, *, start: int, stop: int) -> Tensor:
    return value[start:stop]


def _check_round_trip(model: nn.Module, inputs: Inputs, logits: Tensor) -> None:
    other = copy.deepcopy(model)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_model(model, str(file))  # keeps shared tensors once
        for value in other.state_dict().values():
            value.zero_()
        missing, unexpected = load_model(other, str(file), strict=False)
    assert not missing, f"the saved state lacks {sorted(missing)[0]}"
    assert not unexpected, f"the saved state has the unknown {sorted(unexpected)[0]}"
    assert torch.equal(predict(other, inputs), logits), "a model loaded from the saved state gives other logits"


class _Positional(nn.Module):
    """Give any model, whatever the form of its inputs and of its answer, the one form that torch.export knows best."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(inputs) if isinstance(inputs, Mapping) else None

    def forward(self, *tensors: Tensor) -> Tensor:
        return predict(self.model, tensors if self.names is None else dict(zip(self.names, tensors, strict=True)))


def _export_error(model: nn.Module, inputs: Inputs, *, rtol: float, atol: float) -> str | None:
    batch = torch.export.Dim("batch", min=2)
    wrapped, tensors = _Positional(model, inputs), _tensors(inputs)
    larger = tuple(torch.cat([value, value[:1]]) for value in tensors)
    try:
        shapes = {"tensors": tuple({0: batch} for _ in tensors)}
        program = torch.export.export(wrapped, tensors, dynamic_shapes=shapes, strict=False).module()
        torch.testing.assert_close(program(*larger), wrapped(*larger), rtol=rtol, atol=atol)
    except Exception as error:
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    return None


def _tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, Mapping) else tuple(inputs)
