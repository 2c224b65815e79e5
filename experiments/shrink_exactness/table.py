"""The table of the README, from results.json."""

from collections import Counter
from pathlib import Path
from typing import Any

START, END = "<!-- table -->", "<!-- end of table -->"
HEAD = [
    "| model | verdict | exact groups | other groups | parameters at 25 / 50 / 75 % | difference | trace, CPU s "
    "| Torch-Pruning 1.6.1 |",
    "|---|---|---|---|---|---:|---:|---|",
]


def write_table(readme: Path, results: dict[str, Any], names: list[str]) -> None:
    """Put the table between its marks in `readme`."""
    rows = [row(name, results[name]) for name in names if name in results]
    text = readme.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    readme.write_text("\n".join([before + START, *HEAD, *rows, "", summary(results), END + after]))


def row(name: str, result: dict[str, Any]) -> str:
    if "ratios" not in result:
        return f"| {name} | {result['verdict']}: {result['why']} | | | | | | {peer(result)} |"
    sizes = " / ".join(f"{measured['params'] / result['params']:.2f}" for measured in result["ratios"].values())
    differences = [measured["difference"] for measured in result["ratios"].values() if "difference" in measured]
    verdict = result["verdict"] + (f": {result['why']}" if result["why"] else "")
    cells = [name, verdict, kinds(result["exact"]), kinds(result["inexact"]), sizes]
    cells += [f"{max(differences):.0e}" if differences else "", str(result["trace_s"]), peer(result)]
    return "| " + " | ".join(cells) + " |"


def kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


def peer(result: dict[str, Any]) -> str:
    found = result.get("peer")
    if found is None:
        return "not run"
    if "error" in found:
        return f"fail: {found['error']}"
    if "inner" in result.get("inexact", {}) and all("difference" in each for each in found.values()):
        return "runs, not comparable: cuts within the groups of group norm"
    failures = [(ratio, each) for ratio, each in found.items() if each["verdict"] != "pass"]
    if failures:
        ratio, each = failures[0]
        part = "" if len(failures) == len(found) else f" at {ratio}"
        return f"fail{part}: {each['why'].replace('|', '/')}"
    return f"pass, {max(each['difference'] for each in found.values()):.0e}"


def summary(results: dict[str, Any]) -> str:
    ours = Counter(result["verdict"] for result in results.values())
    theirs = Counter(peer(result).split(",")[0].split(":")[0].split(" at")[0] for result in results.values())
    return f"lightning_opt: {say(ours)} of {len(results)}. Torch-Pruning: {say(theirs)}."


def say(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items(), reverse=True))
