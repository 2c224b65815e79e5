"""How one tensor is quantized: the integers (or 8-bit floats) that its values may take, and what shares a scale."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that a quantized tensor may take are `(q - zero_point) * scale`, with `q` from `qmin` to `qmax`.

    Attributes:
        bits: 2 to 8; a float8 grid has 8.
        symmetric: The zero point is fixed (0 if signed, the middle of the range if not), so the range is symmetric.
        signed: Integers from `-2**(bits - 1)`; otherwise from 0.
        axis: One scale for each index along this axis; None is one scale for the whole tensor.
        group_size: With `axis`, one scale for each run of this many values along all other axes flattened.
        dtype: "int", "float8_e4m3fn" or "float8_e5m2".
        narrow: A symmetric signed grid leaves out its lowest integer, so that it is the same on both sides of 0.

    Raises:
        ValueError: A value is out of range, or two do not go together.

    Example:
        >>> Grid(bits=4).qmin, Grid(bits=4).qmax, Grid(bits=8, symmetric=False, signed=False).levels
        (-7, 7, 256)
    """

    bits: int = 8
    symmetric: bool = True
    signed: bool = True
    axis: int | None = None
    group_size: int | None = None
    dtype: str = "int"
    narrow: bool = True

    def __post_init__(self) -> None:
        for name in ("bits", "axis", "group_size"):
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name != "bits"):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be from 2 to 8, not {self.bits}")
        if self.group_size is not None and (self.axis is None or self.group_size < 1):
            raise ValueError(f"group_size={self.group_size} needs to be at least 1 and an axis beside it")
        if self.dtype not in ("int", *FLOAT8):
            raise ValueError(f"dtype={self.dtype!r} is not known; known are int, {', '.join(FLOAT8)}")
        if self.is_float and not (self.symmetric and self.signed and self.bits == 8):
            raise ValueError(f"dtype={self.dtype!r} is symmetric, signed and of 8 bits")

    @property
    def is_float(self) -> bool:
        """Whether the values are 8-bit floats."""
        return self.dtype in FLOAT8

    @property
    def qmin(self) -> int:
        """The smallest integer (or 8-bit float)."""
        if self.is_float:
            return -self.qmax
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + int(self.symmetric and self.narrow)

    @property
    def qmax(self) -> int:
        """The largest integer (or 8-bit float)."""
        if self.is_float:
            return int(torch.finfo(FLOAT8[self.dtype]).max)
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def levels(self) -> int:
        """How many values there are (of float8: the spread of the largest over the smallest step is not counted)."""
        return self.qmax - self.qmin + 1 if not self.is_float else 256

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds one value a byte."""
        return FLOAT8.get(self.dtype, torch.int8 if self.signed else torch.uint8)

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point of a symmetric grid; None where it depends on the data."""
        if not self.symmetric:
            return None
        return 0 if self.signed else 2 ** (self.bits - 1)

    def channels(self, tensor: Tensor) -> int:
        """Return how many scales a tensor of this shape has."""
        if self.axis is None:
            return 1
        along = tensor.shape[self.axis]
        if self.group_size is None:
            return along
        rest = tensor.numel() // along if along else 0
        return along * -(-rest // self.group_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the grid as plain values, without those that are as usual."""
        usual = Grid()
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value != getattr(usual, name)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Grid":
        """Make the grid from plain values.

        Raises:
            ValueError: A name is not known or a value is wrong.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a field of a grid; it has {', '.join(known)}")
        return cls(**values)
