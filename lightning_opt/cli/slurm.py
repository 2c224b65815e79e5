"""Submits a prepared job to SLURM by submitit, and what each of its tasks does."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning_opt.cli.log import log
from lightning_opt.config import launch, ranks
from lightning_opt.errors import ConfigError, LightningOptError, PeerLostError, StorageError

_POLL_S = 5.0
# The job of a rank that was killed ends with the code of a lost peer, not with srun's 128 + SIGKILL.
_EXIT = f'code=$?; [ "$code" = 137 ] && exit {PeerLostError.exit_code}; exit "$code"'
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
_TRY_AGAIN = os.EX_TEMPFAIL


def submit(folder: Path, settings: dict[str, Any]) -> str:
    """Submit the job of a run folder and return its id.

    Raises:
        ConfigError: The cluster refuses it; the message holds what sbatch says.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    options = dict(settings)
    task = Task(folder, max_requeues=options.pop("max_requeues"))
    options["setup"] = [*options["setup"], _python_path()]
    # The ranks that are left say which one is gone, and end by themselves: srun would not let them finish.
    options["srun_args"] = ["--kill-on-bad-exit=0"]
    options["teardown"] = [_EXIT]
    executor = submitit.SlurmExecutor(folder=folder / "slurm")
    executor.update_parameters(**options)
    try:
        return str(executor.submit(task).job_id)
    except (FailedJobError, subprocess.CalledProcessError, OSError) as error:
        said = " ".join(str(error).split())[-300:]
        raise ConfigError(f"launch=slurm: the cluster refuses the job ({said})") from error


def _python_path() -> str:
    """Return the line of shell by which tasks can import what this process can, beside what Python itself finds."""
    own = (sys.prefix, sys.base_prefix)
    paths = [path for path in map(os.path.abspath, sys.path) if not path.startswith(own)]
    return f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}${{PYTHONPATH:+:$PYTHONPATH}}"


class Task:
    """What one task of a job does; submitit keeps it in a file beside the log and runs it in each task.

    Args:
        folder: The run folder.
        max_requeues: How often the job is put back into the queue.
    """

    def __init__(self, folder: Path, *, max_requeues: int) -> None:
        self.folder, self.max_requeues = folder, max_requeues

    def __call__(self) -> None:
        """Run this task's rank; after SIGUSR1 rank 0 puts the job back into the queue."""
        launch.take_part_in_srun()
        os.environ[launch.RUN_DIR] = str(self.folder)
        from lightning_opt.cli.guard import guarded
        from lightning_opt.cli.rank import run_rank

        try:
            code = guarded(lambda: run_rank(self.folder))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        if code == _TRY_AGAIN and launch.rank() == 0:
            self._requeue()
        if code not in ranks.STOPPED and os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
            # a rank that hangs on another machine is out of this one's reach
            step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
            subprocess.run(["scancel", "--signal=KILL", step], capture_output=True)
        if code not in (0, _TRY_AGAIN):
            sys.exit(code)

    def _requeue(self) -> None:
        job, times = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if times >= self.max_requeues:
            log.warning("warning: job %s was queued again %d times (launch.max_requeues); it ends here", job, times)
            return
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode:
            log.warning("warning: scontrol requeue %s: %s; requeue it by hand, it resumes", job, done.stderr.strip())
            sys.exit(_TRY_AGAIN)
        log.info("job %s is queued again and will go on from here", job)


def wait_for(job: str, folder: Path) -> None:
    """Wait until a job is over, over all its times in the queue.

    Raises:
        PeerLostError: A task was killed, or failed.
        LightningOptError: The job's own error, by its exit code; its log says more.
        StorageError: SLURM does not answer.
    """
    while (state := _state(job))[0] not in _OVER:
        time.sleep(_POLL_S)
    name, code = state
    if name == "COMPLETED":
        return
    where = f"see {folder / 'slurm'} and {folder / 'train.log'}"
    guilty = ranks.newest_guilty(folder)
    if guilty is not None and (guilty.ending is None or guilty.ending.code == 1):
        raise PeerLostError(f"job {job} ended ({name}): rank {guilty.rank} {guilty.what}; {where}")
    kinds = [kind for kind in LightningOptError.__subclasses__() if kind.exit_code == code]
    raise (kinds[0] if kinds else PeerLostError)(f"job {job} ended ({name}, exit code {code}); {where}")


def _state(job: str) -> tuple[str, int]:
    """Return a job's state and exit code as the controller knows them; no accounting is needed."""
    program = shutil.which("scontrol") or "scontrol"
    done = subprocess.run([program, "show", "job", "-o", job], capture_output=True, text=True)
    if done.returncode:
        raise StorageError(f"job {job}: SLURM knows it no longer ({done.stderr.strip()[:160]})")
    fields = dict(word.partition("=")[::2] for word in done.stdout.split() if "=" in word)
    return fields["JobState"], int(fields.get("ExitCode", "0:0").partition(":")[0])
