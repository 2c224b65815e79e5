"""One run folder and one config for every process of a job.

Lightning starts the other ranks of a DDP job by running the command again. If that command composed its own config,
each rank would make its own folder, and under a sweep its own values. So a job leaves its folder in the environment for
the span of the fit, and a process that finds it there runs that folder's config and nothing else.

Where torchrun has started all ranks, rank 0 makes the folder and tells the others through the store that torchrun keeps
for its workers. Each round of workers has a store of its own, so a command that torchrun may start again must name its
folder, or it would begin anew. Other launchers have no such store: there, too, the folder must be named, and the other
ranks wait until rank 0 has written its config into it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_opt.errors import ConfigError, PeerLostError

if TYPE_CHECKING:
    from torch.distributed import Store

RUN_DIR = "LIGHTNING_OPT_RUN_DIR"
_OF_ONE_JOB = (RUN_DIR, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES_OF_TORCHRUN = ("GROUP_", "ROLE_", "TORCHELASTIC_")
_KEY = "lightning_opt/run_dir"
_LONGEST_START = timedelta(minutes=30)  # rank 0 builds everything once before it makes the folder
_POLL_S = 0.1


def rank() -> int:
    """Return which process of a job this is, over all machines."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def folder_of_parent() -> Path | None:
    """Return the run folder if this process is another rank of a job that is already running."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return None
    folder = os.environ.get(RUN_DIR)
    return Path(folder) if folder else None


def launched_from_outside() -> bool:
    """Tell whether torchrun or another launcher started this process as one of several."""
    return "LOCAL_RANK" in os.environ and RUN_DIR not in os.environ and processes() > 1


def processes() -> int:
    """Return how many processes a launcher says that it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_store() -> bool:
    """Tell whether the ranks can agree on a folder by themselves: torchrun keeps a store for its workers."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def announce(folder: Path) -> None:
    """Tell the ranks that a launcher started which folder is theirs, once its config is written; rank 0 calls this."""
    if launched_from_outside() and has_store():
        _store().set(_KEY, str(folder))


def wait_for_folder(run_dir: str | None) -> Path:
    """Wait until rank 0 has a folder, and return it.

    Args:
        run_dir: The name on the command line, which is all there is to agree on without a store.

    Raises:
        ConfigError: There is neither a store nor a name.
        PeerLostError: Rank 0 or the launcher is gone.
    """
    if has_store():
        try:
            return Path(_store().get(_KEY).decode())
        except RuntimeError as error:  # the store's own error is one
            raise PeerLostError(f"rank {rank()} was told no run folder by rank 0 ({error})") from error
    check_named(run_dir)
    assert run_dir is not None
    folder = Path(run_dir).expanduser().resolve()
    wait_for_file(folder / ".hydra" / "resolved.json")
    return folder


def check_named(run_dir: str | None) -> None:
    """Refuse processes that were started from outside and have no way to agree on a folder.

    Raises:
        ConfigError: There are some.
    """
    if not launched_from_outside() or run_dir:
        return
    if not has_store():
        raise ConfigError(
            "run_dir has no value; several processes were started from outside and must share one folder: "
            "name it, or start them with torchrun"
        )
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ConfigError(
            "run_dir has no value; with --max-restarts torchrun starts the command again, which would begin anew in "
            "another folder: name it"
        )


def wait_for_file(path: Path) -> None:
    """Wait until rank 0 has written a file.

    Raises:
        PeerLostError: The process that started this one is gone: nobody will end it when rank 0 fails.
    """
    parent = os.getppid()
    while not path.is_file():
        if os.getppid() != parent:
            raise PeerLostError(f"rank {rank()} waited for {path} and its launcher is gone; the same command resumes")
        time.sleep(_POLL_S)


@contextmanager
def as_one_process() -> Iterator[None]:
    """Hide a launcher for a span in which this process works alone, such as a teacher's training.

    Lightning would else wait for the peers that the environment tells of.
    """
    names = [name for name in os.environ if name in _OF_A_LAUNCHER or name.startswith(_PREFIXES_OF_TORCHRUN)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def job(run_dir: Path) -> Iterator[None]:
    """Announce the job's folder to the processes that it will start, and leave the environment as it was.

    Without the second half, the next job of a sweep would find `LOCAL_RANK=0`, believe that a launcher had started it,
    and wait for peers that never come.
    """
    before = {name: os.environ.get(name) for name in _OF_ONE_JOB}
    os.environ[RUN_DIR] = str(run_dir)
    try:
        yield
    finally:
        leave_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def leave_process_group() -> None:
    """End this process's part in `torch.distributed`, if it has one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _store() -> "Store":
    """Return the store that torchrun keeps for its workers."""
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_LONGEST_START)
