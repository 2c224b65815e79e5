"""Start a student from layers of its teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.modules.taps import near_names


def every_nth_layer(prefix: str, student_layers: int, teacher_layers: int) -> dict[str, str]:
    """Map each student layer to a teacher layer, evenly spaced from the first.

    Sanh et al. 2019, "DistilBERT", arXiv 1910.01108, section 3, take one layer out of two.

    >>> every_nth_layer("encoder.layer", 3, 12)
    {'encoder.layer.0': 'encoder.layer.0', 'encoder.layer.1': 'encoder.layer.4', 'encoder.layer.2': 'encoder.layer.8'}

    Raises:
        ValueError: The student has no layer, or more than the teacher.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"student_layers={student_layers} must be between 1 and teacher_layers={teacher_layers}")
    return {f"{prefix}.{i}": f"{prefix}.{i * teacher_layers // student_layers}" for i in range(student_layers)}


@torch.no_grad()
def initialise_from_teacher(
    student: nn.Module, teacher: nn.Module, mapping: Mapping[str, str], *, slice: bool = False
) -> list[str]:
    """Copy parameters and buffers of the teacher's submodules into the student's. Nothing is written if anything fails.

    Args:
        student: Is changed in place; keeps its own dtype and device.
        teacher: Is read.
        mapping: Student prefix -> teacher prefix, such as `{"encoder.layer.1": "encoder.layer.4"}`: a module, or one
            tensor. Everything under the student's prefix must exist under the teacher's. `{"": ""}` copies the whole
            model.
        slice: Take the leading rows, columns, ... of a teacher tensor that is larger.

    Returns:
        The student's names of what was copied, in the order of `mapping`.

    Raises:
        ConfigError: A prefix or tensor is missing (the message lists near names), or two shapes do not fit.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    chosen: dict[str, Tensor] = {}
    for target, source in mapping.items():
        _require_prefix(source, theirs, "teacher")
        for name in _require_prefix(target, ours, "student"):
            inner = name[len(target) :].lstrip(".")
            origin = ".".join(part for part in (source, inner) if part)
            if origin not in theirs:
                raise ConfigError(
                    f"{target!r}: {source!r}: the teacher has no tensor {origin!r} for the student's {name!r}; "
                    f"near names: {', '.join(near_names(origin, list(theirs)))}"
                )
            chosen[name] = _fitting(ours[name], theirs[origin], name, origin, slice)
    for name, value in chosen.items():
        ours[name].copy_(value)
    return list(chosen)


def _require_prefix(prefix: str, tensors: Mapping[str, Tensor], whose: str) -> list[str]:
    names = [name for name in tensors if not prefix or name == prefix or name.startswith(f"{prefix}.")]
    if not names:
        modules = {name.rsplit(".", depth)[0] for name in tensors for depth in range(1, name.count(".") + 1)}
        near = near_names(prefix, sorted(modules | set(tensors)))
        raise ConfigError(f"the {whose} has nothing under {prefix!r}; near names: {', '.join(near)}")
    return names


def _fitting(ours: Tensor, theirs: Tensor, name: str, origin: str, leading: bool) -> Tensor:
    if ours.shape == theirs.shape:
        return theirs
    if leading and ours.dim() == theirs.dim() and all(a <= b for a, b in zip(ours.shape, theirs.shape, strict=True)):
        for axis, size in enumerate(ours.shape):
            theirs = theirs.narrow(axis, 0, size)
        return theirs
    hint = "no leading part of it fits" if leading else "choose layers of equal shape, or slice=True"
    raise ConfigError(
        f"the student's {name!r} has shape {tuple(ours.shape)} and the teacher's {origin!r} "
        f"{tuple(theirs.shape)}; {hint}"
    )
