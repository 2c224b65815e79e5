"""The space of a sweep: how it is read, named and checked before anything starts."""

import math

import pytest

from lightning_opt.config.sweeps import folder_name, read_space

LR = "optimizer.lr"


def axis(word, **more):
    (found,) = read_space([word], **more).axes
    return found


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("model=cnn,mlp", ("cnn", "mlp")),
        ("model=choice(cnn,mlp)", ("cnn", "mlp")),
        ("seed=range(1,10,3)", ("1", "4", "7")),
        ("+vars.x=[1,2],[3]", ("[1,2]", "[3]")),
        ("seed=1,1,2", ("1", "2")),
    ],
)
def test_finite_values_are_those_of_hydra(word, values):
    assert axis(word).values == values


@pytest.mark.parametrize(
    ("word", "low", "high", "log", "whole"),
    [
        ("x=interval(1,8)", 1.0, 8.0, False, False),
        ("x=int(interval(1,8))", 1, 8, False, True),
        ("x=tag(log, interval(1e-4,1e-2))", 1e-4, 1e-2, True, False),
        ("x=tag(log, int(interval(1,64)))", 1, 64, True, True),
        ("x=range(1,10,3)", 1, 7, False, True),
    ],
)
def test_numbers_are_read_with_their_scale(word, low, high, log, whole):
    found = axis(word)
    assert (found.low, found.high, found.log, found.whole) == (low, high, log, whole)


@pytest.mark.parametrize(
    "word", ["x=interval(2,1)", "x=tag(log,interval(0,1))", "x=tag(log,range(1,9,2))", "x=interval(1", "x=range(3,3)"]
)
def test_space_that_is_none_is_refused(word):
    with pytest.raises(Exception, match=r"^x=") as caught:
        read_space([word])
    assert caught.value.exit_code == 2


def test_key_that_is_swept_twice_is_refused():
    with pytest.raises(Exception, match=r"seed is swept twice"):
        read_space(["seed=1,2", "+seed=3,4"])


def test_grid_is_the_product_with_the_last_axis_fastest():
    space = read_space(["task_name=t", "model=a,b", "seed=1,2", "data.size=8"])
    assert space.fixed == ("task_name=t", "data.size=8")
    assert [(point["model"], point["seed"]) for point in space.grid()] == [
        ("a", "1"),
        ("a", "2"),
        ("b", "1"),
        ("b", "2"),
    ]
    assert space.words({"model": "b", "seed": "2"}) == ["task_name=t", "data.size=8", "model=b", "seed=2"]


def test_command_line_has_the_last_word_over_yaml():
    space = read_space([f"{LR}=1e-3,1e-2", "seed=5"], {LR: "interval(1,2)", "seed": [1, 2], "model": ["a", "b"]})
    assert [found.key for found in space.axes] == ["model", LR]
    assert axis(f"{LR}=1e-3,1e-2").values == space.axes[1].values
    assert space.fixed == ("seed=5",)


def test_corners_are_both_ends_of_what_has_no_end():
    space = read_space([f"{LR}=interval(0.1,0.5)", "seed=range(0,1000)", "model=a,b,c"])
    corners = space.corners(100)
    assert len(corners) == 2 * 2 * 3
    assert {point[LR] for point in corners} == {"0.1", "0.5"}
    assert {point["seed"] for point in corners} == {"0", "999"}
    few = space.corners(5)
    assert len(few) <= 2 + 1 + 1 + 2
    assert {point["model"] for point in few} == {"a", "b", "c"}
    assert {point["seed"] for point in few} == {"0", "999"}


def test_same_values_same_folder_and_other_values_another():
    rates = [0.001 * (1 + k * 1e-9) for k in range(50)]
    names = {folder_name({LR: repr(rate)}) for rate in rates}
    assert len(names) == len(set(map(repr, rates)))
    assert folder_name({"model": "cnn", LR: "0.1"}) == "model-cnn__optimizer.lr-0.1"
    assert folder_name({}) == "job"
    for value in ("../x", "a/b", "[1,2]", "{a: b}", "é", "x" * 300, "''"):
        name = folder_name({"vars.x": value})
        assert "/" not in name
        assert len(name) <= 120
        assert name == folder_name({"vars.x": value})
    assert folder_name({"a": "[12]"}) != folder_name({"a": "[1,2]"})


def test_folder_needs_no_quotes_on_a_command_line():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    name = folder_name({"model": "cnn", LR: repr(math.pi * 1e-7), "vars.x": "[1,-2]"})
    parsed = OverridesParser.create().parse_override(f"run_dir=/runs/{name}")
    assert parsed.value() == f"/runs/{name}"
