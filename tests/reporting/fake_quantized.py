"""Fake runs that quantized: numbers as a small CNN has them on a processor with and without fast integers."""

from pathlib import Path

from fake_pruned import measured as measured_of
from fake_pruned import pruned_record, write_pruned_metrics
from fake_run import _latency, full_record

from lightning_opt.reporting import comparison, deployed_entry, write_record
from lightning_opt.reporting.gains import quantized_rows, with_gains
from lightning_opt.reporting.quantized import claims
from lightning_opt.reporting.recommendation import recommendation

FLOAT_MS = {"torch eager": (0.80, 8.0), "ONNX Runtime": (0.40, 6.0), "OpenVINO": (0.30, 5.0)}
EAGER_MS = {"torch eager": (1.60, 12.0)}
FAST_MS = {"onnx": (0.20, 2.0), "openvino": (0.10, 2.5)}
SLOW_MS = {"onnx": (0.45, 7.0), "openvino": (0.33, 5.5)}
ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch_export": "torch export", "safetensors": "torch eager"}
BF16_MS = (0.15, 3.0)
SCHEME = {"dynamic": False, "learnable": False, "clip": False, "attention": False, "rules": {}}
_LAYERS = {"stem": ("Conv2d", 432), "body.0": ("Conv2d", 18_432), "body.1": ("Conv2d", 36_864), "head": ("Linear", 650)}


def layer(name, *, bits=8, reads=8, sensitivity=None, why=None):
    kind, params = _LAYERS.get(name, ("Linear", 64))
    return {
        "name": name,
        "kind": kind,
        "params": params,
        "weight_bits": bits,
        "activation_bits": reads if bits else None,
        "dynamic": False,
        "weight": None if bits is None else f"int{bits} per channel",
        "activation": f"uint{reads}" if bits and reads else None,
        "sensitivity": sensitivity,
        "float_reason": why,
    }


def layers(*, mixed=False):
    if not mixed:
        return [layer(name) for name in _LAYERS]
    found = {"stem": (8, 0.002), "body.0": (4, 0.0004), "body.1": (4, 0.0001), "head": (None, 0.031)}
    why = {"head": "quantizing it costs more than max_drop"}
    return [layer(name, bits=bits, sensitivity=cost, why=why.get(name)) for name, (bits, cost) in found.items()]


def few_bit_files(times, *, acc=0.943, precision="int8"):
    """Give the deployed entries of a quantized model: all four formats, timed."""
    latency = {name: _latency(*ms) for name, ms in times.items()}
    latency |= {"safetensors": _latency(*EAGER_MS["torch eager"]), "torch_export": _latency(1.7, 12.5)}
    files = {"safetensors": "model.safetensors", "torch_export": "model.pt2", "onnx": "model.onnx"}
    return [
        deployed_entry(
            {
                "format": name,
                "runtime": {"engine": ENGINES[name], "threads": 1, "dtype": "float32"},
                "precision": precision,
                "file": f"artifact/{files.get(name, 'model.xml')}",
                "size_bytes": 62_000 + 4_000 * place,
                "latency_ms": latency[name],
                "quality": {"acc": acc},
                "max_abs_diff": 0.0 if name == "safetensors" else 0.031,
                "argmax_agreement": 1.0 if name == "safetensors" else 0.9994,
                "steps": 0.0 if name == "safetensors" else 1.2,
            }
        )
        for place, name in enumerate(("safetensors", "torch_export", "onnx", "openvino"))
    ]


def float_entry(*, acc, bf16=None, bf16_acc=None):
    params = 56_378
    entry = measured_of(FLOAT_MS, acc=acc, params=params, nonzero=params, flops=9_000_000)
    if bf16:
        engine = {"engine": "OpenVINO", "dtype": "bfloat16", "dense": True, "threads": 1, "latency_ms": _latency(*bf16)}
        entry["engines"].append(engine | ({} if bf16_acc is None else {"quality": {"acc": bf16_acc}}))
    return entry


