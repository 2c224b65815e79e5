"""Training loops as one writes them for torch alone: one process, DDP, FSDP2 and a pipeline of two."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from setting import CLIP, MICRO_BATCHES, RATE, network
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

Batches = Iterator[tuple[Tensor, Tensor]]
Lap = Callable[[], bool]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def one(batches: Batches, lap: Lap) -> None:
    """Train in one process."""
    model = network()
    _train(model, batches, lap)


def ddp(batches: Batches, lap: Lap) -> None:
    """Train with torch's DistributedDataParallel."""
    _train(DistributedDataParallel(network(), gradient_as_bucket_view=True), batches, lap)


def fsdp2(batches: Batches, lap: Lap) -> None:
    """Train with `fully_shard` on each block and on the whole."""
    model, mesh = network(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, batches, lap)


def _train(model: nn.Module, batches: Batches, lap: Lap) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for ids, labels in batches:
        if not lap():
            return
        optimizer.zero_grad()
        loss_of(model(ids), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


class First(nn.Module):
    """The embeddings and the first half of the blocks."""

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = model.token_embedding, model.position_embedding
        self.blocks = nn.ModuleList(model.blocks[:blocks])  # type: ignore[index]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x


class Last(nn.Module):
    """The other half of the blocks, the norm and the head."""

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.blocks[blocks:])  # type: ignore[index]
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def pipeline(batches: Batches, lap: Lap) -> None:
    """Train with torch's 1F1B on two processes; each has half of the blocks."""
    model, first = network(), dist.get_rank() == 0
    half = len(model.blocks) // 2  # type: ignore[arg-type]
    part = First(model, half) if first else Last(model, half)
    stage = PipelineStage(part, dist.get_rank(), 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_of)
    parameters = list(part.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    for ids, labels in batches:
        if not lap():
            return
        optimizer.zero_grad()
        if first:
            schedule.step(ids, return_outputs=False)
        else:
            schedule.step(target=labels, return_outputs=False)
        squares = torch.stack(torch._foreach_norm([p.grad for p in parameters])).square().sum()
        dist.all_reduce(squares)
        scale = (CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([p.grad for p in parameters], scale)
        optimizer.step()
