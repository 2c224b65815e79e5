"""Compare what was timed: our int8 with the best float engine, and with the peers' int8."""

from typing import Any

from clock import Samples, speedup, summary

VNNI_LIMIT = 2.5  # over the best float32 engine, on CPUs with 8-bit dot products
OURS = "int8 ours"
NNCF, STATIC, DYNAMIC = "int8 NNCF, OpenVINO", "int8 ORT static, ONNX Runtime", "int8 ORT dynamic, ONNX Runtime"


def compared(samples: Samples) -> dict[str, Any]:
    """Return the fastest arm of each kind, and speed-ups of ours with bootstrap intervals, CPU time and wall time."""
    medians = summary(samples)
    kinds = {"fp32": "fp32", "bf16": "bf16", "ours": OURS}
    best = {kind: _fastest(medians, start) for kind, start in kinds.items() if _fastest(medians, start)}
    pairs = {f"best {kind}": (best[kind], best["ours"]) for kind in ("fp32", "bf16") if kind in best and "ours" in best}
    if "ours" in best:
        pairs["torch eager"] = ("fp32, torch eager", best["ours"])
        for name, arm in {"NNCF": NNCF, "ORT static": STATIC, "ORT dynamic": DYNAMIC}.items():
            pairs[name] = (arm, best["ours"])
        pairs["NNCF, both in OpenVINO"] = (NNCF, f"{OURS}, OpenVINO")
        pairs["ORT static as it comes"] = (f"{STATIC} as it comes", best["ours"])
        pairs["ORT static, both in ONNX Runtime"] = (STATIC, f"{OURS}, ONNX Runtime")
        seven = _fastest(medians, "int8 with 7-bit weights")
        pairs["7-bit weights over best fp32"] = (best["fp32"], seven)
        pairs["7-bit weights over ORT static"] = (STATIC, seven)
    for name, arm in {"NNCF": NNCF, "ORT static": STATIC}.items():
        if "fp32" in best:
            pairs[f"{name} over best fp32"] = (best["fp32"], arm)
    ratios = {
        name: {"cpu": speedup(samples, *pair), "wall": speedup(samples, *pair, clock=1)["value"], "of": list(pair)}
        for name, pair in pairs.items()
        if all(arm in samples for arm in pair)
    }
    return {"best": best, "ratios": ratios}


def _fastest(medians: dict[str, dict[str, float]], start: str) -> str:
    arms = [arm for arm in medians if arm.startswith(start)]
    return min(arms, key=lambda arm: medians[arm]["cpu_ms"]) if arms else ""


def geometric_mean(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= value
    return product ** (1.0 / len(values)) if values else float("nan")
