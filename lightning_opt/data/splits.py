"""Splits that depend on the data and on `split_seed`, never on a run's seed: runs stay comparable."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SplitIndices:
    """Positions of the samples of each part, ascending int64: disjoint, and together everything."""

    train: Tensor
    val: Tensor
    test: Tensor


def hashed_split(
    keys: Sequence[bytes],
    *,
    val_fraction: float,
    test_fraction: float,
    split_seed: int = 0,
    strata: Sequence[Hashable] | None = None,
) -> SplitIndices:
    """Split samples by a hash of their keys.

    Samples of equal key stay together, so a sample that occurs twice, or several pieces of one document, cannot lie on
    both sides. Within each stratum the groups are ordered by hash and cut where the fractions are reached.

    Args:
        keys: What each sample is told apart by, such as its own bytes.
        val_fraction: Share of the samples for validation.
        test_fraction: Share of the samples for the test.
        split_seed: Another number gives another split.
        strata: Class of each sample, to give every part the same mix. A group counts where its first sample does.

    Raises:
        ValueError: The fractions are out of range, or a part would be empty that should not be.
    """
    check_fractions(val_fraction, test_fraction)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        groups[key].append(position)
    by_stratum: dict[Hashable, list[tuple[bytes, list[int]]]] = defaultdict(list)
    salt = split_seed.to_bytes(8, "little", signed=True)
    for key, positions in groups.items():
        order = hashlib.blake2b(key, digest_size=16, salt=salt.ljust(16, b"\0")).digest()
        by_stratum[strata[positions[0]] if strata is not None else None].append((order, positions))
    parts: dict[str, list[int]] = {"test": [], "val": [], "train": []}
    for stratum in by_stratum.values():
        _cut(sorted(stratum), parts, val_fraction=val_fraction, test_fraction=test_fraction)
    tensors = {name: torch.tensor(sorted(positions), dtype=torch.int64) for name, positions in parts.items()}
    for name, fraction in (("train", 1.0), ("val", val_fraction), ("test", test_fraction)):
        if fraction and not len(tensors[name]):
            raise ValueError(f"{name}_fraction leaves no sample of {len(keys)} in the {name} part")
    return SplitIndices(**tensors)


def _cut(
    stratum: list[tuple[bytes, list[int]]], parts: dict[str, list[int]], *, val_fraction: float, test_fraction: float
) -> None:
    """Deal the groups of one stratum to test, then val, then train."""
    total = sum(len(positions) for _, positions in stratum)
    test_end = round(total * test_fraction)
    val_end = test_end + round(total * val_fraction)
    seen = 0
    for _, positions in stratum:
        name = "test" if seen < test_end else "val" if seen < val_end else "train"
        parts[name] += positions
        seen += len(positions)


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Check that both fractions are shares that leave something to train on.

    Raises:
        ValueError: They are not.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), not {value}")
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction={val_fraction} and test_fraction={test_fraction} leave nothing to train on")
