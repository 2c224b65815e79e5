"""Which process holds which tensor, and what processes that hold the same one tell each other."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_opt.modules import TaskModule
from lightning_opt.strategies.pipeline.engine import Place
from lightning_opt.strategies.pipeline.stages import Dropped, Stage
from lightning_opt.strategies.pipeline.work import Shares

_MODEL = "model."
_BUCKET_BYTES = 25 * 2**20


class Copies:
    """Know the holders of every tensor of a LightningModule that a pipeline spreads.

    A tensor that several stages need (an embedding that is also the head) is held by each; its gradients are added up.
    What belongs to a loss is where the loss is computed; what belongs to neither network nor losses is everywhere.

    Args:
        module: The module, still whole.
        stages: All stages of its network.
        shares: Where its losses are computed.
        place: Where this process stands.
        mesh: `(pipelines, processes of each)`.
    """

    def __init__(
        self, module: TaskModule, stages: Sequence[Stage], shares: Shares, place: Place, mesh: DeviceMesh
    ) -> None:
        self.module, self.place, self.mesh = module, place, mesh
        self.data_group = mesh[mesh.mesh_dim_names[0]].get_group()  # type: ignore[index]
        self.pipelines = dist.get_world_size(self.data_group)
        everyone = tuple(sorted(set(place.owners)))
        self.parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        self.holders: dict[str, tuple[int, ...]] = dict.fromkeys(self._names(), everyone)
        self.savers: dict[str, int] = dict.fromkeys(self._names(), everyone[0])
        for name in self.holders:
            if name.startswith(_MODEL):
                inner = name.removeprefix(_MODEL)
                having = [s.number for s in stages if inner in s.parameters or inner in s.buffers]
                self._set(name, having)
        for term, part in module.term_modules().items():
            home = next(n for n, names in enumerate(shares.terms) if term in names)
            for name in self._within(part):
                self._set(name, [home])
        self._counted = {
            id(one)
            for name, one in module.named_parameters(remove_duplicate=False)
            if self.savers[name] == place.process
        }
        self._groups = self._make_groups(everyone)

    def _names(self) -> list[str]:
        buffers = [name for name, _ in self.module.named_buffers(remove_duplicate=False)]
        return [*self.parameters, *buffers]

    def _within(self, part: nn.Module) -> Iterable[str]:
        inside = {id(one) for one in (*part.parameters(), *part.buffers())}
        named = (
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        )
        return [name for name, one in named if id(one) in inside]

    def _set(self, name: str, stages: Sequence[int]) -> None:
        processes = [self.place.owners[n] for n in stages] or [self.place.owners[0]]
        self.holders[name] = tuple(sorted(set(processes)))
        self.savers[name] = processes[0]

    def foreign(self) -> list[str]:
        """Return the names of the tensors that this process does not hold."""
        return [name for name, holders in self.holders.items() if self.place.process not in holders]

    def counts(self, parameter: Tensor) -> bool:
        """Whether it is this process that counts a parameter, of all that hold it."""
        return id(parameter) in self._counted

    def _make_groups(self, everyone: tuple[int, ...]) -> dict[tuple[int, ...], dist.ProcessGroup]:
        wanted = sorted({self.holders[name] for name in self.parameters if len(self.holders[name]) > 1})
        groups = {everyone: self.place.group}
        for holders in wanted:
            if holders == everyone:
                continue
            for row in self.mesh.mesh.tolist():  # every process takes part in making every group
                group = dist.new_group([row[process] for process in holders])
                if self.mesh.get_rank() in row and self.place.process in holders:
                    groups[holders] = group
        return groups

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Add up the gradients of what several stages hold, and average them over the pipelines."""
        seen: set[int] = set()
        for name, parameter in self.module.named_parameters():
            holders = self.holders[name]
            if len(holders) > 1 and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self._groups[holders])
        if self.pipelines > 1:
            self._average([one for one in self.module.parameters() if one.requires_grad])

    def _average(self, parameters: Sequence[Tensor]) -> None:
        for one in parameters:
            if one.grad is None:  # on another pipeline it may have one
                one.grad = torch.zeros_like(one)
        for bucket in _buckets([one.grad for one in parameters if one.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket]).div_(self.pipelines)
            dist.all_reduce(flat, group=self.data_group)
            pieces = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])

    @torch.no_grad()
    def refill(self, dropped: Dropped) -> None:
        """Send every tensor from the process that keeps it to those that do not hold it. Collective."""
        mine = set(dropped.names)
        made: dict[int, Tensor] = {}
        for name in self.holders:
            if len(self.holders[name]) == dist.get_world_size(self.place.group):
                continue
            held = dropped.like(name) if name in mine else self._value(name)
            value = torch.empty_like(held, memory_format=torch.contiguous_format) if name in mine else held.data
            value = value.to(self.place.device).contiguous()
            dist.broadcast(value, src=dist.get_global_rank(self.place.group, self.savers[name]), group=self.place.group)
            if name in mine:
                dropped.fill(name, value, made)

    def _value(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        value: Tensor = getattr(self.module.get_submodule(path), attribute)
        return value


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group gradients of one kind, in order, into buckets of some size."""
    buckets: list[list[Tensor]] = []
    size, kind = 0, None
    for gradient in gradients:
        if not buckets or size > _BUCKET_BYTES or gradient.dtype != kind:
            buckets.append([])
            size, kind = 0, gradient.dtype
        buckets[-1].append(gradient)
        size += gradient.numel() * gradient.element_size()
    return buckets
