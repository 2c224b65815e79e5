"""What Lightning does on its own when it starts ranks, and what is wanted instead for the span of a job.

It runs the command again for each rank: under a sweep every child would run the whole sweep, with values of its own
(Lightning issue 18175, Hydra issue 2070). It answers a dead child by SIGKILL for all, itself included, so that nobody
says why. And its handlers of signals save a checkpoint, or talk to other ranks, inside the handler.
"""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lightning_opt.config import launch, ranks
from lightning_opt.errors import PeerLostError

_STORE_KEY = "lightning_opt/store"
_LONGEST_JOIN_S = 300.0
_TRY_S = 5.0
_POLL_S = 0.05


@contextmanager
def adapted(folder: Path) -> Iterator[None]:
    """Let Lightning start ranks that run this folder's config, and leave signals and dead ranks to us."""
    lightning_observer = subprocess_script._launch_process_observer

    def observe(children: list[subprocess.Popen[bytes]]) -> None:
        room = ranks.here()
        if room is None:
            lightning_observer(children)
        else:
            _note_how_they_end(room, children)
            _wait_until_there(room, children)

    command = launch.rank_command(folder)
    with ExitStack() as stack:
        stack.enter_context(_patched(subprocess_script, "_launch_process_observer", observe))
        stack.enter_context(_patched(subprocess_script, "_basic_subprocess_cmd", lambda: command))
        hydra = _patched(subprocess_script, "_hydra_subprocess_cmd", lambda local_rank: (command, os.getcwd()))
        stack.enter_context(hydra)
        stack.enter_context(_patched(_SignalConnector, "register_signal_handlers", _leave_signals_alone))
        launch.leave_srun_out()
        yield


def join_restartable_group(config: dict[str, Any]) -> None:
    """Form the process group where torchrun may start the ranks again; Lightning then leaves it as it is.

    torchrun keeps one store over all its restarts. With gloo a rank would find the address of a peer of the round
    before in it, and call a process that is gone. So rank 0 opens a store of its own for each round.

    Raises:
        PeerLostError: Rank 0 opened none in time.
    """
    if not launch.has_store() or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0 or dist.is_initialized():
        return
    accelerator = (config.get("trainer") or {}).get("accelerator", "auto")
    on_gpu = accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    timeout = timedelta(seconds=float((config.get("strategy") or {}).get("timeout_s") or 1800.0))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=_store_of_this_round(),
        rank=launch.rank(),
        world_size=launch.processes(),
        timeout=timeout,
    )


def _store_of_this_round() -> dist.Store:
    """Open a store (rank 0) or find the one that rank 0 has opened: an address that nobody answers is an old one."""
    kept = launch.store_of_torchrun(timeout_s=_LONGEST_JOIN_S)
    if launch.rank() == 0:
        host = "127.0.0.1" if launch.is_loopback(os.environ["MASTER_ADDR"]) else launch.own_address()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        kept.set(_STORE_KEY, f"{host} {store.port}")
        return store
    for _ in range(int(_LONGEST_JOIN_S / _TRY_S)):
        host, port = kept.get(_STORE_KEY).decode().split()
        try:
            return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_TRY_S))
        except RuntimeError:  # refused: rank 0 of this round has not written its address yet
            continue
    raise PeerLostError(f"rank {launch.rank()} found no rank 0 of this round; the same command resumes")


def _note_how_they_end(room: ranks.Ranks, children: list[subprocess.Popen[bytes]]) -> None:
    """Note the exit codes of the ranks that this process has started; whoever watches them decides what follows."""
    for number, child in enumerate(children, 1):
        threading.Thread(target=_note_one, args=(room, number, child), daemon=True, name=f"rank-{number}-watch").start()


def _note_one(room: ranks.Ranks, number: int, child: subprocess.Popen[bytes]) -> None:
    room.note_status(number, child.wait())


def _wait_until_there(room: ranks.Ranks, children: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the others' imports, which on a busy machine take longer than a rank may be silent later on."""
    expected = set(range(1, len(children) + 1))
    while expected - set(room.processes()) and all(child.poll() is None for child in children):
        time.sleep(_POLL_S)


def _leave_signals_alone(connector: _SignalConnector) -> None:
    connector.received_sigterm = False
    connector._original_handlers = {}


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
