"""Forked processes form a group, hand results back, and a failure or a hang of one is told."""

import time

import pytest
import torch
import torch.distributed as dist

from lightning_opt.testing.ranks import on_ranks


def summed():
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value)
    return {"sum": value, "rank": dist.get_rank()}


def test_every_rank_takes_part_and_answers():
    answers = on_ranks(summed, ranks=3, group=True)
    assert [answer["rank"] for answer in answers] == [0, 1, 2]
    assert all(answer["sum"].item() == 6.0 for answer in answers)


def test_a_failure_is_told_with_its_rank_and_traceback():
    def job():
        if dist.get_rank() == 1:
            raise ValueError("not here")

    with pytest.raises(AssertionError, match=r"(?s)rank 1 ended with 1.*not here"):
        on_ranks(job, group=True)


def test_a_hang_is_ended():
    def job():
        if dist.get_rank() == 0:
            time.sleep(60)

    with pytest.raises(AssertionError, match="rank 0 hung"):
        on_ranks(job, group=True, timeout_s=2)
