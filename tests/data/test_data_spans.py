"""Spans of texts: whole words in their order, special tokens kept, the same in every run."""

import pytest
import torch

from lightning_opt.data import RandomSpan, TokenDataset
from lightning_opt.data.randomness import Draws

# [CLS]=1, tokens 10.., [SEP]=2
ROWS = [[1, *range(10, 10 + size), 2] for size in (20, 5, 1, 0)]


def data(**change):
    return TokenDataset(ROWS, torch.zeros(4), pad_id=0, max_length=24, multiple_of=1, **change)


def test_a_span_is_a_piece_of_its_text_between_the_special_tokens():
    spans = data(transform=RandomSpan(share=1.0, shortest=2, longest=4), seed=3, variants=50)
    sizes, starts = set(), set()
    for version in range(50):
        batch = spans.__getitems__([(version, row) for row in range(4)])
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        for row, whole in zip(rows, ROWS, strict=True):
            inner = row[1:-1]
            assert row[0] == 1
            assert row[-1] == 2
            assert inner == whole[1:-1] or (
                2 <= len(inner) <= 4 and inner == list(range(inner[0], inner[0] + len(inner)))
            )
        assert not batch["input_ids"][~batch["attention_mask"].bool()].any()
        assert rows[2] == ROWS[2]
        assert rows[3] == ROWS[3]
        sizes.add(len(rows[0]) - 2)
        starts.add(rows[0][1])
    assert sizes == {2, 3, 4}
    assert {min(starts), max(starts)} <= set(range(10, 30))
    assert len(starts) > 10


def test_the_share_is_of_samples_and_versions_come_back():
    many = TokenDataset(
        [ROWS[0]] * 2000,
        torch.zeros(2000),
        pad_id=0,
        max_length=24,
        transform=RandomSpan(share=0.25),
        seed=1,
        variants=2,
    )
    batch = many.__getitems__([(0, row) for row in range(2000)])
    cut = (batch["attention_mask"].sum(1) < 22).float().mean()
    assert abs(float(cut) - 0.25) < 0.03
    assert torch.equal(batch["input_ids"], many.__getitems__([(2, row) for row in range(2000)])["input_ids"])
    assert not torch.equal(batch["input_ids"], many.__getitems__([(1, row) for row in range(2000)])["input_ids"])
    plain = many.plain().__getitems__([(0, 0)])
    assert plain["attention_mask"].sum() == 22


def test_texts_without_special_tokens():
    ids = torch.arange(1, 9)[None]
    got, lengths = RandomSpan(share=1.0, shortest=3, longest=3, keep_first=0, keep_last=0)(
        ids, torch.tensor([8]), Draws.of(seed=0, variants=[0], indices=[0])
    )
    row = got[0, : int(lengths)].tolist()
    assert row == list(range(row[0], row[0] + 3))


@pytest.mark.parametrize("change", [{"share": 0.0}, {"shortest": 0}, {"shortest": 5, "longest": 4}, {"keep_first": -1}])
def test_arguments_out_of_range_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        RandomSpan(**change)
