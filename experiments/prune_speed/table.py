"""Write what was measured as tables."""

from pathlib import Path
from typing import Any

MARKS = ("<!-- table -->", "<!-- end of table -->")


def markdown(results: dict[str, Any]) -> str:
    about, parts = results["machine"], results["parts"]
    loads = [part["load"] for name, part in parts.items() if name != "resnet50"]
    loads += [part["load"] for part in parts.get("resnet50", {}).values()]
    lines = [
        f"{about['cpu']} ({', '.join(about['flags'])}), {about['cores']} cores, one thread, torch {about['torch']}, "
        f"ONNX Runtime {about['onnxruntime']}, OpenVINO {about['openvino']}; load average at most {max(loads):.1f}.",
    ]
    for target, part in parts.get("resnet50", {}).items():
        lines += ["", f"**ResNet-50, 1/{target} of the multiply-accumulates**", "", *_table(part["arms"])]
    if "bert" in parts:
        lines += ["", "**Four layers of BERT-base, 128 tokens**", "", *_table(parts["bert"]["arms"])]
    if "zeros" in parts:
        lines += ["", *_zeros(parts["zeros"])]
    return "\n".join(lines)


def _table(arms: dict[str, Any]) -> list[str]:
    engines = list(arms["dense"]["times"])
    heads = " | ".join(f"{engine} ms | share" for engine in engines)
    lines = [
        f"| what was done | MAC ratio | {heads} | best against best | share, CPU time (limit) | share, wall time |",
        f"|---|---:|{'---:|' * (2 * len(engines) + 3)}",
    ]
    for name, arm in arms.items():
        cells = [f"{arm['times'][engine]['cpu_ms']:.1f} | {arm['efficiency'][engine]:.2f}" for engine in engines]
        low, high = (arm["best_speedup"][key] / arm["mac_ratio"] for key in ("low", "high"))
        verdict = "" if name == "dense" else f" [{low:.3f}, {high:.3f}]"
        if name != "dense":
            verdict += f" (>= {arm['limit']})" if arm["holds"] else f" (>= {arm['limit']}: missed)"
        lines.append(
            f"| {name} | {arm['mac_ratio']:.2f} | {' | '.join(cells)} | {arm['best_speedup']['value']:.2f}x, "
            f"{arm['best_engine']} | {arm['best_efficiency']:.3f}{verdict} | {arm['best_efficiency_wall']:.3f} |"
        )
    return lines


def _zeros(part: dict[str, Any]) -> list[str]:
    arm = part["arms"]["90% zeros"]
    speedups = ", ".join(f"{engine} {each['value']:.2f}x" for engine, each in arm["speedup"].items())
    linear = part["linear"]
    times = ", ".join(f"{name} {each['cpu_ms']:.2f}" for name, each in linear.items())
    best = min(each["cpu_ms"] for name, each in linear.items() if "fp32" in name)
    sparse = ", ".join(
        f"{name} {best / each['cpu_ms']:.2f}x" for name, each in linear.items() if name.startswith("CSR")
    )
    hardware = "in hardware" if part["bfloat16_in_hardware"] else "not in this CPU's hardware"
    return [
        f"**90 % zeros in dense kernels** (BERT layers as above), speed-up: {speedups}.",
        "",
        f"**One linear layer, 768 -> 3072, 128 rows**, CPU ms: {times} (bf16 is {hardware}). Over the best dense fp32: "
        f"{sparse}.",
    ]


def into_readme(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
