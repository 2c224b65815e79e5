"""Which layers of two networks go together, and what losses over layers share."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from lightning_opt.errors import ConfigError
from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32
from lightning_opt.losses.reduce import blank


def match_names(names: Iterable[str], pattern: str) -> list[str]:
    """Return the module names that a pattern fits, in the order given.

    `*`, `?` and `[...]` work as in `fnmatch` but stay inside one dot-separated part, so that `encoder.layer.*` means
    the layers and not all that is inside them; `**` stands for any number of parts. The ending ":in" must agree.

    >>> match_names(["layer1.0", "layer1.0.conv", "layer2.0", "layer2.0:in"], "layer*.0")
    ['layer1.0', 'layer2.0']
    >>> match_names(["layer.0.query", "layer.1.query"], "**.query")
    ['layer.0.query', 'layer.1.query']
    """
    stem, _, end = pattern.partition(":")
    parts = stem.split(".")
    split = ((name, name.partition(":")) for name in names)
    return [name for name, (base, _, ending) in split if ending == end and _fits(base.split("."), parts)]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def pair_names(layers: Mapping[str, str], student: Iterable[str], teacher: Iterable[str]) -> list[tuple[str, str]]:
    """Return (student name, teacher name) for each pair of layers that the patterns in `layers` stand for.

    Raises:
        ConfigError: A pattern fits nothing, or the two sides fit different numbers of modules.
    """
    student, teacher = list(student), list(teacher)
    pairs: list[tuple[str, str]] = []
    for ours, theirs in layers.items():
        left, right = match_names(student, ours), match_names(teacher, theirs)
        if not left or len(left) != len(right):
            raise ConfigError(
                f"layers: {ours!r} matches {len(left)} modules of the student {left} and {theirs!r} {len(right)} of "
                f"the teacher {right}; give patterns that match equally many, at least one"
            )
        pairs += zip(left, right, strict=True)
    return pairs


def exact(x: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off: matrix products inside a loss keep the precision of their inputs."""
    # A tensor without data has no autocast to switch off.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def flatten(x: Tensor, mask: Tensor | None) -> Tensor:
    """Turn `(B, ...)` into `(B, D)`; positions of `(B, T, D)` that `mask` `(B, T)` excludes become zero."""
    x = at_least_float32(x)
    return (blank(x, mask) if mask is not None and mask.dim() == x.dim() - 1 else x).reshape(len(x), -1)


class LayerLoss(DistillationLoss):
    """Base of losses between named layers.

    Args:
        layers: Student pattern -> teacher pattern (see `match_names`). A pattern may match several modules; they are
            paired in the models' own order. None: the loss reads the logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})

    def __init__(self, layers: Mapping[str, str] | None) -> None:
        super().__init__()
        if layers is not None and not layers:
            raise ValueError("layers is empty: name at least one pair, such as {'layer3': 'layer3'}")
        self.layers = dict(layers or {})
        self.student_taps = tuple(self.layers)
        self.teacher_taps = tuple(dict.fromkeys(self.layers.values()))
        self._names: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[str, str]]] = {}
        if layers is None:  # what is needed depends on this one choice, so the instance says it
            self.needs = type(self).needs - {"features"} | {"logits"}  # type: ignore[misc]

    def pairs(self, student: Signals, teacher: Signals) -> list[tuple[Tensor, Tensor]]:
        """Return the (student, teacher) tensors that go together; the teacher's carry no gradient."""
        if not self.layers:
            return [(student.logits, teacher.logits.detach())]
        key = (tuple(student.features), tuple(teacher.features))
        if key not in self._names:
            self._names[key] = pair_names(self.layers, *key)
        return [(student.features[ours], teacher.features[theirs].detach()) for ours, theirs in self._names[key]]

    def mask(self, supervision: Supervision) -> Tensor | None:
        """Return the mask that belongs to what this loss reads: of tokens for features, of positions for logits."""
        return supervision.token_mask if self.layers else supervision.mask
