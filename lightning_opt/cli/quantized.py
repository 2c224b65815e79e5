"""What quantization did in a run: the float model that it is set against, and the record's `quantization`."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_opt.cli.fitting import Fitted, load_weights
from lightning_opt.cli.log import log
from lightning_opt.config.build import Config, build_model
from lightning_opt.errors import LightningOptError
from lightning_opt.evaluation import count_nonzero, count_parameters, safetensors_bytes
from lightning_opt.export import deployable as with_integers
from lightning_opt.export import fused_layers
from lightning_opt.export.exporter import first_line
from lightning_opt.forward import Inputs
from lightning_opt.quantization.convert import float_twin
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import is_converted, is_quantized, quantizers
from lightning_opt.quantization.summary import quantization_summary, scheme_of
from lightning_opt.reporting.gains import quantized_rows, with_gains
from lightning_opt.reporting.machine import hardware
from lightning_opt.reporting.quantized import claims
from lightning_opt.reporting.recommendation import recommendation
from lightning_opt.surgery import recipe_of

Record = dict[str, Any]
_ENGINES = {"onnx": ("onnxruntime", "ONNX Runtime"), "openvino": ("openvino", "OpenVINO")}
QAT, POST_TRAINING = "qat", "post_training"
OTHER_MODEL = (
    "it was trained with its weights and activations rounded, and without that it is another model "
    "(baseline=true trains the control)"
)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized model in the forms in which it is shown, run and counted.

    Attributes:
        rounded: What was trained or calibrated: float weights and the quantizers that round them.
        integer: The same answers from integers: what is deployed.
        twin: The same structure without quantizers.
        method: "qat" or "post_training".
        chosen: How bits were chosen layer by layer, where they were.
        reference: Name in the record's models of the float model that is timed beside the files.
        judged: Name of the float model that quality is compared with; None where there is none.
    """

    rounded: nn.Module
    integer: nn.Module
    twin: nn.Module
    method: str
    reference: str
    judged: str | None
    chosen: Sequence[Record] = ()


def was_quantized(config: Config, student: Fitted) -> bool:
    """Tell whether a run's model rounds its weights: quantizers that were never switched on do nothing."""
    found = quantizers(student.model)
    if found and not all(quantizer.enabled for quantizer in found.values()):
        log.warning("training ended before quantizers were switched on (quantizer.start); the model stays in float")
        return False
    return is_quantized(student.model)


def deployable(model: nn.Module) -> nn.Module:
    """Return what is deployed of a model: integers where it rounds, no quantizers where they were never on."""
    if is_converted(model) or all(quantizer.enabled for quantizer in quantizers(model).values()):
        return with_integers(model)
    return float_twin(model)


def quantized_of(config: Config, fitted: Mapping[str, Fitted], *, pruned: bool) -> Quantized:
    """Return the forms of a run's quantized model, and the names of what it is set against."""
    rounded, method = fitted["student"].model, method_of(config)
    alone = "baseline" in fitted
    return Quantized(
        rounded=rounded,
        integer=deployable(rounded),
        twin=float_twin(rounded),
        method=method,
        reference="baseline" if alone and not pruned and method == QAT else "float",
        judged="float" if method == POST_TRAINING else "baseline" if alone else None,
        chosen=[row for stage in fitted["student"].stages for row in stage.get("layers", ())],
    )


def method_of(config: Config) -> str:
    """Return how the model was quantized, "qat" or "post_training", as its config says."""
    nodes = [config.get("quantizer") or {}, *(config.get("callbacks") or {}).values()]
    asked = [node for node in nodes if str((node or {}).get("_target_", "")).endswith(".Quantize")]
    return str(asked[0].get("method", QAT)) if asked else QAT


def float_model(config: Config, folder: Path, found: Quantized) -> nn.Module:
    """Return the float model: the best weights as they were before a post-training method, else the same structure."""
    best = folder / "checkpoints" / "best.ckpt"
    if found.method != POST_TRAINING or not best.is_file():
        return found.twin
    held = nn.ModuleDict({"model": build_model(config["model"])})
    try:
        load_weights(held, best)
    except (LightningOptError, RuntimeError, ValueError) as error:
        log.warning("%s: the weights before quantization cannot be read (%s); compared with what is left", best, error)
        return found.twin
    before = held["model"].eval()
    return found.twin if is_quantized(before) else before


def facts_of(found: Quantized) -> Record:
    """Return what is known of the quantized model without running it: its weights, counted before they were rounded."""
    return {
        "params": count_parameters(found.twin),
        "params_nonzero": count_nonzero(found.twin),
        "size_bytes": safetensors_bytes(found.integer),
    }


