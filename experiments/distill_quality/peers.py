"""The arms of torchdistill: run by run.py under another interpreter, on the same tensors, nets, seeds and loop.

PEER_PYTHON peers.py JOB.pt    (prints one JSON line for each arm and seed)
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from setting import PAIRS, Loss, accuracy, fresh, train
from torch import Tensor


def load_losses() -> Any:
    """Import torchdistill's losses beside a CPU build of torch.

    torchvision, which it pulls in, describes operators that only its own binary has; where that binary was made for
    another build of torch the import fails. The losses use none of them, so the descriptions are skipped.
    """
    register = torch.library.register_fake

    def patient(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    torch.library.register_fake = patient
    try:
        from torchdistill.losses import mid_level
    finally:
        torch.library.register_fake = register
    return mid_level


def peer_losses() -> dict[str, Callable[[], Loss]]:
    """Name torchdistill's losses: KD at the usual setting, and logit standardization as its own example sets it."""
    theirs = load_losses()
    where = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
    }
    return {
        "torchdistill_kd": lambda: _loss(theirs.KDLoss(**where, temperature=4.0, alpha=0.1)),
        "torchdistill_logit_std": lambda: _loss(theirs.LogitStdKDLoss(**where, temperature=2.0, alpha=0.5, beta=9.0)),
    }


def _loss(criterion: Any) -> Loss:
    def loss(logits: Tensor, told: Tensor | None, labels: Tensor, progress: float) -> Tensor:
        return criterion({".": {"output": logits}}, {".": {"output": told}}, labels)

    return loss


def main() -> None:
    torch.set_num_threads(1)
    job = torch.load(sys.argv[1], weights_only=True)
    pair, losses = PAIRS[job["pair"]], peer_losses()
    for arm, seed in job["missing"]:
        student = fresh(pair.student, seed)
        form = "versions" if arm.endswith("_versions") else "plain"
        seconds = train(
            student,
            job["seen"][form],
            job["labels"],
            losses[arm.removesuffix("_versions")](),
            answers=job["told"][form],
            batch=pair.batch,
            epochs=pair.epochs,
            lr=pair.lr,
            seed=seed,
        )
        got = {part: accuracy(student, *job[part]) for part in ("val", "test")}
        print(json.dumps({"arm": arm, "seed": seed, "cpu_s": round(seconds, 2), **got}), flush=True)


if __name__ == "__main__":
    main()
