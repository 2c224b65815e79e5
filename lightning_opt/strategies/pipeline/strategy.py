"""The pipeline as a Lightning strategy: `Trainer(devices=2, strategy=pipeline())`."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_opt.checkpointing.keys import mix
from lightning_opt.checkpointing.sharded_strategy import ShardedCheckpointing, check_averages
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.modules import TaskModule
from lightning_opt.strategies.gradient_norm import clip_by_value_, global_norm, scale_to_norm_
from lightning_opt.strategies.mesh import copy_from_first
from lightning_opt.strategies.pipeline.bubble import Clock, Operation
from lightning_opt.strategies.pipeline.checks import check_example, check_module, check_sizes
from lightning_opt.strategies.pipeline.engine import Deliver, Engine, Place, asked_in_training
from lightning_opt.strategies.pipeline.recording import in_eval_mode, record
from lightning_opt.strategies.pipeline.schedules import SCHEDULES, placement, stages_per_process
from lightning_opt.strategies.pipeline.split import Costs, choose_cuts, split
from lightning_opt.strategies.pipeline.stages import Cut, Dropped, Stage, StagedNetwork
from lightning_opt.strategies.pipeline.sync import Copies

log = logging.getLogger("lightning_opt")
_DATA, _PIPE = "data_parallel", "pipeline"


class PipelineStrategy(ShardedCheckpointing, DDPStrategy):
    """Give each process some of the network's layers, and let micro-batches go through them one after the other.

    Works for every `TaskModule`: `Supervised`, `Distillation` and a module of one's own that has its parts. The steps,
    the numbers that are logged, checkpoints and the order of a run are those of one process; batch statistics
    (batch normalisation) are those of a micro-batch.

    Args:
        stages: Into how many parts the network is cut; None: as many as the schedule needs.
        micro_batches: Into how many parts a batch is cut. One that cannot be cut so is cut into fewer.
        schedule: "1f1b", "gpipe", "interleaved_1f1b", "zero_bubble" or "zbv".
        split: Modules with which the stages after the first begin; None: chosen so that stages cost alike.
        data_parallel_size: How many pipelines work side by side on different samples.
        costs: What is shared out evenly: "measured" seconds or "parameters".
        timeout_s: After how many seconds without an answer a peer counts as lost.

    Raises:
        ValueError: A value is out of range.
    """

    reads_features = True  # `Distillation` leaves the student's taps to it

    def __init__(
        self,
        *,
        stages: int | None = None,
        micro_batches: int = 4,
        schedule: str = "1f1b",
        split: Sequence[str] | None = None,
        data_parallel_size: int = 1,
        costs: Costs = "measured",
        timeout_s: float = 300.0,
    ) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s))
        for name, number in (("micro_batches", micro_batches), ("data_parallel_size", data_parallel_size)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
        if costs not in ("measured", "parameters"):
            raise ValueError(f"costs must be 'measured' or 'parameters', not {costs!r}")
        self.stages, self.micro_batches, self.schedule = stages, micro_batches, schedule
        self.names, self.pipelines, self.costs = split, data_parallel_size, costs
        self.engine: Engine | None = None
        self.clock = Clock()
        self.order: dict[int, list[Operation]] = {}
        self.stage_count = 0
        self._all_stages: list[Stage] = []
        self._copies: Copies | None = None

    # What is asked before any process starts

    def check_world(self, processes: int) -> None:
        """Refuse sizes that do not fit a number of processes; no process group is needed.

        Raises:
            ConfigError: They do not fit.
        """
        check_sizes(processes, pipelines=self.pipelines, stages=self.stages, schedule=self.schedule)

    def check_model(self, model: nn.Module, example_inputs: Inputs, *, processes: int | None = None) -> None:
        """Refuse a network that cannot be cut into that many stages; no process group is needed.

        Args:
            model: The network.
            example_inputs: A small batch.
            processes: How many there will be; None: those of the trainer; without one, as many as `stages`, or two.

        Raises:
            ConfigError: It cannot be cut; the message says where it can.
        """
        if processes is None and self.parallel_devices:
            processes = len(self.parallel_devices) * self.num_nodes
        count = self._count(processes // self.pipelines if processes else self.stages or 2)
        _search(model, example_inputs, count, costs="parameters", names=self.names)

    def check_module(self, module: "pl.LightningModule") -> None:
        """Refuse a LightningModule that cannot be trained in parts; no process group is needed.

        Raises:
            ConfigError: Naming the method or the loss.
        """
        check_module(module)

    def _count(self, processes: int) -> int:
        return self.stages or processes * stages_per_process(self.schedule, None, processes)

    # Processes and groups

    @override
    def setup_environment(self) -> None:
        processes = len(self.parallel_devices or [None]) * self.num_nodes
        self.check_world(processes)
        super().setup_environment()
        if not hasattr(self, "mesh"):
            shape = (self.pipelines, processes // self.pipelines)
            self.mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=(_DATA, _PIPE))

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.pipelines, "rank": self.mesh.get_local_rank(_DATA)}

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The processes that have the same layers and see different samples."""
        return self.mesh[_DATA].get_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The processes that see the same samples and have different layers."""
        return self.mesh[_PIPE].get_group()

    # The module

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        check_averages(trainer.callbacks, strategy="strategy=pipeline")  # type: ignore[attr-defined]
        self.accelerator.setup(trainer)
        module, fits = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        check_module(module)
        assert isinstance(module, TaskModule)
        if isinstance(self.precision_plugin, MixedPrecision) and self.precision_plugin.scaler is not None:
            raise ConfigError(
                "strategy=pipeline cannot scale losses as trainer.precision=16-mixed does; use bf16-mixed"
            )
        self.model = self.precision_plugin.convert_module(module)
        if self.engine is None:
            self._cut(trainer, module)
        self.model_to_device()
        for part in module.modules():
            if isinstance(part, Metric):
                part.process_group = self.data_group
        if fits:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fits:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _cut(self, trainer: "pl.Trainer", module: TaskModule) -> None:
        """Give every process the same network, and leave it its own part."""
        copy_from_first([*module.parameters(), *module.buffers()], device=self.root_device)
        self.parameter_order = [name for name, one in module.named_parameters() if one.requires_grad]
        processes = dist.get_world_size(self.pipeline_group)
        count = self._count(processes)
        inputs = check_example(trainer, module)
        cuts = self.broadcast(
            _search(module.model, inputs, count, costs=self.costs, names=self.names) if self.global_rank == 0 else None
        )
        self._all_stages = split(module.model, inputs, count, cuts=cuts)
        self._say()
        place = Place(
            group=self.pipeline_group,
            process=self.mesh.get_local_rank(_PIPE),
            owners=placement(self.schedule, count, processes),
            device=self.root_device,
        )
        self._place = place
        self._engine_of(module)
        assert self.engine is not None
        self._copies = Copies(module, self._all_stages, self.engine.shares, place, self.mesh)
        self._dropped = Dropped(module, self._copies.foreign(), device=self.root_device)
        self.engine.parameters = [one for one in module.parameters() if one.requires_grad]

    def _engine_of(self, module: TaskModule) -> None:
        self.engine = Engine(
            module=module,
            stages=self._all_stages,
            place=self._place,
            schedule=self.schedule,
            micro_batches=self.micro_batches,
            precision=self.precision_plugin.forward_context,
            clock=self.clock,
        )
        vars(module.model)["forward"] = _Whole(self.engine)

    def _say(self) -> None:
        parts = "; ".join(
            f"{stage.number} from {stage.start or 'the beginning'} ({len(stage.parameters)} tensors)"
            for stage in self._all_stages
        )
        if self.global_rank == 0:
            log.info("pipeline: %d stages: %s", len(self._all_stages), parts)

    # Steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        module, engine = self.lightning_module, self.engine
        assert isinstance(module, TaskModule)
        assert engine is not None
        with self.precision_plugin.train_step_context():
            context = module.context(args[0], ask=engine.needs_teacher or _all_must_ask(module))
        with _own_random_state(self.root_device, self._seed(module.trainer)):
            terms, gradients = engine.train(context)
        self.order, self.stage_count = engine.order, len(engine.stages)
        total = module.log_step(terms)
        delivered: Tensor = Deliver.apply(total, gradients, *engine.parameters)
        return delivered

    def _seed(self, trainer: "pl.Trainer") -> int:
        """Return what this process's dropout starts from in a step: another number on each, the same after a resume."""
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return mix(int(os.environ.get("PL_GLOBAL_SEED", "0")), done, self.global_rank)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        assert self.lightning_module is not None
        assert self._copies is not None
        if not self.lightning_module.trainer.fit_loop._should_accumulate():
            self._copies.reduce_gradients()

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = self._clip_by_norm
        plugin.clip_grad_by_value = self._clip_by_value

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        assert self._copies is not None
        parameters = [one for one in self.precision_plugin.main_params(optimizer) if one.grad is not None]
        counted = [one for one in parameters if self._copies.counts(one)]
        norm = global_norm(counted, groups=[self.pipeline_group], device=self.root_device)
        scale_to_norm_(parameters, norm, float(clip_val))

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value_(self.precision_plugin.main_params(optimizer), float(clip_val))

    # Checkpoints

    @property
    @override
    def replica_rank(self) -> int:
        return int(self.mesh.get_local_rank(_DATA))

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = super().lightning_module_state_dict()
        for name in [name for name in state if not self._saves(name)]:
            del state[name]
        return state

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        said = super().optimizer_state(optimizer)
        return {**said, "state": {name: one for name, one in said["state"].items() if self._saves(name)}}

    def _saves(self, name: str) -> bool:
        """Whether it is this process that writes a tensor, of all stages that hold it."""
        return self._copies is None or self._copies.savers.get(name, self._place.process) == self._place.process

    # The end

    @override
    def teardown(self) -> None:
        module = self.lightning_module
        trainer = getattr(module, "_trainer", None)
        if self.engine is not None and trainer is not None and trainer.state.status == TrainerStatus.RUNNING:
            self.gather()
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            vars(self.precision_plugin).pop(name, None)
        super().teardown()

    def gather(self) -> None:
        """Give every process the whole network again, as after `ddp`. Collective."""
        assert self.engine is not None
        assert self._copies is not None
        self.engine.close()
        self._copies.refill(self._dropped)
        self.engine = None


