"""The simulator of pipelines gives the idle shares of the papers, on the orders that torch makes."""

import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "pipeline_bubble"


@pytest.fixture(scope="module")
def study():
    """The study's own modules, which are no package."""
    before = set(sys.modules)
    sys.path.insert(0, str(STUDY))
    import orders
    import simulator

    yield simulator, orders
    sys.path.remove(str(STUDY))
    for name in ("simulator", "orders"):
        if name not in before:
            sys.modules.pop(name, None)


TIMES = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def seconds(op):
    return TIMES[op[0]]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 9), (8, 32)])
@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_equal_stages_wait_as_long_as_the_papers_say(study, name, ranks, micro_batches):
    simulator, orders = study
    run = simulator.simulate(orders.orders_of(name, ranks=ranks, micro_batches=micro_batches), seconds)
    # m forwards and backwards on each rank, and p - 1 of both in which the pipeline fills and drains.
    assert run.span_s == pytest.approx(3.0 * (micro_batches + ranks - 1))
    assert run.idle == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))
    assert simulator.fill_drain_bubble(stages=ranks, micro_batches=micro_batches) == pytest.approx(run.idle)


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_orders_of_one_stage_a_rank_are_those_of_torch(study, name):
    _, orders = study
    for ranks, micro_batches in ((2, 3), (4, 8)):
        made = orders.orders_of(name, ranks=ranks, micro_batches=micro_batches)
        for rank in range(ranks):
            assert made[rank] == orders.asked_of_torch(name, rank=rank, ranks=ranks, micro_batches=micro_batches)


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks"), [(2, 8, 2), (4, 8, 2), (4, 16, 3), (8, 16, 4)])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(study, ranks, micro_batches, chunks):
    simulator, orders = study
    made = orders.orders_of("interleaved 1F1B", ranks=ranks, micro_batches=micro_batches, stages_per_rank=chunks)
    run = simulator.simulate(made, seconds)
    assert run.span_s == pytest.approx(3.0 * (chunks * micro_batches + ranks - 1))
    formula = simulator.interleaved_bubble(ranks=ranks, micro_batches=micro_batches, stages_per_rank=chunks)
    assert run.idle == pytest.approx(formula) == pytest.approx((ranks - 1) / (chunks * micro_batches + ranks - 1))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 16), (8, 32)])
def test_zero_bubble_orders_wait_less(study, ranks, micro_batches):
    simulator, orders = study
    runs = {
        name: simulator.simulate(orders.orders_of(name, ranks=ranks, micro_batches=micro_batches), seconds).idle
        for name in ("1F1B", "interleaved 1F1B", "interleaved zero bubble", "ZBV")
    }
    formula = simulator.zero_bubble_bubble(ranks=ranks, micro_batches=micro_batches, stages_per_rank=2, times=TIMES)
    assert formula == pytest.approx((ranks - 1) / (6 * micro_batches + ranks - 1))
    assert runs["interleaved zero bubble"] == pytest.approx(formula)
    assert runs["ZBV"] < runs["interleaved 1F1B"] < runs["1F1B"]


def test_one_slow_stage_sets_the_pace(study):
    simulator, orders = study
    made = orders.orders_of("1F1B", ranks=4, micro_batches=8)
    run = simulator.simulate(made, lambda op: TIMES[op[0]] * (2.0 if op[1] == 2 else 1.0))
    # Two forwards before it, two backwards after it, and once it waits: the first gradient is there at 7, and it has
    # done its two forwards at 6. From then on it never stands still.
    assert run.span_s == pytest.approx(2 * 1.0 + 8 * 6.0 + 2 * 2.0 + 1.0)
    assert run.busy_s == pytest.approx([24.0, 24.0, 48.0, 24.0])


def test_messages_cost_latency_and_bytes(study):
    simulator, orders = study
    made = orders.orders_of("GPipe", ranks=2, micro_batches=1)
    link = simulator.Link(latency_s=0.25, bytes_per_s=4.0)
    run = simulator.simulate(made, seconds, link=link, message_bytes=2.0)
    assert run.span_s == pytest.approx(1 + 0.75 + 1 + 2 + 0.75 + 2)


def test_one_wire_carries_one_message_at_a_time(study):
    simulator, orders = study
    made = orders.orders_of("GPipe", ranks=2, micro_batches=3)
    run = simulator.simulate(made, seconds, link=simulator.Link(bytes_per_s=1.0), message_bytes=4.0)
    forwards = [begin for (kind, stage, _), begin, _ in run.spans[1] if kind == "F" and stage == 1]
    assert forwards == pytest.approx([5.0, 9.0, 13.0])


@pytest.mark.parametrize(("name", "most"), [("GPipe", [8, 8, 8, 8]), ("1F1B", [4, 3, 2, 1])])
def test_inputs_that_are_kept(study, name, most):
    simulator, orders = study
    assert simulator.simulate(orders.orders_of(name, ranks=4, micro_batches=8), seconds).held == most


def test_orders_that_wait_for_one_another_are_refused(study):
    simulator, _ = study
    with pytest.raises(ValueError, match="rank 0 waits"):
        simulator.simulate([[("B", 0, 0), ("F", 0, 0)], [("F", 1, 0), ("B", 1, 0)]], seconds)


def test_a_ring_sends_each_byte_twice(study):
    simulator, _ = study
    link = simulator.Link(latency_s=0.5, bytes_per_s=10.0)
    assert simulator.ring_all_reduce_s(100.0, ranks=4, link=link) == pytest.approx(2 * 3 / 4 * 10.0 + 6 * 0.5)
    assert simulator.ring_all_reduce_s(100.0, ranks=1, link=link) == 0.0
