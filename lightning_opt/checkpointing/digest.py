"""What a file must be to be trusted."""

import hashlib
from pathlib import Path

from lightning_opt.errors import NoCheckpointError


class CheckpointDamagedError(NoCheckpointError):
    """A checkpoint is missing, incomplete or not what its manifest says (exit 3)."""


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
