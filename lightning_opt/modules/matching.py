"""Look at networks once, before training: do student and teachers answer alike, and how are answers mixed."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, predict
from lightning_opt.losses import Signals, Term
from lightning_opt.losses.teachers import Mix, mix_probabilities, mix_sigmoids, mix_values
from lightning_opt.modules.taps import FeatureTaps
from lightning_opt.modules.teacher import Teacher
from lightning_opt.tasks import Multilabel, Regression, Task


def look(model: nn.Module, patterns: Sequence[str], inputs: Inputs) -> Signals:
    """Look at a network once, in eval mode, and leave it in the mode it was in."""
    was_training = model.training
    model.eval()
    with FeatureTaps(model, patterns) as taps:
        logits = predict(model, inputs)
        features = taps.collect()
    model.train(was_training)
    return Signals(logits=logits, features=features)


def ask_once(teacher: Teacher, patterns: Sequence[str], inputs: Inputs) -> Signals:
    """Ask a teacher once, on the device where the example is."""
    teacher.watch(patterns)
    try:
        return teacher(inputs)
    finally:
        teacher.watch([])


def mix_of(task: Task) -> Mix:
    """Return how the answers of several teachers are averaged for a task."""
    if isinstance(task, Regression):
        return mix_values
    return mix_sigmoids if isinstance(task, Multilabel) else mix_probabilities


def check_match(student: Tensor, teacher: Tensor, name: str) -> None:
    """Refuse a teacher whose logits have another shape than the student's.

    Raises:
        ConfigError: They differ; the message names the teacher and both shapes.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"teacher: {name} answers with shape {tuple(teacher.shape)} and the student with {tuple(student.shape)}; "
            "both need the same classes, labels or vocabulary"
        )


def readers_of_features(terms: Sequence[Term]) -> list[str]:
    """Return the names of the losses that read more of a teacher than its logits, which is all that can be stored."""
    return [term.name for term in terms if "features" in term.loss.needs or term.loss.teacher_taps]
