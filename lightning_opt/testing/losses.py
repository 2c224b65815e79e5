"""A checker for distillation losses: what training, masking and checkpoints here expect of one."""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision


def check_loss(
    loss: DistillationLoss,
    student: Signals,
    teacher: Signals,
    supervision: Supervision,
    *,
    zero_when_equal: bool = False,
    tolerance: float = 1e-5,
) -> None:
    """Assert that a loss behaves as every loss here must, on one batch of yours.

    It returns a finite scalar; its gradient reaches the student and its own parameters and never the teacher; it leaves
    what it is given as it was; it stays finite under bfloat16 autocast; what is masked changes nothing; the same call
    gives the same value; and it survives a copy and a round trip through its state dict. `loss` itself is left as it
    was: everything runs on copies.

    Args:
        loss: What is checked; it is built from the batch first.
        student: What the student said, float32 or float64.
        teacher: What the teacher said.
        supervision: Give masks with some False entries to have masking checked.
        zero_when_equal: Also assert that the loss is 0, and never negative, where the student says what the teacher
            says. Only for losses over logits.
        tolerance: How far from 0, or from the value before masked entries changed, counts as equal.

    Raises:
        AssertionError: What is wrong, in one sentence.

    >>> from lightning_opt.losses import KD
    >>> says = [Signals(logits=torch.randn(8, 5)) for _ in range(2)]
    >>> check_loss(KD(), *says, Supervision(), zero_when_equal=True)
    """
    built = copy.deepcopy(loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built.build(student, teacher)
    given = [tensor.clone() for tensor in (*_tensors(student), *_tensors(teacher))]
    value = _check_value(built, student, teacher, supervision)
    kept = map(torch.equal, given, (*_tensors(student), *_tensors(teacher)))
    assert all(kept), f"{_name(loss)} changes the tensors that it is given"
    _check_gradients(built, student, teacher, supervision)
    _check_bfloat16(built, student, teacher, supervision)
    _check_masks(built, student, teacher, supervision, value, tolerance)
    _check_copies(built, student, teacher, supervision, value)
    if zero_when_equal:
        assert value.item() >= -tolerance, f"{_name(loss)} is negative: {value.item()}"
        equal = _call(built, teacher, teacher, supervision).item()
        assert abs(equal) <= tolerance, f"{_name(loss)} is {equal} where the student says what the teacher says"


def _check_value(loss: DistillationLoss, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
    for progress in (0.0, 1.0):
        value = _call(loss, student, teacher, replace(supervision, progress=progress))
        assert isinstance(value, Tensor), f"{_name(loss)} returned {type(value).__name__}, not a tensor"
        assert value.shape == (), f"{_name(loss)} returned shape {tuple(value.shape)}, not a scalar"
        assert math.isfinite(value.item()), f"{_name(loss)} is {value.item()} at progress {progress}"
    value = _call(loss, student, teacher, supervision)
    again = _call(loss, student, teacher, supervision)
    assert torch.equal(value, again), f"{_name(loss)} is {value.item()} and then {again.item()} on the same batch"
    return value.detach()


def _check_gradients(loss: DistillationLoss, student: Signals, teacher: Signals, supervision: Supervision) -> None:
    student, teacher = _leaves(student), _leaves(teacher)
    used = copy.deepcopy(loss)
    _call(used, student, teacher, supervision, on_copy=False).backward()
    grads = [tensor.grad for tensor in _tensors(student) if tensor.grad is not None]
    assert any(bool(grad.any()) for grad in grads), f"{_name(loss)} gives the student no gradient"
    assert all(bool(grad.isfinite().all()) for grad in grads), (
        f"{_name(loss)} gives the student a gradient of NaN or Inf"
    )
    reached = [tensor for tensor in _tensors(teacher) if tensor.grad is not None and bool(tensor.grad.any())]
    assert not reached, f"{_name(loss)} gives the teacher a gradient; detach its tensors"
    # Data-parallel training waits for the gradient of every parameter.
    idle = [name for name, parameter in used.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle, f"{_name(loss)} gives its own parameter {idle[0]} no gradient"


def _check_bfloat16(loss: DistillationLoss, student: Signals, teacher: Signals, supervision: Supervision) -> None:
    student, teacher = _leaves(student, torch.bfloat16), _leaves(teacher, torch.bfloat16)
    with torch.autocast(student.logits.device.type, torch.bfloat16):
        value = _call(loss, student, teacher, supervision)
    assert math.isfinite(value.item()), f"{_name(loss)} is {value.item()} in bfloat16"
    value.backward()
    grads = [tensor.grad for tensor in _tensors(student) if tensor.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads), f"{_name(loss)} has a gradient of NaN or Inf in bfloat16"


def _check_masks(
    loss: DistillationLoss,
    student: Signals,
    teacher: Signals,
    supervision: Supervision,
    value: Tensor,
    tolerance: float,
) -> None:
    spoiled, spoiled_teacher = (_leaves(_spoil(signals, supervision)) for signals in (student, teacher))
    changed = _call(loss, spoiled, spoiled_teacher, supervision)
    gap = abs(changed.item() - value.item())
    # Written so that a NaN fails too.
    assert gap <= tolerance, f"{_name(loss)} went from {value.item()} to {changed.item()} when masked entries changed"
    changed.backward()
    grads = [tensor.grad for tensor in _tensors(spoiled) if tensor.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads), f"{_name(loss)} lets a masked NaN into the gradient"
    if supervision.mask is not None and "logits" in loss.needs:
        nothing = replace(supervision, mask=torch.zeros_like(supervision.mask))
        alone = _call(loss, student, teacher, nothing).item()
        assert alone == 0.0, f"{_name(loss)} is {alone} where the mask leaves nothing"


def _check_copies(
    loss: DistillationLoss, student: Signals, teacher: Signals, supervision: Supervision, value: Tensor
) -> None:
    state = copy.deepcopy(loss.state_dict())
    other = copy.deepcopy(loss)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(state)
    restored = _call(other, student, teacher, supervision)
    assert torch.equal(restored, value), (
        f"{_name(loss)} is {restored.item()} after a copy and a state dict round trip, {value.item()} before"
    )


def _call(
    loss: DistillationLoss, student: Signals, teacher: Signals, supervision: Supervision, *, on_copy: bool = True
) -> Tensor:
    """Call a copy, so that a loss with a memory starts each time from the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value: Tensor = (copy.deepcopy(loss) if on_copy else loss)(student, teacher, supervision)
    return value


def _leaves(signals: Signals, dtype: torch.dtype | None = None) -> Signals:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_() if tensor.is_floating_point() else tensor

    return Signals(logits=leaf(signals.logits), features={name: leaf(x) for name, x in signals.features.items()})


def _tensors(signals: Signals) -> list[Tensor]:
    return [signals.logits, *signals.features.values()]


def _spoil(signals: Signals, supervision: Supervision) -> Signals:
    """Put NaN into logits and features wherever the masks say that nothing counts."""

    def spoil(tensor: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or tensor.shape[: mask.ndim] != mask.shape or not tensor.is_floating_point():
            return tensor
        return tensor.masked_fill(~mask.reshape(*mask.shape, *[1] * (tensor.ndim - mask.ndim)), torch.nan)

    features = {name: spoil(x, supervision.token_mask) if x.ndim == 3 else x for name, x in signals.features.items()}
    return Signals(logits=spoil(signals.logits, supervision.mask), features=features)


def _name(loss: DistillationLoss) -> str:
    return type(loss).__name__
