"""Who starts the ranks of a run: this command with Lightning, torchrun, or SLURM.

A launcher is chosen by `launch=NAME`. It looks at the config before anything is started, sets what follows from its own
settings (`trainer.num_nodes`), and then runs the job. None of this needs torch.
"""

import os
from importlib import import_module
from typing import Any, Protocol

from lightning_opt.config import launch
from lightning_opt.errors import ConfigError

Config = dict[str, Any]
_LOCAL = "lightning_opt.config.launchers.Local"


class Job(Protocol):
    """What a launcher may do with a job."""

    config: Config

    def here(self) -> Any:
        """Run it in this process (and in those that Lightning starts from it); return its objective."""

    def supervised(self, *, grace_s: float) -> Any:
        """Run it in processes of this machine that this one watches; return its objective."""

    def by_torchrun(self, *, settings: dict[str, Any], grace_s: float) -> Any:
        """Run it by torchrun from this process; return its objective."""

    def by_slurm(self, *, settings: dict[str, Any], wait: bool) -> Any:
        """Submit it to SLURM; return its objective if it waits for the end."""


class Launcher(Protocol):
    """Starts the ranks of a job."""

    def check(self, config: Config) -> list[str]:
        """Refuse what this launcher cannot start; set what follows from its settings; return warnings."""

    def run(self, job: Job) -> Any:
        """Run a job and return its objective; None where it does not wait for the end."""


class Local:
    """This machine: Lightning starts the other ranks, this process watches them.

    Args:
        grace_s: How long the ranks may take to end when one of them has failed, in seconds.

    Raises:
        ValueError: If a number is negative.
    """

    def __init__(self, *, grace_s: float = 15.0) -> None:
        if grace_s < 0:
            raise ValueError(f"grace_s={grace_s}: give 0 or more")
        self.grace_s = grace_s

    def check(self, config: Config) -> list[str]:
        """Refuse several machines; warn of more processes than cores."""
        nodes = nodes_of(config)
        if nodes > 1 and not launch.launched_from_outside():
            raise ConfigError(
                f"trainer.num_nodes={nodes}: launch=local starts processes on this machine alone; "
                f"give launch=slurm launch.nodes={nodes}, or launch=torchrun launch.nodes={nodes} on each machine"
            )
        return [*_crowded(config), *exposed()]

    def run(self, job: Job) -> Any:
        """Run the job here; watched where there are several ranks."""
        if devices_of(job.config) == 1 or launch.launched_from_outside():
            return job.here()
        return job.supervised(grace_s=self.grace_s)


