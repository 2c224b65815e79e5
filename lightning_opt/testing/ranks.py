"""Run a piece of a test in several processes that know each other, without the command line.

Importing torch and Lightning anew in every process would take longer than most tests: the processes are forked.
"""

import contextlib
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_POLL_S = 0.01


def on_ranks(job: Callable[[], Any], *, ranks: int = 2, timeout_s: float = 60.0, group: bool = False) -> list[Any]:
    """Call a function in several processes as torchrun would start them, and return what each gave.

    Lightning takes its part from the environment: `Trainer(devices=ranks, accelerator="cpu", strategy=...)` works
    inside.

    Args:
        job: What each process does; it may return tensors and plain values.
        ranks: How many processes.
        timeout_s: How long they may take together; processes that hang are killed.
        group: Whether a gloo process group is there when the job starts, for code without Lightning.

    Raises:
        AssertionError: A process failed, died or hung; the message holds the traceback of each that failed.

    Example:
        >>> on_ranks(lambda: dist.get_rank() * 10, group=True)
        [0, 10]
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = wait_for_ranks(start_ranks(job, Path(folder), ranks=ranks, group=group), timeout_s=timeout_s)
        if any(code != 0 for code in codes):
            raise AssertionError("\n".join(_failures(Path(folder), codes)))
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def start_ranks(job: Callable[[], Any], folder: Path, *, ranks: int, group: bool = False) -> list[int]:
    """Fork the processes of a job and return their ids; each leaves `<rank>.pt` or `<rank>.txt` in the folder."""
    port = free_port()
    return [_fork(job, folder, rank, ranks, port, group) for rank in range(ranks)]


def wait_for_ranks(pids: list[int], *, timeout_s: float) -> list[int | None]:
    """Return each process's exit code; those that hang are killed, and have none."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout_s
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_S)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _fork(job: Callable[[], Any], folder: Path, rank: int, ranks: int, port: int, group: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with _as_rank(rank, ranks, port, group=group), open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere):
                result = job()
            torch.save(result, folder / f"{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)  # nothing of the test runner that was copied into this process may run


@contextlib.contextmanager
def _as_rank(rank: int, ranks: int, port: int, *, group: bool) -> Iterator[None]:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    if group:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _failures(folder: Path, codes: list[int | None]) -> Iterator[str]:
    for rank, code in enumerate(codes):
        said = folder / f"{rank}.txt"
        if code is None:
            yield f"rank {rank} hung and was killed"
        elif code:  # what it said is there unless it was killed
            yield f"rank {rank} ended with {code}\n{said.read_text() if said.is_file() else ''}"
