"""Write what a run made in deployable formats, and time the files beside the models that they are compared with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_opt.cli.log import log
from lightning_opt.evaluation import Measured
from lightning_opt.evaluation.latency import fixed_threads
from lightning_opt.export import OnnxRunner, OpenVinoRunner, TorchExportRunner
from lightning_opt.export.runner import EagerRunner, Runner

Record = dict[str, Any]


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
