"""Sharded checkpoints for a Lightning strategy whose processes hold different parts of a model."""

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_opt.checkpointing import together
from lightning_opt.checkpointing.files import remove
from lightning_opt.checkpointing.garbage import collect_garbage
from lightning_opt.checkpointing.io import DurableCheckpointIO
from lightning_opt.checkpointing.layout import Part, parts_of
from lightning_opt.checkpointing.primitives import to_primitives
from lightning_opt.checkpointing.sharded import ShardedCheckpoint, is_index, malformed, open_together
from lightning_opt.checkpointing.sharded_save import save_sharded, total_bytes
from lightning_opt.checkpointing.stored import Stored, StoredOptimizer, StoredState, fitted, load_state
from lightning_opt.errors import ConfigError, UntrustedInputError

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object
_Parts = dict[str, list[Part]]


class ShardedCheckpointing(_Base):
    """Put this before a Lightning strategy: `class Mine(ShardedCheckpointing, ModelParallelStrategy)`.

    Checkpoints are written by all processes, in one format for every strategy, and are read by any number of processes
    under any strategy; so are ordinary single files.

    Order of a restore: as with one process, Lightning reads the checkpoint *before* the strategy's `setup`. The
    module's and the callbacks' `on_load_checkpoint` (which replay recipes) and the callbacks' `load_state_dict` are
    therefore called while the model is whole; its shapes are those of the checkpoint when `setup` begins to shard it.
    The weights wait until the strategy calls `setup_precision_plugin`, the last step of every Lightning `setup`, and
    go straight into the shards.

    What it needs of the strategy: `distributed_sampler_kwargs`, `lightning_module`, `optimizers`; names of parameters
    that stay what they are in one process. A strategy that gives each process other layers sets `parameter_order` and
    `replica_rank`.
    """

    parameter_order: Sequence[str] | None = None
    """Names of all trained parameters of the whole model in the order of one process; None: the live module's."""

    _waiting: tuple[Mapping[str, Any], bool] | None = None
    _is_ready = False

    @property
    def replica_rank(self) -> int:
        """Which of the processes with the same plain tensors this is; the first one writes them."""
        return together.rank()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether Lightning reads the checkpoint after `setup`: no, see the class."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for `load_optimizer_state_dict`."""
        return True

    def peek(self, trainer: "pl.Trainer") -> dict[str, Any] | None:
        """Return the checkpoint that this run starts from, or None; its tensors are read only if they are looked at.

        Recipes in it have been replayed by the time a strategy's `setup` is called.
        """
        return trainer._checkpoint_connector._loaded_checkpoint or None

    def setup_environment(self) -> None:
        """Forget what waited for an earlier `setup`."""
        self._waiting, self._is_ready = None, False
        super().setup_environment()

    def setup(self, trainer: "pl.Trainer") -> None:
        """Refuse what cannot follow sharded weights.

        Raises:
            ConfigError: A callback averages weights.
        """
        check_averages(trainer.callbacks, strategy=type(self).__name__)  # type: ignore[attr-defined]
        super().setup(trainer)

    def setup_precision_plugin(self) -> None:
        """Load the weights that waited: the model has its final layout now."""
        super().setup_precision_plugin()
        self._is_ready = True
        if self._waiting is not None:
            state, strict = self._waiting
            self._waiting = None
            self._load_weights(state, strict=strict)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what this process holds of the model's state."""
        return self._module().state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what this process holds of an optimizer's state, with names for parameters; all processes call it."""
        inner = _inner(optimizer)
        names = self._names_of_parameters()
        groups = self._group_names(inner)
        said = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": order}
            for group, order in zip(inner.param_groups, groups, strict=True)
        ]
        return {"state": {names[id(p)]: dict(state) for p, state in inner.state.items()}, "param_groups": said}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint from all processes; nothing has its name before every piece is durable.

        Raises:
            StorageError: The disk of any process is full or fails; the previous version is intact.
            ConfigError: It holds something that could only be loaded by running code.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r} is not used here: leave it out")
        path = Path(together.from_first(os.fspath(filepath)))
        parts, rest, own = together.agree(lambda: self._split(checkpoint))
        parts |= self._differing(checkpoint["state_dict"])
        rest = _with_others(rest, together.gather(own))
        rest["sharded"]["data_ranks"] = together.gather(self._data_rank())
        save_sharded(
            path,
            parts=parts,
            rest=rest,
            step=int(rest.get("global_step", 0)),
            epoch=int(rest.get("epoch", 0)),
            before_publish=getattr(self.checkpoint_io, "before_publish", None),
        )

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint, sharded or a single file; the tensors of a sharded one are read when they are needed.

        Raises:
            CheckpointDamagedError: A file is missing or not what it should be, for any process.
            UntrustedInputError: Loading it would run code.
        """
        if weights_only is False:
            raise UntrustedInputError(f"{checkpoint_path}: weights_only off would run code from the file; leave it out")
        text = together.from_first(os.fspath(checkpoint_path))
        if Path(text).is_dir():
            raise UntrustedInputError(f"{text} is a folder of torch's distributed format, which is pickled: not loaded")
        if not is_index(Path(text)):
            io = self.checkpoint_io
            own = DurableCheckpointIO() if type(io) is TorchCheckpointIO else io
            return together.agree(lambda: own.load_checkpoint(text, weights_only=True))
        saved = open_together(Path(text))
        return together.agree(lambda: self._from_index(saved))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, or keep them until the model has its final layout."""
        if self._is_ready:
            self._load_weights(checkpoint["state_dict"], strict=strict)
        else:
            self._waiting = (checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what this process holds of the optimizers' states; all processes call it.

        Raises:
            ConfigError: The optimizers train other parameters than those of the checkpoint.
        """
        self._names_of_parameters()
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            order = self._group_names(_inner(optimizer))
            together.agree(functools.partial(self._load_optimizer, _inner(optimizer), saved, order))

    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Remove a checkpoint and the files that it alone needs."""
        if not self.is_global_zero:
            return
        path = Path(filepath)
        if is_index(path):
            remove(path)
            collect_garbage(path.parent)
        else:
            self.checkpoint_io.remove_checkpoint(path)

    def checkpoint_bytes(self, checkpoint: Mapping[str, Any]) -> int:
        """Return how many bytes of tensors all processes together would write; all processes call it."""
        parts, _, _ = together.agree(lambda: self._split(checkpoint))
        return sum(together.gather(total_bytes(parts)))

    def _module(self) -> "pl.LightningModule":
        assert self.lightning_module is not None
        return self.lightning_module

    def _data_rank(self) -> list[int]:
        said: dict[str, Any] = getattr(self, "distributed_sampler_kwargs", None) or {}
        return [int(said.get("rank", together.rank())), int(said.get("num_replicas", together.processes()))]

    def _names_of_parameters(self) -> dict[int, str]:
        for part in self._module().modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # gathered weights are other objects than those that the optimizer has
        return {id(parameter): name for name, parameter in self._module().named_parameters()}

    def _group_names(self, optimizer: Optimizer) -> list[list[str]]:
        """Return the names of each parameter group over all processes, in the order of one process."""
        names = self._names_of_parameters()
        mine = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
        every = together.gather(mine)
        if any(not name for groups in every for group in groups for name in group):
            raise ConfigError(
                f"optimizer {type(optimizer).__name__} trains parameters that are not parameters of "
                f"{type(self._module()).__name__}: their state could not be found again in a checkpoint"
            )
        if all(groups == every[0] for groups in every):
            return mine
        order = {name: place for place, name in enumerate(self.parameter_order or ())}
        merged = [dict.fromkeys(name for groups in every for name in groups[number]) for number in range(len(mine))]
        return [sorted(group, key=lambda name: order.get(name, len(order))) for group in merged]

    def _split(self, checkpoint: Mapping[str, Any]) -> tuple[_Parts, dict[str, Any], Any]:
        """Return this process's pieces, what is whole in the first process, and what only this process knows."""
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        rest = dict(to_primitives(rest))
        state = checkpoint["state_dict"]
        parts = {f"state_dict.{n}": self._parts(v) for n, v in state.items() if isinstance(v, Tensor)}
        extra = {name: to_primitives(value) for name, value in state.items() if not isinstance(value, Tensor)}
        others: list[Any] = []
        optimizers = []
        for number, one in enumerate(checkpoint.get("optimizer_states", ())):
            tensors, odd = _split_state(one["state"])
            parts |= {f"optimizer.{number}.{name}": self._parts(value) for name, value in tensors.items()}
            others.append(odd)
            optimizers.append({"param_groups": to_primitives(one["param_groups"])})
        if "optimizer_states" in checkpoint:
            rest["optimizers"] = optimizers
        rest["sharded"] = {}
        versions = getattr(state, "_metadata", OrderedDict())
        return parts, rest, (extra, versions, others) if self.replica_rank == 0 else None

    def _parts(self, tensor: Tensor) -> list[Part]:
        return parts_of(tensor, replica=self.replica_rank)

    def _differing(self, state: Mapping[str, Any]) -> _Parts:
        """Return the buffers that are not what they are in the first process that has them.

        Nobody keeps the running statistics of batch norms equal over processes; each gets its own back.
        """
        buffers = {name for name, _ in self._module().named_buffers()}
        plain = {
            n: v for n, v in state.items() if n in buffers and isinstance(v, Tensor) and not isinstance(v, DTensor)
        }
        first: dict[str, str] = {}
        for known in together.gather({name: _digest(value) for name, value in plain.items()}):
            first = {**known, **first}
        return {
            f"ranks.{together.rank()}.state_dict.{name}": parts_of(value, replica=0)
            for name, value in plain.items()
            if first[name] != _digest(value)
        }

    def _from_index(self, saved: ShardedCheckpoint) -> dict[str, Any]:
        with malformed(saved.path):
            rest: dict[str, Any] = saved.rest
            about, optimizers = rest.pop("sharded", {}), rest.pop("optimizers", None)
            names = {name: f"state_dict.{name}" for name in saved.names("state_dict.")}
            ranks, rank = about.get("data_ranks", []), together.rank()
            if len(ranks) == together.processes() and list(ranks[rank]) == self._data_rank():
                mine = f"ranks.{rank}.state_dict."
                names |= {name: mine + name for name in saved.names(mine) if name in names}
            entries = {name: Stored(saved, full) for name, full in names.items()} | dict(about.get("extra_state", {}))
            rest["state_dict"] = StoredState(entries, versions=about.get("versions"))
            if optimizers is not None:
                rest["optimizer_states"] = [
                    StoredOptimizer(saved, number, one["param_groups"], one.get("others", {}))
                    for number, one in enumerate(optimizers)
                ]
        return rest

    def _load_weights(self, state: Mapping[str, Any], *, strict: bool) -> None:
        module = self._module()
        mine = set(module.state_dict())
        elsewhere = set().union(*together.gather(sorted(mine))) - mine
        together.agree(lambda: load_state(module, state, strict=strict, elsewhere=elsewhere))

    def _load_optimizer(self, optimizer: Optimizer, saved: Any, order: list[list[str]]) -> None:
        groups, states = _by_name(saved, order)
        names = self._names_of_parameters()
        state: dict[int, dict[str, Any]] = {}
        numbered, number = [], 0
        for live, said in zip(optimizer.param_groups, groups, strict=True):
            places = range(number, number + len(live["params"]))
            numbered.append({**said, "params": list(places)})
            number += len(places)
            for place, parameter in zip(places, live["params"], strict=True):
                name = names[id(parameter)]
                if name in states:
                    state[place] = {k: _for_parameter(v, parameter, f"{name}.{k}") for k, v in states[name].items()}
        optimizer.load_state_dict({"state": state, "param_groups": numbered})


def check_averages(callbacks: Sequence["pl.Callback"], *, strategy: str) -> None:
    """Refuse callbacks that average weights: they copy the whole model before it is sharded.

    Raises:
        ConfigError: Naming the callback.
    """
    for callback in callbacks:
        if isinstance(callback, WeightAveraging):
            raise ConfigError(
                f"callbacks: {type(callback).__name__} keeps a whole copy of the model, which {strategy} does not have "
                "on any process; leave it out or set strategy=ddp"
            )


def _inner(optimizer: Any) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _split_state(state: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return an optimizer's tensors as `{parameter.key: tensor}`, and the rest as `{parameter: {key: value}}`."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and isinstance(key, str) and "." not in key:
                tensors[f"{name}.{key}"] = value
            else:
                others.setdefault(name, {})[key] = to_primitives(value)
    return tensors, others


def _with_others(rest: dict[str, Any], every: Sequence[Any]) -> dict[str, Any]:
    """Add what the processes know of their own layers."""
    extra: dict[str, Any] = {}
    versions: OrderedDict[str, Any] = OrderedDict()
    for own in every:
        if own is None:
            continue
        extra, versions = {**own[0], **extra}, OrderedDict({**own[1], **versions})
        for optimizer, odd in zip(rest.get("optimizers", ()), own[2], strict=True):
            optimizer["others"] = {**odd, **optimizer.get("others", {})}
    return {**rest, "sharded": {"extra_state": extra, "versions": versions}}


def _by_name(saved: Any, order: list[list[str]]) -> tuple[list[dict[str, Any]], Mapping[str, Mapping[str, Any]]]:
    """Return an optimizer's groups and states, as saved by one process (by number) or by several (by name)."""
    if isinstance(saved, StoredOptimizer):
        found = [set(group["params"]) for group in saved.groups]
        if found != [set(group) for group in order]:
            odd = sorted(set().union(*found) ^ {name for group in order for name in group})[:3]
            raise ConfigError(
                f"checkpoint: its optimizer has other parameters than this run's ("
                f"{', '.join(odd) or 'in other groups'}): "
                "keep the model and the optimizer of the run that wrote it"
            )
        return saved.groups, saved.by_name()
    groups = saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group) for group in order]:
        raise ConfigError(
            f"checkpoint: its optimizer has groups of {[len(group['params']) for group in groups]} parameters, this "
            f"run's of {[len(group) for group in order]}: keep the model and the optimizer of the run that wrote it"
        )
    pairs = [
        (n, name)
        for group, names in zip(groups, order, strict=True)
        for n, name in zip(group["params"], names, strict=True)
    ]
    return groups, {name: saved["state"][number] for number, name in pairs if number in saved["state"]}


def _for_parameter(value: Any, parameter: Tensor, name: str) -> Any:
    """Return a value of an optimizer's state laid out like the parameter, if it has its shape."""
    same = isinstance(value, Stored | Tensor) and tuple(value.shape) == tuple(parameter.shape)
    return fitted(value, parameter if same else None, name=name)


def _digest(tensor: Tensor) -> str:
    here = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(here.numpy().data).hexdigest()
