"""Code that `torch.compile` has compiled, which notices neither hooks that come and go nor new sizes."""

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether some of a module's code is compiled."""
    inside = any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in module.modules())
    return inside or getattr(module, "_compiler_ctx", None) is not None
