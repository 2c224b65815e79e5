import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_opt.quantization.grid import Grid


@given(bits=st.integers(2, 8), symmetric=st.booleans(), signed=st.booleans(), narrow=st.booleans())
def test_integers_fill_the_bits(bits, symmetric, signed, narrow):
    grid = Grid(bits=bits, symmetric=symmetric, signed=signed, narrow=narrow)
    left_out = int(symmetric and signed and narrow)
    assert grid.levels == grid.qmax - grid.qmin + 1 == 2**bits - left_out
    info = torch.iinfo(grid.storage)
    assert info.min <= grid.qmin < grid.qmax <= info.max
    if left_out:
        assert grid.qmin == -grid.qmax
    assert Grid.from_dict(grid.to_dict()) == grid


@pytest.mark.parametrize(("dtype", "largest"), [("float8_e4m3fn", 448), ("float8_e5m2", 57344)])
def test_float8(dtype, largest):
    grid = Grid(dtype=dtype, axis=0)
    assert (grid.qmin, grid.qmax, grid.storage) == (-largest, largest, getattr(torch, dtype))
    assert grid.storage.itemsize == 1


@pytest.mark.parametrize(
    ("shape", "fields", "scales"),
    [
        ((6, 4, 3, 3), {}, 1),
        ((6, 4, 3, 3), {"axis": 0}, 6),
        ((6, 4, 3, 3), {"axis": 1}, 4),
        ((6, 4), {"axis": -1}, 4),
        ((6, 64), {"axis": 0, "group_size": 32}, 12),
        ((6, 4, 3, 3), {"axis": 0, "group_size": 32}, 12),
    ],
)
def test_scales_of_a_tensor(shape, fields, scales):
    assert Grid(**fields).channels(torch.empty(shape)) == scales


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": None}, "bits"),
        ({"group_size": 32}, "group_size"),
        ({"axis": 0, "group_size": 0}, "group_size"),
        ({"dtype": "int9"}, "int9"),
        ({"dtype": "float8_e4m3fn", "bits": 4}, "float8_e4m3fn"),
    ],
)
def test_what_cannot_be_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Grid(**fields)


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="'bit' is not a field"):
        Grid.from_dict({"bit": 4})
