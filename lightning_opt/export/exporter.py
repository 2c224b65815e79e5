"""Write a model in deployable formats, read each file back, and say how closely it repeats the model."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_opt.errors import ConfigError, LightningOptError, MissingExtraError
from lightning_opt.evaluation.inputs import at_batch, to_device
from lightning_opt.evaluation.latency import fixed_threads
from lightning_opt.evaluation.size import bytes_on_disk
from lightning_opt.evaluation.state import evaluation_mode, on_device, uncompiled
from lightning_opt.export.compare import Difference, compare
from lightning_opt.export.cpu import multiplies_int8_exactly
from lightning_opt.export.files import make_folder
from lightning_opt.export.manifest import MANIFEST, add_to_manifest
from lightning_opt.export.onnx import OnnxRunner, require_onnx_writer, require_onnxruntime, write_onnx
from lightning_opt.export.openvino import OpenVinoRunner, require_openvino, write_openvino
from lightning_opt.export.precision import FLOATS, precision_of
from lightning_opt.export.program import export_program
from lightning_opt.export.quantized_ops import holds_dynamic
from lightning_opt.export.runner import EagerRunner, Runner
from lightning_opt.export.safetensors import read_safetensors, state_tensors, write_safetensors
from lightning_opt.export.timing import LatencyPlan, explain_latency, time_runners
from lightning_opt.export.torch_export import TorchExportRunner, write_torch_export
from lightning_opt.forward import Inputs

FORMATS = ("safetensors", "torch_export", "onnx", "openvino")
FILES = {"safetensors": "model.safetensors", "torch_export": "model.pt2", "onnx": "model.onnx", "openvino": "model.xml"}
_SIDECARS = {"onnx": ("model.onnx.data",), "openvino": ("model.bin",)}
_NUMBERS = ("runtime", "file", "size_bytes", "latency_ms", "quality", "max_abs_diff", "argmax_agreement")
_MAX_STEPS = 16.0
_MIN_AGREEMENT = 0.99

Deployed = dict[str, Any]
Quality = Callable[[Callable[[Inputs], Tensor]], Mapping[str, float]]
log = logging.getLogger("lightning_opt")


def export(
    model: nn.Module,
    example_inputs: Inputs,
    folder: str | Path,
    *,
    formats: Sequence[str] | str = FORMATS,
    batches: Iterable[Inputs] = (),
    latency: LatencyPlan | None = LatencyPlan(),  # noqa: B008 - it is frozen
    quality: Quality | None = None,
    threads: int | None = None,
    tolerance: float = 0.05,
) -> list[Deployed]:
    """Write `model` to `folder` in each of `formats`, read each file back from disk, and compare its answers.

    Where the folder is an artifact, the files are added to its manifest. A model whose values are rounded to integers
    is converted (a copy of it, if need be), so that engines compute with integers; an artifact's own weights stay those
    of the model as it is, for its recipe says nothing of that: save it with `deployable(model)` to have integers there.

    Args:
        model: Handed back in the mode and on the device that it came in.
        example_inputs: Inputs of one or more samples.
        folder: Made when it is not there.
        formats: Some of "safetensors", "torch_export", "onnx", "openvino"; or "auto": all whose packages are there.
        batches: Inputs to compare answers on, such as test batches; none: the example. The batch axis of the files is
            free, and so is every axis whose length differs among these.
        latency: How to time the files, side by side; None leaves their latency unknown.
        quality: Takes a predictor (inputs -> main tensor) and returns the task's metrics; runs once for each file.
        threads: CPU threads, the same for each engine; None keeps PyTorch's present number.
        tolerance: Largest difference that is accepted, over the model's largest absolute answer. Engines round
            integers in ways of their own, which moves a few answers by a step: of a quantized model's file it is
            accepted too that its answers stay within 16 steps of an 8-bit grid, or 99 % of its classes the same.

    Returns:
        For each format `format, runtime, precision, file` (in `folder`), `size_bytes` (with its sidecar),
        `latency_ms`, `quality`, `max_abs_diff`, `steps` (that difference in steps of the 8-bit grid that covers the
        model's answers) and `argmax_agreement` against the model in PyTorch eager, and `reasons`: for each number that
        is None, why. With "auto", a format that cannot hold this model has no file but a reason.

    Raises:
        MissingExtraError: A format was asked for by name and its package is not installed.
        ConfigError: A format of another name; or one asked for by name cannot hold this model, or does not repeat it.
        StorageError: A file could not be written.
    """
    wanted, batches = _choose(formats), [to_device(each, "cpu") for each in batches]
    example, folder = to_device(example_inputs, "cpu"), Path(folder)
    make_folder(folder)
    model = getattr(model, "_orig_mod", model)
    kept, model = model, deployable(model)
    with on_device("cpu", model), evaluation_mode(model), uncompiled(model), fixed_threads(threads) as fixed:
        writer = _Writer(model, example, batches, folder, threads=fixed, tolerance=tolerance)
        if (folder / MANIFEST).is_file():
            writer.kept = kept
        entries, runners = _write_all(writer, wanted, forgive=formats == "auto")
        timed = {} if latency is None else time_runners(runners, example, latency)
        for name, runner in runners.items():
            _complete(entries[name], timed.get(name), None if quality is None else quality(runner.predict))
    if (folder / MANIFEST).is_file():
        add_to_manifest(folder, [file for name in runners for file in written_files(name, folder)])
    return list(entries.values())


def _complete(entry: Deployed, latency_ms: Any, quality: Mapping[str, float] | None) -> None:
    """Add to a file's entry how fast it is and what it is worth, where that is known."""
    entry["latency_ms"] = latency_ms
    explain_latency(entry)
    if quality is not None:
        entry["quality"] = dict(quality)
        entry["reasons"].pop("quality")


def deployable(model: nn.Module) -> nn.Module:
    """Return a model as it is deployed: where its values are rounded, a copy that holds integers; else itself."""
    from lightning_opt.quantization.convert import convert
    from lightning_opt.quantization.state import is_converted, quantizers

    if is_converted(model) or not any(quantizer.enabled for quantizer in quantizers(model).values()):
        return model
    with uncompiled(model):
        return convert(copy.deepcopy(model))


def written_files(name: str, folder: Path) -> list[str]:
    """List the files of one format that are in `folder`: the main one first, then its sidecar."""
    return [file for file in (FILES[name], *_SIDECARS.get(name, ())) if (folder / file).is_file()]


def _write_all(
    writer: "_Writer", wanted: Sequence[str], *, forgive: bool
) -> tuple[dict[str, Deployed], dict[str, Runner]]:
    """Write the formats; where it is forgiven, one that cannot hold the model leaves an entry that says why."""
    entries, runners = {}, {}
    for name in wanted:
        try:
            entries[name], runners[name] = writer.write(name)
        except ConfigError as error:
            if not forgive:
                raise
            log.warning("export: no %s: %s", name, error)
            entries[name] = _empty_entry(name) | {"reasons": dict.fromkeys(_NUMBERS, str(error))}
    return entries, runners


class _Writer:
    """Write one model's formats; it is traced once, when the first of them needs it."""

    def __init__(
        self,
        model: nn.Module,
        example: Inputs,
        batches: Sequence[Inputs],
        folder: Path,
        *,
        threads: int,
        tolerance: float,
    ) -> None:
        self._model, self._example, self._batches, self._folder = model, example, batches, folder
        self._threads, self._tolerance = threads, tolerance
        self._precision = precision_of(model)
        self._is_quantized = self._precision not in FLOATS
        self._programs: dict[bool, ExportedProgram | ConfigError] = {}
        self._onnx: Path | None = None
        self.kept = model

    def write(self, name: str) -> tuple[Deployed, Runner]:
        """Write one format, open its file, compare, and return its entry and what runs it.

        Raises:
            ConfigError: The format cannot hold the model, or the file does not repeat it; the file is removed then.
        """
        try:
            runner = self._write(name, self._folder / FILES[name])
            found = compare(EagerRunner(self._model), runner, self._batches or [at_batch(self._example, 2)])
            self._check(name, found)
        except Exception as error:
            # The weights alone stay: the folder may be an artifact, whose weights they are.
            for file in written_files(name, self._folder) if name != "safetensors" else ():
                (self._folder / file).unlink(missing_ok=True)
            if isinstance(error, LightningOptError | OSError):
                raise
            # Converters raise anything; all of it means that the format cannot hold the model.
            raise ConfigError(
                f"{type(self._model).__name__} cannot be exported as {name}: {first_line(error)}; leave {name} out of "
                "export.formats"
            ) from error
        return self._entry(name, runner, found), runner

    def _write(self, name: str, path: Path) -> Runner:
        if name == "safetensors":
            with uncompiled(self.kept):
                fresh = copy.deepcopy(self.kept).cpu().eval()
            with torch.no_grad():  # so that what is compared comes from the file and not from the copy
                for _, tensor in state_tensors(fresh):
                    tensor.zero_()
            return EagerRunner(read_safetensors(fresh, write_safetensors(self.kept, path)))
        if name == "torch_export":
            return TorchExportRunner(write_torch_export(self._traced(engines=False), path))
        program = self._traced(engines=self._is_quantized)
        if name == "onnx":
            self._onnx = write_onnx(program, path)
            return OnnxRunner(path, threads=self._threads)
        source = self._onnx if self._is_quantized and not holds_dynamic(program) else None
        return OpenVinoRunner(write_openvino(program, path, source=source), threads=self._threads)

    def _traced(self, *, engines: bool) -> ExportedProgram:
        """Trace the model the first time; that it cannot be traced is also found out once."""
        if engines not in self._programs:
            try:
                traced = export_program(self._model, self._example, batches=self._batches, engines=engines)
                self._programs[engines] = traced
            except ConfigError as error:
                self._programs[engines] = error
        found = self._programs[engines]
        if isinstance(found, ConfigError):
            raise found
        return found

    def _check(self, name: str, found: Difference) -> None:
        close = found.max_abs_diff <= self._tolerance * max(found.largest, 1e-6)  # not where it is NaN
        if self._is_quantized and not close:
            agree = found.argmax_agreement is not None and found.argmax_agreement >= _MIN_AGREEMENT
            close = found.steps <= _MAX_STEPS or (agree and math.isfinite(found.max_abs_diff))
        if not close:
            raise ConfigError(
                f"{FILES[name]} does not repeat {type(self._model).__name__}: answers differ by "
                f"{found.max_abs_diff:.3g} and the largest is {found.largest:.3g}; {self._way_out(name)}"
            )

    def _way_out(self, name: str) -> str:
        if self._is_quantized and name == "openvino" and not multiplies_int8_exactly():
            return "this processor has no VNNI, so quantize weights to 7 bits (w7a8), or leave it out of export.formats"
        return f"leave {name} out of export.formats"

    def _entry(self, name: str, runner: Runner, found: Difference) -> Deployed:
        reasons = {"quality": "not evaluated here"}
        if found.argmax_agreement is None:
            reasons["argmax_agreement"] = "the model's answer has no classes to choose among"
        return _empty_entry(name) | {
            "runtime": {"engine": runner.engine, "threads": self._threads, "dtype": runner.dtype},
            "precision": self._precision,
            "file": FILES[name],
            "size_bytes": sum(bytes_on_disk(self._folder / file) for file in written_files(name, self._folder)),
            "max_abs_diff": found.max_abs_diff,
            "steps": found.steps,
            "argmax_agreement": found.argmax_agreement,
            "reasons": reasons,
        }


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _choose(formats: Sequence[str] | str) -> list[str]:
    """Return the formats to write."""
    if formats == "auto":
        return [name for name in FORMATS if _missing_package(name) is None]
    names = list(dict.fromkeys([formats] if isinstance(formats, str) else formats))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"export.formats has {name!r}; use some of {', '.join(FORMATS)}, or auto")
        if (hint := _missing_package(name)) is not None:
            raise hint
    return names


def _missing_package(name: str) -> MissingExtraError | None:
    try:
        if name == "onnx":
            require_onnx_writer()
            require_onnxruntime()
        if name == "openvino":
            require_openvino()
    except MissingExtraError as hint:
        return hint
    return None


def _empty_entry(name: str) -> Deployed:
    return {"format": name, **dict.fromkeys(_NUMBERS), "reasons": {}}
