"""The order of the data and its random numbers: functions of (seed, epoch, index), continued after any batch."""

import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_opt.checkpointing import EpochBatchSampler, SeededDataset, eval_loader, make_resumable, train_loader
from lightning_opt.checkpointing.keys import mix
from lightning_opt.checkpointing.loader import ResumableLoader


def sampler(n, **kwargs):
    options = {"batch_size": 4, "seed": 1, "shuffle": True, "drop_last": False}
    return EpochBatchSampler(n, **options | kwargs)


def indices(batches):
    return [[index for _, index in batch] for batch in batches]


def flat(batches):
    return [index for batch in batches for index in batch]


def test_the_hash_is_the_published_splitmix64():
    # first outputs of splitmix64 from state 0 and 1 (Steele, Lea and Flood 2014; Vigna's reference code)
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1) == 0x910A2DEC89025CC1
    assert len({mix(seed, epoch, index) for seed in range(8) for epoch in range(8) for index in range(8)}) == 512


def test_each_epoch_is_a_permutation_of_its_own():
    epochs = [indices(sampler(10, position=lambda e=e: (e, 0))) for e in range(3)]
    for batches in epochs:
        assert sorted(flat(batches)) == list(range(10))
        assert [len(b) for b in batches] == [4, 4, 2]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == indices(sampler(10))
    assert epochs[0] != indices(sampler(10, seed=2))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [24, 25, 31, 47])
def test_ranks_together_are_one_process_with_the_larger_batch(world_size, drop_last, n):
    ranks = [
        indices(sampler(n, batch_size=3, rank=r, world_size=world_size, drop_last=drop_last)) for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    one = indices(sampler(n, batch_size=3 * world_size, drop_last=drop_last))
    together = [flat(parts) for parts in zip(*ranks, strict=True)]
    assert flat(together) == flat(one)
    full = n // (3 * world_size) - (not drop_last and 0 < n % (3 * world_size) < world_size)
    assert together[:full] == one[:full]
    assert max(len(b) for r in ranks for b in r[-1:]) - min(len(b) for r in ranks for b in r[-1:]) <= 1


def test_it_starts_where_the_position_is_at_the_first_next():
    position = [(0, 0)]
    keys = sampler(12, position=lambda: position[0])
    batches = iter(keys)
    position[0] = (3, 1)
    assert list(batches) == list(sampler(12, position=lambda: (3, 0)))[1:]


def test_all_of_an_epoch_is_nothing_of_the_next_one():
    assert list(sampler(12, position=lambda: (2, 3))) == list(sampler(12, position=lambda: (3, 0)))


@pytest.mark.parametrize(
    "kwargs", [{"batch_size": 0}, {"batch_size": 20, "drop_last": True}, {"rank": 2, "world_size": 2}]
)
def test_impossible_sizes_are_refused(kwargs):
    with pytest.raises(ValueError, match=r"batch_size|rank"):
        sampler(10, **kwargs)


class Noisy(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.tensor([index, float(torch.rand(())), float(np.random.rand()), random.random()])


def test_samples_depend_on_their_key_alone():
    data = SeededDataset(Noisy(), seed=1)
    alone = data[(2, 7)]
    assert torch.equal(data.__getitems__([(2, 3), (2, 7)])[1], alone)
    for other in (SeededDataset(Noisy(), seed=2)[(2, 7)], data[(3, 7)]):
        assert (other[1:] != alone[1:]).all()


def test_global_generators_are_left_as_they_were():
    data = SeededDataset(Noisy(), seed=1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(()), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    list(train_loader(data.dataset, batch_size=4, seed=3, collate_fn=lambda s: random.random()))
    data[(0, 1)]
    assert (torch.rand(()), np.random.rand(), random.random()) == expected


def test_any_number_of_workers_gives_the_same_batches():
    def batches(workers):
        loader = train_loader(Noisy(), batch_size=4, seed=3, num_workers=workers, collate_fn=mixed)
        return torch.stack([b for _ in range(2) for b in loader])

    assert torch.equal(batches(0), batches(2))


def mixed(samples):
    return torch.stack(samples) * random.random()


def test_without_a_trainer_it_keeps_its_own_position():
    def loader():
        return train_loader(Noisy(), batch_size=4, seed=3)

    whole = loader()
    expected = [b for _ in range(3) for b in whole]
    for stop in (0, 1, 4, 5, 9):
        first, seen = loader(), []
        while len(seen) < stop:
            for batch in first:
                seen.append(batch)
                if len(seen) == stop:
                    break
        second = loader()
        second.load_state_dict(first.state_dict())
        while len(seen) < len(expected):
            seen.extend(second)
        assert torch.equal(torch.stack(seen), torch.stack(expected)), stop


def test_other_data_than_the_saved_state_is_warned_of():
    loader = train_loader(Noisy(), batch_size=4, seed=3)
    with pytest.warns(UserWarning, match="global_batch_size: 4 -> 5"):
        train_loader(Noisy(), batch_size=5, seed=3).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [6, 7, 13, 16, 20])
def test_evaluation_sees_each_sample_once(monkeypatch, world_size, n):
    seen, lengths = [], set()
    for rank in range(world_size):
        monkeypatch.setattr("lightning_opt.checkpointing.loader.data_ranks", lambda _, r=rank: (r, world_size))
        batches = list(eval_loader(TensorDataset(torch.arange(n)), batch_size=2))
        assert all(1 <= len(b[0]) <= 3 for b in batches)
        lengths.add(len(batches))
        seen.extend(torch.cat([b[0] for b in batches]).tolist())
    assert sorted(seen) == list(range(n))
    assert len(lengths) == 1


def test_evaluation_with_fewer_samples_than_ranks_is_refused(monkeypatch):
    monkeypatch.setattr("lightning_opt.checkpointing.loader.data_ranks", lambda _: (0, 4))
    with pytest.raises(ValueError, match="3 samples make no batch"):
        eval_loader(TensorDataset(torch.arange(3)), batch_size=2)


class Keyed(Dataset):
    def __len__(self):
        return 8

    def __getitems__(self, keys):
        return torch.tensor(keys)


def test_a_dataset_that_takes_keys_gets_them():
    batches = torch.cat(list(train_loader(Keyed(), batch_size=4, seed=3)))
    assert sorted(batches[:, 1].tolist()) == list(range(8))
    assert batches[:, 0].tolist() == [0] * 8


def test_a_subset_gets_its_indices():
    data = Subset(TensorDataset(torch.arange(10)), [9, 8, 7, 6])
    assert sorted(torch.cat([b[0] for b in train_loader(data, batch_size=2, seed=3)]).tolist()) == [6, 7, 8, 9]


class Foreign(pl.LightningDataModule):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(10.0)), **self.options)


