"""A student that learns from teachers and from labels at once."""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt.checkpointing.keys import mix
from lightning_opt.checkpointing.loader import data_ranks
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, map_inputs
from lightning_opt.losses import DistillationLoss, OnPolicy, Signals, Supervision, Term, combine_teachers, value_at
from lightning_opt.losses.schedules import Schedule
from lightning_opt.losses.teachers import FixedWeights, TeacherWeights
from lightning_opt.modules.base import OptimizerFactory, SchedulerFactory, TaskModule
from lightning_opt.modules.context import StepContext, count_of_loss, names_read
from lightning_opt.modules.matching import ask_once, check_match, look, mix_of, readers_of_features
from lightning_opt.modules.taps import FeatureTaps
from lightning_opt.modules.teacher import Teacher
from lightning_opt.modules.teacher_cache import TeacherCache
from lightning_opt.tasks import Example, Task

_BUILD_SEED = 20_251  # projectors start the same on every rank and in every resumed run


class Distillation(TaskModule):
    """Minimise `task_weight * task loss + sum of weight * term`.

    The teachers are held outside the module tree: they are in no checkpoint, no optimizer and no gradient bucket.
    What the losses learn themselves (projectors, memory banks) is trained and checkpointed with the student and is
    absent from its artifact.

    Args:
        student: The network that is trained; `model` is another name for it.
        teacher: One or several teachers, or plain frozen networks.
        task: How to read a batch, the task's own loss and the metrics.
        losses: What to compare; a plain loss counts with weight 1.
        task_weight: Weight of the loss on labels; a number or a schedule over progress.
        optimizer: As in `TaskModule`.
        scheduler: As in `TaskModule`.
        weighting: How several teachers are combined; evenly when not given.
        sampling: Replaces some batches by sequences that the student or the teacher wrote.
        cache: The teachers' answers on the training set; the teachers are then not called while training.

    Raises:
        ValueError: No teacher, or neither a loss nor a task weight.
        ConfigError: A loss asks for what the cache does not hold.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        task: Task,
        losses: Sequence[Term | DistillationLoss],
        task_weight: float | Schedule = 1.0,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        weighting: TeacherWeights | None = None,
        sampling: OnPolicy | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__(student, task=task, optimizer=optimizer, scheduler=scheduler)
        given = [teacher] if isinstance(teacher, Teacher | nn.Module) else list(teacher)
        if not given:
            raise ValueError("teacher is empty; Supervised trains a model alone")
        if not losses:
            raise ValueError("losses is empty: nothing would be learnt from the teacher")
        self.teachers = [one if isinstance(one, Teacher) else Teacher(one) for one in given]
        self.terms = nn.ModuleList(loss if isinstance(loss, Term) else Term(loss) for loss in losses)
        names = ["task", *(term.name for term in self._each_term())]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"losses: the name {repeated[0]!r} is taken twice; give Term(..., name=...) another one")
        self.task_weight = task_weight
        self.weighting = weighting or FixedWeights()
        self.sampling = sampling
        self.cache = cache
        self._student_taps: FeatureTaps | None = None
        self._is_built = False
        if cache is not None and (readers := readers_of_features(self._each_term())):
            raise ConfigError(
                f"loss.terms.{readers[0]} reads the teacher's features and teacher.cache holds only its logits; "
                "set teacher.cache=null or drop this loss"
            )

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.model

    def _each_term(self) -> list[Term]:
        return cast(list[Term], list(self.terms))

    @override
    def setup(self, stage: str) -> None:
        """Give losses the shapes they need, before weights are restored; refuse teachers that do not match."""
        if stage == "fit" and not self._is_built:
            datamodule = getattr(self.trainer, "datamodule", None)
            self.build(self._example(), vocab_size=getattr(datamodule, "vocab_size", None))
            self._is_built = True

    def build(self, example: Example, *, vocab_size: int | None = None) -> None:
        """Run one batch through all networks, check that they match, and let the losses make their parts.

        Args:
            example: A small batch.
            vocab_size: How many tokens the data may hold; None where it has none.

        Raises:
            ConfigError: The teacher's answer has another shape, or it does not know the student's tokens.
        """
        for teacher in self.teachers:
            teacher.check_vocabulary(vocab_size)
        # Neither random state nor batch statistics may move: a resumed run comes through here too.
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(_BUILD_SEED)
            student_signals = look(self.model, self._student_patterns(), example.inputs)
            answers = [
                ask_once(teacher, patterns, example.inputs)
                for teacher, patterns in zip(self.teachers, self._teacher_patterns(), strict=True)
            ]
            for teacher, answer in zip(self.teachers, answers, strict=True):
                check_match(student_signals.logits, answer.logits, teacher.name)
            together = combine_teachers(answers, FixedWeights()(answers, Supervision()), mix=mix_of(self.task))
            for term in self._each_term():
                term.loss.build(student_signals, together)
        self._warn_when_larger()

    def tapped_modules(self) -> list[str]:
        """Return the patterns of the student's modules for whose widths losses have parts of their own.

        Projectors and memory banks fit the widths that they were built for: whoever cuts the student must leave these
        features as wide as they are. Losses without such parts (relations, attention maps) take any width.
        """
        built = [term for term in self._each_term() if type(term.loss).build is not DistillationLoss.build]
        return list(dict.fromkeys(pattern for term in built for pattern in term.loss.student_taps))

    @override
    def on_fit_start(self) -> None:
        if self.cache is None:
            for teacher, patterns in zip(self.teachers, self._teacher_patterns(), strict=True):
                teacher.place(self.trainer.strategy).watch(patterns)
        # A pipeline reads the features itself: each of its ranks runs a part of the student.
        if (patterns := self._student_patterns()) and not getattr(self.trainer.strategy, "reads_features", False):
            self._student_taps = FeatureTaps(self.model, patterns)
            self._student_taps.install()

    @override
    def on_fit_end(self) -> None:
        for teacher in self.teachers:
            teacher.release()
        if self._student_taps is not None:
            self._student_taps.remove()
            self._student_taps = None

    @override
    def context(self, batch: Any, *, ask: bool = True) -> StepContext:
        read = self.task.read(batch)
        example = self._sampled(read)
        supervision = replace(self.supervision_of(example), progress=self.progress)
        # What a student wrote itself must not be taught to it as if it were right.
        labels_are_true = example is read or self.sampling is None or self.sampling.labels_are_true
        return StepContext(
            inputs=example.inputs,
            supervision=supervision,
            teacher=self._ask(example, supervision) if ask else None,
            labels_are_true=labels_are_true,
        )

    @override
    def answer(self, inputs: Inputs) -> Signals:
        logits = self.task.logits(self.model, inputs)
        return Signals(logits=logits, features=self._student_taps.collect() if self._student_taps is not None else {})

    @override
    def loss_terms(
        self, student: Signals, context: StepContext, *, only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return every weighted part of the loss by name; parts of weight zero are not computed."""
        assert context.teacher is not None
        parts = {}
        progress = context.supervision.progress
        task_weight = value_at(self.task_weight, progress)
        if task_weight and context.labels_are_true and (only is None or "task" in only):
            parts["task"] = task_weight * self.task.loss(student.logits, context.labels)
        for term in self._each_term():
            if only is not None and term.name not in only:
                continue
            weight = value_at(term.weight, progress)
            # A part with parameters of its own is always computed: under ddp each of them must get a gradient.
            if weight or any(True for _ in term.parameters()):
                parts[term.name] = weight * term.loss(student, context.teacher, context.supervision)
        return parts if parts or only is not None else {"task": 0.0 * student.logits.sum()}

    @override
    def log_step(self, terms: Mapping[str, Tensor]) -> Tensor:
        total = reduce(torch.add, terms.values())  # cheaper than to stack them: no node more than needed
        self.log_terms({"loss": total, **{f"loss_{name}": value for name, value in terms.items()}})
        return total

    @override
    def readers(self) -> dict[str, Sequence[str] | None]:
        each = ((term.name, term.loss) for term in self._each_term())
        read = {name: None if "logits" in loss.needs else list(loss.student_taps) or None for name, loss in each}
        return {"task": None, **read}

    @override
    def term_modules(self) -> dict[str, nn.Module]:
        return {term.name: term for term in self._each_term()}

    @override
    def term_counts(self, context: StepContext, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        counts = super().term_counts(context, features)
        for term in self._each_term():
            read = {name: features[name] for name in names_read(features, term.loss.student_taps)}
            counts[term.name] = count_of_loss(term.loss, context.supervision, read)
        return counts

    def _ask(self, example: Example, supervision: Supervision) -> Signals:
        if self.cache is not None:
            if example.index is None:
                raise ConfigError("teacher.cache needs the batch's 'index'; the data module gives none")
            return Signals(logits=self.cache.read(example.index, epoch=self.current_epoch).to(self.device))
        answers = [teacher(example.inputs) for teacher in self.teachers]
        if len(answers) == 1:
            return answers[0]
        return combine_teachers(answers, self.weighting(answers, supervision), mix=mix_of(self.task))

    def _sampled(self, example: Example) -> Example:
        if self.sampling is None:
            return example
        if isinstance(example.inputs, tuple):
            raise ConfigError("loss.sampling writes sequences of tokens; the data gives several tensors per sample")
        was_training = self.model.training
        self.model.eval()
        inputs, labels = self.sampling.mix(
            example.inputs,
            self.labels_of(example),
            lambda ids: self.task.logits(self.model, ids),
            lambda ids: self.teachers[0](ids).logits,
            step=self.global_step,
            # A resumed run writes the same samples.
            seed=mix(int(os.environ.get("PL_GLOBAL_SEED", "0")), 0),
            rank=data_ranks(self.trainer)[0],  # processes that share a batch write the same
        )
        self.model.train(was_training)
        if inputs is example.inputs:
            return example
        # The samples' own mask: they may be of another length than what they replace.
        return replace(self.task.read({**_named(inputs), "labels": labels}), inputs=inputs, index=example.index)

    def _student_patterns(self) -> list[str]:
        return list(dict.fromkeys(pattern for term in self._each_term() for pattern in term.loss.student_taps))

    def _teacher_patterns(self) -> list[list[str]]:
        """Return each teacher's tap patterns; of several teachers, "1.layer3" means the second one's `layer3`."""
        wanted = list(dict.fromkeys(pattern for term in self._each_term() for pattern in term.loss.teacher_taps))
        if len(self.teachers) == 1:
            return [wanted]
        numbers = range(len(self.teachers))
        return [[name.removeprefix(f"{n}.") for name in wanted if name.startswith(f"{n}.")] for n in numbers]

    def _example(self) -> Example:
        """Return a small batch without moving any random state or loader."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and hasattr(datamodule, "example_inputs"):
            inputs = datamodule.example_inputs(2)
        else:
            with torch.random.fork_rng():
                batches = self.trainer.fit_loop._data_source.dataloader()
                inputs = self.task.read(next(iter(batches))).inputs
        return Example(inputs=map_inputs(inputs, lambda value: value.to(self.device)))

    def _warn_when_larger(self) -> None:
        student = sum(p.numel() for p in self.model.parameters())
        teacher = sum(p.numel() for one in self.teachers for p in one.model.parameters())
        if student > teacher:
            warnings.warn(
                f"the student ({student:,} parameters) is larger than its teacher ({teacher:,})", stacklevel=2
            )


def _named(inputs: Inputs) -> dict[str, Tensor]:
    return dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}  # type: ignore[dict-item]
