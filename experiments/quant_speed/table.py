"""Write what was measured as tables."""

from pathlib import Path
from typing import Any

from judge import VNNI_LIMIT, geometric_mean

MARKS = ("<!-- table -->", "<!-- end of table -->")
SIZES = {
    "int8 ours ONNX": "fp32 ONNX",
    "int8 ours OpenVINO": "fp32 OpenVINO",
    "int8 ours safetensors": "fp32 safetensors",
    "int8 NNCF": "fp32 OpenVINO",
    "int8 ORT static": "fp32 ONNX",
}
COLUMNS = {
    "best fp32": None,
    "best bf16": None,
    "torch eager": None,
    "NNCF": 1.0,
    "NNCF, both in OpenVINO": None,
    "ORT static": 1.2,
    "ORT static as it comes": None,
    "ORT static, both in ONNX Runtime": None,
    "7-bit weights over best fp32": None,
    "7-bit weights over ORT static": None,
}


def markdown(results: dict[str, Any]) -> str:
    about, parts = results["machine"], results["parts"]
    loads = [batch["load"] for part in parts.values() for batch in part["batches"].values()]
    vnni = any("vnni" in flag for flag in about["flags"])
    lines = [
        f"{about['cpu']} ({', '.join(about['flags'])}; {'with' if vnni else '**without**'} 8-bit dot products), "
        f"{about['cores']} cores, one thread, torch {about['torch']}, ONNX Runtime {about['onnxruntime']}, OpenVINO "
        f"{about['openvino']}; load average at most {max(loads, default=0.0):.1f}.",
    ]
    for batch in ("1", "32"):
        lines += [
            "",
            f"**Our int8 over the others, batch {batch}** (times faster, CPU time)",
            "",
            *_ratios(parts, batch, vnni),
        ]
        lines += ["", f"**Milliseconds, batch {batch}**", "", *_times(parts, batch)]
    lines += ["", "**Size on disk over float32 in the same format** (limit 0.26 for ours)", "", *_sizes(parts)]
    lines += [
        "",
        "**Cosine of the answers to float32's** (random weights: a check of the graph and of the sums, no quality)",
        "",
    ]
    return "\n".join([*lines, *_cosines(parts)])


def _cosines(parts: dict[str, Any]) -> list[str]:
    arms = list(dict.fromkeys(arm for part in parts.values() for arm in part["cosine"] if arm.startswith("int8")))
    lines = [f"| network | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    for name, part in parts.items():
        cells = [f"{part['cosine'][arm]:.4f}" if arm in part["cosine"] else "-" for arm in arms]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ratios(parts: dict[str, Any], batch: str, vnni: bool) -> list[str]:
    found = {name: part["batches"][batch] for name, part in parts.items()}
    columns = {name: limit for name, limit in COLUMNS.items() if any(name in each["ratios"] for each in found.values())}
    limits = {**columns, "best fp32": VNNI_LIMIT if vnni else None}
    heads = [f"{name} (>= {limits[name]})" if limits[name] else name for name in columns]
    lines = [f"| network | {' | '.join(heads)} | fastest of ours |", f"|---|{'---:|' * len(columns)}---|"]
    for name, each in found.items():
        cells = [_ratio(each["ratios"].get(column)) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {each['best'].get('ours', '').rpartition(', ')[2]} |")
    means = []
    for column in columns:
        values = [each["ratios"][column]["cpu"]["value"] for each in found.values() if column in each["ratios"]]
        mean, limit = geometric_mean(values), limits[column]
        missed = limit is not None and mean < limit
        means.append(f"**{mean:.2f}**, least {min(values):.2f}{' (missed)' if missed else ''}")
    return [*lines, f"| geometric mean | {' | '.join(means)} | |"]


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    cpu = found["cpu"]
    return f"{cpu['value']:.2f} [{cpu['low']:.2f}, {cpu['high']:.2f}]"


def _times(parts: dict[str, Any], batch: str) -> list[str]:
    arms = list(dict.fromkeys(arm for part in parts.values() for arm in part["batches"][batch]["arms"]))
    lines = [f"| network | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    for name, part in parts.items():
        times = part["batches"][batch]["arms"]
        cells = [_ms(times[arm]["cpu_ms"]) if arm in times else "-" for arm in arms]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _sizes(parts: dict[str, Any]) -> list[str]:
    lines = [f"| network | float32 MB | {' | '.join(SIZES)} |", f"|---|---:|{'---:|' * len(SIZES)}"]
    for name, part in parts.items():
        sizes = part["sizes"]
        cells = [f"{sizes[small] / sizes[whole]:.3f}" if small in sizes else "-" for small, whole in SIZES.items()]
        lines.append(f"| {name} | {sizes['fp32 ONNX'] / 1e6:.1f} | {' | '.join(cells)} |")
    return lines


def into_readme(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
