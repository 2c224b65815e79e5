"""From a checkpoint of many files to an ordinary one of one file."""

from pathlib import Path

from lightning_opt.checkpointing.files import verify
from lightning_opt.checkpointing.io import DurableCheckpointIO
from lightning_opt.checkpointing.sharded import is_index, load_whole
from lightning_opt.errors import ConfigError


def consolidate(path: str | Path, out: str | Path | None = None) -> Path:
    """Write a sharded checkpoint as the ordinary single file that one process would have written; return its path.

    It needs as much memory as the whole checkpoint, and no process group. The sharded one stays.

    Args:
        path: Of the index, for instance `checkpoints/last.ckpt`.
        out: The new file; None: `<name>-consolidated.ckpt` beside it.

    Raises:
        ConfigError: It is no sharded checkpoint, or the new file is there already.
        CheckpointDamagedError: A file of it is missing or damaged; the message names it.
        UntrustedInputError: It points outside its folder.
        StorageError: The new file cannot be written.
    """
    source = Path(path)
    target = Path(out) if out is not None else source.with_name(f"{source.stem}-consolidated.ckpt")
    if source.is_file() and not is_index(source):
        raise ConfigError(f"{source} is a single file already: there is nothing to consolidate")
    if source.is_dir():
        names = ", ".join(sorted(one.name for one in source.rglob("*.ckpt"))) or "none"
        raise ConfigError(f"{source} is a folder: name a checkpoint file in it ({names})")
    if target.exists():
        raise ConfigError(f"{target} is there already: remove it, or name another file")
    verify(source)
    DurableCheckpointIO().save_checkpoint(load_whole(source, verified=True), target)
    return target
