from collections import Counter

import pytest

from lightning_opt.data.splits import hashed_split

KEYS = [f"sample {number}".encode() for number in range(1000)]
CLASSES = [number % 10 for number in range(1000)]


def split(keys=KEYS, **kwargs):
    return hashed_split(keys, **({"val_fraction": 0.1, "test_fraction": 0.2} | kwargs))


def parts(indices):
    return [indices.train.tolist(), indices.val.tolist(), indices.test.tolist()]


def test_parts_are_disjoint_complete_and_of_the_asked_size():
    train, val, test = parts(split())
    assert sorted(train + val + test) == list(range(1000))
    assert (len(train), len(val), len(test)) == (700, 100, 200)
    assert train == sorted(train)


def test_each_part_has_the_same_mix_of_classes():
    for part, size in zip(parts(split(strata=CLASSES)), (70, 10, 20), strict=True):
        assert Counter(CLASSES[number] for number in part) == dict.fromkeys(range(10), size)


def test_order_of_the_samples_does_not_matter():
    backwards = [{KEYS[::-1][number] for number in part} for part in parts(split(KEYS[::-1]))]
    assert backwards == [{KEYS[number] for number in part} for part in parts(split())]


def test_split_seed_gives_another_split():
    assert set(parts(split(split_seed=1))[2]) != set(parts(split())[2])
    assert parts(split(split_seed=1)) == parts(split(split_seed=1))


def test_equal_keys_stay_together():
    keys = [key for key in KEYS[:300] for _ in range(3)]
    where = {}
    for name, part in enumerate(parts(split(keys))):
        for number in part:
            where.setdefault(keys[number], set()).add(name)
    assert all(len(places) == 1 for places in where.values())


@pytest.mark.parametrize(
    ("fractions", "name"),
    [
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "nothing to train on"),
    ],
)
def test_bad_fractions_are_named(fractions, name):
    with pytest.raises(ValueError, match=name):
        split(**fractions)


def test_a_part_that_would_be_empty_is_refused():
    with pytest.raises(ValueError, match="val_fraction leaves no sample"):
        hashed_split(KEYS[:3], val_fraction=0.1, test_fraction=0.4)


def test_no_validation_part_where_none_is_asked_for():
    assert len(split(val_fraction=0.0).val) == 0
