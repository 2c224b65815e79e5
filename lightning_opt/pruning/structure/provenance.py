"""Which numbers of which modules reach which operations as sizes.

The model runs once with each whole number that a module holds replaced by a number that remembers where it comes from.
It behaves as the number it replaces; when it arrives as an argument of an operation, its source is noted.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_opt.forward import Inputs, forward
from lightning_opt.pruning.structure.calls import Link
from lightning_opt.pruning.structure.program import common_name, evaluating, without_cache

# (module that runs the operation, operation) -> for each call, the operation's numbers and the attribute of each
Calls: TypeAlias = dict[tuple[str, str], list[list[tuple[int, tuple[str, str] | None]]]]


class _Number(int):
    """A whole number that knows the attribute that it was read from; what is computed from it is a plain number."""

    source: tuple[str, str]


class _Recorder(TorchFunctionMode):
    """Notes the numbers among the arguments of operations, and where they come from."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.calls: Calls = defaultdict(list)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            for item in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(item, slice) and item != slice(None):
                    self._note("slice", [item.start, item.stop])
        else:
            own = args[1:] if args and not isinstance(args[0], int) else args
            self._note(common_name(name), _numbers([own, *(kwargs or {}).values()]))
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, numbers: list[Any]) -> None:
        found = [(int(number or 0), getattr(number, "source", None)) for number in numbers]
        self.calls[self.stack[-1], name].append(found)


def find_calls(model: nn.Module, example_inputs: Inputs) -> Calls:
    """Run `model` once and return the numbers that its operations are given; the model is put back."""
    stack = [""]
    recorder = _Recorder(stack)
    with evaluating(model), without_cache(model), _numbered(model), tracking(model, stack), recorder, torch.no_grad():
        forward(model, example_inputs)
    return dict(recorder.calls)


def source_of(calls: Calls, link: Link) -> tuple[str, str] | None:
    """Return the module and attribute that the number of an operation was read from, None if from none."""
    if link.place is None:
        return None
    name, turn, place = link.place
    noted = calls.get((link.module, name), [])
    if turn >= len(noted) or place >= len(noted[turn]):
        return None
    number, source = noted[turn][place]
    return source if number == link.size else None


@contextlib.contextmanager
def _numbered(model: nn.Module) -> Iterator[None]:
    """Replace the whole numbers that modules hold."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            held = vars(module)
            for name, value in list(held.items()):
                if type(value) is int and value > 1 and not name.startswith("_"):
                    number = _Number(value)
                    number.source = (path, name)
                    replaced.append((held, name, value))
                    held[name] = number
        yield
    finally:
        for held, name, value in replaced:
            held[name] = value


@contextlib.contextmanager
def tracking(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the module whose forward runs on top of `stack`, after an error too."""
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, *_: Any) -> None:
        stack.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave) for module in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _numbers(arguments: Any) -> list[Any]:
    """Return the numbers among arguments, lists opened, in order."""
    if isinstance(arguments, tuple | list):
        return [number for item in arguments for number in _numbers(item)]
    return [arguments] if isinstance(arguments, int) and not isinstance(arguments, bool) else []
