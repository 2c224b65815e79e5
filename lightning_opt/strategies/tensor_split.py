"""Cut layers of one network across processes, so that the code between them need not know.

Parameters are `DTensor`s, so that checkpoints, optimizers and norms know what is whole. While a unit of the network
runs, its modules see their own pieces as plain tensors; what cut layers owe each other is added at their edges.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lightning_opt.strategies.tensor_ops import cut, enter, own_part, put_together, sum_up
from lightning_opt.strategies.tensor_plans import Kind, axes
from lightning_opt.strategies.tensor_views import View, views_of

_COUNTS = ("split_size", "num_heads", "num_attention_heads", "n_heads", "all_head_size", "nf")


class TensorSplit:
    """What was done to cut a network; `undo` takes it back.

    Args:
        network: Its names are those of the plan.
        kinds: What becomes of which module.
        mesh: One dimension: the processes that share each layer.
    """

    def __init__(self, network: nn.Module, kinds: Mapping[str, Kind], mesh: DeviceMesh) -> None:
        self._kinds = {network.get_submodule(name): kind for name, kind in kinds.items()}
        self._names = {network.get_submodule(name): name for name in kinds}
        self._network, self._mesh = network, mesh
        self._undo: list[Callable[[], Any]] = []
        self._entered: list[tuple[Tensor, int, Tensor]] = []

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that share each layer."""
        return self._mesh.get_group()

    def distribute(self, module: nn.Module) -> None:
        """Replace all parameters of a module, the network's parent or itself, by `DTensor`s on the mesh."""
        placed = self._placements()
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None or isinstance(parameter, DTensor):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self._as_dtensor(parameter, placed.get(id(parameter), Replicate()))
                part._parameters[name] = made[id(parameter)]

    def install(self) -> None:
        """Add what cut layers owe each other, and correct what modules say about their width."""
        for module, kind in self._kinds.items():
            self._install_one(module, kind)
        cut_out = [module for module, kind in self._kinds.items() if kind.cut == "out"]
        for one in dict.fromkeys([*cut_out, *map(self._parent, cut_out)]):
            self._divide_counts(one)

    def views(self, module: nn.Module) -> dict[str, View]:
        """Return how the parameters of one module look while it runs, by name."""
        kind = self._kinds.get(module, Kind())
        special: dict[str, View] = {}
        if kind.shared:
            special = dict.fromkeys(module._parameters, partial(_shared, group=self.group))
        if kind.parts > 1:
            out = (axes(module) or (0, 1))[0]
            special = {
                "weight": partial(_own_of_fused, group=self.group, parts=kind.parts, dim=out),
                "bias": partial(_own_of_fused, group=self.group, parts=kind.parts, dim=0),
            }
        if kind.cut == "in":
            special["bias"] = _withheld if isinstance(module, nn.Linear) else _blank
        return views_of(module, special)

    def forget(self) -> None:
        """Drop what was kept for the layers of a unit that has run."""
        self._entered.clear()

    def undo(self) -> None:
        """Take off everything but the `DTensor`s."""
        for one in reversed(self._undo):
            one()
        self._undo = []

    def _placements(self) -> dict[int, Placement]:
        placed: dict[int, Placement] = {}
        for module, kind in self._kinds.items():
            if kind.cut is None:
                continue
            out, into = axes(module) or (0, 1)
            placed[id(module.weight)] = Shard(into if kind.cut == "in" else out)
            if kind.cut == "out" and isinstance(getattr(module, "bias", None), nn.Parameter):
                placed[id(module.bias)] = Shard(0)
        return placed

    def _as_dtensor(self, parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
        whole = parameter.detach()
        piece = own_part(whole, self.group, placement.dim).clone() if isinstance(placement, Shard) else whole
        piece = piece.to(self._mesh.device_type).contiguous()
        made = DTensor.from_local(piece, self._mesh, [placement], run_check=False)
        return nn.Parameter(made, requires_grad=parameter.requires_grad)

    def _install_one(self, module: nn.Module, kind: Kind) -> None:
        if kind.cut == "rows":
            assert isinstance(module, nn.Embedding)
            self._set(module, "padding_idx", self._own_row(module, module.padding_idx))
            self._add(module.register_forward_pre_hook(self._own_rows))
            self._add(module.register_forward_hook(self._all_rows))
        if kind.enters:
            self._add(module.register_forward_pre_hook(self._before_cut))
        if kind.cut == "in":
            self._add(module.register_forward_pre_hook(self._before_sum))
            self._add(module.register_forward_hook(self._after_sum))
        if kind.answer == "join":
            self._add(module.register_forward_hook(self._join))
        if kind.answer == "hand_on":
            self._add(module.register_forward_hook(lambda _, args, output: self._enter(output)))

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._undo.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    def _add(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _before_cut(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._enter(args[0]), *args[1:])

    def _before_sum(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        into = (axes(module) or (0, 1))[1]
        is_whole = args[0].shape[-1] == module.weight.shape[into] * self._mesh.size()  # type: ignore[index]
        return (cut(args[0], self.group), *args[1:]) if is_whole else None

    def _after_sum(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        total = sum_up(output, self.group)
        bias = vars(module).get("_withheld_bias")
        return total if bias is None else total + bias.to(total.dtype)

    def _own_row(self, module: nn.Embedding, row: int | None) -> int | None:
        rows = module.num_embeddings // self._mesh.size()
        first = dist.get_rank(self.group) * rows
        return row - first if row is not None and first <= row < first + rows else None

    def _own_rows(self, module: nn.Embedding, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = module.weight.shape[0]
        own = args[0] - dist.get_rank(self.group) * rows
        vars(module)["_elsewhere"] = elsewhere = (own < 0) | (own >= rows)
        return (own.masked_fill(elsewhere, 0), *args[1:])

    def _all_rows(self, module: nn.Embedding, args: Any, output: Tensor) -> Tensor:
        # tokens of other processes' rows give zeros here: the sum has all
        elsewhere = vars(module).pop("_elsewhere").unsqueeze(-1)
        return sum_up(output.masked_fill(elsewhere, 0.0), self.group)

    def _join(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return put_together(output, self.group)
        output.logits = put_together(output.logits, self.group)
        return output

    def _enter(self, x: Tensor) -> Tensor:
        """Enter once for all layers that read the same tensor: their gradients are then summed once, too."""
        for seen, version, entered in self._entered:
            if seen is x and version == x._version:
                return entered
        entered = enter(x, self.group)
        if torch.is_grad_enabled():
            self._entered = [(x, x._version, entered)]
        return entered

    def _parent(self, module: nn.Module) -> nn.Module:
        return self._network.get_submodule(self._names[module].rpartition(".")[0])

    def _divide_counts(self, parent: nn.Module) -> None:
        for name in _COUNTS:
            count = vars(parent).get(name)
            if isinstance(count, int) and count % self._mesh.size() == 0:
                self._set(parent, name, count // self._mesh.size())


def _shared(parameter: DTensor, module: nn.Module, *, group: dist.ProcessGroup) -> Tensor:
    return enter(parameter.to_local(), group)


def _own_of_fused(parameter: DTensor, module: nn.Module, *, group: dist.ProcessGroup, parts: int, dim: int) -> Tensor:
    """Return this process's rows of each of several matrices that lie one behind the other.

    Such a tensor is kept cut in one place, as checkpoints want it, and put together when it is needed.
    """
    whole = parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    pieces = whole.unflatten(dim, (parts, dist.get_world_size(group), -1))
    return pieces.select(dim + 1, dist.get_rank(group)).flatten(dim, dim + 1)


def _withheld(parameter: DTensor, module: nn.Module) -> None:
    vars(module)["_withheld_bias"] = parameter.to_local()


def _blank(parameter: DTensor, module: nn.Module) -> Tensor:
    vars(module)["_withheld_bias"] = local = parameter.to_local()
    return torch.zeros_like(local)
