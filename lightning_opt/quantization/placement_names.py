"""One name for each tensor function, however it is called: `x + y`, `x += y`, `x.add_(y)`, `torch.add(x, y)`: "add"."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SITE_FUNCTIONS = (
    *("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "clip", "leaky_relu", "prelu", "elu", "celu"),
    *("selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "logsigmoid", "tanh", "softplus", "exp"),
    *("add", "sub", "rsub", "mul", "div", "true_divide", "pow", "square", "sqrt", "rsqrt", "neg", "abs", "maximum"),
    *("minimum", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "erf", "cat", "concat", "stack", "hstack"),
    *("vstack", "matmul", "bmm", "baddbmm", "mm", "addmm", "einsum", "softmax", "log_softmax", "glu"),
    *("scaled_dot_product_attention", "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"),
    *("normalize", "local_response_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "interpolate", "upsample", "embedding"),
    *("embedding_bag", "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "cumsum"),
    *("conv_transpose3d", "bilinear", "gather", "index_select", "fold", "unfold", "pixel_shuffle", "grid_sample"),
)
"""Functions whose (single) result can be quantized at a site."""

_SAME = {"concat": "cat", "clip": "clamp", "clamp_min": "clamp", "clamp_max": "clamp", "true_divide": "div"}


def common_name(name: str) -> str:
    """Return the common name of a function's `__name__`.

    Example:
        >>> common_name("__iadd__"), common_name("relu_"), common_name("concat"), common_name("__rsub__")
        ('add', 'relu', 'cat', 'rsub')
    """
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[:1] in "ir" and name[1:] in ("add", "sub", "mul", "truediv", "matmul", "pow", "div"):
            name = name[1:] if name != "rsub" else name
        name = {"truediv": "div"}.get(name, name)
    elif not name.startswith("_"):
        name = name.removesuffix("_")
    return _SAME.get(name, name)


def is_in_place(function: Callable[..., Any]) -> bool:
    """Return whether a function's name says that it changes its first argument."""
    name = getattr(function, "__name__", "")
    inside = name.strip("_")
    dunder = name.startswith("__") and name.endswith("__")
    return (
        (inside[:1] == "i" and inside[1:] in ("add", "sub", "mul", "truediv", "pow"))
        if dunder
        else (name.endswith("_") and not name.startswith("_"))
    )


def _table() -> dict[Any, str]:
    found: dict[Any, str] = {}
    rooms = (torch, functional, Tensor, torch._C._nn, torch.special, operator)
    for plain in SITE_FUNCTIONS:
        dunder = {"div": "truediv"}.get(plain, plain)
        spellings = (plain, f"{plain}_", f"__{dunder}__", f"__i{dunder}__", f"__r{dunder}__", dunder, f"i{dunder}")
        for name in spellings:
            for room in rooms if name not in ("iadd", "isub", "imul", "itruediv", "truediv") else (operator,):
                function = getattr(room, name, None)
                if callable(function):
                    found[function] = common_name(plain)
    return found


NAME_OF: dict[Any, str] = _table()
"""Each spelling of a site function -> its common name."""
