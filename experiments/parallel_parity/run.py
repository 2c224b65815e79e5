"""Every strategy against one process: the loss curve, the masks and the quantizers.

    python experiments/parallel_parity/run.py                        # about 4 minutes
    python experiments/parallel_parity/run.py --strategies ddp fsdp2   # some; the other rows in results.json stay

Prints a table and writes results.json and the table in README.md. Exit code 1 above the bound.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: every process shall have one thread

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from training import STEPS, prunings, quantizings, train  # noqa: E402

MARKS = ("<!-- table -->", "<!-- end of table -->")
BOUND = 1e-5
PARTS = ("loss", "masks", "quantizers")


def strategies() -> dict[str, tuple[int, Callable[[], Any]]]:
    """Return the number of processes and what makes the strategy, by the name that a config has for it."""
    from lightning_opt.strategies import ddp
    from lightning_opt.strategies.pipeline import pipeline
    from lightning_opt.strategies.sharded_presets import fsdp2, fsdp2_tp, tensor_parallel

    return {
        "ddp": (2, ddp),
        "fsdp2": (2, fsdp2),
        "tensor_parallel": (2, tensor_parallel),
        "fsdp2_tp": (4, lambda: fsdp2_tp(tensor_parallel_size=2)),
        "pipeline": (2, lambda: pipeline(micro_batches=4)),
        "pipeline_ddp": (4, lambda: pipeline(data_parallel_size=2, micro_batches=4)),
    }


def loss(one: list[float], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare each process's logged losses with those of one process."""
    if "refused" in ranks[0]:
        return ranks[0]
    assert all(len(rank["losses"]) == len(one) for rank in ranks)
    off = [max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(one, rank["losses"], strict=True)) for rank in ranks]
    return {"max_difference": max(off), "batches": len(one), "holds": max(off) <= BOUND}


def masks(one: dict[str, torch.Tensor], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the bits in which the masks differ from one process's, over all that any process holds."""
    if "refused" in ranks[0]:
        return ranks[0]
    found: dict[str, torch.Tensor] = {}
    for rank in ranks:
        found |= rank["masks"]
    assert found.keys() == one.keys(), sorted(found.keys() ^ one.keys())
    differ = sum(int((found[name] ^ bits).count_nonzero()) for name, bits in one.items())
    among = all(torch.equal(bits, found[name]) for rank in ranks for name, bits in rank["masks"].items())
    return {"tensors": len(one), "bytes_that_differ": differ, "same_on_all_ranks": among, "holds": among and not differ}


def quantized(one: dict[str, torch.Tensor], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the quantizers of all processes with one another, exactly, and with those of one process."""
    if "refused" in ranks[0]:
        return ranks[0]
    first = ranks[0]["quantizers"]
    among = all(torch.equal(value, rank["quantizers"][name]) for rank in ranks for name, value in first.items())
    off = torch.cat([_relative(one[name], value) for name, value in first.items() if name.endswith("scale")])
    return {
        "numbers": len(first),
        "same_on_all_ranks": among,
        "scales": len(off),
        "median_relative_difference": float(off.median()),
        "max_relative_difference": float(off.max()),
        "holds": among,
    }


def _relative(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return ((one - other).abs() / one.abs().clamp(min=1e-6)).flatten()


def study(
    names: list[str], parts: list[str], only: str | None, results: dict[str, Any], save: Callable[[], None]
) -> None:
    """Run the single process once for each setting, and each strategy beside it."""
    settings = {"loss": {"loss": None}, "masks": prunings(), "quantizers": quantizings()}
    judges: dict[str, Callable[..., dict[str, Any]]] = {"loss": loss, "masks": masks, "quantizers": quantized}
    keys = {"loss": "losses", "masks": "masks", "quantizers": "quantizers"}
    chosen = strategies()
    for part in parts:
        for title, callbacks in settings[part].items():
            if only is not None and title != only:
                continue
            alone = train(lambda: "auto", ranks=1, callbacks=callbacks)[0]
            rows = results.setdefault(part, {}).setdefault(title, {})
            if part == "loss":
                other = train(lambda: "auto", ranks=1, seed=2)[0]["losses"]
                results["first_loss"], results["last_loss"] = alone["losses"][0], alone["losses"][-1]
                rows["another seed"] = loss(alone["losses"], [{"losses": other}])
            for name in names:
                ranks, make = chosen[name]
                rows[name] = judges[part](alone[keys[part]], train(make, ranks=ranks, callbacks=callbacks))
                print(f"{part}, {title}, {name}: {json.dumps(rows[name])}", flush=True)
                save()


def markdown(results: dict[str, Any]) -> str:
    """Return one row for each strategy."""
    columns = [(part, title) for part in PARTS for title in results.get(part, {})]
    chosen = strategies()
    lines = ["| strategy, processes | " + " | ".join(title for _, title in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in (*chosen, "another seed"):
        ranks = f", {chosen[name][0]}" if name in chosen else " (control)"
        cells = [_cell(part, results[part][title].get(name)) for part, title in columns]
        lines.append(f"| {name}{ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(part: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if "refused" in found:
        return "refused"
    if part == "loss":
        return f"{found['max_difference']:.1e}"
    if part == "masks":
        return "equal" if found["holds"] else f"{found['bytes_that_differ']} bytes differ"
    equal = "equal" if found["same_on_all_ranks"] else "different"
    return f"{equal}; {found['median_relative_difference']:.0e} from one's"


def into_readme(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", choices=list(strategies()), default=list(strategies()))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", help="title of one column of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning_opt"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = HERE / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results |= {"steps": STEPS, "bound": BOUND, "torch": torch.__version__}

    def save() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    study(arguments.strategies, arguments.parts, arguments.only, results, save)
    text = markdown(results)
    print(text)
    into_readme(HERE / "README.md", text)
    rows = [
        row
        for part in PARTS
        for title in results.get(part, {}).values()
        for name, row in title.items()
        if name != "another seed"
    ]
    control = results["loss"]["loss"]["another seed"]["max_difference"]
    return 0 if all(row.get("holds", "refused" in row) for row in rows) and control > BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
