"""Make a PyTorch model small, fast and cheap to run, while it trains, with the measured proof.

Nothing heavy is imported here: `import lightning_opt` costs milliseconds, and each room loads torch or Lightning only
when it is entered.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_opt.export.artifact import load

try:
    __version__ = version("lightning_opt")
except PackageNotFoundError:  # a bare checkout that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from lightning_opt.export.artifact import load

        return load
    raise AttributeError(f"module 'lightning_opt' has no attribute {name!r}")
