"""Compare our losses with torchdistill's on random tensors: value and gradient, in float64.

    python experiments/loss_parity/run.py

Prints a table, writes results.json and the table in README.md. Exit code 1 where two equal definitions differ.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from cases import Case, all_cases  # noqa: E402
from peer import FOLDER, torchdistill_losses  # noqa: E402

LIMIT = 1e-6
MARKS = ("<!-- table -->", "<!-- end of table -->")


@dataclass
class Row:
    """The largest differences of one case over all seeds."""

    loss: str
    peer: str
    same_definition: bool
    value: float
    value_difference: float
    gradient_difference: float
    note: str

    @property
    def passed(self) -> bool:
        """Within the limit: absolute for the gradient and for values up to 1, relative for larger values."""
        return self.value_difference <= LIMIT * max(1.0, abs(self.value)) and self.gradient_difference <= LIMIT


def differences(case: Case) -> tuple[float, float, float]:
    """Return our value, and the absolute differences of the values and of the gradients' largest element."""
    sides = []
    for function in (case.ours, case.theirs):
        student = [tensor.clone().requires_grad_() for tensor in case.student]
        value = function(*student)
        sides.append((value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, student)])))
    (ours, our_gradient), (theirs, their_gradient) = sides
    assert our_gradient.abs().max() > 0, f"{case.loss}: no gradient, nothing is compared"
    return ours, abs(ours - theirs), (our_gradient - their_gradient).abs().max().item()


def compare(folder: Path, *, seeds: int) -> list[Row]:
    peer = torchdistill_losses(folder)
    rows: dict[tuple[str, str], Row] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for case in all_cases(peer, torch.Generator().manual_seed(seed)):
            value, by_value, by_gradient = differences(case)
            row = rows.setdefault(
                (case.loss, case.peer), Row(case.loss, case.peer, case.same, value, 0.0, 0.0, case.note)
            )
            row.value_difference = max(row.value_difference, by_value)
            row.gradient_difference = max(row.gradient_difference, by_gradient)
    return list(rows.values())


def table(rows: list[Row]) -> str:
    lines = [
        "| ours | theirs | value | difference of values | of gradients | within 1e-6 | remark |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        verdict = ("yes" if row.passed else "**no**") if row.same_definition else "other definition"
        numbers = f"{row.value:.4f} | {row.value_difference:.1e} | {row.gradient_difference:.1e}"
        lines.append(f"| `{row.loss}` | `{row.peer}` | {numbers} | {verdict} | {row.note} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peer", type=Path, default=FOLDER, help="folder of torchdistill; filled where it is missing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(arguments.peer, seeds=arguments.seeds)
    text = table(rows)
    print(text)
    failed = [row.loss for row in rows if row.same_definition and not row.passed]
    results = {
        "limit": LIMIT,
        "seeds": arguments.seeds,
        "dtype": "float64",
        "versions": {"torch": torch.__version__, "torchdistill": "1.1.5"},
        "passed": not failed,
        "rows": [{**asdict(row), "passed": row.passed if row.same_definition else None} for row in rows],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _into_readme(text)
    print("FAILED: " + ", ".join(failed) if failed else f"all {sum(r.same_definition for r in rows)} agree")
    return 1 if failed else 0


def _into_readme(text: str) -> None:
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
