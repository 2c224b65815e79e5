"""Watch a network once: which of its modules run, in which order, inside which other, and what they say."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_opt.forward import Inputs, forward, map_inputs

CallKey: TypeAlias = tuple[str, int]


@dataclass(kw_only=True)
class Call:
    """One call of one module.

    Attributes:
        key: Name of the module, and which of its calls this is, from 0.
        start: When it began, counted in beginnings and ends of calls.
        end: When it ended.
        parent: Position of the call that made it; -1 for the network itself.
        takes: Shape and kind of the first floating tensor that it was given; None without one.
        output: Its answer, with a tensor without data in the place of each tensor.
        seconds: How long it took, with all that it called.
        holds_parameters: Whether the module or what is inside it has parameters.
    """

    key: CallKey
    start: int
    parent: int
    takes: Tensor | None
    holds_parameters: bool
    end: int = -1
    output: Any = None
    seconds: float = 0.0


@dataclass
class Recording:
    """What one run of a network showed.

    Attributes:
        calls: In the order of their beginnings; the network's own call is left out.
        answer: What the network said.
        inputs: What it was called with.
    """

    calls: list[Call] = field(default_factory=list)
    answer: Any = None
    inputs: Inputs | None = None
    _inside: dict[CallKey, Counter[str]] = field(default_factory=dict)

    def position(self, key: CallKey) -> int:
        """Return where a call stands among the calls."""
        return next(n for n, call in enumerate(self.calls) if call.key == key)

    def inside(self, call: Call) -> Counter[str]:
        """Return how often a call called each module, itself or through others."""
        if call.key not in self._inside:
            within = (one.key[0] for one in self.calls if call.start < one.start < call.end)
            self._inside[call.key] = Counter(within)
        return self._inside[call.key]

    def children(self, parent: int) -> list[int]:
        """Return the positions of the calls that one call made itself."""
        return [n for n, call in enumerate(self.calls) if call.parent == parent]

    def ancestors(self, position: int) -> set[int]:
        """Return the positions of the calls that were running when one began."""
        found: set[int] = set()
        while (position := self.calls[position].parent) >= 0:
            found.add(position)
        return found


def record(model: nn.Module, inputs: Inputs) -> Recording:
    """Run a network once, without gradients, in the mode it is in."""
    recording, handles = Recording(inputs=inputs), []
    watch = _Watch(recording)
    for name, module in model.named_modules():
        if name:
            holds = any(True for _ in module.parameters())
            handles += [
                module.register_forward_pre_hook(watch.begin(name, holds), with_kwargs=True),
                module.register_forward_hook(watch.finish),
            ]
    try:
        with torch.no_grad():
            recording.answer = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recording


class _Watch:
    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.open: list[int] = []
        self.clock = 0
        self.seen: Counter[str] = Counter()

    def begin(self, name: str, holds_parameters: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.clock += 1
            first = next(floats_of((args, kwargs)), None)
            call = Call(
                key=(name, self.seen[name]),
                start=self.clock,
                parent=self.open[-1] if self.open else -1,
                takes=None if first is None else first.detach().to("meta"),
                holds_parameters=holds_parameters,
                seconds=-time.perf_counter(),
            )
            self.seen[name] += 1
            self.open.append(len(self.recording.calls))
            self.recording.calls.append(call)

        return hook

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock += 1
        call = self.recording.calls[self.open.pop()]
        call.end = self.clock
        call.seconds += time.perf_counter()
        call.output = pytree.tree_map(lambda v: v.detach().to("meta") if isinstance(v, Tensor) else v, output)


def floats_of(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of arguments, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floats_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from floats_of(item)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode for a while; every part gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def like(inputs: Inputs, device: torch.device) -> Any:
    """Return inputs on a device."""
    return map_inputs(inputs, lambda value: value.to(device) if isinstance(value, Tensor) else value)
