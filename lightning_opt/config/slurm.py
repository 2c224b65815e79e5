"""SLURM as a launcher: what is asked of the cluster, in one place."""

import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lightning_opt.config.launchers import Config, Job, devices_of, refuse_nesting, set_nodes
from lightning_opt.errors import ConfigError, MissingExtraError


class Slurm:
    """A cluster under SLURM, by submitit: one task for each device, started again in the same folder after preemption.

    `signal_before_end_s` before its time is over, SLURM sends SIGUSR1 to all tasks: they save at the end of the batch,
    the job is put back into the queue, and goes on where it stopped.

    Args:
        nodes: Machines; `trainer.num_nodes` follows.
        tasks_per_node: Devices of each; `trainer.devices` follows. None for what `trainer.devices` says.
        cpus_per_task: Cores of each task.
        gpus_per_node: GPUs of each machine; None for one a task where `trainer.accelerator` is a GPU.
        partition: The queue; None for the cluster's own choice.
        time_min: Time of the job until it is stopped and queued again, in minutes.
        mem_gb: Memory of each machine; None for the cluster's own choice.
        account: Who pays.
        setup: Lines of shell before the tasks, such as `module load cuda`.
        signal_before_end_s: How long before its end the job is told.
        max_requeues: How often it is queued again.
        extra: Other options of sbatch by their name, such as `{qos: low}`.
        wait: Whether the command waits for the end of the job.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        *,
        nodes: int = 1,
        tasks_per_node: int | None = None,
        cpus_per_task: int = 1,
        gpus_per_node: int | None = None,
        partition: str | None = None,
        time_min: int = 60,
        mem_gb: float | None = None,
        account: str | None = None,
        setup: Sequence[str] = (),
        signal_before_end_s: int = 120,
        max_requeues: int = 100,
        extra: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        numbers = {"nodes": nodes, "cpus_per_task": cpus_per_task, "time_min": time_min}
        numbers |= {"signal_before_end_s": signal_before_end_s}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if signal_before_end_s >= 60 * time_min:
            raise ValueError(
                f"signal_before_end_s={signal_before_end_s}: must be less than time_min={time_min}, "
                f"which is {60 * time_min} s"
            )
        self.nodes, self.tasks_per_node, self.wait = nodes, tasks_per_node, wait
        self.cpus_per_task, self.gpus_per_node = cpus_per_task, gpus_per_node
        self.partition, self.account, self.time_min, self.mem_gb = partition, account, time_min, mem_gb
        self.setup, self.extra = list(setup), dict(extra or {})
        self.signal_before_end_s, self.max_requeues = signal_before_end_s, max_requeues

    def check(self, config: Config) -> list[str]:
        """Refuse what cannot be submitted from here, and numbers that contradict each other."""
        refuse_nesting("slurm")
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launch=slurm: there is no sbatch on this machine; give the command on a machine of the cluster, "
                "or set launch=local"
            )
        if find_spec("submitit") is None:
            raise MissingExtraError("submitit", extra="slurm", needed_for="launch=slurm")
        set_nodes(config, self.nodes)
        self._set_devices(config)
        gpus = self._gpus(config)
        if gpus is not None and gpus < self.tasks_per_node:  # type: ignore[operator]
            raise ConfigError(
                f"launch.gpus_per_node={gpus}: {self.tasks_per_node} tasks of each machine need a GPU each; "
                f"set launch.gpus_per_node={self.tasks_per_node}"
            )
        return []

    def run(self, job: Job) -> Any:
        """Submit the job, say where it is, and return (or wait for its end)."""
        return job.by_slurm(settings=self._settings(job.config), wait=self.wait)

    def _set_devices(self, config: Config) -> None:
        devices = devices_of(config)
        if self.tasks_per_node is None:
            if devices is None:
                raise ConfigError("launch.tasks_per_node has no value; SLURM starts one task for each device: give it")
            self.tasks_per_node = devices
        elif devices not in (None, 1, self.tasks_per_node):
            raise ConfigError(
                f"trainer.devices={devices} and launch.tasks_per_node={self.tasks_per_node} contradict each other; "
                "set launch.tasks_per_node alone"
            )
        config["trainer"] = {**config["trainer"], "devices": self.tasks_per_node}

    def _gpus(self, config: Config) -> int | None:
        on_gpu = config["trainer"].get("accelerator") in ("gpu", "cuda")
        return self.tasks_per_node if self.gpus_per_node is None and on_gpu else self.gpus_per_node

    def _settings(self, config: Config) -> dict[str, Any]:
        """Return the job's parameters as submitit names them; sbatch knows the rest by its own names."""
        named = {
            "gpus_per_node": self._gpus(config),
            "partition": self.partition,
            "account": self.account,
            "mem": f"{int(self.mem_gb * 1024)}MB" if self.mem_gb is not None else None,
        }
        return {
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "time": self.time_min,
            "setup": self.setup,
            "job_name": str(config.get("task_name", "train")),
            "max_requeues": self.max_requeues,
            **{name: value for name, value in named.items() if value is not None},
            "additional_parameters": {"signal": f"USR1@{self.signal_before_end_s}", "requeue": True, **self.extra},
        }
