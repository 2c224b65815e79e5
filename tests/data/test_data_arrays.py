import pytest
import torch

from lightning_opt.checkpointing.loader import eval_loader, train_loader
from lightning_opt.data.arrays import ArrayDataset, TokenDataset, WindowDataset
from lightning_opt.data.augment import Normalize, RandomNoise, RandomShift

X = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 7


def augmented(seed=0, variants=3, finish=None):
    return ArrayDataset(X, Y, transform=RandomNoise(0.1), finish=finish, seed=seed, variants=variants)


def test_a_batch_holds_inputs_targets_and_positions():
    x, y, index = ArrayDataset(X, Y).__getitems__([(0, 4), (5, 2), (9, 49)])
    assert torch.equal(x, X[[4, 2, 49]])
    assert torch.equal(y, Y[[4, 2, 49]])
    assert index.tolist() == [4, 2, 49]
    assert index.dtype == torch.int64


def test_a_single_sample_is_a_row_of_a_batch():
    x, y, index = ArrayDataset(X, Y)[7]
    assert torch.equal(x, X[7])
    assert (y.item(), index.item()) == (0, 7)


@pytest.mark.parametrize("position", [-1, 50])
def test_positions_outside_are_refused(position):
    with pytest.raises(IndexError):
        ArrayDataset(X, Y)[position]


def test_the_version_is_the_epoch_modulo_variants():
    data = augmented()
    by_epoch = [data.__getitems__([(epoch, 3)])[0] for epoch in range(7)]
    assert torch.equal(by_epoch[0], by_epoch[3])
    assert torch.equal(by_epoch[1], by_epoch[4])
    assert torch.equal(by_epoch[0], by_epoch[6])
    assert len({tuple(x.flatten().tolist()) for x in by_epoch[:3]}) == 3


def test_augmentation_ignores_who_else_is_in_the_batch():
    data = augmented()
    whole = data.__getitems__([(2, index) for index in range(50)])[0]
    mixed = data.__getitems__([(2, 9), (1, 3), (2, 0)])[0]
    assert torch.equal(mixed[0], whole[9])
    assert torch.equal(mixed[2], whole[0])
    assert not torch.equal(mixed[1], whole[3])


def test_seeds_give_other_versions():
    assert not torch.equal(augmented(seed=0)[(0, 3)][0], augmented(seed=1)[(0, 3)][0])


def test_plain_leaves_out_the_transform_and_keeps_the_normalisation():
    data = augmented(finish=Normalize(0.5, 0.5))
    torch.testing.assert_close(data.plain()[3][0], (X[3] - 0.5) / 0.5)
    assert not torch.allclose(data[3][0], (X[3] - 0.5) / 0.5)
    assert data.variants == 3


def batches(data, **kwargs):
    loader = train_loader(data, batch_size=8, seed=1, **kwargs)
    return [batch for _ in range(2) for batch in loader]


def test_any_number_of_workers_gives_the_same_batches():
    alone, helped = batches(augmented(), num_workers=0), batches(augmented(), num_workers=2)
    assert len(alone) == len(helped) == 12
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    first, second = (
        {i: x for b in half for x, i in zip(b[0], b[2].tolist(), strict=True)} for half in (alone[:6], alone[6:])
    )
    both = set(first) & set(second)
    assert not any(torch.equal(first[i], second[i]) for i in both)  # epochs differ


def test_batch_size_does_not_change_a_sample():
    def samples(size):
        loader = train_loader(augmented(), batch_size=size, seed=1)
        return {int(i): x for batch in loader for x, i in zip(batch[0], batch[2], strict=True)}

    small, large = samples(5), samples(25)
    assert set(small) == set(large) == set(range(50))
    assert all(torch.equal(small[i], large[i]) for i in small)


@pytest.mark.parametrize(("transform", "variants"), [(RandomShift(1), 0), (None, 2)])
def test_transform_and_variants_go_together(transform, variants):
    with pytest.raises(ValueError, match="variants"):
        ArrayDataset(X, Y, transform=transform, variants=variants)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="50 samples and targets 49"):
        ArrayDataset(X, Y[:-1])


ROWS = [[5, 6], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [3] * 12]
LABELS = torch.tensor([0, 1, 0, 1])


def test_token_rows_are_padded_to_the_longest_rounded_up():
    data = TokenDataset(ROWS, LABELS, pad_id=99, max_length=12, multiple_of=4)
    batch = data.__getitems__([(0, 0), (0, 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 99, 99], [7, 99, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["index"].tolist() == [0, 1]
    assert data.__getitems__([2])["input_ids"].shape == (1, 12)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_the_width_never_passes_the_maximum():
    assert TokenDataset(ROWS, LABELS, pad_id=0, max_length=12, multiple_of=8)[3]["input_ids"].shape == (12,)


def test_fixed_length():
    data = TokenDataset(ROWS, LABELS, pad_id=0, max_length=12, fixed_length=True)
    assert data.__getitems__([1])["input_ids"].shape == (1, 12)


def test_windows_predict_each_token_once():
    stream = torch.arange(100, 123, dtype=torch.int32)
    data = WindowDataset(stream, context_length=5)
    batch = data.__getitems__(list(range(len(data))))
    assert batch["input_ids"].shape == batch["labels"].shape == (5, 5)
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted] + 1)
    assert batch["labels"][counted].tolist() == list(range(101, 123))
    assert batch["input_ids"][0].tolist() == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("length", [2, 5, 6, 7, 11])
def test_windows_at_the_edges(length):
    data = WindowDataset(torch.arange(1, length + 1), context_length=5)
    labels = data.__getitems__(list(range(len(data))))["labels"]
    assert labels[labels != -100].tolist() == list(range(2, length + 1))


def test_moving_windows_stay_inside_and_change_with_the_version_only():
    stream = torch.arange(1, 1001)
    data = WindowDataset(stream, context_length=16, seed=0, variants=2)
    keys = [[(epoch, index) for index in range(len(data))] for epoch in range(3)]
    first, second, third = (data.__getitems__(some) for some in keys)
    assert torch.equal(first["input_ids"], third["input_ids"])
    assert not torch.equal(first["input_ids"], second["input_ids"])
    for batch in (first, second):
        assert (batch["labels"] == batch["input_ids"] + 1).all()  # no position is filled up
        starts = batch["input_ids"][:, 0] - 1
        moved = starts - torch.arange(len(data)) * 16
        assert ((moved >= 0) | (starts == 1000 - 17)).all()
        assert (moved < 16).all()
        assert len(moved.unique()) > 8


def test_a_text_needs_two_tokens():
    with pytest.raises(ValueError, match="1 tokens"):
        WindowDataset(torch.arange(1), context_length=4)


def test_three_ranks_see_each_evaluation_sample_once():
    from lightning_opt.checkpointing.loader import EpochBatchSampler

    data = ArrayDataset(X, Y)
    loader = eval_loader(data, batch_size=8)
    assert torch.cat([batch[2] for batch in loader]).tolist() == list(range(50))
    ranks = [
        EpochBatchSampler(50, batch_size=8, seed=0, shuffle=False, drop_last=False, rank=rank, world_size=3)
        for rank in range(3)
    ]
    seen = [data.__getitems__(keys)[2] for sampler in ranks for keys in sampler]
    assert sorted(torch.cat(seen).tolist()) == list(range(50))
    assert len({len(sampler) for sampler in ranks}) == 1