class Torchrun:
    """torchrun, started by this command: on one machine, or by the same command on each of several.

    A round of ranks that fails is started again and goes on from the last good checkpoint.

    Args:
        nodes: How many machines take part; `trainer.num_nodes` follows.
        max_restarts: How often the ranks are started again.
        rdzv_endpoint: `host:port` of the machine at which all meet; null for a free port of this machine's loopback.
        grace_s: How long ranks may take to end before they are killed, in seconds.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self, *, nodes: int = 1, max_restarts: int = 0, rdzv_endpoint: str | None = None, grace_s: float = 15.0
    ) -> None:
        for name, value, least in (("nodes", nodes, 1), ("max_restarts", max_restarts, 0), ("grace_s", grace_s, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: give {least} or more")
        self.nodes, self.max_restarts, self.grace_s = nodes, max_restarts, grace_s
        self.rdzv_endpoint = rdzv_endpoint

    def check(self, config: Config) -> list[str]:
        """Refuse what torchrun could not bring together."""
        refuse_nesting("torchrun")
        set_nodes(config, self.nodes)
        if not isinstance(devices_of(config), int):
            raise ConfigError(
                f"trainer.devices={config['trainer']['devices']}: launch=torchrun starts one process for each device "
                "and needs their number"
            )
        if self.nodes > 1 and not (self.rdzv_endpoint and config.get("run_dir")):
            key = "run_dir" if self.rdzv_endpoint else "launch.rdzv_endpoint"
            raise ConfigError(
                f"{key} has no value; the {self.nodes} machines of launch.nodes={self.nodes} need one place to meet "
                "and one folder that all of them see: give launch.rdzv_endpoint=HOST:PORT run_dir=FOLDER"
            )
        host = (self.rdzv_endpoint or "").rpartition(":")[0]
        return [*_crowded(config), *exposed(host)]

    def run(self, job: Job) -> Any:
        """Run the job by torchrun."""
        settings = {
            "nodes": self.nodes,
            "devices": devices_of(job.config),
            "max_restarts": self.max_restarts,
            "rdzv_endpoint": self.rdzv_endpoint,
        }
        return job.by_torchrun(settings=settings, grace_s=self.grace_s)


def launcher_of(config: Config) -> Launcher:
    """Return the launcher that a config names.

    Raises:
        ConfigError: It refuses its arguments.
    """
    node = dict(config.get("launch") or {})
    module, _, name = str(node.pop("_target_", _LOCAL)).rpartition(".")
    try:
        made: Launcher = getattr(import_module(module), name)(**node)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"launch.{error}") from error
    return made


def check(config: Config) -> list[str]:
    """Look at how a config's ranks are started, before anything is; set what follows from it; return warnings.

    Raises:
        ConfigError: It cannot work: the key, the value, what to change.
    """
    return launcher_of(config).check(config)


def starts_elsewhere(config: Config) -> bool:
    """Tell whether the ranks run on other machines, whose devices cannot be looked at from here."""
    return str((config.get("launch") or {}).get("_target_", "")).endswith(".Slurm")


def check_devices(config: Config) -> None:
    """Refuse more GPUs than this machine has. Needs torch.

    Raises:
        ConfigError: Naming `trainer.devices`.
    """
    import torch

    trainer = config.get("trainer") or {}
    on_gpu = trainer.get("accelerator") in ("gpu", "cuda") or (
        trainer.get("accelerator") == "auto" and torch.cuda.is_available()
    )
    wanted, there = devices_of(config), torch.cuda.device_count() if on_gpu else 0
    if there and isinstance(wanted, int) and wanted > there:  # where there is none at all, the accelerator is wrong
        raise ConfigError(
            f"trainer.devices={wanted}: this machine has {there} GPUs; set trainer.devices={max(there, 1)}"
        )


def devices_of(config: Config) -> int | None:
    """Return how many devices of each machine are used; None if only the hardware tells."""
    trainer = config.get("trainer") or {}
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return 1 if trainer.get("accelerator") == "cpu" and devices == "auto" else None


def nodes_of(config: Config) -> int:
    """Return how many machines take part."""
    return int((config.get("trainer") or {}).get("num_nodes") or 1)


def set_nodes(config: Config, nodes: int) -> None:
    """Let `trainer.num_nodes` follow `launch.nodes`.

    Raises:
        ConfigError: It says another number.
    """
    if nodes_of(config) not in (1, nodes):
        raise ConfigError(
            f"trainer.num_nodes={nodes_of(config)} and launch.nodes={nodes} contradict each other; "
            "set launch.nodes alone"
        )
    if nodes > 1:
        config["trainer"] = {**config["trainer"], "num_nodes": nodes}


def refuse_nesting(name: str) -> None:
    """Refuse to start ranks from a process that is one.

    Raises:
        ConfigError: It is.
    """
    if launch.launched_from_outside():
        raise ConfigError(
            f"launch={name}: this process was started by a launcher as one of {launch.processes()}; "
            f"give the command without that launcher, or set launch=local"
        )


def _crowded(config: Config) -> list[str]:
    count = devices_of(config)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    accelerator = (config.get("trainer") or {}).get("accelerator")
    if accelerator != "cpu" or count is None or count <= max(cores, 1):
        return []
    return [
        f"trainer.devices={count}: this machine has {cores} cores for {count} processes; they will wait for each other"
    ]


def exposed(host: str = "") -> list[str]:
    """Warn of a meeting place that anybody may reach; "" for the one in the environment."""
    address = launch.public_address(host)
    if address is None:
        return []
    return [
        f"the ranks meet at {address}, which is a public address: what they send is neither encrypted nor checked; "
        "use an address of a private network"
    ]