def quantized_record(
    *,
    times=FAST_MS,
    method="qat",
    baseline=True,
    teacher=False,
    acc=0.943,
    float_acc=0.945,
    bf16=BF16_MS,
    mixed=False,
    pruned=False,
    max_drop=None,
    instructions=("avx2", "avx512_vnni"),
):
    """Give a finished record of a run that quantized, worked out as a run would."""
    record = pruned_record(teacher=teacher, baseline=baseline) if pruned else full_record()
    name = "baseline" if baseline and not pruned else "float"
    floating = float_entry(acc=float_acc, bf16=bf16)
    student = measured_of(EAGER_MS, acc=acc, params=56_378, nonzero=56_378, flops=9_000_000) | {"size_bytes": 62_000}
    before = {key: record["models"][key] for key in ("teacher", "baseline", "dense") if key in record["models"]}
    models = before if pruned else ({"teacher": record["models"]["teacher"]} if teacher else {})
    record["models"] = {**models, name: floating, "student": student}
    record["hardware"]["cpu"]["instructions"] = list(instructions)
    found = few_bit_files(times, acc=acc)
    record["deployed"] = [with_gains(entry, name=name, reference=floating) for entry in found]
    judged = "baseline" if baseline else "float" if method == "post_training" else None
    record["comparison"] = comparison(record["models"], deployed=record["deployed"])
    record["comparison"]["quantized"] = quantized_rows(record["deployed"], name)
    base = record["models"][judged]["quality"]["acc"] if judged else None
    rows = layers(mixed=mixed)
    inside = [row for row in rows if row["weight_bits"]]
    params, some = 56_378, sum(row["params"] for row in inside)
    bits = (sum(row["params"] * row["weight_bits"] for row in inside) + 32 * (params - some)) / params
    record["quantization"] = {
        "method": method,
        "scheme": SCHEME,
        "what": "w8a8",
        "reference": name,
        "judged": judged,
        "layers": rows,
        "totals": {
            "layers": len(rows),
            "quantized": len(inside),
            "params": params,
            "params_quantized": some,
            "share": some / params,
            "weight_bits": bits,
        },
        "size_bytes": {"float": floating["size_bytes"], "quantized": 62_000},
        "quality_drop": None if base is None else base - acc,
        "refused": [{"name": "gate", "reason": "no integer form of GRU is known"}],
        "fused": {"ONNX Runtime": {"int8": 4, "total": 4}, "OpenVINO": {"int8": 3, "total": 4}},
        "reasons": {} if judged else {"quality_drop": "it was trained with rounding on"},
    }
    record["quantization"]["sentences"] = claims(record)
    record["recommendation"] = recommendation(
        record["models"], record["deployed"], metric="acc", reference=name, judged=judged, max_drop=max_drop
    )
    stage = {"method": "quantize", "from_step": 300, "to_step": 600, "what": "w8a8: quantization-aware training"}
    if method == "post_training":
        stage |= {"from_step": 600, "what": "w8a8: post-training quantization, ranges from 512 samples"}
    kept = record["stages"] if pruned else [{"method": "supervised", "from_step": 0, "to_step": 600, "what": "labels"}]
    if teacher and not pruned:
        kept[0] = {**kept[0], "method": "distillation"}
    return record | {
        "command": "python train.py +experiment=qat seed=7",
        "task_name": "qat",
        "stages": [*kept, stage],
        "recipe": [{"op": "quantize", "version": 1, "layers": {}, "sites": {}, "scheme": SCHEME}],
    }


def make_quantized_run(folder: Path, **choice) -> Path:
    """Write a whole run folder, metrics of the quantized model and of the float control included."""
    folder.mkdir(parents=True, exist_ok=True)
    record = quantized_record(**choice)
    write_record(folder, record)
    final = 0.9 if choice.get("pruned") else 0
    write_pruned_metrics(folder / "metrics.csv", best=record["models"]["student"]["quality"]["acc"], final=final)
    if "baseline" in record["models"]:
        (folder / "baseline").mkdir(exist_ok=True)
        write_pruned_metrics(folder / "baseline" / "metrics.csv", best=0.945, final=0)
    return folder
