"""What a training step needs beside the network's answer, as data that can be cut along the batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, map_inputs
from lightning_opt.losses import DistillationLoss, Signals, Supervision
from lightning_opt.losses.layers import match_names

Cut = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Everything that a training step compares the network's answer with.

    Attributes:
        inputs: What the network is called with.
        supervision: What the data says; `labels` are always there.
        teacher: What the teacher said about the inputs; None without one.
        labels_are_true: Whether the labels may be taught: False where the network wrote them itself.
    """

    inputs: Inputs
    supervision: Supervision
    teacher: Signals | None = None
    labels_are_true: bool = True

    @property
    def labels(self) -> Tensor:
        """Labels of the batch."""
        assert self.supervision.labels is not None
        return self.supervision.labels

    def rows(self, rows: slice) -> "StepContext":
        """Return the same for some samples of the batch."""

        def cut(value: Tensor) -> Tensor:
            return value[rows] if value.dim() else value

        return replace(
            self,
            inputs=map_inputs(self.inputs, lambda value: cut(value) if isinstance(value, Tensor) else value),
            supervision=_cut_supervision(self.supervision, cut),
            teacher=None if self.teacher is None else _cut_signals(self.teacher, cut),
        )


def _cut_supervision(supervision: Supervision, cut: Cut) -> Supervision:
    names = ("labels", "mask", "token_mask", "index")
    parts = {name: getattr(supervision, name) for name in names}
    cuts: dict[str, Any] = {name: None if part is None else cut(part) for name, part in parts.items()}
    return replace(supervision, **cuts)


def _cut_signals(signals: Signals, cut: Cut) -> Signals:
    return Signals(
        logits=cut(signals.logits), features={name: cut(feature) for name, feature in signals.features.items()}
    )


def count_of(supervision: Supervision, mask: Tensor | None) -> Tensor:
    """Return over how many things a mean is taken: what a mask lets through, or samples where there is none."""
    assert supervision.labels is not None
    if mask is None:
        return torch.tensor(float(len(supervision.labels)), device=supervision.labels.device)
    return mask.sum().float()


def count_of_loss(loss: DistillationLoss, supervision: Supervision, features: Mapping[str, Tensor]) -> Tensor:
    """Return over how many things a loss takes its mean, as its `averages_over` says.

    Args:
        loss: Any loss that does not couple samples.
        supervision: Of the batch, or of a part of it.
        features: What the loss reads from the student; empty for logits.
    """
    over: str = loss.averages_over
    if over == "auto":
        over = _kind_of(loss, supervision, features)
    masks = {"samples": None, "tokens": supervision.token_mask, "positions": supervision.mask}
    if over == "labelled":
        assert supervision.labels is not None
        has_class = supervision.labels >= 0
        return count_of(supervision, has_class if supervision.mask is None else has_class & supervision.mask)
    return count_of(supervision, masks[over])


def names_read(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that any of a loss's patterns fits, in the order given."""
    names = list(names)
    fitting = {name for pattern in patterns for name in match_names(names, pattern)}
    return [name for name in names if name in fitting]


def _kind_of(loss: DistillationLoss, supervision: Supervision, features: Mapping[str, Tensor]) -> str:
    if not features:
        return "positions"
    are_tokens = {feature.dim() == 3 for feature in features.values()}
    if len(are_tokens) > 1 and supervision.token_mask is not None:
        raise ConfigError(
            f"loss.terms: {type(loss).__name__} reads tokens from some layers and whole samples from others "
            f"({', '.join(features)}), which count differently in parts of a batch; make two losses of it"
        )
    return "tokens" if are_tokens == {True} else "samples"


def cut_evenly(context: StepContext, parts: int) -> Sequence[StepContext]:
    """Cut a batch into equal parts.

    A part in which no position counts gets labels that a loss can look at: its loss is finite, and counts for nothing.

    Raises:
        ValueError: The batch is not divisible.
    """
    size = len(context.labels)
    if size % parts:
        raise ValueError(f"a batch of {size} cannot be cut into {parts} equal parts")
    width = size // parts
    pieces = [context.rows(slice(start, start + width)) for start in range(0, size, width)]
    return [_with_finite_loss(piece) for piece in pieces]


def _with_finite_loss(piece: StepContext) -> StepContext:
    mask, labels = piece.supervision.mask, piece.labels
    if mask is None or labels.is_floating_point():
        return piece
    seen = torch.where(mask.any(), labels, labels.clamp(min=0))
    return replace(piece, supervision=replace(piece.supervision, labels=seen))
