"""What is trained, by hand and by ours: a small causal language model on ready batches of random tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_opt.models import GPT

VOCAB, LENGTH, DIM, DEPTH = 512, 64, 128, 6
BATCH = 8  # of each process with samples of its own
MICRO_BATCHES = 4
RATE, CLIP = 1e-4, 1.0
ENDLESS = 1_000_000


def network() -> GPT:
    torch.manual_seed(0)
    return GPT(
        vocab_size=VOCAB, context_length=LENGTH, dim=DIM, depth=DEPTH, heads=4, tied_embeddings=False, dropout=0.0
    )


class Batches:
    """Some ready batches, again and again, as one very long epoch."""

    def __init__(self, size: int, *, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(VOCAB, (size, LENGTH + 1), generator=draw) for _ in range(4)]
        self.ready = [(block[:, :-1].contiguous(), block[:, 1:].contiguous()) for block in tokens]

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.ready[number % len(self.ready)] for number in range(ENDLESS))
