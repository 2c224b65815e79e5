"""Read what named modules of a network say, without changing the network."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_opt.errors import ConfigError
from lightning_opt.losses.layers import match_names

_INPUT = ":in"


def near_names(wanted: str, names: Sequence[str], *, count: int = 5) -> list[str]:
    """Return up to `count` names that look most like `wanted`, best first.

    >>> near_names("layr3", ["conv1", "layer2", "layer3"], count=2)
    ['layer3', 'layer2']
    """
    ranked = sorted(names, key=lambda name: -SequenceMatcher(None, wanted, name).ratio())
    return ranked[:count]


def match_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the modules that any of the patterns fits, in the model's own order.

    Args:
        model: Any network; the prefix that `torch.compile` puts before names is left out.
        patterns: Exact names or `fnmatch` patterns, part by part (see `losses.relation.match_names`): `layer3`,
            `layer*.1`, `encoder.layer.*`, `**.query`. The ending ":in" stands for a module's first input and is kept.

    Raises:
        ConfigError: A pattern fits no module; the message lists near names.
    """
    names = list(_modules(model))
    both = [ending for name in names for ending in (name, name + _INPUT)]
    found: set[str] = set()
    for pattern in patterns:
        matched = match_names(both, pattern)
        if not matched:
            near = ", ".join(near_names(pattern.removesuffix(_INPUT), names)) or "none: the model has no submodules"
            raise ConfigError(
                f"tap {pattern!r} matches no module of {type(model).__name__}; near names: {near}. "
                "Use one of them; `*` stays within one dot-separated part, `**` crosses parts"
            )
        found.update(matched)
    return [name for name in both if name in found]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    # a module shared under two names is listed under both
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in ((n.replace("_orig_mod.", ""), m) for n, m in named) if name}


class FeatureTaps:
    """Keep the first tensor that each matched module returns (or is given, with ":in") during the model's forward.

    As a context manager it taps for a while; `install` and `remove` do the same for long. Both may be nested; the hooks
    leave with the last. What is kept goes at each forward of `model`, at `collect` and at exit. Outside a forward of
    `model` nothing is kept, so that recomputation in the backward pass (activation checkpointing) stores nothing. A
    module that runs several times in one forward gives its last answer.

    A copy of the model (deepcopy, pickle) made meanwhile does not feed these taps, and its hooks remove themselves at
    their first call. With `model.compile()` or `torch.compile(model)` hooks are traced into the graph without a break;
    PyTorch does not notice hooks that come or go after a graph was made, so `install` and `remove` drop this process's
    graphs (`torch.compiler.reset`; they are made again) if `model` or a part of it is compiled. Give the compiled
    object where `torch.compile` made one: from the network inside it the taps cannot know.

    Args:
        model: The network whose `forward` starts and ends a recording.
        patterns: See `match_modules`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with FeatureTaps(model, ["0"]) as taps:
    ...     _ = model(torch.ones(1, 2))
    ...     features = taps.collect()
    >>> {name: tuple(feature.shape) for name, feature in features.items()}
    {'0': (1, 3)}
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        self.model = model
        self.patterns = tuple(patterns)
        self.names = match_modules(model, self.patterns)
        self._record = _Record()
        self._handles: list[RemovableHandle] = []
        self._depth = 0

    def install(self) -> None:
        """Add the hooks, or count one more user of those that are there."""
        self._depth += 1
        if self._depth > 1 or not self.names:
            return
        modules, root = _modules(self.model), getattr(self.model, "_orig_mod", self.model)
        self._handles = [root.register_forward_pre_hook(_Start(self._record), prepend=True)]
        for name in self.names:
            module = modules[name.removesuffix(_INPUT)]
            if name.endswith(_INPUT):
                tap = _InputTap(self._record, name)
                self._handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(_OutputTap(self._record, name)))
        self._handles.append(root.register_forward_hook(_Stop(self._record)))
        _forget_graphs(self.model)

    def remove(self) -> None:
        """Take the hooks away, with the last user, and drop what is kept. More calls than `install` had do nothing."""
        self._depth = max(self._depth - 1, 0)
        if self._depth or not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._record.clear()
        _forget_graphs(self.model)

    def collect(self) -> dict[str, Tensor]:
        """Return the features of the last forward by name, in the model's order, and forget them.

        Raises:
            ConfigError: A tapped module did not run since the last `collect`, or its answer holds no tensor, or was
                changed in place after it was read.
        """
        features = {name: self._read(name) for name in self.names}
        self._record.clear()
        return features

    def _read(self, name: str) -> Tensor:
        if name not in self._record.features:
            raise ConfigError(f"tap {name!r}: the module did not run in this forward; tap a module that always runs")
        tensor, version = self._record.features[name], self._record.versions.get(name)
        if tensor is None:
            raise ConfigError(f"tap {name!r}: the module gave no tensor; tap a module that returns one")
        if version is not None and version != tensor._version:
            raise ConfigError(
                f"tap {name!r}: a later module changed this feature in place; tap that module, or build it with "
                "inplace=False"
            )
        return tensor

    def __enter__(self) -> "FeatureTaps":
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts without hooks: those of the copied model are spent
        fresh = {"_record": _Record(), "_handles": [], "_depth": 0}
        return {**self.__dict__, **fresh}


class _Record:
    """What the hooks of one `FeatureTaps` share."""

    def __init__(self) -> None:
        self.active = False
        self.features: dict[str, Tensor | None] = {}
        self.versions: dict[str, int] = {}

    def clear(self) -> None:
        self.features.clear()
        self.versions.clear()

    def put(self, name: str, value: Any) -> None:
        if not self.active:
            return
        tensor = next(_tensors(value), None)
        self.features[name] = tensor
        # neither a traced tensor nor an inference tensor counts its changes
        if tensor is not None and not torch.compiler.is_compiling() and not tensor.is_inference():
            self.versions[name] = tensor._version


class _Hook:
    """A hook on one record; copied or unpickled it is spent."""

    def __init__(self, record: _Record, name: str = "") -> None:
        self.record = record
        self.name = name

    def __reduce__(self) -> tuple[type["_Spent"], tuple[()]]:
        return _Spent, ()


class _Start(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        self.record.clear()
        self.record.active = True


class _Stop(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.record.active = False


class _InputTap(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.record.put(self.name, (args, kwargs))


class _OutputTap(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.record.put(self.name, output)


class _Spent:
    """What a hook becomes in a copy of its module: it removes itself at its first call."""

    def __call__(self, module: nn.Module, *call: Any) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _forget_graphs(model: nn.Module) -> None:
    if any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules()):
        torch.compiler.reset()
