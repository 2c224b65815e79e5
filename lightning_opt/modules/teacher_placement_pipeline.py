"""A teacher of which each rank holds some layers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_opt.forward import Inputs, logits_of, map_inputs
from lightning_opt.modules.taps import match_modules
from lightning_opt.modules.teacher_placement_exchange import (
    HEADER,
    Circle,
    as_bytes,
    empty_like_header,
    header_of,
    receive,
    send,
)
from lightning_opt.modules.teacher_placement_int8 import Int8Weight
from lightning_opt.modules.teacher_placement_whole import Answer, Parted
from lightning_opt.strategies.mesh import copy_from_first
from lightning_opt.strategies.pipeline.split import split
from lightning_opt.strategies.pipeline.stages import Cut, Dropped, Stage, keep_only

_INPUT = ":in"
_LOGITS = ""


class Pipelined(Parted):
    """Send each batch of the ranks through the stages, one behind the other, and its answers to who asked.

    Stages are balanced by what they weigh, for that is what they are there for. The batches of data-parallel ranks
    fill the pipeline as micro-batches would (Huang and others, 2018, "GPipe", arXiv 1811.06965, section 2.3).

    Args:
        network: The same on all ranks; changed in place.
        device: This rank's.
        circle: The ranks that are the stages, in this order.
        example: A small batch, on the device of the network.
    """

    def __init__(self, network: nn.Module, device: torch.device, circle: Circle, *, example: Inputs) -> None:
        super().__init__(network, device)
        count = len(circle.ranks)
        self.where = f"pipelined over {count} ranks"
        self.circle = circle
        copy_from_first([*network.parameters(), *network.buffers()], device=device, group=circle.group)
        self._stages = _same_on_all(network, example, circle)
        self._holders = _Holders(network, self._stages)
        self._names: list[str] = []
        self._kept: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._dropped = keep_only(network, [self.stage], device=device)
        network.to(device)

    @property
    def stage(self) -> Stage:
        """This rank's."""
        return self._stages[self.circle.position]

    @override
    def watch(self, patterns: Sequence[str]) -> None:
        for handle in self._handles:
            handle.remove()
        self._names = match_modules(self.network, patterns) if patterns else []
        self._handles = [self._tap(name) for name in self._names if self._owner(name) == self.circle.position]

    @override
    def ask(self, inputs: Inputs) -> Answer:
        batches = self.circle.batches(inputs)
        sending: list[Any] = []
        said = [self._run(batch, sending) for batch in batches]
        for work, _ in sending:
            work.wait()
        return self._deliver(said)

    @override
    def release(self) -> None:
        super().release()
        self.stage.network.release()
        self._holders.refill(self.network, self._dropped, self.circle, self.device)
        self.network.to(self._found_on)

    def _run(self, batch: Inputs, sending: list[Any]) -> dict[str, Tensor]:
        """Run this rank's stage on one batch; return what is read of it."""
        ranks, here = self.circle.ranks, self.circle.position
        received = None if here == 0 else receive(ranks[here - 1], self.circle.group, self.device)
        self._kept = {}
        answer = self.stage(received, batch)
        if not self.stage.is_last:
            send(answer, ranks[here + 1], self.circle.group, sending)
            return self._kept
        return {**self._kept, _LOGITS: logits_of(answer)}

    def _deliver(self, said: Sequence[dict[str, Tensor]]) -> Answer:
        """Send what was said about each batch to the ranks that asked; return what is for this one."""
        circle, names = self.circle, [_LOGITS, *self._names]
        headers = torch.zeros(len(said), len(names), HEADER, dtype=torch.long)
        for batch, parts in enumerate(said):
            for name, value in parts.items():
                headers[batch, names.index(name)] = header_of(value)
        headers = headers.to(self.device)
        dist.all_reduce(headers, group=circle.group)  # each row was written by one stage
        mine: dict[str, Tensor] = {}
        moves, kept_alive = [], []
        for batch, rows in enumerate(headers.tolist()):
            readers = [rank for rank, of in zip(circle.ranks, circle.batch_of, strict=True) if of == batch]
            for name, row in zip(names, rows, strict=True):
                owner = circle.ranks[self._owner(name)]
                if dist.get_rank() == owner:
                    value = said[batch][name].contiguous()
                    kept_alive.append(value)
                    moves += [
                        dist.P2POp(dist.isend, as_bytes(value), one, circle.group) for one in readers if one != owner
                    ]
                elif dist.get_rank() in readers:
                    value = empty_like_header(row, self.device)
                    moves.append(dist.P2POp(dist.irecv, as_bytes(value), owner, circle.group))
                if dist.get_rank() in readers:
                    mine[name] = value
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()
        return mine.pop(_LOGITS), mine

    def _owner(self, name: str) -> int:
        """Return the stage that has the logits, or in which a tapped module does its work."""
        if name == _LOGITS:
            return len(self._stages) - 1
        module = name.removesuffix(_INPUT)
        holds = [module in (stage.takes if name.endswith(_INPUT) else stage.runs) for stage in self._stages]
        return max(number for number, real in enumerate(holds) if real)  # of several runs the last answer counts

    def _tap(self, name: str) -> Any:
        module = self.network.get_submodule(name.removesuffix(_INPUT))
        if name.endswith(_INPUT):
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: self._keep(name, (args, kwargs)), with_kwargs=True
            )
        return module.register_forward_hook(lambda _, args, output: self._keep(name, output))

    def _keep(self, name: str, value: Any) -> None:
        self._kept[name] = next(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


class _Holders:
    """Know which stage holds each tensor of a network.

    Args:
        network: Still whole.
        stages: Into which it is cut.
    """

    def __init__(self, network: nn.Module, stages: Sequence[Stage]) -> None:
        named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
        same: dict[int, list[str]] = {}
        for name, one in named:
            same.setdefault(id(one), []).append(name)
        self.names = list(same.values())  # tied weights have several
        held = [{*stage.parameters, *stage.buffers} for stage in stages]
        self.stages = [next(n for n, own in enumerate(held) if own & set(names)) for names in self.names]

    @torch.no_grad()
    def refill(self, network: nn.Module, dropped: Dropped, circle: Circle, device: torch.device) -> None:
        """Give every rank the tensors that it dropped. Collective."""
        kept = dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
        missing, made = set(dropped.names), dict[int, Tensor]()
        for names, stage in zip(self.names, self.stages, strict=True):
            is_missing = names[0] in missing
            like = dropped.like(names[0]) if is_missing else kept[names[0]]
            value = torch.empty_like(like, device=device, memory_format=torch.contiguous_format)
            if circle.position == stage:
                value = like.detach().contiguous()
            dist.broadcast(as_bytes(value), src=circle.ranks[stage], group=circle.group)
            for name in names if is_missing else ():
                dropped.fill(name, value, made)


def _same_on_all(network: nn.Module, example: Inputs, circle: Circle) -> list[Stage]:
    """Cut the network as the first rank of the circle does."""
    device = next((one.device for one in network.parameters()), torch.device("cpu"))
    example = map_inputs(example, lambda value: value.to(device))
    count = len(circle.ranks)
    told: list[list[tuple[str, int, bool]]] = [[]]
    if circle.position == 0:
        stages = split(network, example, count, costs="parameters")
        told = [[(*stage.start.key, stage.start.light) for stage in stages[1:] if stage.start]]
    dist.broadcast_object_list(told, src=circle.ranks[0], group=circle.group)
    if circle.position == 0:
        return _with_integers(network, stages)
    cuts = [Cut(key=(name, number), light=light) for name, number, light in told[0]]
    return _with_integers(network, split(network, example, count, costs="parameters", cuts=cuts))


def _with_integers(network: nn.Module, stages: list[Stage]) -> list[Stage]:
    """Let integers be wherever their scales are: who reads a weight is found by gradients, which integers have not."""
    for name, layer in network.named_modules(remove_duplicate=False):
        if isinstance(layer, Int8Weight):
            for stage in stages:
                if f"{name}.scale" in stage.parameters and f"{name}.integers" not in stage.parameters:
                    stage.parameters.append(f"{name}.integers")
    return stages
