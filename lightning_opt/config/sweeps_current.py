"""The sweep that is going on, for Hydra's plugins, which Hydra makes from text and cannot be handed anything."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module

from lightning_opt.config.sweeps import quoted
from lightning_opt.config.sweeps_jobs import Job
from lightning_opt.config.sweeps_plan import Sweep
from lightning_opt.config.sweeps_processes import Processes
from lightning_opt.errors import ConfigError

NAME = "lightning_opt"
_PLUGIN = "hydra_plugins.lightning_opt_sweeper"
_current: ContextVar[tuple[Sweep, Processes]] = ContextVar("the sweep that is going on")
Launch = Callable[[Sequence[Sequence[str]], int], Sequence[BaseException | None]]


@contextmanager
def current(sweep: Sweep, processes: Processes) -> Iterator[None]:
    """Make a sweep the one that Hydra's plugins will run inside the block.

    Raises:
        ConfigError: Hydra could not find the plugins.
    """
    try:
        import_module(_PLUGIN)
    except ModuleNotFoundError as error:
        raise ConfigError(f"-m: {_PLUGIN} is missing; reinstall lightning_opt, or start train.py itself") from error
    token = _current.set((sweep, processes))
    try:
        yield
    finally:
        _current.reset(token)


def run(launch: Launch) -> None:
    """Run the current sweep.

    Args:
        launch: Runs jobs, given as words of a command line and the number of the first.
    """
    sweep = _sweep_of()[0]

    def run_jobs(jobs: Sequence[Job]) -> Sequence[BaseException | None]:
        words = [[*_words(sweep, job), f"hydra.sweep.subdir={quoted(job.folder.name)}"] for job in jobs]
        try:
            return launch(words, jobs[0].number)
        except Exception as error:  # of one job, as submitit and Ray hand it on: the run folders say whose
            return [error] * len(jobs)

    sweep.method.run(sweep, run_jobs)


def run_processes(job_words: Sequence[Sequence[str]]) -> list[BaseException | None]:
    """Run jobs of the current sweep side by side, and return what stopped each."""
    sweep, processes = _sweep_of()
    named = {quoted(job.folder.name): job for job in sweep.jobs.values()}
    jobs = [named[words[-1].partition("=")[2]] for words in job_words]
    return processes.run([(_words(sweep, job), job) for job in jobs])


def _words(sweep: Sweep, job: Job) -> list[str]:
    """Return what a job's command line holds: its point, and what the sweep wants in it."""
    return [*sweep.composer.words(job.point), *sweep.extra]


def _sweep_of() -> tuple[Sweep, Processes]:
    try:
        return _current.get()
    except LookupError as error:
        raise ConfigError("hydra/sweeper=lightning_opt runs under lightning_opt's own train -m only") from error
