"""What the callbacks of a fit say that they did to the model."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

Record = dict[str, Any]


def stages_of(trainer: pl.Trainer) -> list[Record]:
    """Collect what the trainer's callbacks say that they did to the model, as the record's `stages`.

    A callback says it by a method `stages()` that returns `[{method, from_step, to_step, what}]`; `layers` beside them,
    a list of plain values by layer, is kept too.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    told = [getattr(callback, "stages", None) for callback in callbacks]
    return [_stage(stage) for tell in told if callable(tell) for stage in tell() if _is_stage(stage)]


def _is_stage(stage: Any) -> bool:
    """A stranger's callback may have a method of that name that means something else."""
    return isinstance(stage, Mapping) and bool(stage.get("method"))


def _stage(told: Mapping[str, Any]) -> Record:
    steps = {key: None if told.get(key) is None else int(told[key]) for key in ("from_step", "to_step")}
    layers = [dict(row) for row in told.get("layers") or () if isinstance(row, Mapping)]
    said = {"method": str(told["method"]), **steps, "what": str(told.get("what", ""))}
    return {**said, "layers": layers} if layers else said
