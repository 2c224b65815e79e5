"""Write the results as tables."""

from pathlib import Path
from typing import Any

MARKS = ("<!-- table -->", "<!-- end of table -->")


def markdown(results: dict[str, Any]) -> str:
    """Return all tables."""
    about, setting = results["machine"], results["setting"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, 1 thread a process, torch {about['torch']}; "
        f"{setting['blocks']} blocks of width {setting['dim']}, 8 micro-batches of {setting['tokens']} "
        f"tokens, {setting['steps']} steps; gloo: "
        f"{results['link']['latency_us']:.0f} us, {results['link']['gb_per_s']:.1f} GB/s.",
        "",
        *_bubbles(results),
    ]
    for name, machine in results.get("simulated", {}).items():
        lines += ["", f"**{name}**: {machine['says']}.", "", *_breaks(machine)]
    return "\n".join(lines)


def _bubbles(results: dict[str, Any]) -> list[str]:
    lines = [
        "| schedule | ranks | paper | equal stages | these stages | measured operations (one step) | off | "
        "from equal stages | on the clock | step, ms | load |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for found in results["bubbles"].values():
        missed = " (missed)" if abs(found["off"]) > results["limit"] else ""
        paper, clock = (f"{found[key]:.3f}" if found.get(key) is not None else "-" for key in ("paper", "on_the_clock"))
        points = 100 * (found["replayed"] - found["theory"])
        lines.append(
            f"| {found['schedule']} | {found['ranks']} | {paper} | {found['theory']:.3f} | {found['own']:.3f} | "
            f"**{found['replayed']:.3f}** ({found['replayed_low']:.3f} to {found['replayed_high']:.3f}) | "
            f"{found['off']:+.1%}{missed} | {found['off_equal_stages']:+.1%}, {points:+.1f} points | {clock} | "
            f"{found['step_ms']:.0f} | {found['load_average']} |"
        )
    return lines


def _breaks(machine: dict[str, Any]) -> list[str]:
    ranks = list(dict.fromkeys(str(found["ranks"]) for found in machine["points"]))
    lines = [f"| schedule | {' | '.join(f'{count} ranks' for count in ranks)} | breaks first |"]
    lines.append("|---" * (len(ranks) + 2) + "|")
    for row in machine["breaks"]:
        cells = [_cell(row["best"].get(count)) for count in ranks]
        first = row["first"]
        breaks = "nothing" if first is None else f"{first['cause']}, {first['ranks']} ranks"
        lines.append(f"| {row['schedule']} | {' | '.join(cells)} | {breaks} |")
    return lines


def _cell(best: dict[str, Any] | None) -> str:
    if best is None:
        return "no cut fits"
    cause = max(best["lost"], key=lambda key: best["lost"][key])
    return f"{best['efficiency']:.2f} ({best['stages']} x {best['copies']}; {cause} {best['lost'][cause]:.2f})"


def into_readme(readme: Path, text: str) -> None:
    """Write the tables between the marks of the README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
