"""Run training steps and evaluations of a network whose stages lie on several processes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, batch_size_of, logits_of, map_inputs
from lightning_opt.modules import TaskModule
from lightning_opt.modules.context import StepContext, cut_evenly
from lightning_opt.strategies.pipeline.bubble import Clock, Operation, order_of
from lightning_opt.strategies.pipeline.schedules import make_schedule, micro_batches_for
from lightning_opt.strategies.pipeline.stages import Stage
from lightning_opt.strategies.pipeline.work import Shares, StageWork

_SCHEDULES_KEPT = 8  # each keeps buffers for what it receives


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands in a pipeline.

    Attributes:
        group: Its processes.
        process: Number of this one among them.
        owners: Process of each stage.
        device: Of this process.
    """

    group: dist.ProcessGroup
    process: int
    owners: Sequence[int]
    device: torch.device

    def mine(self) -> list[int]:
        """Return the numbers of this process's stages."""
        return [stage for stage, owner in enumerate(self.owners) if owner == self.process]

    def rank_of(self, stage: int) -> int:
        """Return the global rank of the process that has a stage."""
        return dist.get_global_rank(self.group, self.owners[stage])


@dataclass
class Engine:
    """Drives the stages of this process in step with those of the others.

    Attributes:
        module: Whose network it is.
        stages: All stages.
        place: Where this process stands.
        schedule: Name of the schedule.
        micro_batches: Into how many parts a batch is cut, where it can be cut so.
        precision: Makes the context in which forward passes run.
        clock: Notes times while it is on.
        order: What each process did in the last step.
    """

    module: TaskModule
    stages: Sequence[Stage]
    place: Place
    schedule: str
    micro_batches: int
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    clock: Clock = field(default_factory=Clock)
    order: dict[int, list[Operation]] = field(default_factory=dict)
    _schedules: dict[Any, Any] = field(default_factory=dict)
    _metas: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shares = Shares(self.module, self.stages)
        self.works = [
            StageWork(self.stages[n], self.shares, self.module, precision=self.precision) for n in self.place.mine()
        ]
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def close(self) -> None:
        """Leave the network as it was, but for the tensors that this process does not have."""
        for work in self.works:
            work.remove()
        self.stages[0].network.release()
        vars(self.module.model).pop("forward", None)
        self._schedules.clear()

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss is computed on this process."""
        return any(work.terms for work in self.works)

    def train(self, context: StepContext) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Run forward and backward of a whole batch.

        Returns:
            The parts of the loss by name, alike on all processes, and the gradient of each of this process's
            parameters. What the parameters' own `grad` held is left alone.
        """
        parts = micro_batches_for(len(context.labels), self.micro_batches)
        pieces = cut_evenly(context, parts)
        for work in self.works:
            work.begin(context, pieces)
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        numbers = torch.arange(parts)
        schedule = self._schedule(context, parts)
        try:
            with self.clock.step():
                schedule.step(index=numbers, target=numbers, return_outputs=False)
            gradients = [parameter.grad for parameter in self.parameters]
        finally:
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
        return self._values(context), gradients

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> Tensor:
        """Return the network's answer to a batch on every process; every process must ask."""
        size = batch_size_of(inputs)
        width = size // micro_batches_for(size, self.micro_batches)
        pieces = [_rows(inputs, slice(at, at + width)) for at in range(0, size, width)]
        key = ("answer", _shapes(pieces[0]), len(pieces))
        known = self._metas.setdefault(key, {})
        handed: dict[tuple[int, int], Tensor] = {}  # between stages of this process
        answers: list[Tensor] = []
        sending = []
        for stage in (self.stages[n] for n in self.place.mine()):
            for number, piece in enumerate(pieces):
                received = self._receive(stage, number, handed, known)
                with self.precision():
                    said = stage(received, piece)
                if stage.is_last:
                    answers.append(logits_of(said).contiguous())
                else:
                    sending += self._send(stage, number, said, handed, known)
        for work, _ in sending:
            work.wait()
        return self._to_all(torch.cat(answers) if answers else None, known)

    def _schedule(self, context: StepContext, parts: int) -> Any:
        key = (_shapes(context.inputs), parts, _modes(self.module))
        if key not in self._schedules:
            if len(self._schedules) >= _SCHEDULES_KEPT:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = make_schedule(
                self.schedule,
                self.works,
                stages=len(self.stages),
                micro_batches=parts,
                device=self.place.device,
                group=self.place.group,
                clock=self.clock,
            )
        self.order = order_of(self._schedules[key])
        return self._schedules[key]

    def _values(self, context: StepContext) -> dict[str, Tensor]:
        """Return the parts of the step's loss, which each are known to one process only.

        Raises:
            ConfigError: The processes were given different batches.
        """
        mine: dict[str, Tensor] = {}
        for work in self.works:
            mine |= work.values
        names = self.shares.names
        zero = torch.zeros((), dtype=torch.float64, device=self.place.device)
        known = [torch.full_like(zero, float(name in mine)) for name in names]
        labels = context.labels.double().sum()
        values = torch.stack([*(mine.get(name, zero).double() for name in names), *known, labels, labels.square()])
        dist.all_reduce(values, group=self.place.group)
        numbers, there, sums = values.float()[: len(names)], values[len(names) : -2].tolist(), values[-2:].tolist()
        count = dist.get_world_size(self.place.group)
        if sums[1] * count > sums[0] ** 2 * (1.0 + 1e-12) + 1e-12:  # equal numbers alone make the variance zero
            raise ConfigError(
                "strategy=pipeline: the processes of one pipeline were given different batches; loaders must share "
                "samples out by strategy.distributed_sampler_kwargs, not by rank and world size"
            )
        found = {name: numbers[n] for n, name in enumerate(names) if there[n]}
        return found or {"task": zero.float()}

    def _receive(self, stage: Stage, number: int, handed: dict[tuple[int, int], Tensor], known: Any) -> Tensor | None:
        if stage.number == 0:
            return None
        if (stage.number, number) in handed:
            return handed.pop((stage.number, number))
        source = self.place.rank_of(stage.number - 1)
        if stage.number not in known:
            meta: list[Any] = [None]
            dist.recv_object_list(meta, src=source, group=self.place.group, device=self.place.device)
            known[stage.number] = meta[0]
        shape, dtype = known[stage.number]
        received = torch.empty(shape, dtype=dtype, device=self.place.device)
        dist.recv(received, src=source, group=self.place.group)
        return received

    def _send(
        self, stage: Stage, number: int, said: Tensor, handed: dict[tuple[int, int], Tensor], known: Any
    ) -> list[tuple[Any, Tensor]]:
        after = stage.number + 1
        if self.place.owners[after] == self.place.process:
            handed[after, number] = said
            return []
        target = self.place.rank_of(after)
        if after not in known:
            known[after] = (tuple(said.shape), said.dtype)
            dist.send_object_list([known[after]], dst=target, group=self.place.group, device=self.place.device)
        said = said.contiguous()
        return [(dist.isend(said, dst=target, group=self.place.group), said)]

    def _to_all(self, answer: Tensor | None, known: Any) -> Tensor:
        source = self.place.rank_of(len(self.stages) - 1)
        if "answer" not in known:
            meta: list[Any] = [None if answer is None else (tuple(answer.shape), answer.dtype)]
            dist.broadcast_object_list(meta, src=source, group=self.place.group, device=self.place.device)
            known["answer"] = meta[0]
        if answer is None:
            shape, dtype = known["answer"]
            answer = torch.empty(shape, dtype=dtype, device=self.place.device)
        dist.broadcast(answer, src=source, group=self.place.group)
        return answer


def asked_in_training() -> ConfigError:
    """Return what to raise when the network is called with gradients outside a step of the pipeline."""
    return ConfigError(
        "strategy=pipeline: the network was called with gradients outside `answer`; a pipeline trains modules whose "
        "training step is `context`, `answer`, `loss_terms` and `log_step` (see lightning_opt.modules.TaskModule)"
    )


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    cut: Inputs = map_inputs(inputs, lambda value: value[rows] if isinstance(value, Tensor) else value)
    return cut


def _shapes(inputs: Inputs) -> Any:
    leaves = pytree.tree_leaves(inputs)
    return tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))


def _modes(module: nn.Module) -> bool:
    return module.training


class Deliver(torch.autograd.Function):
    """Give a loss whose backward adds gradients that are known already to the parameters, times what comes in."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        known = [gradient for gradient in gradients if gradient is not None]
        if known:
            torch._foreach_mul_(known, factor)
        return (None, None, *gradients)