def quantization_of(
    config: Config,
    found: Quantized,
    entries: Mapping[str, Record],
    deployed: Sequence[Record],
    folder: Path,
    inputs: Inputs,
    *,
    metric: str | None,
    higher_is_better: bool,
) -> Record:
    """Return the record's `quantization`.

    Args:
        config: The run's config.
        found: The forms of the model.
        entries: The record's models.
        deployed: The record's deployed files.
        folder: The run folder that they lie in.
        inputs: One sample, to find out again what can not be quantized.
        metric: The task's main metric.
        higher_is_better: Its direction.
    """
    reasons: dict[str, str] = {}
    refused = _refused(found, inputs, reasons)
    summary = quantization_summary(found.rounded, refused=refused, chosen=found.chosen)
    values = {name: (entries.get(name) or {}).get("quality") or {} for name in ("student", found.judged) if name}
    own, base = values["student"].get(metric), values.get(found.judged or "", {}).get(metric)
    drop = None if own is None or base is None else (base - own if higher_is_better else own - base)
    if drop is None:
        reasons["quality_drop"] = OTHER_MODEL if found.judged is None else "no quality of both models"
    multiplies = any(row["activation_bits"] is not None for row in summary["layers"])
    fused = fused_of(deployed, folder) if multiplies else {}
    made = {
        "method": found.method,
        **summary,
        "what": str((config.get("quantizer") or {}).get("scheme") or "") or None,
        "reference": found.reference,
        "judged": found.judged,
        "quality_drop": drop,
        "size_bytes": {
            "float": entries[found.reference].get("size_bytes"),
            "quantized": safetensors_bytes(found.integer),
        },
        **({"fused": fused} if fused else {}),
        "reasons": reasons,
    }
    said = claims({"quantization": made, "deployed": deployed, "hardware": hardware()})
    return {**made, "sentences": said}


def fused_of(deployed: Sequence[Record], folder: Path) -> dict[str, dict[str, int]]:
    """Count the layers that each engine runs in integers, in the files that it reads."""
    made: dict[str, dict[str, int]] = {}
    for entry in deployed:
        engine = _ENGINES.get(str(entry["format"]))
        if engine is None or entry["file"] is None:
            continue
        try:
            counted = fused_layers(folder / entry["file"]).get(engine[0])
        except Exception as error:  # a count that fails is left out; the file was verified before
            log.warning("%s: its layers of integers cannot be counted: %s", entry["file"], first_line(error))
            continue
        if counted is not None and counted[1]:
            made[engine[1]] = {"int8": counted[0], "total": counted[1]}
    return made


def _refused(found: Quantized, inputs: Inputs, reasons: dict[str, str]) -> dict[str, str]:
    """Find out once more which layers can not be quantized, on a copy without quantizers."""
    scheme = scheme_of(recipe_of(found.rounded))
    if scheme is None:
        return {}
    try:
        prepared = prepare(copy.deepcopy(found.twin), inputs, Scheme.from_dict(scheme))
    except (LightningOptError, RuntimeError, ValueError) as error:
        reasons["refused"] = f"could not be found out again: {type(error).__name__}: {str(error).strip()[:200]}"
        return {}
    return {refusal.path: refusal.why for refusal in prepared.refused}


def compared_with_float(found: Quantized, entries: Mapping[str, Record], deployed: list[Record]) -> Record:
    """Add each file's gains to its entry, and return what the record's `comparison` says of the fastest.

    Args:
        found: The forms of the model.
        entries: The record's models, from the measurement that timed the files too.
        deployed: The record's deployed files; changed in place.
    """
    reference = entries[found.reference]
    deployed[:] = [with_gains(entry, name=found.reference, reference=reference) for entry in deployed]
    over, under = reference.get("size_bytes"), entries["student"].get("size_bytes")
    return {
        "quantized": quantized_rows(deployed, found.reference),
        "quantized_size_ratio": over / under if over and under else None,
    }


def recommended(
    config: Config,
    found: Quantized,
    entries: Mapping[str, Record],
    deployed: Sequence[Record],
    *,
    metric: str | None,
    higher_is_better: bool,
) -> Record | None:
    """Return the record's `recommendation`: what to deploy on this machine, and why."""
    asked = (config.get("quantizer") or {}).get("max_drop")
    return recommendation(
        entries,
        deployed,
        metric=metric,
        higher_is_better=higher_is_better,
        reference=found.reference,
        judged=found.judged,
        max_drop=None if asked is None else float(asked),
    )
