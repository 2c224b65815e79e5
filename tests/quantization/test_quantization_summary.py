"""Which layers are quantized and how, counted by hand on small networks."""

import pytest
import torch
from torch import nn

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import switch_on
from lightning_opt.quantization.summary import grid_words, kind_of, quantization_summary, scheme_of
from lightning_opt.surgery import recipe_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.shift = nn.Parameter(torch.zeros(4, 1, 1))
        self.body = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x) + self.shift
        return self.head(self.body(x).relu().mean((2, 3)))


SIZES = {"stem.0": 4 * 9, "shift": 4, "body": 6 * 4 * 9, "head": 6 * 3}
BESIDE = 4 + 4 + 6 + 3  # batch norm's two vectors, and two biases


def quantized(scheme="w8a8"):
    model = Net().eval()
    prepare(model, torch.zeros(1, 1, 8, 8), scheme)
    switch_on(model)
    return model


def rows_of(summary):
    return {row["name"]: row for row in summary["layers"]}


def test_every_weight_with_its_bits():
    summary = quantization_summary(quantized())
    rows = rows_of(summary)
    assert {name: row["params"] for name, row in rows.items()} == SIZES
    for name, kind in {"stem.0": "Conv2d", "body": "Conv2d", "head": "Linear"}.items():
        assert rows[name]["kind"] == kind
        assert (rows[name]["weight_bits"], rows[name]["activation_bits"]) == (8, 8)
        assert rows[name]["weight"] == "int8 per channel"
        assert rows[name]["activation"] == "uint8"
        assert rows[name]["float_reason"] is None
    assert rows["shift"]["weight_bits"] is None
    assert "no layer's weight" in rows["shift"]["float_reason"]


def test_totals_are_counted_over_all_parameters():
    totals = quantization_summary(quantized("w4a8"))["totals"]
    inside = SIZES["stem.0"] + SIZES["body"] + SIZES["head"]
    params = inside + SIZES["shift"] + BESIDE
    assert totals["params"] == params
    assert (totals["layers"], totals["quantized"], totals["params_quantized"]) == (4, 3, inside)
    assert totals["share"] == pytest.approx(inside / params)
    assert totals["weight_bits"] == pytest.approx((4 * inside + 32 * (params - inside)) / params)


def test_learned_steps_are_no_weights():
    totals = quantization_summary(quantized("w4a4_lsq"))["totals"]
    assert totals["params"] == sum(SIZES.values()) + BESIDE


def test_rules_are_told_as_the_reason_for_float():
    scheme = Scheme.parse("w8a8").with_rules({"head": None, "body": {"weight": {"bits": 4}}})
    rows = rows_of(quantization_summary(quantized(scheme)))
    assert rows["head"]["float_reason"] == "the scheme leaves it in float"
    assert rows["body"]["weight_bits"] == 4
    assert rows["stem.0"]["weight_bits"] == 8


def test_dynamic_and_weight_only():
    rows = rows_of(quantization_summary(quantized("w8a8_dynamic")))
    assert rows["head"]["dynamic"]
    rows = rows_of(quantization_summary(quantized("w4g32")))
    assert rows["head"]["activation_bits"] is None
    assert rows["head"]["weight"] == "int4 in groups of 32"


def test_refusals_and_costs_come_from_outside():
    scheme = Scheme.parse("w8a8").with_rules({"head": None, "body": None})
    chosen = [{"name": "head", "sensitivity": 0.25, "reason": "it costs 0.25"}, {"name": "stem.0", "sensitivity": 0.5}]
    summary = quantization_summary(quantized(scheme), refused={"body": "it is shared"}, chosen=chosen)
    rows = rows_of(summary)
    assert rows["head"]["float_reason"] == "it costs 0.25"
    assert rows["body"]["float_reason"] == "it is shared"
    assert (rows["head"]["sensitivity"], rows["stem.0"]["sensitivity"], rows["body"]["sensitivity"]) == (
        0.25,
        0.5,
        None,
    )
    assert rows["stem.0"]["float_reason"] is None
    assert summary["refused"] == [{"name": "body", "reason": "it is shared"}]


def test_a_float_model_has_nothing_quantized():
    summary = quantization_summary(Net())
    assert summary["scheme"] is None
    assert summary["totals"]["quantized"] == 0
    assert summary["totals"]["weight_bits"] == 32
    assert {row["kind"] for row in summary["layers"]} == {"Conv2d", "Linear", "Net"}


def test_tied_weights_are_one_row():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model = Tied().eval()
    prepare(model, torch.zeros(1, 3, dtype=torch.long), "w8")
    switch_on(model)
    summary = quantization_summary(model)
    assert summary["totals"]["params"] == 40
    assert summary["totals"]["params_quantized"] == 40
    assert len(summary["layers"]) == 1


def test_the_scheme_is_read_from_the_recipe():
    model = quantized("w4a8")
    found = scheme_of(recipe_of(model))
    assert Scheme.from_dict(found) == Scheme.parse("w4a8")
    assert scheme_of(recipe_of(model).to_list()) == found
    assert scheme_of([]) is None


def test_words_for_grids_and_kinds():
    assert grid_words(Grid(bits=4, axis=0, group_size=32)) == "int4 in groups of 32"
    assert grid_words(Grid(signed=False, symmetric=False)) == "uint8"
    assert grid_words(Grid(dtype="float8_e4m3fn", axis=0)) == "float8_e4m3fn per channel"
    assert kind_of(quantized().body) == "Conv2d"
