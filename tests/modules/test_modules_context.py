"""A batch cut into parts: each loss, weighed by what counts in each part, is the loss of the whole batch."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from lightning_opt.errors import ConfigError
from lightning_opt.losses import DKD, KD, AttentionTransfer, ForwardKL, HiddenStates, MiniLMRelations, Signals
from lightning_opt.losses.base import Supervision
from lightning_opt.modules import Supervised
from lightning_opt.modules.context import StepContext, count_of_loss, cut_evenly
from lightning_opt.tasks import LanguageModeling

B, T, V, D = 6, 5, 7, 8
LENGTHS = torch.tensor([5, 1, 2, 2, 4, 1])


def example():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (B, T), generator=g)
    mask = torch.arange(T)[None] < LENGTHS[:, None]
    said = [
        Signals(
            logits=torch.randn(B, T, V, generator=g, dtype=torch.float64),
            features={
                "tokens": torch.randn(B, T, D, generator=g, dtype=torch.float64),
                "map": torch.randn(B, D, 3, 3, generator=g, dtype=torch.float64),
            },
        )
        for _ in range(2)
    ]
    supervision = Supervision(labels=torch.where(mask, labels, -100), mask=mask, token_mask=mask.roll(1, 0))
    return said[0], StepContext(inputs=labels, supervision=supervision, teacher=said[1])


def rows_of(signals, rows):
    return Signals(logits=signals.logits[rows], features={name: one[rows] for name, one in signals.features.items()})


LOSSES = [
    (KD(), ()),
    (ForwardKL(), ()),
    (DKD(), ()),
    (HiddenStates({"tokens": "tokens"}), ("tokens",)),
    (HiddenStates({"map": "map"}), ("map",)),
    (AttentionTransfer({"tokens": "tokens"}), ("tokens",)),
    (AttentionTransfer({"map": "map"}), ("map",)),
]


@pytest.mark.parametrize(("loss", "read"), LOSSES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_weighed_by_what_counts_add_up_to_the_whole(loss, read, parts):
    student, context = example()
    features = {name: student.features[name] for name in read}
    whole = loss(student, context.teacher, context.supervision)
    total = count_of_loss(loss, context.supervision, features)
    width, added = B // parts, 0.0
    for number, piece in enumerate(cut_evenly(context, parts)):
        ours = rows_of(student, slice(number * width, (number + 1) * width))
        share = count_of_loss(loss, piece.supervision, features) / total
        added = added + share * loss(ours, piece.teacher, piece.supervision)
    assert float(added) == pytest.approx(float(whole), rel=1e-6)
    plain = sum(
        loss(rows_of(student, slice(n * width, (n + 1) * width)), piece.teacher, piece.supervision) / parts
        for n, piece in enumerate(cut_evenly(context, parts))
    )
    if read != ("map",):  # tokens are spread unevenly: without weights it would be another number
        assert abs(float(plain - whole)) > 1e-4


def test_relations_count_by_samples():
    student, context = example()
    loss = MiniLMRelations({"": ""}, relation_heads=1, projections=["a", "b", "c"])
    assert float(count_of_loss(loss, context.supervision, {"a": student.features["tokens"]})) == B


def test_a_part_in_which_nothing_counts_has_a_finite_loss_that_counts_for_nothing():
    student, context = example()
    labels = context.labels.clone()
    labels[:2] = -100
    supervision = dataclasses.replace(context.supervision, labels=labels, mask=labels != -100)
    module = Supervised(torch.nn.Linear(1, 1), task=LanguageModeling(num_outputs=V))
    pieces = cut_evenly(dataclasses.replace(context, supervision=supervision), 3)
    empty = module.loss_terms(rows_of(student, slice(0, 2)), pieces[0])["task"]
    assert math.isfinite(float(empty))
    assert float(module.term_counts(pieces[0], {})["task"]) == 0
    shares = [float(module.term_counts(piece, {})["task"]) / float((labels != -100).sum()) for piece in pieces]
    added = sum(
        share * float(module.loss_terms(rows_of(student, slice(2 * n, 2 * n + 2)), piece)["task"])
        for n, (share, piece) in enumerate(zip(shares, pieces, strict=True))
    )
    wanted = F.cross_entropy(student.logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100)
    assert added == pytest.approx(float(wanted), rel=1e-6)


def test_a_loss_over_tokens_and_over_whole_samples_is_refused():
    student, context = example()
    loss = HiddenStates({"tokens": "tokens", "map": "map"})
    with pytest.raises(ConfigError, match="make two losses"):
        count_of_loss(loss, context.supervision, dict(student.features))


def test_a_batch_that_is_not_divisible_is_refused():
    with pytest.raises(ValueError, match="batch of 6 cannot be cut into 4"):
        cut_evenly(example()[1], 4)
