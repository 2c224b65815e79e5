"""The places between two batches where everything is done and nothing has begun: where a run can be cut exactly.

Lightning has no hook there. `on_train_batch_end` comes before the module's own hook, validation and plateau
schedulers; `on_train_epoch_end` before the epoch's schedulers and logging; a checkpoint written in either misses what
follows. So the loops' own steps are observed on the one trainer that is fitted.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loops.progress import _ProcessedTracker

Notify = Callable[[], None]


def observe(
    trainer: "pl.Trainer",
    *,
    before_epoch: Notify | None = None,
    before_batches: Notify | None = None,
    after_batch: Notify | None = None,
    after_epoch: Notify | None = None,
) -> Notify:
    """Call functions between batches of a fit.

    Args:
        trainer: The one that fits.
        before_epoch: Called before an epoch's `on_train_epoch_start` hooks, or before the rest of a resumed epoch.
        before_batches: Called when an epoch's loader is set up, before its first batch is fetched.
        after_batch: Called when a batch, its hooks, validation and schedulers are done.
        after_epoch: Called when an epoch, its hooks, schedulers and logging are done.

    Returns:
        A function that ends the observation.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    ends = [
        _wrap(owner, name, before=before, after=after)
        for owner, name, before, after in (
            (fit, "on_advance_start", before_epoch, None),
            (epoch, "on_run_start", None, before_batches),
            (epoch, "on_advance_end", None, after_batch),
            (fit, "on_advance_end", None, after_epoch),
        )
        if before is not None or after is not None
    ]

    def end() -> None:
        for one in ends:
            one()

    return end


def _wrap(owner: Any, name: str, *, before: Notify | None, after: Notify | None) -> Notify:
    method = getattr(owner, name)
    active = True

    @functools.wraps(method)
    def observed(*args: Any, **kwargs: Any) -> Any:
        if active and before is not None:
            before()
        result = method(*args, **kwargs)
        if active and after is not None:
            after()
        return result

    def end() -> None:
        nonlocal active
        active = False
        # another observer may have wrapped this one: then it stays, passing calls on
        if owner.__dict__.get(name) is observed:
            setattr(owner, name, method) if hasattr(method, "__wrapped__") else delattr(owner, name)

    setattr(owner, name, observed)
    return end


def epochs_of(trainer: "pl.Trainer") -> _ProcessedTracker:
    """Return the counters of the epochs that this run has begun and ended."""
    return cast(_ProcessedTracker, trainer.fit_loop.epoch_progress.current)


def inside_epoch(trainer: "pl.Trainer") -> bool:
    """Whether an epoch has begun and not ended."""
    return epochs_of(trainer).ready > epochs_of(trainer).processed


def is_finished(trainer: "pl.Trainer") -> bool:
    """Whether the fit has nothing left to do but its `on_train_end` hooks."""
    fit = trainer.fit_loop
    steps_done = fit.max_steps != -1 and trainer.global_step >= fit.max_steps
    epochs_done = fit.max_epochs not in (-1, None) and epochs_of(trainer).processed >= int(fit.max_epochs or 0)
    return bool(steps_done or epochs_done or (trainer.should_stop and fit._can_stop_early))


def continue_exactly(trainer: "pl.Trainer") -> None:
    """Make Lightning go on from a checkpoint that was written between two batches as if nothing had happened.

    Left alone, Lightning takes such a state for an interrupted one: it would validate again or skip a validation,
    count a step twice, leave out a plateau scheduler's step at the end of the epoch and, with `max_steps`, pass over
    a whole epoch. Call it in `on_train_start`.
    """
    fit = trainer.fit_loop

    def reload_if_early() -> None:
        # a scheduler that asked for the number of steps had the loaders set up before the progress was known: they
        # got no state, and their workers have begun with the wrong batches
        if fit._combined_loader_states_to_load and fit._data_fetcher is not None:
            fit._load_combined_loader_states()
            iter(fit._data_fetcher)

    def settle() -> None:
        end()
        _forget_restart(fit)

    if inside_epoch(trainer):
        # the loops still need to know of the restart to keep their counters when the epoch's batches begin
        end = observe(trainer, before_epoch=reload_if_early, before_batches=settle)
    else:
        _forget_restart(fit)


def complete_fit(trainer: "pl.Trainer") -> None:
    """Make a fit that starts from a checkpoint with nothing left to train call its `on_train_end` hooks all the same.

    Lightning would return at once, and what callbacks do at the end of a fit would be lost with the killed process.
    Call it before the fit's loop runs.
    """
    fit = trainer.fit_loop
    started = False

    def start() -> None:
        nonlocal started
        started = True

    def finish() -> None:
        end_run()
        if not started and is_finished(trainer):
            fit.on_run_start()
            fit.on_run_end()
        end_start()

    end_start = _wrap(fit, "on_run_start", before=start, after=None)
    end_run = _wrap(fit, "run", before=None, after=finish)


def _forget_restart(loop: Any) -> None:
    for one in (loop, loop.epoch_loop, *(loop.epoch_loop.__dict__.values())):
        if hasattr(one, "_restarting"):
            one._restarting = one._resuming_from_checkpoint = one._loaded_from_state_dict = False
