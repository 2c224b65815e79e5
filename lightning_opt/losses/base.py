"""What every distillation loss reads and returns.

A loss never touches a model. It is given what the student and the teacher said about one batch (`Signals`), what the
data says about it (`Supervision`), and returns one scalar.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What one network said about one batch.

    Attributes:
        logits: `(B, C)` for classes, `(B, T, V)` for tokens, `(B,)` or `(B, D)` for regression.
        features: Output of each tapped module by its full name, such as `layer3.1` or `encoder.layer.2`. A pattern that
            matches several modules gives several entries, in the model's own order.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What is known about one batch besides the networks' answers.

    Attributes:
        labels: As the task reads them: `(B,)` classes, `(B, C)` multilabel targets, `(B, T)` tokens, `(B,)` ratings.
        mask: Bool, shape of the logits without the last axis (`(B,)` or `(B, T)`); False positions count for nothing
            in losses over logits. None: everything counts.
        token_mask: Bool `(B, T)`; False marks padding in hidden states. None: everything counts.
        index: `(B,)` int64 position of each sample in the training set, where the data module gives it.
        progress: Fraction of the training that is done, in [0, 1].
    """

    labels: Tensor | None = None
    mask: Tensor | None = None
    token_mask: Tensor | None = None
    index: Tensor | None = None
    progress: float = 0.0


class DistillationLoss(nn.Module):
    """Base of all losses between a student and a teacher.

    Subclasses say what they need, so that nothing is captured that no loss reads:

    Attributes:
        needs: Any of "logits", "features", "labels", "index".
        student_taps: Module-name patterns (`fnmatch`) whose outputs the loss reads from the student.
        teacher_taps: The same for the teacher. "NAME:in" reads a module's first input instead of its output.
        couples_samples: Whether a sample's share depends on the other samples of its batch, so that the loss of a batch
            is no mean of the losses of its parts. A pipeline, which works part by part, refuses such a loss.
        averages_over: What the mean is taken over, so that parts of a batch are weighed as the whole would: "samples",
            "positions" (the True entries of `mask`), "tokens" (those of `token_mask`), "labelled" (positions with a
            class); "auto": tokens where every feature is `(B, T, D)`, samples for other features, positions for logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    couples_samples: ClassVar[bool] = False
    averages_over: ClassVar[Literal["auto", "samples", "positions", "tokens", "labelled"]] = "auto"
    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()

    def build(self, student: Signals, teacher: Signals) -> None:
        """Create the parts whose shapes depend on the networks (projectors, memory banks), from one example batch.

        Called once before training and before weights are restored, under a fixed seed. Calling it again with the same
        shapes must change nothing.
        """

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        """Return the loss of one batch, a scalar.

        Teacher tensors carry no gradient; the gradient must reach the student's tensors (and the loss's own parts).
        """
        raise NotImplementedError  # pragma: no cover - abstract
