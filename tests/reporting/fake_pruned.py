"""Fake runs that pruned: zeros in unchanged shapes, and channels that are gone; numbers as a small CNN has them."""

import csv
from pathlib import Path

import numpy as np
from fake_run import _latency, full_deployed, full_record, model_measures

from lightning_opt.reporting import comparison, deployed_entry, model_entry, write_record

DENSE_MS = {"torch eager": (0.82, 8.5), "ONNX Runtime": (0.34, 5.9), "OpenVINO": (0.31, 5.2)}
ZEROS_MS = {"torch eager": (0.83, 8.4), "ONNX Runtime": (0.34, 5.9), "OpenVINO": (0.31, 5.3)}
SHRUNK_MS = {"torch eager": (0.61, 4.9), "ONNX Runtime": (0.22, 3.1), "OpenVINO": (0.20, 2.8)}
_SHAPES = {
    "stem.weight": ([16, 1, 3, 3], [12, 1, 3, 3]),
    "stage1.0.conv1.weight": ([32, 16, 3, 3], [16, 12, 3, 3]),
    "stage1.0.conv2.weight": ([32, 32, 3, 3], [20, 16, 3, 3]),
    "stage2.0.conv1.weight": ([64, 32, 3, 3], [32, 20, 3, 3]),
    "stage2.0.conv2.weight": ([64, 64, 3, 3], [64, 32, 3, 3]),
    "head.weight": ([10, 64], [10, 64]),
}
_LEFT = {"stem.weight": 0.52, "head.weight": 0.41}


def _engines(times):
    names = [name for name in times if name != "torch eager"]
    rest = [{"engine": name, "dtype": "float32", "dense": True, "threads": 1} for name in names]
    return [each | {"latency_ms": _latency(*times[each["engine"]])} for each in rest]


def measured(times, *, acc, params, nonzero, flops):
    entry = model_measures(acc=acc, f1=acc - 0.001, params=params, flops=flops, latency=_latency(*times["torch eager"]))
    entry |= {"params_nonzero": nonzero, "engines": _engines(times)}
    reasons = {"energy_j_per_1k": "no energy counter on this machine", "cost_per_1m": "no price given"}
    return model_entry(entry | {"reasons": reasons})


def layer(name, shape, now, *, kept, zeros):
    before, params = int(np.prod(shape)), int(np.prod(now))
    nonzero = round(kept * params)
    return {
        "name": name,
        "original_shape": shape,
        "shape": now,
        "params_before": before,
        "params": params,
        "nonzero": nonzero,
        "sparsity": 1 - nonzero / params,
        "kept": nonzero / before,
        "zeros": zeros if kept < 1 else "none",
        "flops_before": before * 2 * 49,
        "flops": params * 2 * 49,
    }


def pruning(*, structured, dense_ms, pruned_ms, reference="baseline"):
    layers = [
        layer(
            name,
            shape,
            now if structured else shape,
            kept=1.0 if structured else _LEFT.get(name, 0.08),
            zeros="unstructured",
        )
        for name, (shape, now) in _SHAPES.items()
    ]
    before, params, nonzero = (sum(row[key] for row in layers) for key in ("params_before", "params", "nonzero"))
    rows = [
        {
            "engine": name,
            "dtype": "float32",
            "threads": 1,
            "batch": batch,
            "dense_ms": dense,
            "pruned_ms": now,
            "ratio": dense / now,
        }
        for name in dense_ms
        for batch, dense, now in zip((1, 32), dense_ms[name], pruned_ms[name], strict=True)
    ]
    kind = "structured" if structured else "unstructured"
    return {
        "kind": kind,
        "kinds": [{"kind": kind, "layers": len(layers) - structured, "params": before - nonzero}],
        "reference": reference,
        "layers": layers,
        "totals": {
            "params_before": before,
            "params": params,
            "nonzero": nonzero,
            "sparsity": 1 - nonzero / params,
            "kept": nonzero / before,
            "flops_before": before * 98,
            "flops": params * 98,
        },
        "size_bytes": {
            "before": 4 * before,
            "dense": 4 * params,
            "bitmask": 4 * nonzero + params // 8,
            "bitmask_fp16": 2 * nonzero + params // 8,
            "compressed": int(3.6 * nonzero) + params // 8,
        },
        "latency": rows,
        "sentences": [f"Sentence number {place} of this {kind} run." for place in (1, 2)],
        "reasons": {},
    }


