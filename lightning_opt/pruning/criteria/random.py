"""The control: scores that know nothing."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_opt.pruning.criteria.base import Criterion, Evidence, finite


@dataclass(frozen=True)
class Random(Criterion):
    """Keep weights by lot: the control that every other criterion must beat.

    The draw depends on the seed, the weight's name and its shape alone, so every process, every device and every
    resumed run draws the same, and the choice at a higher sparsity lies within the choice at a lower one.
    """

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        text = f"{evidence.seed}:{evidence.name}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)  # on the CPU: devices draw differently
        return finite(torch.rand(weight.shape, generator=generator).to(weight.device))
