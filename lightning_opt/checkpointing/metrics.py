"""What Lightning forgets at a checkpoint: the metrics of an epoch that has begun."""

from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_opt.checkpointing.boundary import Notify, epochs_of, inside_epoch, is_finished, observe
from lightning_opt.checkpointing.rng import by_rank, of_this_rank


class MetricState(pl.Callback):
    """Saves half-finished epoch metrics, so that those of a resumed epoch cover all of it.

    Acts: when a checkpoint is written, and once after a resume. Leaves in a checkpoint: the last values of all logged
    metrics, the sums behind `self.log(..., on_epoch=True)` and the states of the module's torchmetrics that have seen
    data, for every rank. Strategies: all; with another number of ranks, epoch metrics of the resumed epoch are partial
    (a warning says so).
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._cut: dict[str, Any] | None = None
        self._ends: list[Notify] = []
        self._trainer: pl.Trainer | None = None

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._trainer = trainer

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._trainer is None:
            return {}
        return by_rank(self._cut or self._snapshot(self._trainer), trainer=self._trainer)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict or None

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._cut = None
        self._ends = [observe(trainer, after_batch=lambda: self._keep_if_cut(trainer))]
        if self._pending is not None:
            self._ends.append(observe(trainer, before_epoch=lambda: self._restore(trainer)))

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for end in self._ends:
            end()
        self._ends = []

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if (state := self._take_pending(trainer)) is not None:  # there was nothing left to train
            _set_latest(trainer, state)

    def _snapshot(self, trainer: "pl.Trainer") -> dict[str, Any]:
        connector = trainer._logger_connector
        return {
            "callback": _numbers(connector._callback_metrics),
            "logged": _numbers(connector._logged_metrics),
            "progress_bar": _numbers(connector._progress_bar_metrics),
            "epoch": _epoch_sums(trainer.fit_loop.epoch_loop._results),
            "modules": _metric_states(trainer.lightning_module),
        }

    def _keep_if_cut(self, trainer: "pl.Trainer") -> None:
        # `max_steps` ends a fit inside an epoch: its sums are reset before the last checkpoint is written, but a run
        # with more steps goes on inside that epoch
        batches = trainer.fit_loop.epoch_loop
        if is_finished(trainer) and not batches._num_ready_batches_reached():
            self._cut = self._snapshot(trainer)

    def _restore(self, trainer: "pl.Trainer") -> None:
        state = self._take_pending(trainer)
        if state is None:
            return
        _set_latest(trainer, state)
        _load_metric_states(trainer.lightning_module, state["modules"])
        if inside_epoch(trainer) and epochs_of(trainer).ready > 0:
            _load_epoch_sums(trainer, state["epoch"])

    def _take_pending(self, trainer: "pl.Trainer") -> dict[str, Any] | None:
        state, self._pending = self._pending, None
        if state is None:
            return None
        if (mine := of_this_rank(state, trainer=trainer)) is not None:
            return dict(mine)
        rank_zero_warn(
            f"The checkpoint was written by {len(state['ranks'])} processes and is resumed by {trainer.world_size}"
            f"{' in another order' if len(state['ranks']) == trainer.world_size else ''}: "
            "training metrics of the resumed epoch cover only the rest of it"
        )
        return None


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in metrics.items()}


def _set_latest(trainer: "pl.Trainer", state: dict[str, Any]) -> None:
    connector = trainer._logger_connector
    connector._callback_metrics.update(_numbers(state["callback"]))
    connector._logged_metrics.update(_numbers(state["logged"]))
    connector._progress_bar_metrics.update(_numbers(state["progress_bar"]))


def _epoch_sums(results: _ResultCollection) -> dict[str, Any]:
    return {
        key: {
            "meta": _describe(result.meta),
            "is_tensor": result.is_tensor,
            "value": result.value.detach().clone() if result.is_tensor else None,
            "batch_size": _tensor_or_none(getattr(result, "cumulated_batch_size", None)),
            "last": _tensor_or_none(result._forward_cache),
        }
        for key, result in results.items()
        if not result.has_reset
    }


def _tensor_or_none(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None


def _describe(meta: _Metadata) -> dict[str, Any]:
    names = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
    said = {name: getattr(meta, name) for name in (*names, "dataloader_idx", "metric_attribute")}
    said["reduce_fx"] = meta.reduce_fx.__name__
    said["sync"] = [meta.sync.should, meta.sync.rank_zero_only, meta.sync.op]
    return said


class _ContinuedResults(_ResultCollection):
    """Results that go on from saved sums; what is logged again takes its own description along, and the sums."""

    def __init__(self, pending: dict[str, Any]) -> None:
        super().__init__(training=True)
        self._pending = pending

    @override
    def log(self, fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        key = f"{fx}.{name}"
        if key in self._pending:
            self.pop(key, None)
        super().log(fx, name, *args, **kwargs)

    @override
    def __setitem__(self, key: str, result: _ResultMetric) -> None:
        if (saved := self._pending.pop(key, None)) is not None:
            _fill(result, saved)
        super().__setitem__(key, result)

    @override
    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        if fx is None:  # the resumed epoch is over
            self._pending.clear()
        super().reset(metrics, fx)


def _load_epoch_sums(trainer: "pl.Trainer", saved: dict[str, Any]) -> None:
    loop = trainer.fit_loop.epoch_loop
    results = _ContinuedResults(dict(saved))
    for key, one in saved.items():
        if (result := _rebuild(trainer, one)) is not None:
            dict.__setitem__(results, key, result)
    loop._results = results.to(trainer.strategy.root_device)
    # not the epoch's first batch: the first value that is logged must not clear the sums
    trainer._logger_connector._first_loop_iter = True


def _rebuild(trainer: "pl.Trainer", saved: dict[str, Any]) -> _ResultMetric | None:
    said = dict(saved["meta"])
    should, rank_zero_only, op = said.pop("sync")
    meta = _Metadata(**said)
    meta.sync = _Sync(_should=should, fn=trainer.strategy.reduce, rank_zero_only=rank_zero_only, _op=op)
    result = _ResultMetric(meta, saved["is_tensor"])
    if result.is_tensor:
        _fill(result, saved)
        return result
    modules = dict(trainer.lightning_module.named_modules())
    result.value = modules.get(str(meta.metric_attribute))
    return result if result.value is not None else None


def _fill(result: _ResultMetric, saved: dict[str, Any]) -> None:
    result._update_count = 1
    result.has_reset, result._forward_cache = False, _tensor_or_none(saved["last"])
    if result.is_tensor and saved["value"] is not None:
        result.value = saved["value"].clone()
        if saved["batch_size"] is not None:
            result.cumulated_batch_size = saved["batch_size"].clone()


def _metrics_of(module: torch.nn.Module) -> dict[str, torchmetrics.Metric]:
    for one in module.modules():
        if isinstance(one, torchmetrics.MetricCollection):
            one.values(copy_state=False)  # members that share their states hold stale ones until they are asked for
    return {name: one for name, one in module.named_modules() if isinstance(one, torchmetrics.Metric)}


def _metric_states(module: torch.nn.Module) -> dict[str, Any]:
    return {
        name: {
            "updates": metric._update_count,
            "states": {state: _copied(getattr(metric, state)) for state in metric._defaults},
        }
        for name, metric in _metrics_of(module).items()
        if metric._update_count > 0
    }


def _load_metric_states(module: torch.nn.Module, saved: dict[str, Any]) -> None:
    for name, metric in _metrics_of(module).items():
        if name not in saved:
            continue
        for state, value in saved[name]["states"].items():
            setattr(metric, state, _copied(value, device=metric.device))
        metric._update_count, metric._computed = saved[name]["updates"], None


def _copied(value: Any, *, device: torch.device | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device or value.device, copy=True)
    if isinstance(value, list):
        return [_copied(one, device=device) for one in value]
    return value
