"""FSDP2 around the repeated blocks of a network, and out of it again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from lightning_opt.errors import ConfigError
from lightning_opt.modules.taps import near_names

_LISTS = (nn.ModuleList, nn.ModuleDict)  # they have no forward: nobody would gather their weights
_SMALLEST = 2  # a list of one block is no repetition


@dataclass(frozen=True)
class Wrapping:
    """How FSDP2 is put around a network.

    Args:
        patterns: Names of the modules, within the network, whose weights are gathered together; None: the repeated
            blocks, found by type.
        reshard_after_forward: Whether a block's whole weights are freed between forward and backward.
        cpu_offload: Whether weights, gradients and optimizer state wait in the host's memory.
    """

    patterns: Sequence[str] | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def units(self, network: nn.Module) -> list[str]:
        """Return the names of the modules that are wrapped, inner ones first.

        Raises:
            ConfigError: A pattern matches nothing, or something that has no forward.
        """
        names = repeated_blocks(network) if self.patterns is None else _matches(network, self.patterns)
        tied = _names_by_parameter(network)
        # One parameter can be in one unit only: what shares weights with the rest stays in the root's.
        alone = [name for name in names if not _shares_weights(name, network.get_submodule(name), tied)]
        return sorted(alone, key=lambda name: -name.count("."))

    def policy(self) -> OffloadPolicy:
        """Return where FSDP2 keeps what it shards."""
        return CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()


def repeated_blocks(network: nn.Module) -> list[str]:
    """Return the names of the blocks that a network repeats: members of one class in a list or a sequence.

    Only the outermost repetition counts, so a unit is a whole block and never one of its layers.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> repeated_blocks(nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])}))
        ['blocks.0', 'blocks.1']
    """
    found: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(_is_inside(name, block) for block in found):
            found += [f"{name}.{key}".lstrip(".") for key in _repeated(module)]
    return found


def shard_fully(
    module: nn.Module,
    *,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    wrapping: Wrapping,
    ignored: Iterable[nn.Parameter] = (),
) -> None:
    """Put FSDP2 around the units and then around the module, in place.

    The root keeps its whole weights until its backward, since they are needed again at once; without gradients they
    are freed when its forward is over.

    Args:
        module: The root; its `forward` is called first.
        units: Parts of it, inner ones first.
        mesh: One dimension, over which parameters are sharded.
        wrapping: How.
        ignored: Parameters that stay as they are.
    """
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": wrapping.policy(), "ignored_params": set(ignored)}
    for unit in units:
        fully_shard(unit, reshard_after_forward=wrapping.reshard_after_forward, **options)
    fully_shard(module, reshard_after_forward=False, **options)
    module.register_forward_hook(_free_without_gradients)


def settle(root: nn.Module) -> None:
    """Let a root that is never left out of a forward know that it is one, before any part of it is called alone."""
    cast(Any, fully_shard).state(root)._lazy_init()


def gather_around(module: nn.Module, methods: Sequence[str]) -> None:
    """Let methods of an FSDP2 root other than `forward` find whole weights, too."""
    for name in methods:
        register_fsdp_forward_method(module, name)


@torch.no_grad()
def unshard_fully(module: nn.Module, *, methods: Sequence[str] = (), device: torch.device | None = None) -> None:
    """Take FSDP2 off a module in place: each process has plain whole parameters again.

    Collective: all processes must call it.

    Args:
        module: A root that `shard_fully` was called with.
        methods: Those that `gather_around` was called with.
        device: Where the parameters lie afterwards; None: on the host.
    """
    wrapped = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in wrapped:
        cast(FSDPModule, part).reshard()
    make_whole(module, device=device)
    for part in wrapped:
        _unwrap(part)
    for name in methods:
        vars(module).pop(name, None)


@torch.no_grad()
def make_whole(module: nn.Module, *, device: torch.device | None = None) -> None:
    """Replace every sharded parameter by a whole plain one; those that share one keep sharing it."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    whole = _whole(parameter).to(device or "cpu")
                    made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]


def _whole(parameter: DTensor) -> Tensor:
    if parameter.device.type != parameter.device_mesh.device_type:  # it waits in the host's memory
        local = parameter.to_local().to(parameter.device_mesh.device_type)
        parameter = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return parameter.full_tensor()


def _unwrap(module: nn.Module) -> None:
    """Undo what `fully_shard` left on one module; torch has no call for it."""
    state: Any = cast(Any, fully_shard).state(module)
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in state._fsdp_param_groups:
        handles += [*group._module_to_pre_save_state_dict_hook_handle.values()]
        handles += [*group._module_to_pre_load_state_dict_hook_handle.values()]
        handles += [one._post_load_hook_handle for one in group.fsdp_params]
    for handle in handles:
        handle.remove()
    for key in [key for key, hook in module._forward_hooks.items() if hook is _free_without_gradients]:
        del module._forward_hooks[key]
    vars(module).pop(STATE_KEY, None)
    vars(module).pop(REGISTRY_KEY, None)
    _module_state_mapping.pop(module, None)
    module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]
    for part in module.modules():
        vars(part).pop("_is_fsdp_managed_module", None)
        vars(part).pop("_fsdp_use_orig_params", None)


def _free_without_gradients(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled():  # no backward will come that would free them
        cast(FSDPModule, module).reshard()


def _repeated(module: nn.Module) -> list[str]:
    by_class: dict[type, list[str]] = {}
    for key, child in module.named_children():
        if any(True for _ in child.children()) and any(True for _ in child.parameters()):
            by_class.setdefault(type(child), []).append(key)
    return [key for keys in by_class.values() if len(keys) >= _SMALLEST for key in keys]


def _matches(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    modules = {name: module for name, module in network.named_modules() if name}
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in modules if fnmatchcase(name, pattern)]
        if not hits:
            near = ", ".join(near_names(pattern, list(modules))) or "none"
            raise ConfigError(f"strategy.wrap: {pattern!r} matches no module of the network; near names: {near}")
        if lists := [name for name in hits if isinstance(modules[name], _LISTS)]:
            raise ConfigError(
                f"strategy.wrap: {pattern!r} matches {lists[0]!r}, a {type(modules[lists[0]]).__name__} that is never "
                f"called itself; name its members: {lists[0]}.*"
            )
        found |= dict.fromkeys(hits)
    return list(found)


def _names_by_parameter(network: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _shares_weights(name: str, unit: nn.Module, tied: dict[int, list[str]]) -> bool:
    return any(not other.startswith(f"{name}.") for one in unit.parameters() for other in tied[id(one)])


def _is_inside(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")
