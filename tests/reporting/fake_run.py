"""A complete fake run folder: a realistic record and the metrics that CSVLogger would have written."""

import csv
import json
import math
from pathlib import Path

import numpy as np

from lightning_opt.reporting import comparison, deployed_entry, model_entry, new_record, write_record

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script></style><b>",
    "../../etc/x",
    "a\x00b\x07c\x1b[31md",
    "\u202egnp.exe\u2066",
    "$\\frac{1}{0}$ {{ 7*7 }} {% raw %}",
    "| a | [link](javascript:alert(3)) `code` |",
    "very_" + "long_" * 40 + "name",
]


def _latency(batch_1_ms, batch_32_ms):
    rows = [(1, batch_1_ms), (32, batch_32_ms)]
    return [{"batch": batch, "p50": p50, "p95": 1.12 * p50, "p99": 1.31 * p50} for batch, p50 in rows]


def _throughput(latency):
    return [{"batch": row["batch"], "value": 1000.0 * row["batch"] / row["p50"]} for row in latency]


def model_measures(*, acc, f1, params, flops, latency):
    return {
        "quality": {"acc": acc, "f1": f1},
        "params": params,
        "params_nonzero": params,
        "flops": flops,
        "size_bytes": 4 * params + 1800,
        "latency_ms": latency,
        "throughput_per_s": _throughput(latency),
        "peak_memory_bytes": 9 * params + 4_000_000,
        "runtime": {"engine": "torch eager", "threads": 1, "dtype": "fp32"},
    }


def _engine(name, dtype, latency):
    return {"engine": name, "dtype": dtype, "dense": True, "threads": 1, "latency_ms": latency}


def full_models():
    no_counter = "no energy counter on this machine"
    reasons = {"energy_j_per_1k": no_counter, "cost_per_1m": "no price given (benchmark.price_per_hour)"}
    teacher = model_measures(acc=0.976, f1=0.975, params=1_212_042, flops=84_300_000, latency=_latency(4.21, 61.0))
    teacher["engines"] = [
        _engine("torch compiled", "fp32", _latency(3.1, 48.0)),
        _engine("ONNX Runtime", "fp32", _latency(2.2, 39.5)),
        _engine("torch compiled", "bf16", _latency(5.4, 80.1)),
    ]
    student = model_measures(acc=0.968, f1=0.967, params=71_402, flops=6_100_000, latency=_latency(0.81, 8.4))
    student["engines"] = [_engine("ONNX Runtime", "fp32", _latency(0.34, 5.9))]
    baseline = model_measures(acc=0.945, f1=0.943, params=71_402, flops=6_100_000, latency=_latency(0.82, 8.5))
    entries = {"teacher": teacher, "baseline": baseline, "student": student}
    return {name: model_entry(entry | {"reasons": reasons}) for name, entry in entries.items()}


def full_deployed():
    onnx = {
        "format": "onnx",
        "runtime": {"engine": "ONNX Runtime", "threads": 1},
        "file": "artifact/model.onnx",
        "size_bytes": 290_110,
        "latency_ms": _latency(0.33, 5.8),
        "quality": {"acc": 0.968},
        "max_abs_diff": 1.9e-6,
        "argmax_agreement": 1.0,
    }
    weights = {"format": "safetensors", "file": "artifact/model.safetensors", "size_bytes": 287_404}
    return [
        deployed_entry(onnx),
        deployed_entry(weights | {"runtime": "torch eager"}, reason="the same weights as the student above"),
    ]


def full_record():
    record = new_record(
        ["python", "train.py", "+experiment=distill", "seed=7"], seed=7, config_sha256="ab" * 32, task_name="distill"
    )
    record |= {
        "status": "finished",
        "started": "2026-11-24T09:00:00.000Z",
        "finished": "2026-11-24T09:03:12.400Z",
        "wall_seconds": 192.4,
        "models": full_models(),
        "deployed": full_deployed(),
        "stages": [
            {"method": "teacher", "from_step": 0, "to_step": 900, "what": "trained on demand, cached"},
            {"method": "distil", "from_step": 0, "to_step": 600, "what": "0.1 CE + 0.9 KD (T = 4)"},
        ],
        "recipe": [{"op": "shrink", "version": 1, "kept": {"conv.weight": {"0": [0, 2]}}, "attributes": {}}],
        "predicted": [{"what": "latency at batch 1", "low": 3.0, "high": 6.0, "achieved": 5.2}],
        "warnings": ["the machine was busy: load average 3.1 on 2 cores"],
    }
    record["comparison"] = comparison(record["models"], deployed=record["deployed"])
    return record


def write_metrics(path: Path, *, best: float, terms=("loss_ce", "loss_kd"), steps=600, seed=0, epochs=6) -> None:
    """Write sparse rows: training terms every 10 steps, validation at the end of each epoch."""
    rng = np.random.default_rng(seed)
    logged = ("epoch", "step", "lr-AdamW", "train/loss", "val/acc", "val/loss")
    columns = sorted({*logged, *(f"train/{term}" for term in terms)})
    per_epoch = steps // epochs
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in range(9, steps, 10):
            decay = math.exp(-step / 150)
            heights = {f"train/{term}": 2.0 / (place + 1) for place, term in enumerate(terms)}
            values = {term: height * decay + 0.1 + 0.04 * rng.random() for term, height in heights.items()}
            row = {"epoch": step // per_epoch, "step": step, "train/loss": sum(values.values()), **values}
            writer.writerow(row | {"lr-AdamW": 1e-3 * (1 - step / steps)})
            if (step + 1) % per_epoch == 0:
                accuracy = best - 0.35 * math.exp(-step / 110) + 0.002 * rng.standard_normal()
                row = {"epoch": step // per_epoch, "step": step}
                writer.writerow(row | {"val/acc": accuracy, "val/loss": 0.2 + decay})


def make_run(folder: Path, record=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, full_record() if record is None else record)
    write_metrics(folder / "metrics.csv", best=0.966)
    for name, best in (("baseline", 0.943), ("teacher", 0.975)):
        (folder / name).mkdir(exist_ok=True)
        write_metrics(folder / name / "metrics.csv", best=best, terms=("loss_ce",), seed=len(name))
    return folder


def rename(value, old, new):
    """Replace a text everywhere in plain data, keys too."""
    return json.loads(json.dumps(value).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1]))
