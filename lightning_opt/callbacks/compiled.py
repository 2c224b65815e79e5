"""Code that `torch.compile` has compiled, which notices neither hooks that come and go nor new sizes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether some of a module's code is compiled."""
    inside = any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in module.modules())
    return inside or getattr(module, "_compiler_ctx", None) is not None


@contextmanager
def uncompiled(root: nn.Module) -> Iterator[None]:
    """Let modules that were compiled in place run as they are written."""
    compiled = [(m, m._compiled_call_impl) for m in root.modules() if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
