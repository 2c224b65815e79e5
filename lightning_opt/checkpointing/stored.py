"""Tensors of a checkpoint that are read when, and as far as, somebody needs them."""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_opt.checkpointing.layout import Read, like
from lightning_opt.checkpointing.sharded import ShardedCheckpoint, optimizer_tensors
from lightning_opt.errors import ConfigError


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a sharded checkpoint."""

    saved: ShardedCheckpoint
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logical tensor."""
        return self.saved.shapes[self.name]

    def read(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return a box of it."""
        return self.saved.read(self.name, offsets=offsets, sizes=sizes)

    def whole(self) -> Tensor:
        """Return all of it."""
        return self.saved.read(self.name)


class StoredState(MutableMapping[str, Any]):
    """The state dict of a sharded checkpoint: a look at an entry reads it, going over the names reads nothing.

    Args:
        entries: By name: `Stored`, or any value.
        versions: What a state dict's `_metadata` is: the versions of its modules.
    """

    def __init__(self, entries: Mapping[str, Any], *, versions: Any = None) -> None:
        self._entries = dict(entries)
        self._metadata = versions

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        return entry.whole() if isinstance(entry, Stored) else entry

    def __setitem__(self, name: str, value: Any) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def unread(self, name: str) -> Any:
        """Return an entry without reading it."""
        return self._entries[name]


@dataclass(frozen=True)
class StoredOptimizer:
    """The state of an optimizer in a sharded checkpoint, by parameter names.

    Args:
        saved: Where it lies.
        number: Which optimizer it is.
        groups: The parameter groups, with names for parameters.
        others: What is no tensor, by parameter and key.
    """

    saved: ShardedCheckpoint
    number: int
    groups: list[dict[str, Any]]
    others: Mapping[str, Mapping[str, Any]]

    def by_name(self) -> dict[str, dict[str, Any]]:
        """Return the state of each parameter, its tensors unread."""
        tensors = optimizer_tensors(self.saved, self.number)
        return {
            name: {key: Stored(self.saved, full) for key, full in tensors.get(name, {}).items()}
            | dict(self.others.get(name, {}))
            for name in {**tensors, **self.others}
        }


def load_state(
    module: nn.Module, state: Mapping[str, Any], *, strict: bool = True, elsewhere: Collection[str] = ()
) -> None:
    """Load a state dict into a module whose parameters may be sharded; each process takes what it holds of them.

    Args:
        module: Plain, or with DTensors for parameters.
        state: Whole tensors, or `Stored` ones.
        strict: As `nn.Module.load_state_dict`.
        elsewhere: Names that other processes' parts of the model have, and this one's has not.

    Raises:
        ConfigError: A tensor has another shape than the parameter.
        RuntimeError: Names are missing or unexpected, as of `nn.Module.load_state_dict`.
    """
    live = module.state_dict()  # FSDP2 puts its shards in place for this
    given: OrderedDict[str, Any] = OrderedDict()
    for name in state:
        if name not in elsewhere:
            entry = state.unread(name) if isinstance(state, StoredState) else state[name]
            given[name] = fitted(entry, live.get(name), name=name)
    if (versions := getattr(state, "_metadata", None)) is not None:
        given._metadata = versions  # type: ignore[attr-defined]
    module.load_state_dict(given, strict=strict)


def fitted(entry: Any, live: Any, *, name: str) -> Any:
    """Return a value of a checkpoint laid out over processes like the live tensor that it is for.

    Args:
        entry: `Stored`, a whole tensor, or any other value, which is returned as it is.
        live: What it is for; what is no DTensor gets the whole value.
        name: For the message.

    Raises:
        ConfigError: It has another shape.
    """
    if not isinstance(live, DTensor) or isinstance(entry, DTensor) or not isinstance(entry, Stored | Tensor):
        return entry.whole() if isinstance(entry, Stored) else entry
    if tuple(entry.shape) != tuple(live.shape):
        raise ConfigError(
            f"checkpoint[{name}] has shape {tuple(entry.shape)}, the model's has {tuple(live.shape)}: build the model "
            "that the checkpoint was written by"
        )
    return like(live, entry.read if isinstance(entry, Stored) else _reader(entry))


def _reader(whole: Tensor) -> Read:
    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        box = whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))]
        return box.clone()  # not a view: the whole tensor would stay in memory

    return read