def _search(model: nn.Module, inputs: Inputs, count: int, *, costs: Costs, names: Sequence[str] | None) -> list[Cut]:
    with in_eval_mode(model):
        network = StagedNetwork(model, record(model, inputs))
        try:
            return choose_cuts(network, inputs, count, costs=costs, names=names)
        finally:
            network.release()


def _all_must_ask(module: TaskModule) -> bool:
    """Whether a teacher's answer takes the work of other processes too."""
    return any(teacher.asks_together for teacher in getattr(module, "teachers", []))


@contextmanager
def _own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Draw other numbers than the other processes for a while, without coming out of step with them."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


class _Whole:
    """What the network's forward is while its layers are spread: an answer that every process gets."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise asked_in_training()
        inputs: Any = kwargs if not args else args[0] if len(args) == 1 else args
        return self.engine.evaluate(inputs)


def pipeline(
    *,
    stages: int | None = None,
    micro_batches: int = 4,
    schedule: str = "1f1b",
    split: Sequence[str] | None = None,
    data_parallel_size: int = 1,
    costs: Costs = "measured",
    timeout_s: float = 300.0,
) -> PipelineStrategy:
    """Give each process some of the network's layers; see `PipelineStrategy`."""
    return PipelineStrategy(
        stages=stages,
        micro_batches=micro_batches,
        schedule=schedule,
        split=split,
        data_parallel_size=data_parallel_size,
        costs=costs,
        timeout_s=timeout_s,
    )
