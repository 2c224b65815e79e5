"""What a command says while it works: plain lines on the terminal, the same with times in train.log."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("lightning_opt")

_PREFIX = "warning: "
_MOST_CHARACTERS = 400
_CHATTER = ("lightning.pytorch", "lightning.fabric", "torch.onnx", "onnxscript", "matplotlib")
# True, and of no use to the reader of a run's log.
_NOISE = (
    "does not have many workers",
    "The .srun. command is available",
    "smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    "Starting from v1.9.0",
    "isinstance\\(treespec, LeafSpec\\)",
    "Found .* module\\(s\\) in eval mode",
    "The dataloader, .* does not have",
    "It is recommended to use `self.log",
)


def start_logging(*, verbose: bool = False) -> None:
    """Send the log to the terminal; only rank 0 speaks."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        terminal = logging.StreamHandler()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(terminal)
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=f".*{pattern}.*")
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [_OneLine()]
    logging.getLogger("py.warnings").propagate = False


def log_to_file(path: Path) -> logging.Handler:
    """Also write the log to a file, with times; return the handler so that it can be taken off again."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return handler


@contextmanager
def heard(into: list[str], *, most: int = 50) -> Iterator[None]:
    """Collect what is warned of inside the block, Python's warnings and our own, each once and as one line.

    Args:
        into: Gets the lines as they come; those that it holds already are not repeated.
        most: Lines that it holds at most.
    """
    handler = _Heard(into, most)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Heard(logging.Handler):
    """Append warnings and errors of the log to a list."""

    def __init__(self, into: list[str], most: int) -> None:
        super().__init__(level=logging.WARNING)
        self._into, self._most = into, most

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split()).removeprefix(_PREFIX)[:_MOST_CHARACTERS]
        if line and line not in self._into and len(self._into) < self._most:
            self._into.append(line)


class _OneLine(logging.Handler):
    """Pass Python warnings on to the log as one line, without the source line that raised them."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip().splitlines()
        # "file:line: Category: message"
        message = text[0].split("Warning: ", 1)[-1] if text else ""
        log.warning("warning: %s", message)
