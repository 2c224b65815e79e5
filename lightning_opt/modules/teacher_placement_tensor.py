"""A teacher of which each rank holds a part of every layer."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from typing_extensions import override

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.modules.taps import match_modules
from lightning_opt.modules.teacher_placement_exchange import Circle
from lightning_opt.modules.teacher_placement_whole import Answer, Parted
from lightning_opt.strategies.mesh import DATA, TENSOR, copy_from_first
from lightning_opt.strategies.spread import Spread
from lightning_opt.strategies.tensor_plans import Kind, check_taps, resolve

_INPUT = ":in"


class TensorParallel(Parted):
    """Compute each layer together, by the tensor plans that students have, too.

    Shoeybi and others, 2019, "Megatron-LM", arXiv 1909.08053, section 3. Ranks with different batches compute one
    batch after the other, each as it would be computed alone; every rank keeps the answer to its own.

    Args:
        network: The same on all ranks; changed in place.
        device: This rank's.
        circle: The ranks that hold one copy together.

    Raises:
        ConfigError: No plan knows the network, or its layers cannot be cut evenly.
    """

    def __init__(self, network: nn.Module, device: torch.device, circle: Circle) -> None:
        super().__init__(network, device)
        count = len(circle.ranks)
        self.where = f"tensor-parallel over {count} ranks"
        self.circle = circle
        self._kinds = plan_for(network, count)
        copy_from_first([*network.parameters(), *network.buffers()], device=device, group=circle.group)
        copies = dist.get_world_size() // count
        mesh = init_device_mesh(device.type, (copies, 1, count), mesh_dim_names=("copies", DATA, TENSOR))
        self._spread = Spread(network, network, mesh=mesh[DATA, TENSOR], kinds=self._kinds)
        for module in network.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    @override
    def watch(self, patterns: Sequence[str]) -> None:
        for name in match_modules(self.network, patterns) if patterns else ():
            self._check_tap(name)
        super().watch(patterns)

    def _check_tap(self, name: str) -> None:
        """Refuse a feature of which each rank has a part only."""
        module = name.removesuffix(_INPUT)
        kind = self._kinds.get(module)
        if name.endswith(_INPUT):
            if kind is not None and kind.cut == "in":
                raise ConfigError(
                    f"teacher.placement=tensor_parallel: no rank has all of what enters {module!r}; compare a whole "
                    "block's features, or choose teacher.placement=sharded"
                )
            return
        try:
            check_taps(self.network, self._kinds, [module])
        except ConfigError as error:
            raise ConfigError(f"teacher.placement=tensor_parallel: {error}") from error

    @override
    def ask(self, inputs: Inputs) -> Answer:
        answers = (super(TensorParallel, self).ask(batch) for batch in self.circle.batches(inputs))
        mine = None
        for number, answer in enumerate(answers):  # those of other ranks go at once
            mine = answer if number == self.circle.mine else mine
        assert mine is not None
        return mine

    @override
    def release(self) -> None:
        super().watch([])
        self._spread.undo()
        self.network.requires_grad_(False).to(self._found_on)


def plan_for(network: nn.Module, ranks: int) -> dict[str, Kind]:
    """Return which layers are cut among a number of ranks, and how.

    Raises:
        ConfigError: No plan knows the network, or its layers cannot be cut evenly.
    """
    try:
        return resolve(network, None, size=ranks)
    except ConfigError as error:
        raise ConfigError(f"teacher.placement=tensor_parallel, {ranks} ranks: {error}") from error
