import pytest
import torch

from lightning_opt.quantization import ops
from lightning_opt.quantization.functional import (
    dequantize,
    dynamic_fake_quantize,
    fake_quantize,
    quantize,
    scale_and_zero_point,
)
from lightning_opt.quantization.grid import Grid

ACTIVATION = Grid(symmetric=False, signed=False, narrow=False)
GRIDS = [ACTIVATION, Grid(axis=0), Grid(axis=1, bits=4, symmetric=False), Grid(bits=4, axis=0, group_size=5)]


def case(grid, dtype=torch.float32):
    x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    n = grid.channels(x)
    scale, zero_point = scale_and_zero_point(-torch.linspace(0.5, 1, n), torch.linspace(0.4, 1.5, n), grid)
    return x.to(dtype), scale, zero_point


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_give_the_same_bits(grid, dtype):
    x, scale, zero_point = case(grid, dtype)
    plain = fake_quantize(x, scale, zero_point, grid)
    q = quantize(x, scale, zero_point, grid)
    back = dequantize(q, scale, zero_point, grid)
    with ops.exporting():
        assert torch.equal(fake_quantize(x, scale, zero_point, grid), plain)
        seen = dequantize(q, scale, zero_point, grid)
    assert torch.equal(seen.view(torch.int32), back.view(torch.int32))


@pytest.mark.parametrize("grid", [ACTIVATION, Grid(), Grid(symmetric=True, signed=False)], ids=str)
def test_the_dynamic_operator_gives_the_same_bits(grid):
    x = case(ACTIVATION)[0]
    plain = dynamic_fake_quantize(x, grid)
    with ops.exporting():
        assert torch.equal(dynamic_fake_quantize(x, grid), plain)


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_operators_keep_their_promises_to_torch(grid):
    x, scale, zero_point = case(grid)
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor")
    check(ops.quantize_dequantize, (x, scale, zero_point, grid.axis, grid.qmin, grid.qmax), test_utils=tests)
    q = quantize(x, scale, zero_point, grid)
    check(ops.dequantize, (q, scale, zero_point, grid.axis, grid.group_size), test_utils=tests)
    check(ops.dynamic_quantize_dequantize, (x, True, -127, 127), test_utils=tests)


class Both(torch.nn.Module):
    """An activation and an integer weight."""

    def __init__(self):
        super().__init__()
        x, scale, zero_point = case(GRIDS[1])
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("q", quantize(x, scale, zero_point, GRIDS[1]))

    def forward(self, x):
        x = fake_quantize(x, self.scale[:1], self.zero_point[:1], ACTIVATION)
        return x * dequantize(self.q, self.scale, self.zero_point, GRIDS[1]) + dynamic_fake_quantize(x, ACTIVATION)


def names(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_exported_graphs_hold_the_operators_or_plain_ones():
    x = case(ACTIVATION)[0]
    plain = torch.export.export(Both(), (x,), strict=False)
    assert not any("lightning_opt" in name for name in names(plain))
    with ops.exporting():
        ours = torch.export.export(Both(), (x,), strict=False)
    kinds = ("quantize_dequantize", "dequantize", "dynamic_quantize_dequantize")
    assert {f"lightning_opt.{kind}.default" for kind in kinds} <= names(ours)
    assert not any("round" in name for name in names(ours))
    assert torch.equal(ours.module()(x), Both()(x))
    assert torch.equal(plain.module()(x), Both()(x))


def test_exporting_ends_where_it_should():
    with pytest.raises(KeyError), ops.exporting(), ops.exporting():
        raise KeyError
    assert not ops.is_exporting()
    with ops.exporting():
        with ops.exporting():
            pass
        assert ops.is_exporting()


def test_a_switch_is_off_when_all_have_left_in_any_order():
    """Two callbacks enter one after the other and leave in the same order."""
    first, second = ops.exporting(), ops.exporting()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ops.is_exporting()
    second.__exit__(None, None, None)
    assert not ops.is_exporting()
