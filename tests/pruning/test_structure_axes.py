"""Axes against brute force: which sets of entries are left when a view, a split or a sum must keep its form."""

import pytest
import torch

from lightning_opt.pruning.structure.axes import (
    Reason,
    freeze,
    leaves,
    mark_inexact,
    new_axis,
    regroup,
    size_of,
    split,
    sum_axis,
    unify,
)
from lightning_opt.pruning.structure.units import entries_of_units, kept_count, kept_mask, nested_pairs

WHERE = Reason("test")


def free(axis):
    return [leaf for leaf in dict.fromkeys(leaves(axis)) if leaf.frozen is None]


def test_unify_makes_two_axes_keep_the_same_entries():
    a, b = new_axis(5), new_axis(5)
    unify(a, b, WHERE)
    (leaf,) = free(a)
    keep = torch.tensor([True, False, True, True, False])
    assert kept_mask(b, {leaf: keep}).equal(keep)


def test_view_as_rows_keeps_a_rectangle():
    axis = new_axis(12)
    rows, columns = regroup([axis], [3, 4])
    (row,), (column,) = free(rows), free(columns)
    keep_row, keep_column = torch.tensor([True, False, True]), torch.tensor([True, True, False, True])
    expected = torch.outer(keep_row, keep_column).flatten()
    assert kept_mask(axis, {row: keep_row, column: keep_column}).equal(expected)
    assert kept_count(axis, {row: 2, column: 3}) == int(expected.sum())


def test_a_view_across_dims_and_back_is_the_same_axis():
    axis = new_axis(24)
    parts = regroup([axis], [2, 3, 4])
    merged = regroup(parts, [6, 4])
    assert [size_of(part) for part in merged] == [6, 4]
    unify(regroup(merged, [24])[0], axis, WHERE)
    assert [leaf.size for leaf in free(axis)] == [2, 3, 4]


def test_views_that_do_not_nest_are_not_said_in_factors():
    axis = new_axis(12)
    regroup([axis], [3, 4])
    assert regroup([axis], [2, 6]) is None


def test_axes_divided_in_other_ways_freeze_both():
    a, b = new_axis(12), new_axis(12)
    regroup([a], [3, 4])
    regroup([b], [4, 3])
    unify(a, b, WHERE)
    assert not free(a)
    assert not free(b)
    assert "divided in another way" in next(leaves(a)).frozen.why


def test_split_gives_parts_that_are_cut_apart():
    axis = new_axis(10)
    first, second = split(axis, [4, 6])
    (leaf,) = free(second)
    keep = torch.tensor([True, False] * 3)
    assert kept_mask(axis, {leaf: keep}).equal(torch.cat([torch.ones(4, dtype=torch.bool), keep]))
    assert kept_mask(first, {leaf: keep}).all()


def test_split_through_a_concatenation_takes_the_part_apart():
    a, b = new_axis(4), new_axis(6)
    both = sum_axis([a, b])
    first, second = split(both, [6, 4])
    keep = torch.tensor([False, True])
    (leaf,) = [leaf for leaf in leaves(b) if leaf.size == 2]
    mask = torch.tensor([True] * 4 + [False, True] + [True] * 4)
    assert kept_mask(both, {leaf: keep}).equal(mask)
    assert kept_mask(first, {leaf: keep}).equal(mask[:6])
    assert kept_mask(second, {leaf: keep}).equal(mask[6:])


def test_rows_of_a_concatenation_follow_the_distributive_law():
    heads = sum_axis([new_axis(32), new_axis(16)])  # 32 query and 16 key entries, seen as 6 heads of 8
    rows, columns = regroup([heads], [6, 8])
    assert [leaf.size for leaf in leaves(rows)] == [4, 2]
    assert [leaf.size for leaf in leaves(columns)] == [8]
    (column,) = free(columns)
    keep = torch.arange(8) % 2 == 0
    assert kept_mask(heads, {column: keep}).equal(keep.repeat(6))


def test_a_shuffle_ties_the_halves_of_a_concatenation():
    a, b = new_axis(4), new_axis(4)
    rows, columns = regroup([sum_axis([a, b])], [2, 4])
    (leaf,) = free(columns)
    assert free(a) == free(b) == [leaf]
    assert not [leaf for leaf in leaves(rows) if leaf.frozen is None and leaf.size > 1]


def test_two_concatenations_with_other_breaks_meet_in_their_common_parts():
    a = sum_axis([new_axis(2), new_axis(6)])
    b = sum_axis([new_axis(5), new_axis(3)])
    unify(a, b, WHERE)
    assert [leaf.size for leaf in leaves(a)] == [2, 3, 3]
    assert list(leaves(a)) == list(leaves(b))


def test_what_is_known_of_a_factor_passes_to_its_parts():
    axis = new_axis(12)
    freeze(axis, WHERE)
    mark_inexact(axis, Reason("norm"))
    for part in regroup([axis], [3, 4]):
        assert next(leaves(part)).frozen is WHERE
        assert next(leaves(part)).inexact.why == "norm"
    other = new_axis(12)
    unify(other, axis, WHERE)
    assert not free(other)


def test_units_of_entries():
    axis = new_axis(6)
    rows, columns = regroup([axis], [2, 3])
    (row,), (column,) = free(rows), free(columns)
    assert entries_of_units(axis)[row].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert entries_of_units(axis)[column].tolist() == [[0, 3], [1, 4], [2, 5]]
    twice = sum_axis([axis, new_axis(2), axis])
    assert entries_of_units(twice)[row].tolist() == [[0, 1, 2, 8, 9, 10], [3, 4, 5, 11, 12, 13]]
    assert entries_of_units(twice)[column].tolist() == [[0, 3, 8, 11], [1, 4, 9, 12], [2, 5, 10, 13]]
    assert set(nested_pairs(twice)) == {(row, column), (column, row)}


@pytest.mark.parametrize("size", [1, 7])
def test_one_entry_has_no_factor(size):
    assert size_of(new_axis(size)) == size
    assert len(new_axis(1)) == 0
