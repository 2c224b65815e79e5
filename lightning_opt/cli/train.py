"""`train`: build -> fit -> test -> benchmark -> export -> report -> return the objective(s)."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_opt.cli import help as help_text
from lightning_opt.cli.guard import guarded
from lightning_opt.cli.log import log, start_logging
from lightning_opt.config import launch
from lightning_opt.config.paths import import_from_here
from lightning_opt.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    import_from_here()
    if help_text.wanted(words):
        print(help_text.train())
        return 0
    return guarded(lambda: _run(words), debug=_wants_debug(words))


def _run(words: list[str]) -> int:
    """Compose and check first: nothing heavy is imported, nothing is created, until the config can work."""
    from lightning_opt.config import compose, launchers
    from lightning_opt.config.checks import check
    from lightning_opt.config.hydra_entry import sweep, through_hydra
    from lightning_opt.config.sweeps_open import refuse_alone

    launch.take_part_in_srun()
    line = compose.read_command_line(words, config_name="train")
    if line.flags:
        return through_hydra(line)
    if launch.launched_from_outside():
        if line.multirun:
            raise ConfigError("-m: a sweep starts its own processes; give the command without a launcher")
        if launch.rank() > 0:
            named = None if launch.has_store() else compose.plain(compose.compose_config(line)).get("run_dir")
            return _as_rank(launch.wait_for_folder(named))
    if line.multirun:
        return sweep(line, run_job=_job, rehearse=_check_and_rehearse)
    refuse_alone(line)
    composed = compose.compose_config(line)
    config = compose.plain(composed)
    warnings = [*check(config), *launchers.check(config)]
    _launched(Job(config=config, yaml=compose.unresolved_yaml(composed), words=words, warnings=warnings))
    return 0


def _job(config: dict[str, Any], yaml: str, words: list[str]) -> Any:
    """Run one job of a sweep."""
    return _launched(Job(config=config, yaml=yaml, words=words))


def _check_and_rehearse(config: dict[str, Any]) -> None:
    """Look at one point of a sweep before its first job starts."""
    from lightning_opt.config import launchers

    launchers.check(config)
    _rehearse(config)


def _launched(job: "Job") -> Any:
    """Run one job from a checked config by the launcher that it names; return its objective(s)."""
    from lightning_opt.config.launchers import launcher_of

    launcher = launcher_of(job.config)
    launcher.check(job.config)  # a job of a sweep has not met it yet
    return launcher.run(job)


@dataclass(kw_only=True)
class Job:
    """One job: what launchers may do with it (see `config.launchers.Job`)."""

    config: dict[str, Any]
    yaml: str
    words: list[str]
    warnings: list[str] = field(default_factory=list)

    def here(self) -> Any:
        """Run it in this process, and in those that Lightning starts from it."""
        _rehearse(self.config)
        from lightning_opt.cli import job  # with Lightning, which a refusal need not wait for

        return job.run(self.config, yaml=self.yaml, command=self._command, warnings=self.warnings)

    def supervised(self, *, grace_s: float) -> Any:
        """Run it in processes of this machine that this one watches."""
        from lightning_opt.cli import supervise

        debug = _wants_debug(self.words)
        if supervise.is_safe_to_fork():
            return supervise.run_forked(self.here, grace_s=grace_s, debug=debug)
        folder = self.prepare()
        if not self.is_finished(folder):
            supervise.run_command(launch.rank_command(folder), grace_s=grace_s, debug=debug)
        return self.objective(folder)

    def by_torchrun(self, *, settings: dict[str, Any], grace_s: float) -> Any:
        """Run it by torchrun from this process."""
        folder = self.prepare()
        if not self.is_finished(folder):
            from lightning_opt.cli.torchrun import run

            run(folder, grace_s=grace_s, debug=_wants_debug(self.words), **settings)
        return self.objective(folder) if self.is_finished(folder, quiet=True) else None

    def by_slurm(self, *, settings: dict[str, Any], wait: bool) -> Any:
        """Submit it to SLURM, and say where it is."""
        folder = self.prepare()
        if not self.is_finished(folder):
            from lightning_opt.cli.slurm import submit, wait_for

            job = submit(folder, settings)
            print(f"job {job}: {folder}")
            if not wait:
                return None
            wait_for(job, folder)
        return self.objective(folder)

    def prepare(self) -> Path:
        """Make its run folder, for other processes."""
        _rehearse(self.config)
        from lightning_opt.cli import job

        return job.prepare(self.config, yaml=self.yaml, command=self._command, warnings=self.warnings)

    def is_finished(self, folder: Path, *, quiet: bool = False) -> bool:
        """Tell whether its run is done, and the user too."""
        from lightning_opt.cli.run_folder import is_finished

        if (done := is_finished(folder)) and not quiet:
            log.info("%s is finished; its report: %s", folder, folder / "report.html")
        return done

    def objective(self, folder: Path) -> Any:
        """Return the objective of a finished run."""
        from lightning_opt.cli import job
        from lightning_opt.reporting import read_record

        return job.objective(self.config, read_record(folder))

    @property
    def _command(self) -> list[str]:
        return [*_program(), *self.words]


def _rehearse(config: dict[str, Any]) -> None:
    """Build everything of a config once and throw it away, so that what it refuses is known before anything starts."""
    start_logging()
    launch.leave_srun_out()
    with _collector_off():
        from lightning_opt.cli.rehearsal import rehearse
        from lightning_opt.config.launchers import check_devices, starts_elsewhere

        if starts_elsewhere(config):
            config = _as_on_a_cpu(config)
        check_devices(config)
        rehearse(config)


def _as_on_a_cpu(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that can be rehearsed on a machine without the devices that the run will have."""
    from lightning_opt.config.launchers import devices_of

    trainer = {**config["trainer"], "accelerator": "cpu", "devices": devices_of(config) or 1}
    if str(trainer.get("precision", "")).startswith("16"):
        trainer["precision"] = "32-true"
    return {**config, "trainer": trainer}


@contextmanager
def _collector_off() -> Iterator[None]:
    """Look for no garbage meanwhile: what imports make is none, and looking takes a fifth of their time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _wants_debug(words: list[str]) -> bool:
    return any(word.startswith(("debug=", "+debug=")) for word in words)


def _program() -> list[str]:
    """Return the words before the arguments, as a person would type them again."""
    name = Path(sys.argv[0]).name
    return ["python", name] if name == "train.py" else ["lightning-opt", "train"]


def _as_rank(folder: Path) -> int:
    """Run as another rank of a job that is already running: its config, its folder, nothing else."""
    from lightning_opt.cli import job

    job.run_as_rank(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
