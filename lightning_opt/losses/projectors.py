"""Projectors that give a student's feature its teacher's width; the losses train and checkpoint them."""

from typing import Literal, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.errors import ConfigError

Kind: TypeAlias = Literal["auto", "linear", "conv"]

_CONV = {3: nn.Conv1d, 4: nn.Conv2d}
_NORM = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


def make_projector(student: Tensor, teacher: Tensor, *, kind: Kind = "auto") -> nn.Module:
    """Make the module that gives a student's feature its teacher's width.

    Vectors and tokens get a linear layer, maps a 1x1 convolution and batch norm; equal widths need nothing.

    Args:
        student: Example feature `(B, C)`, `(B, T, D)` or `(B, C, H, W)`.
        teacher: Example feature in the same layout.
        kind: "conv" reads three axes as `(B, C, L)`; "linear" and "auto" as `(B, T, D)`.

    Raises:
        ConfigError: The two layouts differ, or `kind` does not fit them.
    """
    by_conv = _by_conv(student, teacher, kind)
    width, wanted = width_pair(student, teacher, kind)
    if width == wanted:
        return nn.Identity()
    if not by_conv:
        return nn.Linear(width, wanted).to(student.device)
    conv, norm = _CONV[student.dim()], _NORM[student.dim()]
    return nn.Sequential(conv(width, wanted, 1, bias=False), norm(wanted)).to(student.device)


def width_pair(student: Tensor, teacher: Tensor, kind: Kind) -> tuple[int, int]:
    """Return the width, along the axis that projectors change, of a student and a teacher feature."""
    axis = 1 if _by_conv(student, teacher, kind) else -1
    return student.shape[axis], teacher.shape[axis]


def _by_conv(student: Tensor, teacher: Tensor, kind: Kind) -> bool:
    axes = student.dim()
    by_conv = axes == 4 or (axes == 3 and kind == "conv")
    fits = {"auto": 2 <= axes <= 4, "linear": axes in (2, 3), "conv": axes in (3, 4)}
    if axes != teacher.dim() or not fits[kind]:
        raise ConfigError(
            f"layers: a student feature {tuple(student.shape)} cannot be compared with a teacher feature "
            f"{tuple(teacher.shape)} (kind={kind!r}); pair layers of the same layout"
        )
    return by_conv


def equal_sizes(student: Tensor, teacher: Tensor, *, kind: Kind = "auto") -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps to the size of the smaller, axis by axis; tokens must agree already."""
    if not _by_conv(student, teacher, kind):
        if student.shape[1:-1] != teacher.shape[1:-1]:
            raise ConfigError(f"layers: {student.shape[1]} student tokens cannot be compared with {teacher.shape[1]}")
        return student, teacher
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _pool(student, size), _pool(teacher, size)


def _pool(x: Tensor, size: list[int]) -> Tensor:
    if list(x.shape[2:]) == size:
        return x
    if len(size) == 1:
        return functional.adaptive_avg_pool1d(x, size[0])
    return functional.adaptive_avg_pool2d(x, (size[0], size[1]))


def run_in_own_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """Run a projector on a feature that may have another precision than its weights (a bf16 student's)."""
    weight = next(module.parameters(), None)
    return module(x if weight is None else x.to(weight.dtype))
