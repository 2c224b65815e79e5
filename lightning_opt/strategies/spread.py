"""Spread one module over a mesh of processes in place, and bring it back."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from lightning_opt.strategies.mesh import DATA, TENSOR, local_part
from lightning_opt.strategies.tensor_ops import average_gradient
from lightning_opt.strategies.tensor_plans import Kind
from lightning_opt.strategies.tensor_split import TensorSplit
from lightning_opt.strategies.tensor_views import LocalViews, View, views_of
from lightning_opt.strategies.wrapping import Wrapping, gather_around, make_whole, settle, shard_fully, unshard_fully


class Spread:
    """What was done to spread a module; `undo` gives every process the whole module again.

    Layers are cut over the second dimension of the mesh; what is left of each is sharded over the first. Every
    parameter is a `DTensor` afterwards, those that nothing is done to as well. A single number (a 0-d parameter)
    cannot be sharded: each process has it, and its gradient is the mean over the processes with different samples.

    Args:
        module: What is spread: the network, or what holds it and further trained parts.
        network: Its names are those of wrapping and plan.
        mesh: Two dimensions, `data_parallel` and `tensor_parallel`.
        wrapping: How FSDP2 is put around the network.
        kinds: What becomes of which layer (see `tensor_plans.resolve`); empty where layers stay whole.
        methods: Those of `module`, beside `forward`, that use its weights.
    """

    def __init__(
        self,
        module: nn.Module,
        network: nn.Module,
        *,
        mesh: DeviceMesh,
        wrapping: Wrapping | None = None,
        kinds: Mapping[str, Kind] | None = None,
        methods: Sequence[str] = (),
    ) -> None:
        self._mesh, self._wrapping, self._methods = mesh, wrapping or Wrapping(), tuple(methods)
        self._units = [network.get_submodule(name) for name in self._wrapping.units(network)]
        inside = {id(one) for one in network.parameters()}
        self.root = module if any(id(one) not in inside for one in module.parameters()) else network
        if self.root is not network:  # projectors and the like are the outermost unit's
            self._units.append(network)
        self._split = TensorSplit(network, kinds or {}, mesh[TENSOR]) if mesh[TENSOR].size() > 1 else None
        self._shards = mesh[DATA].size() > 1 or self._split is None
        self._views: list[LocalViews] = []
        self._numbers = {one for one in self.root.parameters() if one.ndim == 0} if self._shards else set()
        self._do()

    def settle(self) -> None:
        """Fix which unit is the outermost, before any other is called alone. Parameters must be where they stay."""
        if self._shards:
            settle(self.root)

    def free(self) -> None:
        """Free whole weights that no backward will free."""
        if self._shards:
            cast(FSDPModule, self.root).reshard()

    def undo(self, *, device: torch.device | None = None) -> None:
        """Give every process the whole module; parameters are new objects. Collective.

        Args:
            device: Where they lie; None: on the host.
        """
        if self._shards:
            unshard_fully(self.root, methods=self._methods, device=device)
        for views in reversed(self._views):
            views.undo()
        if self._split is not None:
            self._split.undo()
        make_whole(self.root, device=device)

    def _do(self) -> None:
        if self._split is not None:
            self._split.distribute(self.root)
            self._split.install()
        if self._shards:
            self._numbers = _replicated(self.root, self._mesh if self._split is not None else self._mesh[DATA])
        if self._split is not None or self._numbers:
            self._show_views()
        if self._shards:
            shard_fully(
                self.root,
                units=self._units,
                mesh=self._mesh[DATA],
                wrapping=self._wrapping,
                ignored=self._numbers,
            )
            gather_around(self.root, self._methods_of(self.root))

    def _show_views(self) -> None:
        done: set[nn.Module] = set()
        for unit in [*self._units, self.root]:
            own = [part for part in unit.modules() if part not in done]
            done |= set(own)
            views = LocalViews({part: self._views_of(part) for part in own}, after=self._after)
            views.install(unit, methods=self._methods_of(unit))
            self._views.append(views)

    def _methods_of(self, unit: nn.Module) -> tuple[str, ...]:
        return self._methods if all(hasattr(unit, name) for name in self._methods) else ()

    def _views_of(self, part: nn.Module) -> dict[str, View]:
        views = self._split.views(part) if self._split is not None else views_of(part, {})
        if self._split is None:  # all others are FSDP2's
            views = {name: view for name, view in views.items() if part._parameters[name] in self._numbers}
        group = self._mesh[DATA].get_group()
        for name in views:
            if part._parameters[name] in self._numbers:
                views[name] = partial(_number, group=group)
        return views

    def _after(self) -> None:
        if self._split is not None:
            self._split.forget()


def is_spread(module: nn.Module) -> bool:
    """Whether some parameter of a module is not whole on each process."""
    return any(isinstance(one, DTensor) for one in module.parameters())


def _replicated(module: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Put a module's single numbers on the mesh, the same on all processes, and return them."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, one in part._parameters.items():
            if one is not None and one.ndim == 0:
                if id(one) not in made:
                    local = local_part(one.detach())
                    whole = DTensor.from_local(
                        local.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False
                    )
                    made[id(one)] = nn.Parameter(whole, requires_grad=one.requires_grad)
                part._parameters[name] = made[id(one)]
    return set(made.values())


def _number(parameter: DTensor, module: nn.Module, *, group: dist.ProcessGroup) -> Tensor:
    return average_gradient(parameter.to_local(), group)
