"""The text pair: film reviews, MiniLM fine-tuned on them, and spans of the training sentences for it to judge."""

from pathlib import Path
from typing import Any

import torch
from setting import Pair
from torch import Tensor, nn

from lightning_opt.data import MiniLMTokenizer, MovieReviews
from lightning_opt.data.cache import cached_arrays
from lightning_opt.data.fetch import default_cache_dir
from lightning_opt.forward import logits_of
from lightning_opt.models import minilm_encoder

SPAN_SETS, SHORTEST, LONGEST = 4, 2, 12  # sets of spans; word pieces in a span
_CLS, _SEP = 101, 102


def load_teacher(folder: Path) -> nn.Module:
    """Read MiniLM as `python train.py +experiment=distill_text` leaves it in the cache, in teachers/HASH."""
    weights = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True, mmap=True)["state_dict"]
    model = minilm_encoder(num_outputs=2, pretrained=False)
    own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    model.load_state_dict(own)
    return model.eval()


@torch.no_grad()
def ask(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the teacher's logits `(N, 2)` for padded tokens `(N, T)`, texts of like length together."""
    lengths, answers = (ids != 0).sum(dim=1), torch.empty(len(ids), 2)
    for rows in lengths.argsort().split(64):
        tokens = ids[rows, : int(lengths[rows].max())].long()
        answers[rows] = logits_of(model(input_ids=tokens, attention_mask=(tokens != 0).long())).float()
    return answers


def spans_of(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a span of random place and length out of each text: padded tokens `(N, T)`, of the same shape."""
    inner = (ids != 0).sum(dim=1) - 2
    want = torch.randint(SHORTEST, LONGEST + 1, inner.shape, generator=generator).minimum(inner).clamp_min(1)
    start = (torch.rand(len(ids), generator=generator) * (inner - want + 1).clamp_min(1)).long() + 1
    steps = torch.arange(LONGEST)[None]
    spans = torch.zeros_like(ids)
    spans[:, 0] = _CLS
    spans[:, 1 : LONGEST + 1] = ids.gather(1, (start[:, None] + steps).clamp_max(ids.shape[1] - 1)) * (
        steps < want[:, None]
    )
    spans[torch.arange(len(ids)), want + 1] = _SEP
    return spans


def read_text(pair: Pair, teacher: Path) -> dict[str, Tensor]:
    """Return tokens, labels and the teacher's answers of all parts, and sets of spans of the training part.

    The answers take the teacher some minutes; they are kept in the cache, under the name of its folder.
    """
    module = MovieReviews(tokenizer=MiniLMTokenizer(), **pair.data)
    module.prepare_data()
    parts = {"train": module.splits.train, "val": module.splits.val, "test": module.splits.test}
    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        found |= {f"{name}_ids": part.ids, f"{name}_labels": part.labels}
    generator = torch.Generator().manual_seed(11)
    found["span_ids"] = torch.stack([spans_of(found["train_ids"], generator) for _ in range(SPAN_SETS)])

    def answer() -> dict[str, Any]:
        model = load_teacher(teacher)
        told = {f"{name}_answers": ask(model, found[f"{name}_ids"]).numpy() for name in parts}
        return told | {"span_answers": torch.stack([ask(model, ids) for ids in found["span_ids"]]).numpy()}

    kept = cached_arrays(default_cache_dir() / "parsed" / f"distill-quality-{teacher.name}.bin", answer)
    return found | {name: torch.from_numpy(value.copy()) for name, value in kept.items()}


def versions_of(pair: Pair, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mix whole sentences and spans: what students see, `(V, N, T)`, and the teacher's answers to it, `(V, N, 2)`."""
    generator = torch.Generator().manual_seed(12)
    seen, told = [], []
    for version in range(pair.variants):
        cut = (torch.rand(len(found["train_ids"]), generator=generator) < pair.span_share)[:, None]
        number = version % SPAN_SETS
        seen.append(torch.where(cut, found["span_ids"][number], found["train_ids"]))
        told.append(torch.where(cut, found["span_answers"][number], found["train_answers"]))
    return torch.stack(seen), torch.stack(told)
