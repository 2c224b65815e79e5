"""`sweep=grid`: every combination, each in its own folder."""

from typing import Any

from lightning_opt.config.sweeps_plan import Launch, Sweep

_ON_FAILURE = ("continue", "stop", "ignore")


class Jobs:
    """How the jobs of any sweep run.

    Args:
        params: Key to values, in Hydra's sweep syntax or as a list; the command line has the last word.
        n_jobs: Jobs at once. 1 runs them in this process, one after the other; more, each in a process of its own.
        threads: Threads of each process; None shares the cores that this one may use among all of them.
        launcher: A launcher of Hydra's in the place of ours: `ray`, `submitit_slurm`, `submitit_local`, `joblib`.
        on_failure: "continue" runs the others and ends with the failed job's exit code; "stop" starts no other;
            "ignore" ends with 0.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        params: dict[str, Any] | None = None,
        n_jobs: int = 1,
        threads: int | None = None,
        launcher: str | None = None,
        on_failure: str = "continue",
    ) -> None:
        if n_jobs < 1:
            raise ValueError(f"n_jobs={n_jobs}: must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: must be at least 1")
        if on_failure not in _ON_FAILURE:
            raise ValueError(f"on_failure={on_failure}: choose from {', '.join(_ON_FAILURE)}")
        self.params = dict(params or {})
        self.n_jobs, self.threads, self.launcher, self.on_failure = n_jobs, threads, launcher, on_failure

    def prepare(self, sweep: Sweep) -> None:
        """Open nothing."""

    def callbacks(self, node: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the callbacks that every job gets beside its own, from the sweep's own config."""
        return {}

    @property
    def in_this_process(self) -> bool:
        """Tell whether jobs run here, one after the other."""
        return self.n_jobs == 1 and self.launcher is None


class Grid(Jobs):
    """Run every combination of the values."""

    def check(self, sweep: Sweep) -> None:
        """List the jobs.

        Raises:
            ConfigError: An axis has no end of values.
        """
        for number, point in enumerate(sweep.space.grid()):
            sweep.job(number, point)

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Run them, those that are done left out."""
        jobs = list(sweep.jobs.values())
        together = 1 if self.in_this_process else self.n_jobs if self.on_failure == "stop" else len(jobs)
        for start in range(0, len(jobs), together):
            sweep.run(jobs[start : start + together], launch)
            if sweep.must_stop:
                return
