"""`sweep=optuna`: Optuna draws the points, stores what became of them, and says which jobs are not worth ending.

Why a driver of ours: the released `hydra-optuna-sweeper` 1.3 demands an Optuna below 3, whose sqlite storage fails with
today's SQLAlchemy; the release that takes Optuna 5 needs a Hydra that is not out yet. It also starts every trial anew
and has no way to prune one. Sampling, storage and pruning are Optuna's own; here they are tied to run folders.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_opt.config.sweeps import Axis, Point, Space, as_word
from lightning_opt.config.sweeps_grid import Jobs
from lightning_opt.config.sweeps_jobs import FAILED, FINISHED, STOPPED, Job, Outcome, write_trial
from lightning_opt.config.sweeps_plan import Launch, Sweep
from lightning_opt.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

STUDY = "sweep"
STORAGE = "optuna.db"
_STOP_TRIAL = {"_target_": "lightning_opt.callbacks.stop_trial.StopTrial"}


class Optuna(Jobs):
    """Draw the points with Optuna.

    A trial's values are a function of the seed and of the trials before it, so a sweep that was killed and resumed is
    the one that was not (with `n_jobs=1`). Trials that were running are taken up again in their own folders; equal
    values share a folder, so nothing is trained twice.

    Args:
        n_trials: Trials that end well or are pruned, over all starts of the command.
        sampler: Makes an Optuna sampler from `seed`.
        seed: Of the sampler.
        pruner: Decides from validation values which trials to stop; None for none. One objective only.
        direction: "maximize" or "minimize", one or one for each objective; None to know it from the objective.
        objectives: Names of what is optimised where the job's own `objective` is null.
        storage: Address of an Optuna storage; None for `optuna.db` in the sweep's folder.
        jobs: How jobs run: see `Jobs`.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        sampler: Callable[..., Any],
        n_trials: int = 20,
        seed: int = 1,
        pruner: Any = None,
        direction: str | list[str] | None = None,
        objectives: list[str] | None = None,
        storage: str | None = None,
        params: dict[str, Any] | None = None,
        n_jobs: int = 1,
        threads: int | None = None,
        launcher: str | None = None,
        on_failure: str = "continue",
    ) -> None:
        super().__init__(params=params, n_jobs=n_jobs, threads=threads, launcher=launcher, on_failure=on_failure)
        if n_trials < 1:
            raise ValueError(f"n_trials={n_trials}: must be at least 1")
        for word in [direction] if isinstance(direction, str) else direction or []:
            if word not in ("maximize", "minimize"):
                raise ValueError(f"direction={word}: choose maximize or minimize")
        self.n_trials, self.seed, self.sampler, self.pruner = n_trials, seed, sampler, pruner
        self.direction, self.storage, self.objectives = direction, storage, objectives
        self._study: Study | None = None

    def callbacks(self, node: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the callback that asks the pruner, where there is one."""
        return {"stop_trial": {**_STOP_TRIAL, "pruner": node["pruner"]}} if self.pruner is not None else {}

    def check(self, sweep: Sweep) -> None:
        """Refuse a sampler, a pruner and a space that do not go together.

        Raises:
            ConfigError: Naming the key.
        """
        if not sweep.space.axes:
            raise ConfigError(
                "sweep=optuna: nothing varies; give a key several values: 'optimizer.lr=tag(log,interval(1e-4,1e-2))'"
            )
        if self.pruner is not None and len(sweep.objectives) > 1:
            raise ConfigError("sweep.pruner: Optuna prunes with one objective only; set sweep.pruner=null")
        self._fresh_sampler(sweep.space, 0)

    def prepare(self, sweep: Sweep) -> None:
        """Open the study, which a resumed sweep finds in its folder.

        Raises:
            StorageError: The storage cannot be opened.
        """
        import optuna
        from optuna.study import StudyDirection

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                storage=optuna.storages.RDBStorage(self._address(sweep)),
                study_name=STUDY,
                directions=[StudyDirection[word.upper()] for word in sweep.directions],
                pruner=self.pruner,
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's own, which need not be imported for this
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(f"sweep.storage={self._address(sweep)}: cannot open it ({first})") from error

    def run(self, sweep: Sweep, launch: Launch) -> None:
        """Run trials until `n_trials` have ended; those that were running when a sweep was killed come first."""
        study = self._opened
        waiting = self._left_running(sweep.space)
        self._remember(sweep, study.trials)
        self._try_again(sweep)
        left = self.n_trials - sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
        study.sampler = self._fresh_sampler(sweep.space, len(study.trials))
        while left > 0 and not sweep.must_stop and not self._is_exhausted():
            count = min(left, self.n_jobs)
            trials: list[FrozenTrial | Trial] = [waiting.pop(0) for _ in range(min(count, len(waiting)))]
            trials += [self._ask(sweep.space) for _ in range(count - len(trials))]
            jobs = [self._job(sweep, trial) for trial in trials]
            outcomes = sweep.run(jobs, launch)
            for trial, outcome in zip(trials, outcomes, strict=True):
                self._tell(trial.number, outcome)
            left -= len(trials)

    def _left_running(self, space: Space) -> "list[FrozenTrial]":
        """Return the trials that a killed sweep left; one that was killed while it was drawn is given up."""
        names = {axis.name for axis in space.axes}
        running = [trial for trial in self._opened.trials if trial.state.name == "RUNNING"]
        for trial in running:
            if set(trial.params) != names:
                self._tell(trial.number, Outcome(status=FAILED))
        return [trial for trial in running if set(trial.params) == names]

    @property
    def _opened(self) -> "Study":
        assert self._study is not None, "prepare() comes first"
        return self._study

    def _address(self, sweep: Sweep) -> str:
        return self.storage or f"sqlite:///{sweep.folder / STORAGE}"

    def _ask(self, space: Space) -> "Trial":
        study = self._opened
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's words about experimental samplers
            study.sampler = self._fresh_sampler(space, len(study.trials))
            return study.ask(fixed_distributions=_distributions(space))

    def _fresh_sampler(self, space: Space, trial: int) -> Any:
        """Make the sampler of one trial: the seed of a resumed sweep must not draw its first points again.

        A sampler that walks a grid knows from the storage where it is, and needs the same seed each time.
        """
        wants = inspect.signature(self.sampler).parameters
        if "search_space" in wants:
            return self.sampler(search_space=_finite(space), seed=self.seed)
        return self.sampler(seed=self.seed + trial)

    def _is_exhausted(self) -> bool:
        sampler = self._opened.sampler
        return hasattr(sampler, "is_exhausted") and bool(sampler.is_exhausted(self._opened))

    def _job(self, sweep: Sweep, trial: "FrozenTrial | Trial") -> Job:
        job = sweep.job(trial.number, _point(sweep.space, trial.params))
        if self.pruner is not None:
            facts = {"storage": self._address(sweep), "study": STUDY, "number": trial.number}
            write_trial(job.folder, facts)
        return job

    def _tell(self, number: int, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        states = {FINISHED: TrialState.COMPLETE, STOPPED: TrialState.PRUNED, FAILED: TrialState.FAIL}
        if outcome.status not in states:
            return  # it is still running, as far as Optuna knows, and is taken up again
        try:
            self._opened.tell(number, list(outcome.values) or None, state=states[outcome.status])
        except RuntimeError as error:
            # So a grid says, when all is stored, that this was its last point: it thinks that it is in Optuna's loop.
            if "Study.stop" not in str(error):
                raise

    def _try_again(self, sweep: Sweep) -> None:
        """Put the values of trials that failed in an earlier start first in the queue."""
        tried = [trial.params for trial in self._opened.trials if trial.state.name != "FAIL"]
        for trial in self._opened.trials:
            if trial.state.name == "FAIL" and trial.params and trial.params not in tried:
                tried.append(trial.params)
                self._opened.enqueue_trial(trial.params)

    def _remember(self, sweep: Sweep, trials: "list[FrozenTrial]") -> None:
        """Name the jobs of earlier starts, so that `sweep.json` and the report have them all."""
        for trial in trials:
            if set(trial.params) == {axis.name for axis in sweep.space.axes}:
                sweep.job(trial.number, _point(sweep.space, trial.params))


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    return {axis.name: _distribution(axis) for axis in space.axes}


def _distribution(axis: Axis) -> "BaseDistribution":
    """Return Optuna's word for an axis."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.low is None or axis.high is None:
        return CategoricalDistribution(axis.values or ())
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(float(axis.low), float(axis.high), log=axis.log, step=axis.step)


def _finite(space: Space) -> dict[str, list[Any]]:
    """Return every value of every axis, as Optuna's grid wants them.

    Raises:
        ConfigError: An axis has no end of values.
    """
    space.grid()
    values: dict[str, list[Any]] = {}
    for axis in space.axes:
        words = list(axis.values or ())
        values[axis.name] = [int(w) if axis.whole else float(w) for w in words] if axis.is_numeric else words
    return values


def _point(space: Space, params: dict[str, Any]) -> Point:
    """Return a trial's values as words; those of a range with steps without the digits that adding them left."""
    stepped = {axis.name for axis in space.axes if axis.step is not None and not axis.whole}
    return {
        axis.name: f"{params[axis.name]:.12g}" if axis.name in stepped else as_word(params[axis.name])
        for axis in space.axes
    }
