"""Write what a run made in deployable formats, and time the files beside the models that they are compared with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_opt.cli.judging import COMPARED_BATCHES, batches_of_test, example_of, quality_of
from lightning_opt.cli.log import log
from lightning_opt.config.build import Config
from lightning_opt.evaluation import Measured
from lightning_opt.evaluation.latency import fixed_threads
from lightning_opt.export import LatencyPlan, OnnxRunner, OpenVinoRunner, TorchExportRunner, export
from lightning_opt.export.runner import EagerRunner, Runner
from lightning_opt.reporting import deployed_entry
from lightning_opt.tasks import Task

Record = dict[str, Any]


def written(
    config: Config,
    place: Path,
    model: nn.Module,
    task: Task,
    data: pl.LightningDataModule,
    *,
    formats: Sequence[str] | str,
    inside: str = "",
    latency: LatencyPlan | None = None,
) -> list[Record]:
    """Write a model in some formats; each file is read back, compared on test batches, and judged on the test set.

    Args:
        config: Its part `benchmark` says with how many threads.
        place: The folder.
        model: In eval mode, on the CPU.
        task: Judges the answers of each file.
        data: Gives the test set.
        formats: Which.
        inside: Path of the folder that `place` is in, as the record names files.
        latency: How to time the files beside each other; None leaves that to others.
    """
    found = export(
        model,
        example_of(data),
        place,
        formats=formats,
        batches=[inputs for inputs, _ in batches_of_test(task, data, COMPARED_BATCHES)],
        latency=latency,
        quality=lambda predictor: quality_of(predictor, task, data),
        threads=(config.get("benchmark") or {}).get("threads"),
    )
    for entry in found:
        entry["file"] = f"{inside}{place.name}/{entry['file']}" if entry["file"] else None
    return [deployed_entry(entry) for entry in found]


def runners_of(deployed: Sequence[Record], folder: Path, model: nn.Module, *, threads: int | None) -> dict[str, Runner]:
    """Open each file that was written and verified just now, in the engine that it is for.

    Args:
        deployed: The record's deployed files.
        folder: The run folder that they are named from.
        model: What they hold; runs the weights in PyTorch eager.
        threads: CPU threads of each engine; None is PyTorch's present number.
    """
    found: dict[str, Runner] = {}
    with fixed_threads(threads) as count:
        for entry in deployed:
            name, file = str(entry["format"]), entry["file"]
            if file is None:
                continue
            try:
                found[name] = _opened(folder / file, model, threads=count)
            except Exception as error:  # an engine that fails now leaves one file untimed, and nothing else
                log.warning("%s is not timed: %s", file, error)
                entry["reasons"]["latency_ms"] = f"could not be opened to be timed: {type(error).__name__}"
    return found


def _opened(path: Path, model: nn.Module, *, threads: int) -> Runner:
    if path.suffix == ".onnx":
        return OnnxRunner(path, threads=threads)
    if path.suffix == ".xml":
        return OpenVinoRunner(path, threads=threads)
    return TorchExportRunner(path) if path.suffix == ".pt2" else EagerRunner(model)


def with_times(deployed: Sequence[Record], measured: Measured) -> list[Record]:
    """Return the deployed files with what was timed of them beside the models."""
    made = []
    for entry in deployed:
        timed: Mapping[str, Any] | None = measured.runners.get(str(entry["format"]))
        if timed is None:
            made.append(dict(entry))
            continue
        old = {name: why for name, why in entry["reasons"].items() if name != "latency_ms"}
        made.append({**entry, **timed, "reasons": old | timed["reasons"]})
    return made
