"""A teacher of which each rank holds a slice of every weight."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_opt.forward import Inputs
from lightning_opt.modules.teacher_placement_int8 import Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Linear
from lightning_opt.modules.teacher_placement_whole import Answer, Held, Parted, bytes_of, most
from lightning_opt.strategies.mesh import copy_from_first
from lightning_opt.strategies.wrapping import Wrapping, unshard_fully

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Int8Linear, Int8Conv1d, Int8Conv2d, Int8Embedding)
_SHARE = 0.02  # of the network: gathering smaller ones alone would cost time and save nothing


class Sharded(Parted):
    """Gather a block's weights when it runs, and free them when it has run: FSDP2, apart from the student's.

    Zhao and others, 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277.

    Args:
        network: The same on all ranks; changed in place.
        device: This rank's.
        ranks: Over how many neighbouring ranks one copy is spread.
    """

    def __init__(self, network: nn.Module, device: torch.device, *, ranks: int) -> None:
        super().__init__(network, device)
        self.where = f"sharded over {ranks} ranks by its own FSDP2"
        copy_from_first([*network.parameters(), *network.buffers()], device=device)
        self._units = [*(network.get_submodule(name) for name in _units(network)), network]
        mesh = _mesh(device, ranks)
        for unit in self._units:
            # The root, too: no backward will come that frees what its forward gathered.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        self._resident = bytes_of(network)
        self._peak: int | None = None

    @override
    def ask(self, inputs: Inputs) -> Answer:
        if self._peak is not None:
            return super().ask(inputs)
        seen = [self._resident]

        def look(module: nn.Module, args: object, output: object) -> None:
            seen.append(self._resident + _gathered_bytes(self.network))

        # In front of FSDP2's own hooks, which free what was gathered.
        handles = [unit.register_forward_hook(look, prepend=True) for unit in self._units]
        try:
            answer = super().ask(inputs)
        finally:
            for handle in handles:
                handle.remove()
        self._peak = most(max(seen), self.device)
        return answer

    @override
    def held(self) -> Held:
        held = most(bytes_of(self.network), self.device)
        return Held(whole_bytes=self.whole_bytes, rank_bytes=held, peak_bytes=self._peak)

    @override
    def release(self) -> None:
        super().release()
        unshard_fully(self.network)
        self.network.requires_grad_(False).to(self._found_on)


def _units(network: nn.Module) -> list[str]:
    """Return the names of the modules whose weights are gathered together: repeated blocks, else large layers.

    A layer that shares its weight with another is left to the root: its weight is read while it does not run.
    """
    if blocks := Wrapping().units(network):
        return blocks
    whole = bytes_of(network)
    large = [
        name for name, part in network.named_modules() if type(part) in _LAYERS and bytes_of(part) >= _SHARE * whole
    ]
    return Wrapping(patterns=large).units(network) if large and "" not in large else []


def _mesh(device: torch.device, ranks: int) -> DeviceMesh:
    """Return a mesh of this rank and its neighbours, `ranks` of them."""
    world = dist.get_world_size()
    if ranks == world:
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // ranks, ranks), mesh_dim_names=("copies", "slices"))["slices"]


def _gathered_bytes(network: nn.Module) -> int:
    """Return the bytes of the weights that are whole at this moment."""
    whole = [one for one in network.parameters() if not isinstance(one, DTensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in whole}.values())
