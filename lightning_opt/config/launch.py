"""One run folder and one config for every process of a job.

Lightning starts the other ranks of a job by running the command again. If that command composed its own config, each
rank would make its own folder, and under a sweep its own values. So the other ranks are started by a command of their
own (`rank_command`), which runs the config in a folder and nothing else.

Where torchrun has started all ranks, rank 0 makes the folder and tells the others through the store that torchrun keeps
for its workers. The store outlives a restart on one machine, so the ranks of the next round find the folder there;
over several machines it may not, and then a command that torchrun may start again must name its folder, or it would
begin anew. Other launchers have no such store: there, too, the folder must be named, and the other ranks wait until
rank 0 has written its config into it.
"""

import ipaddress
import json
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_opt.errors import ConfigError, PeerLostError

if TYPE_CHECKING:
    from torch.distributed import Store

RUN_DIR = "LIGHTNING_OPT_RUN_DIR"
_INTERFACE = "GLOO_SOCKET_IFNAME"
_OF_ONE_JOB = (
    RUN_DIR,
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
    _INTERFACE,
)
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES_OF_TORCHRUN = ("GROUP_", "ROLE_", "TORCHELASTIC_")
# What makes Lightning believe that srun has started the process.
_OF_SRUN = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE")
_KEY = "lightning_opt/run_dir"
_LONGEST_START_S = 1800.0  # rank 0 builds everything once before it makes the folder
_POLL_S = 0.1
_RANK = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lightning_opt.cli.rank import main; sys.exit(main())"
)


def rank_command(folder: Path) -> list[str]:
    """Return the command that runs one rank of a job: it reads the folder's config, and knows no other.

    It imports what this process would import, however that was started.
    """
    return [sys.executable, "-c", _RANK, json.dumps(sys.path), str(folder)]


def rank() -> int:
    """Return which process of a job this is, over all machines."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def launched_from_outside() -> bool:
    """Tell whether torchrun or another launcher started this process as one of several."""
    return "LOCAL_RANK" in os.environ and RUN_DIR not in os.environ and processes() > 1


def processes() -> int:
    """Return how many processes a launcher says that it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_store() -> bool:
    """Tell whether the ranks can agree on a folder by themselves: torchrun keeps a store for its workers."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_of_torchrun() -> bool:
    """Tell whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def announce(folder: Path) -> None:
    """Tell the ranks that a launcher started which folder is theirs, once its config is written; rank 0 calls this."""
    if launched_from_outside() and has_store():
        store_of_torchrun().set(_KEY, str(folder))


def announced() -> Path | None:
    """Return the folder that rank 0 announced before torchrun started the ranks again; None at the first start.

    Raises:
        ConfigError: It is a later start, and nobody knows the folder any more.
    """
    if not (launched_from_outside() and has_store()) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    store = store_of_torchrun()
    if not store.check([_KEY]):
        raise ConfigError("run_dir has no value; torchrun started the command again and the folder is lost: name it")
    return Path(store.get(_KEY).decode())


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
            return Path(store_of_torchrun().get(_KEY).decode())
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
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ConfigError(
            "run_dir has no value; with --max-restarts torchrun starts the command again on several machines, which "
            "would begin anew in another folder: name it"
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
    if _is_on_one_machine() and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault(_INTERFACE, "lo")  # gloo would else listen where the machine's name leads
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


def store_of_torchrun(*, timeout_s: float = _LONGEST_START_S) -> "Store":
    """Return the store that torchrun keeps for its workers."""
    from torch.distributed import TCPStore

    address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout_s)
    return TCPStore(address, port, is_master=False, timeout=timeout)


def take_part_in_srun() -> None:
    """Tell Lightning and torch what SLURM's variables say of a task that srun has started beside others.

    A process inside an allocation that srun has not started is alone: Lightning would wait for peers that never come.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "0")) if "SLURM_STEP_ID" in os.environ else 0
    if tasks > 1 and "LOCAL_RANK" not in os.environ:
        numbers = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "NODE_RANK": "NODEID", "GROUP_RANK": "NODEID"}
        os.environ |= {ours: os.environ[f"SLURM_{theirs}"] for ours, theirs in numbers.items()}
        os.environ["WORLD_SIZE"] = str(tasks)
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).partition("(")[0]
        job = os.environ["SLURM_JOB_ID"]
        os.environ.setdefault("TORCHELASTIC_RUN_ID", f"slurm-{job}")  # torch and Lightning then read the above
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "")))
        os.environ.setdefault("MASTER_PORT", str(15000 + int(job) % 10000))
    for name in _OF_SRUN:
        os.environ.pop(name, None)


def leave_srun_out() -> None:
    """Silence Lightning's advice to use srun wherever it is installed."""
    warnings.filterwarnings("ignore", message=".*The `srun` command is available.*")


def _first_host(nodes: str) -> str:
    """Return the first machine of a list that SLURM writes as `node[03-07,12]`; where there is but one, loopback."""
    if os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    head, bracket, rest = nodes.partition("[")
    return head + re.split(r"[-,\]]", rest)[0] if bracket and "," not in head else nodes.partition(",")[0]


def _is_on_one_machine() -> bool:
    machines = os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    return machines == "1" and is_loopback(os.environ.get("MASTER_ADDR", ""))


def is_loopback(address: str) -> bool:
    """Tell whether only this machine can be reached by an address."""
    if address in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def public_address(address: str = "") -> str | None:
    """Return the rendezvous' address if anybody may reach it: the ranks' traffic is neither encrypted nor checked.

    Args:
        address: Where the ranks are to meet; "" for what the environment says.
    """
    address = address or os.environ.get("MASTER_ADDR", "")
    try:
        found = ipaddress.ip_address(socket.gethostbyname(address)) if address else None
    except (OSError, ValueError):
        return None
    return address if found is not None and found.is_global else None


def own_address() -> str:
    """Return a name by which other machines reach this one."""
    return socket.getfqdn()
