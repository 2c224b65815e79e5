"""One run folder and one config for every process of a job.

Lightning starts the other ranks of a DDP job by running the command again. If that command composed its own config,
each rank would make its own folder, and under a sweep its own values. So a job leaves its folder in the environment for
the span of the fit, and a process that finds it there runs that folder's config and nothing else.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_DIR = "LIGHTNING_OPT_RUN_DIR"
_OF_ONE_JOB = (RUN_DIR, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


def folder_of_parent() -> Path | None:
    """Return the run folder if this process is another rank of a job that is already running."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return None
    folder = os.environ.get(RUN_DIR)
    return Path(folder) if folder else None


def launched_from_outside() -> bool:
    """Tell whether torchrun or a scheduler started this process as one of several."""
    return "LOCAL_RANK" in os.environ and RUN_DIR not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


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
