"""FSDP2, tensor parallelism and both at once, for any LightningModule."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_opt.checkpointing.sharded_strategy import ShardedCheckpointing, check_averages
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.losses import Term
from lightning_opt.modules import Distillation
from lightning_opt.strategies.gradient_norm import clip_by_norm_, clip_by_value_
from lightning_opt.strategies.mesh import DATA, TENSOR, Sizes, copy_from_first, copy_random_state, sizes_of
from lightning_opt.strategies.spread import Spread, is_spread
from lightning_opt.strategies.tensor_plans import Kind, Plan, check_taps, resolve
from lightning_opt.strategies.wrapping import Wrapping

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class ShardedStrategy(ShardedCheckpointing, ModelParallelStrategy):
    """Spread the weights of any LightningModule over processes: each holds a part, and all of it is computed with.

    Unlike Lightning's own, the module needs no `configure_model`: its network is found as the callbacks find it. A
    module that shards itself in `configure_model` is left as it is.

    Args:
        data_parallel_size: Processes that see different samples; None: what is left of all.
        tensor_parallel_size: Processes that share each layer; None: what is left of all.
        wrapping: How FSDP2 is put around the network.
        plan: How layers are cut: module-name pattern -> kind (see `tensor_plans.KINDS`); None: the built-in plan for a
            network with such names.
        keep_sharded: Whether weights stay spread when the trainer is done. Else every process has the whole module
            again afterwards, on the host, as after `ddp`.
        timeout_s: After how many seconds without an answer a peer counts as lost.
    """

    def __init__(
        self,
        *,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int | None = None,
        wrapping: Wrapping | None = None,
        plan: Plan | None = None,
        keep_sharded: bool = False,
        timeout_s: float = 300.0,
    ) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout_s))
        self._asked = {"data": data_parallel_size, "tensor": tensor_parallel_size}
        self._wrapping = wrapping or Wrapping()
        self._plan = dict(plan) if plan is not None else None
        self._keep_sharded = keep_sharded
        self._spread: Spread | None = None
        self._norms: list[nn.Module] = []
        self._tensor_size = tensor_parallel_size or 1

    # What is asked before any process starts

    def sizes(self, processes: int) -> Sizes:
        """Return how many processes share batches and layers.

        Raises:
            ConfigError: The sizes do not multiply to the number of processes.
        """
        return sizes_of(processes, data=self._asked["data"], tensor=self._asked["tensor"])

    def check_world(self, processes: int) -> None:
        """Refuse sizes that do not fit a number of processes; no process group is needed.

        `check_model` then knows among how many processes layers are cut.

        Raises:
            ConfigError: See `sizes`.
        """
        self._tensor_size = self.sizes(processes).tensor

    def check_model(self, model: nn.Module, example_inputs: Inputs | None = None) -> None:
        """Refuse a network that cannot be spread this way; no process group is needed.

        Raises:
            ConfigError: A pattern matches nothing, no plan knows the network, or layers cannot be cut evenly.
        """
        self._wrapping.units(model)
        self._kinds(model, self._tensor_size)

    def check_module(self, module: nn.Module) -> None:
        """Refuse a LightningModule whose step cannot be spread this way; no process group is needed.

        Raises:
            ConfigError: It draws sequences that the processes would have to draw together.
        """
        if isinstance(module, Distillation):
            _check_sampling(module, tensor=self._tensor_size)

    # Processes and groups

    @override
    def setup_environment(self) -> None:
        devices = len(self.parallel_devices or [None])
        sizes = self.sizes(devices * self.num_nodes)
        self._data_parallel_size, self._tensor_parallel_size = sizes.data, sizes.tensor
        super().setup_environment()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The processes that see different samples."""
        return self.device_mesh[DATA].get_group()

    # The module

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        assert self.accelerator is not None
        assert self.model is not None
        module = self.lightning_module
        assert module is not None
        check_averages(trainer.callbacks, strategy=type(self).__name__)  # type: ignore[attr-defined]
        self.accelerator.setup(trainer)
        if not is_overridden("configure_model", module):
            self.model = self.precision_plugin.convert_module(self.model)
            self.parallelize(module)
        _materialize_distributed_module(self.model, self.root_device)
        self.model_to_device()
        if self._spread is not None:
            self._spread.settle()
        _count_once(module, self.data_group)
        self._norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        if self.device_mesh[TENSOR].size() > 1:
            copy_random_state(device=self.root_device, group=self.device_mesh[TENSOR].get_group())
        self.barrier()
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fits:
            _optimizers_to_device(self.optimizers, self.root_device)

    def parallelize(self, module: nn.Module) -> None:
        """Spread a LightningModule's weights in place; one that is spread already is left as it is.

        Parameter objects change: optimizers are made afterwards. Collective.

        Raises:
            ConfigError: See `check_model`.
        """
        if is_spread(module):
            return
        network = _network_of(module)
        kinds = self._kinds(network, self.device_mesh[TENSOR].size())
        if isinstance(module, Distillation):
            _check_sampling(module, tensor=self.device_mesh[TENSOR].size())
            losses = [term.loss for term in module.terms.children() if isinstance(term, Term)]
            check_taps(network, kinds, [name for loss in losses for name in loss.student_taps])
        copy_from_first([*module.parameters(), *module.buffers()], device=self.root_device)
        self._spread = Spread(
            module,
            network,
            mesh=self.device_mesh,
            wrapping=self._wrapping,
            kinds=kinds,
            methods=[name for name in _STEPS if isinstance(module, pl.LightningModule) and is_overridden(name, module)],
        )

    def gather(self, module: nn.Module, *, device: torch.device | None = None) -> None:
        """Undo `parallelize` in place: every process has the whole weights again. Parameter objects change. Collective.

        Args:
            module: What was spread.
            device: Where they lie afterwards; None: where the process computes.
        """
        if self._spread is not None:
            self._spread.undo(device=device or self.root_device)
            self._spread = None

    def _kinds(self, network: nn.Module, size: int) -> dict[str, Kind]:
        return resolve(network, self._plan, size=size) if size > 1 else {}

    @override
    def model_to_device(self) -> None:
        if self._wrapping.cpu_offload:
            return
        super().model_to_device()

    # Steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_statistics()
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_statistics()
        return self._without_leftovers(super().validation_step(*args, **kwargs))

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_statistics()
        return self._without_leftovers(super().test_step(*args, **kwargs))

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_statistics()
        return self._without_leftovers(super().predict_step(*args, **kwargs))

    def _share_statistics(self) -> None:
        """Give all processes the first one's running statistics of batch norms, as DDP does before each forward."""
        if self._norms and self.device_mesh[DATA].size() > 1:
            statistics = [one for norm in self._norms for one in norm.buffers(recurse=False)]
            copy_from_first(statistics, device=self.root_device, group=self.data_group)

    def _without_leftovers(self, output: Any) -> Any:
        if self._spread is not None:
            self._spread.free()  # no backward comes that would free whole weights
        return output

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = self._clip_by_norm
        plugin.clip_grad_by_value = self._clip_by_value

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_norm_(self.precision_plugin.main_params(optimizer), float(clip_val), device=self.root_device)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value_(self.precision_plugin.main_params(optimizer), float(clip_val))

    # Numbers

    @override
    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor:
        """Reduce over the processes that see different samples, unless a group is given."""
        return super().reduce(tensor, self.data_group if group is None else group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    @override
    def teardown(self) -> None:
        module = self.lightning_module
        trainer = getattr(module, "_trainer", None)
        ended_well = trainer is not None and trainer.state.status == TrainerStatus.RUNNING
        if module is not None and self._spread is not None and ended_well and not self._keep_sharded:
            self.gather(module, device=torch.device("cpu"))
            module.cpu()
        if module is not None:
            _count_once(module, None)
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            vars(self.precision_plugin).pop(name, None)
        super().teardown()


def _network_of(module: nn.Module) -> nn.Module:
    if not isinstance(module, pl.LightningModule):
        return module
    from lightning_opt.callbacks.network import find_root  # callbacks ask about strategies

    return find_root(module, None)[1]


def _check_sampling(module: Distillation, *, tensor: int) -> None:
    """Refuse what would have processes call the network a different number of times, or with other samples."""
    if module.sampling is not None and (module.sampling.source == "student" or tensor > 1):
        raise ConfigError(
            "loss.sampling draws other sequences on each process, and a network in parts is computed by all of them "
            "together; set loss.sampling=null or strategy=ddp (strategy=fsdp2 can have loss.sampling.source=teacher)"
        )


def _count_once(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Let metrics add up only what processes with different samples have seen."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.process_group = group