def pruned_record(*, structured=False, teacher=False, baseline=True, acc=0.939):
    """Give a finished record: the dense model (control or untrained), the pruned one, and a teacher where asked."""
    record = full_record()
    times = SHRUNK_MS if structured else ZEROS_MS
    found = pruning(
        structured=structured, dense_ms=DENSE_MS, pruned_ms=times, reference="baseline" if baseline else "dense"
    )
    totals = found["totals"]
    before = {"params": totals["params_before"], "nonzero": totals["params_before"], "flops": totals["flops_before"]}
    after = {"params": totals["params"], "nonzero": totals["nonzero"], "flops": totals["flops"]}
    dense = measured(DENSE_MS, acc=0.945, **before)
    if not baseline:
        dense |= {"quality": None, "reasons": dense["reasons"] | {"quality": "not trained: the shapes before pruning"}}
    models = {"teacher": record["models"]["teacher"]} if teacher else {}
    models |= {"baseline" if baseline else "dense": dense, "student": measured(times, acc=acc, **after)}
    method = "distillation" if teacher else "supervised"
    what = (
        "Structures, GroupNorm, cubic, 0.5; 27 of 55 groups cut"
        if structured
        else "Element, Magnitude, cubic, sparsity 0.90 reached"
    )
    record |= {
        "command": "python train.py +experiment=prune seed=7",
        "task_name": "prune",
        "models": models,
        "pruning": found,
        "stages": [
            {"method": method, "from_step": 0, "to_step": 600, "what": "loss on labels"},
            {"method": "prune", "from_step": 60, "to_step": 420, "what": what},
        ],
        "deployed": [deployed_entry(full_deployed()[0])],
        "recipe": record["recipe"] if structured else [],
    }
    record["comparison"] = comparison(record["models"])
    return record


def write_pruned_metrics(path: Path, *, best=0.94, final=0.9, shrink_to=None, steps=600, epochs=12):
    """Write validation accuracy that dips while a cubic schedule prunes, and the sparsity where it changed."""
    rng = np.random.default_rng(0)
    columns = ["epoch", "step", "student/sparsity", "student/params", "train/loss", "val/acc"]
    per_epoch = steps // epochs
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        if shrink_to:
            writer.writerow({"epoch": 0, "step": 0, "student/params": 69_904})
        for step in range(9, steps, 10):
            epoch = step // per_epoch
            writer.writerow({"epoch": epoch, "step": step, "train/loss": 2 * np.exp(-step / 150) + 0.05 * rng.random()})
            if final and 60 <= step <= 420 and (step + 1) % 30 == 0:
                progress = (step - 60) / 360
                writer.writerow({"epoch": epoch, "step": step, "student/sparsity": final * (1 - (1 - progress) ** 3)})
            if shrink_to and step == 419:
                writer.writerow({"epoch": epoch, "step": step, "student/params": shrink_to})
            if (step + 1) % per_epoch == 0:
                dip = 0.05 * np.exp(-(((step - 360) / 90) ** 2)) if final else 0.0
                accuracy = best - 0.35 * np.exp(-step / 90) - dip + 0.002 * rng.standard_normal()
                writer.writerow({"epoch": epoch, "step": step, "val/acc": accuracy})


def make_pruned_run(folder: Path, **choice) -> Path:
    """Write a whole run folder, metrics of the pruned model and of the dense control included."""
    folder.mkdir(parents=True, exist_ok=True)
    record = pruned_record(**choice)
    write_record(folder, record)
    totals = record["pruning"]["totals"]
    shrink = totals["params"] if choice.get("structured") else None
    write_pruned_metrics(
        folder / "metrics.csv",
        best=record["models"]["student"]["quality"]["acc"],
        final=0.5 if shrink else 0.9,
        shrink_to=shrink,
    )
    if "baseline" in record["models"]:
        (folder / "baseline").mkdir(exist_ok=True)
        write_pruned_metrics(folder / "baseline" / "metrics.csv", best=0.945, final=0)
    return folder
