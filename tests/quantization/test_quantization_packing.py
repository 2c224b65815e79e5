import numpy as np
import pytest
import torch

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.packing import pack, packed_bits, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (4, 5), (2, 3, 3, 3), (5, 1), (1, 7)])
def test_integers_come_back(bits, signed, shape):
    grid = Grid(bits=bits, signed=signed, symmetric=False)
    q = torch.randint(grid.qmin, grid.qmax + 1, shape).to(grid.storage)
    q.view(-1)[0], q.view(-1)[-1] = grid.qmin, grid.qmax
    packed = pack(q, grid)
    back = unpack(packed, grid, tuple(shape[1:]))
    assert back.dtype == q.dtype
    assert torch.equal(back, q)
    columns = q[0].numel()
    assert packed.numel() == shape[0] * -(-columns * packed_bits(grid) // 8)


def test_the_first_integer_lies_in_the_lowest_bits():
    """The order that ONNX uses for int4; signed ones lie above an offset of 8 (4 bits) or 2 (2 bits)."""
    four = pack(torch.tensor([[-7, 3, 1]], dtype=torch.int8), Grid(bits=4))
    np.testing.assert_array_equal(four, [[(-7 + 8) | (3 + 8) << 4, 1 + 8]])
    two = pack(torch.tensor([[0, 3, 1, 2, 3]], dtype=torch.uint8), Grid(bits=2, signed=False, symmetric=False))
    np.testing.assert_array_equal(two, [[0 | 3 << 2 | 1 << 4 | 2 << 6, 3]])


def test_rows_can_be_picked_before_they_are_unpacked():
    grid = Grid(bits=3)
    q = torch.randint(-3, 4, (6, 5), dtype=torch.int8)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(unpack(pack(q, grid)[rows], grid, (5,)), q[rows])


def test_float8_is_not_packed():
    grid = Grid(dtype="float8_e4m3fn")
    q = torch.randn(2, 3).to(torch.float8_e4m3fn)
    assert pack(q, grid) is q
