"""The same ResNet-50 through Torch-Pruning 1.6.1, to the same number of multiply-accumulates."""

import contextlib
import copy
import io
import subprocess
import sys
from pathlib import Path

from resnet import X, macs
from torch import nn

VERSION = "1.6.1"
FOLDER = Path(__file__).resolve().parents[2] / "build" / "peers" / "torch_pruning"


def install(folder: Path) -> None:
    """Lay the peer into a folder of its own, without what it depends on, and make it importable."""
    if not (folder / "torch_pruning").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"torch-pruning=={VERSION}"], check=True)
    sys.path.append(str(folder))


def cut(model: nn.Module, *, target: float, round_to: int | None, tries: int = 6) -> nn.Module:
    """Return the model at 1/`target` of its multiply-accumulates: the largest one that has no more.

    Channels by their L2 norm over the group, the same share in every layer, the classifier left alone, as its
    documentation has it for ResNet-50. The share is found by trying.
    """
    whole, best = macs(model), None
    low, high, share = 0.0, 1.0, 1.0 - target**-0.5
    for _ in range(tries):
        small = _prune(copy.deepcopy(model), share, round_to)
        found = whole / macs(small)
        if found >= target:
            high = share
            best = small if best is None or macs(small) > macs(best) else best
        else:
            low = share
        # Multiply-accumulates fall about with the square of what stays.
        guess = 1.0 - (1.0 - share) * (found / (1.003 * target)) ** 0.5
        share = guess if low < guess < high else (low + high) / 2
    if best is None:
        raise RuntimeError(f"Torch-Pruning did not reach {target}x in {tries} tries")
    return best


def _prune(model: nn.Module, share: float, round_to: int | None) -> nn.Module:
    import torch_pruning

    with contextlib.redirect_stdout(io.StringIO()):
        pruner = torch_pruning.pruner.BasePruner(
            model,
            X,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[model.get_submodule("fc")],
            round_to=round_to,
        )
        pruner.step()
    return model.eval()
