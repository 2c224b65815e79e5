"""Runs a prepared job by torchrun's own agent, inside this process."""

import hashlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lightning_opt.cli.supervise import failure, watched
from lightning_opt.config import launch, ranks
from lightning_opt.config.processes import descendants, end_descendants
from lightning_opt.config.ranks import Ranks

_OURS = (signal.SIGTERM, signal.SIGUSR1)  # the ranks are to save; torchrun would give them little time for it
_OF_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"
_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_LOOPBACK = "127.0.0.1:0"
# A store of its own for each round: with gloo, ranks would else find addresses of the round before.
_NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def run(
    folder: Path,
    *,
    nodes: int,
    devices: int,
    max_restarts: int,
    rdzv_endpoint: str | None,
    grace_s: float,
    debug: bool = False,
) -> None:
    """Run the job of a folder in processes that torchrun starts, again where they fail.

    Raises:
        PeerLostError: A rank was killed, failed or hung, in the last of all rounds.
        LightningOptError: The error of the job itself.
        SystemExit: The job was asked to stop, and saved its state.
    """
    spared = descendants(os.getpid())
    with watched() as room, _quiet():
        try:
            with _environment(folder), _signals_to_ranks(room):
                config = _config(folder, room.folder, nodes, devices, max_restarts, rdzv_endpoint, grace_s)
                program, *words = launch.rank_command(folder)
                elastic_launch(config, program)(*words)
            said = room.endings().get(0)  # on its machine; it ends with 0 even if it was asked to stop: see `cli.rank`
            if said is None or said.code == 0:
                return
            code, guilty = said.code, None
        except ChildFailedError as error:
            code, guilty = _code_of(error, room), None
        except SignalException as error:
            code, guilty = -error.sigval, None
        finally:
            end_descendants(spared=spared)
        if code not in ranks.STOPPED and code != -signal.SIGINT:
            guilty = room.guilty()
    raise failure(guilty, code, folder, debug=debug)


def _config(
    folder: Path, place: Path, nodes: int, devices: int, max_restarts: int, endpoint: str | None, grace_s: float
) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint or _LOOPBACK,
        max_restarts=max_restarts,
        monitor_interval=0.5,
        local_addr="127.0.0.1" if endpoint is None or launch.is_loopback(endpoint.rpartition(":")[0]) else None,
        signals_to_handle=_OF_TORCHRUN,
        shutdown_timeout=max(1, int(grace_s)),
        logs_specs=DefaultLogsSpecs(log_dir=str(place / "logs")),
    )


def _code_of(error: ChildFailedError, room: Ranks) -> int:
    """Return the exit code of the first rank that failed, and note how it ended."""
    rank, first = error.get_first_failure()
    for number, one in error.failures.items():
        room.note_status(number, one.exitcode)
    said = room.endings().get(rank)
    return said.code if said is not None else first.exitcode


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Tell the ranks their folder, and torchrun how to keep its store."""
    names: dict[str, str] = {launch.RUN_DIR: str(folder), _NO_SHARED_STORE: "1", _SIGNALS: _OF_TORCHRUN}
    if "OMP_NUM_THREADS" not in os.environ:
        names["OMP_NUM_THREADS"] = "1"  # as the command torchrun does
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextmanager
def _signals_to_ranks(room: Ranks) -> Iterator[None]:
    """Hand signals that ask to stop to the ranks themselves."""

    def hand_on(number: int, _: Any) -> None:
        for pid in room.running().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    before = {number: signal.signal(number, hand_on) for number in _OURS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out torchrun's own account of a failure: what matters of it is in one line of ours."""
    logger = logging.getLogger("torch.distributed.elastic")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
