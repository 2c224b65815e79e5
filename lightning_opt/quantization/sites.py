"""Values that no layer of its own makes, quantized where they are made.

A module whose values are quantized is an owner: its class becomes a subclass with the same forward around it. Most
values are what a module returns or is given, such as the output of an `nn.ReLU` or of a residual block, and need
nothing more. What a function returns in the middle of a forward is caught by a `SiteMode`, entered for that forward
alone: activation checkpointing, sharding and pipelines, which call modules one by one, go on working.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_opt.quantization.layers.swap import add_behaviour, remove_behaviour
from lightning_opt.quantization.ops import is_exporting
from lightning_opt.quantization.placement_names import NAME_OF
from lightning_opt.quantization.quantizer import FakeQuantizer, is_calibrating

Site: TypeAlias = tuple[str, int, Mapping[str, Any]]
"""(function, how many-th call of that name within one forward of the owner, from 0; how it is quantized).

Two are no functions: "output" is what the owner returns (the number counts a tuple's items), "input" what it is given
(the number counts all arguments, those by keyword after the others).
"""

TIMES, ALONE = " by ", " alone"
"""A site "linear by embedding" is a product with the weight of the owner's table `embedding`, a tied head: both factors
are rounded. "linear by embedding alone" leaves the other factor as it is."""

CHILD = "site_quantizers"
_JOINS = ("cat", "stack", "hstack", "vstack")
_running = threading.local()


class SiteMode(TorchFunctionMode):
    """Quantizes the results of some functions while one forward of one owner runs.

    Only calls of the innermost owner count: its own, and those of its children that are neither owners nor paused.

    Args:
        owner: The module whose forward runs.
        quantizers: `{function: {index: quantizer}}`.
    """

    def __init__(self, owner: nn.Module, quantizers: Mapping[str, Mapping[int, Any]]) -> None:
        super().__init__()
        self.owner = owner
        self.quantizers = quantizers
        self.calls = dict.fromkeys(quantizers, 0)
        self.is_innermost = True
        self.outer: SiteMode | None = None

    def __enter__(self) -> "SiteMode":
        self.outer = _innermost()
        if self.outer is not None:
            self.outer.is_innermost = False
        _running.mode = self
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _running.mode = self.outer
        if self.outer is not None:
            self.outer.is_innermost = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = NAME_OF.get(func) if self.is_innermost else None
        if name is None or name not in self.calls:
            return func(*args, **(kwargs or {}))
        index = self.calls[name]
        self.calls[name] = index + 1
        quantizer = self.quantizers[name].get(index)
        if quantizer is None:
            return func(*args, **(kwargs or {}))
        if isinstance(quantizer, TiedProduct):
            return quantizer.product(self.owner, func, *args, **(kwargs or {}))
        if name in _JOINS and is_exporting():
            args = _joined(quantizer, args)
        return quantizer(func(*args, **(kwargs or {})))


class paused:  # noqa: N801 - used as a function: `with paused():`
    """Keep calls inside from counting as those of the owner around, such as those of a layer's own arithmetic."""

    def __enter__(self) -> None:
        self.mode = _innermost()
        self.before = self.mode is not None and self.mode.is_innermost
        if self.mode is not None:
            self.mode.is_innermost = False

    def __exit__(self, *_: object) -> None:
        if self.mode is not None:
            self.mode.is_innermost = self.before


class TiedProduct(nn.Module):
    """What stands for `linear(x, table.weight)` at a site: both are rounded, the weight as the table rounds it.

    Args:
        weight_of: The table's name within the owner.
        input_quantizer: Of what is multiplied.
    """

    def __init__(self, weight_of: str, input_quantizer: FakeQuantizer | None) -> None:
        super().__init__()
        self.weight_of = weight_of
        self.input_quantizer = input_quantizer

    def is_active(self, owner: nn.Module) -> bool:
        """Return whether anything is rounded or looked at, or the table holds integers."""
        quantizer: Any = getattr(owner.get_submodule(self.weight_of), "weight_quantizer", self)
        is_rounded = quantizer is self or (quantizer is not None and quantizer.enabled)
        return is_rounded or (self.input_quantizer is not None and _is_active(self.input_quantizer))

    def product(self, owner: nn.Module, func: Callable[..., Any], x: Tensor, *rest: Any, **kwargs: Any) -> Any:
        """Call `func` with the rounded values; the weight that it is given is not looked at."""
        table: Any = owner.get_submodule(self.weight_of)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        quantizer = getattr(table, "weight_quantizer", None)
        if hasattr(table, "float_weight"):
            weight = table.float_weight().to(x.dtype)
        else:
            is_rounded = quantizer is not None and quantizer.enabled
            weight = table.rounded_weight(quantizer)[0] if is_rounded else table.weight
        return func(x, weight, *rest[1:], **kwargs)


class SiteOwner(nn.Module):
    """What a module becomes that has sites; its quantizers are its child `site_quantizers`.

    While no quantizer is switched on or observes, the forward is the module's own and nothing else runs.
    """

    prefix = "Quantized"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with its sites quantized."""
        quantizers: dict[str, Any] = self._modules[CHILD]._modules  # type: ignore[union-attr]
        if not any(_is_active(quantizer, self) for quantizer in quantizers.values()):
            return super().forward(*args, **kwargs)
        sites = _by_function(quantizers)
        given, returned = sites.pop("input", None), sites.pop("output", None)
        if given:
            with paused():
                args, kwargs = _quantize_given(given, args, kwargs)
        if sites:
            with SiteMode(self, sites):
                answer = super().forward(*args, **kwargs)
        else:
            answer = super().forward(*args, **kwargs)
        if not returned:
            return answer
        with paused():
            return _quantize_returned(returned, answer)


class ChainOwner(SiteOwner):
    """An `nn.Sequential` that owns sites: it runs, counts and gives out its own parts, not its quantizers."""

    def _parts(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self._modules.items() if name != CHILD and module is not None}

    def __iter__(self) -> Any:
        return iter(self._parts().values())

    def __len__(self) -> int:
        return len(self._modules) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._parts().items())[index]))
        return list(self._parts().values())[index]


def swap_owner(
    module: nn.Module,
    sites: Sequence[Site],
    *,
    make: Callable[[Mapping[str, Any]], FakeQuantizer],
) -> None:
    """Make `module` the owner of `sites`, in place; the quantizers are switched off.

    Args:
        module: Keeps its parameters, buffers, children and their names; gets one child more.
        sites: What is quantized; more can be added by a second call.
        make: Builds the quantizer of a site, switched off, from its plain values.

    Raises:
        ValueError: A site is not one, or is there already, or the module's forward cannot be wrapped.
    """
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{type(module).__name__} has a forward that was put in on the object; it cannot be wrapped")
    if CHILD not in module._modules:
        module.add_module(CHILD, nn.ModuleDict())
        add_behaviour(module, ChainOwner if isinstance(module, nn.Sequential) else SiteOwner)
    held = module.get_submodule(CHILD)
    for site in sites:
        function, index, values = _checked(site)
        function, _, table = function.partition(TIMES)
        name = f"{function}_{index}"
        if name in held._modules:
            raise ValueError(f"site {function!r} number {index} of {type(module).__name__} is quantized already")
        held.add_module(name, _tied(module, table, make(values)) if table else make(values))


def restore_owner(module: nn.Module) -> None:
    """Make an owner the plain module that it was, in place; another module stays as it is."""
    if CHILD in module._modules:
        remove_behaviour(module, ChainOwner if isinstance(module, ChainOwner) else SiteOwner)
        del module._modules[CHILD]


def _tied(owner: nn.Module, table: str, quantizer: FakeQuantizer) -> TiedProduct:
    path = table.removesuffix(ALONE)
    try:
        owner.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"site: {path!r} names no module of {type(owner).__name__}") from error
    return TiedProduct(path, None if table.endswith(ALONE) else quantizer)


def _innermost() -> SiteMode | None:
    return getattr(_running, "mode", None)


def _is_active(quantizer: Any, owner: nn.Module | None = None) -> bool:
    if isinstance(quantizer, TiedProduct) and owner is not None:
        return quantizer.is_active(owner)
    return quantizer.enabled or (quantizer.observing and (quantizer.training or is_calibrating()))


def _by_function(quantizers: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for name, quantizer in quantizers.items():
        function, _, index = name.rpartition("_")
        found.setdefault(function, {})[int(index)] = quantizer
    return found


def _checked(site: Any) -> Site:
    known = isinstance(site, tuple | list) and len(site) == 3 and isinstance(site[2], Mapping)
    name = str(site[0]).partition(TIMES)[0] if known else ""
    if name not in {"input", "output", *NAME_OF.values()} or type(site[1]) is not int or site[1] < 0:
        raise ValueError(f"a site is [function, number, grid] with a function such as 'add'; got {str(site)[:80]}")
    return site[0], site[1], site[2]


def _quantize_given(
    quantizers: Mapping[int, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Quantize some of the arguments, counted in the order in which they are given."""
    args = tuple(quantizers[i](value) if i in quantizers else value for i, value in enumerate(args))
    given = enumerate(kwargs.items(), start=len(args))
    return args, {name: quantizers[i](value) if i in quantizers else value for i, (name, value) in given}


def _quantize_returned(quantizers: Mapping[int, Any], answer: Any) -> Any:
    """Quantize what a module returns: a tensor, or the tensors of a tuple by their place in it."""
    if isinstance(answer, Tensor):
        return quantizers[0](answer)
    if isinstance(answer, tuple) and type(answer) is tuple:
        return tuple(quantizers[i](item) if i in quantizers else item for i, item in enumerate(answer))
    raise TypeError(f"a module whose output is quantized returned {type(answer).__name__}, not a tensor")


def _joined(quantizer: Callable[[Tensor], Tensor], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round what is joined to the grid of the result: the same values, and each input is an integer for an engine."""
    return ([quantizer(tensor) for tensor in args[0]], *args[1:])