def doubled(samples):
    return torch.stack([s[0] for s in samples]) * 2


def test_a_foreign_loader_is_made_again_with_its_settings():
    module = make_resumable(Foreign(batch_size=4, shuffle=True, drop_last=True, collate_fn=doubled), seed=1)
    loader = module.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    assert len(first) == 8
    assert not torch.equal(first, second)
    assert set(first.tolist()) < {2.0 * i for i in range(10)}
    in_order = make_resumable(DataLoader(TensorDataset(torch.arange(10)), batch_size=4), seed=1)
    assert torch.cat([b[0] for b in in_order]).tolist() == list(range(10))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=2),
        DataLoader(range(10), batch_size=2, sampler=WeightedRandomSampler(torch.ones(10), 10)),
        DataLoader(range(10), batch_sampler=type("Own", (BatchSampler,), {})(range(10), 2, False)),
    ],
)
def test_what_cannot_be_made_resumable_is_left_alone_with_one_warning(loader):
    with pytest.warns(UserWarning, match="not be bit-exact") as caught:
        assert make_resumable(loader, seed=1) is loader
    assert len(caught) == 1


def test_a_resumable_loader_is_left_alone_without_a_warning():
    loader = train_loader(Noisy(), batch_size=4, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_resumable(loader, seed=1) is loader
    with pytest.raises(ValueError, match="IterableDataset"):
        train_loader(Stream(), batch_size=2, seed=1)
