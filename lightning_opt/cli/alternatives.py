"""Other ways to put the same trained model into few bits, written and measured beside the one that was asked for."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_opt.cli.deploying import written
from lightning_opt.cli.judging import example_of
from lightning_opt.cli.log import log
from lightning_opt.cli.quantized import POST_TRAINING
from lightning_opt.cli.sides import Sides
from lightning_opt.config.build import Config
from lightning_opt.data import DataModule
from lightning_opt.errors import ConfigError
from lightning_opt.export import FORMATS
from lightning_opt.quantization import Scheme, quantize
from lightning_opt.tasks import Task

Record = dict[str, Any]
_CALIBRATION_SAMPLES = 512
_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


def check_schemes(config: Config) -> None:
    """Refuse a scheme that is not known.

    Raises:
        ConfigError: Naming it and what is known.
    """
    for name in (config.get("export") or {}).get("schemes") or ():
        try:
            Scheme.parse(name)
        except ValueError as error:
            raise ConfigError(f"export.schemes has {name!r}: {error}") from error


def write_alternatives(
    config: Config, folder: Path, sides: Sides, task: Task, data: pl.LightningDataModule
) -> list[Record]:
    """Write the float model that was quantized in each of `export.schemes`, into `artifact/SCHEME/`.

    Returns:
        As the record's `deployed`, not timed yet; a format is called "onnx, w8a8_dynamic". Empty where the run did not
        quantize after training: a model that was trained with its values rounded is good for its own scheme alone.
    """
    names = (config.get("export") or {}).get("schemes") or []
    if not names or sides.forms is None or sides.forms.method != POST_TRAINING:
        return []
    floating, found = sides.models[sides.forms.reference], []
    for name in names:
        log.info("exporting the same model as %s", name)
        try:
            model = quantize(floating, example_of(data), name, calibration=_calibration(name, data))
        except ConfigError as error:  # the run is done: what is left out beside it is told and no more
            log.warning("warning: export.schemes: %s is left out: %s", name, error)
            continue
        for form in _engine_formats(config["export"].get("formats", "auto")):
            place = folder / "artifact" / name
            try:
                (entry,) = written(config, place, model, task, data, formats=[form], inside="artifact/")
            except ConfigError as error:
                log.warning("warning: export.schemes: %s is not written as %s: %s", name, form, error)
                continue
            found.append(entry | {"format": f"{form}, {name}"})
    return found


def _calibration(scheme: str, data: pl.LightningDataModule) -> list[Any] | None:
    if not Scheme.parse(scheme).needs_calibration:
        return None
    if not isinstance(data, DataModule):
        raise ConfigError("fixed ranges need calibration_batches() of lightning_opt.data.DataModule")
    return data.calibration_batches(-(-_CALIBRATION_SAMPLES // data.batch_size))


def _engine_formats(formats: list[str] | str) -> list[str]:
    """Leave the formats that engines read and whose packages are there: the others would repeat the weights."""
    wanted = FORMATS if formats == "auto" else [formats] if isinstance(formats, str) else formats
    return [name for name, package in _PACKAGES.items() if name in wanted and find_spec(package) is not None]
