"""What is left of sharded checkpoints that nothing names any more."""

import contextlib
import logging
import re
import shutil
from pathlib import Path

from lightning_opt.checkpointing.index import SHARDS, folder_of

_log = logging.getLogger(__name__)
_ONE_FOLDER = re.compile(r"\d{1,20}-[0-9a-f]{8}")


def collect_garbage(folder: Path) -> list[Path]:
    """Remove the folders of tensors that no index in a folder names, and return them.

    Nothing is removed if a file in the folder cannot be read: it might name one.
    """
    shards = folder / SHARDS
    removed: list[Path] = []
    if shards.is_symlink() or not shards.is_dir():
        return removed
    try:
        needed = {folder_of(path) for path in folder.iterdir() if path.is_file()}
        found = [one for one in shards.iterdir() if _ONE_FOLDER.fullmatch(one.name) and not one.is_symlink()]
    except OSError as error:
        _log.warning("%s: old shards are kept, since what needs them is not known (%s)", folder, error)
        return removed
    for one in found:
        if f"{SHARDS}/{one.name}" not in needed:
            shutil.rmtree(one, ignore_errors=True)
            removed.append(one)
    with contextlib.suppress(OSError):
        shards.rmdir()  # only if it is empty
    return removed
