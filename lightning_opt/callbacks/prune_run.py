"""One fit's pruning: masks, evidence, and what happens at each moment of the timeline."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_opt.callbacks.compiled import is_compiled
from lightning_opt.callbacks.neighbours import mask_averages
from lightning_opt.callbacks.non_finite import NonFiniteGuard, is_bad
from lightning_opt.callbacks.prune_plan import Plan
from lightning_opt.callbacks.prune_timeline import Timeline
from lightning_opt.callbacks.shards import is_spread
from lightning_opt.checkpointing.rng import gather
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.criteria.slimming import add_sparsity_gradient, batch_norm_scales
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.parts import Layout
from lightning_opt.pruning.rewind import Rewind, tensors_of
from lightning_opt.pruning.schedules import Schedule
from lightning_opt.pruning.statistics import Statistics, only_weight_shaped
from lightning_opt.surgery import Edit
from lightning_opt.surgery.shrink import Shrink, cut

_ALWAYS = frozenset({"movement"})  # sums over the whole run


class Pruning:
    """Holds the masks of one fit and changes them when they are due.

    Args:
        trainer: Its optimizers are made, and restored after a stop.
        root_name: Where the pruned network is in the LightningModule.
        plan: What is masked, and how it is chosen.
        timeline: When.
        observe_steps: For how many optimizer steps before an update evidence is gathered.
        schedule: Says when weights go back to earlier values.
        penalty: Strength of the L1 penalty on batch-norm scales until pruning is over.

    Raises:
        ConfigError: The criterion would have to choose before it has seen anything.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        *,
        root_name: str,
        plan: Plan,
        timeline: Timeline,
        observe_steps: int,
        schedule: Schedule,
        penalty: float = 0.0,
    ) -> None:
        self.trainer, self.root_name, self.plan, self.timeline = trainer, root_name, plan, timeline
        self.observe_steps, self.schedule = observe_steps, schedule
        self._spread = is_spread(trainer.strategy)
        self.masks, self.rewind = Masks(plan.parameters, plan.layout), self._make_rewind()
        self.fraction, self.updates = 0.0, 0
        if timeline.start == 0 and plan.needs and schedule.at(timeline.progress(0)) > 0.0:
            raise ConfigError(
                f"start is step 0, before which {', '.join(sorted(plan.needs))} cannot have been observed; "
                "give start='1 steps' or later"
            )
        self.step = self._last_update = trainer.global_step - 1  # the moment "0 steps" is still to come
        self._is_gathering = self._is_shrunk = False
        self._shrunk_to = 0
        self._handles: list[Any] = []
        self._observed: Optimizer | None = None
        self._penalty, self._scales = penalty, _scales_of(plan.root) if penalty else []
        self._guards = [c for c in trainer.callbacks if isinstance(c, NonFiniteGuard)]  # type: ignore[attr-defined]
        self._rollbacks = self._count_rollbacks()

    @property
    def is_over(self) -> bool:
        """Whether the last moment has come."""
        return self.step >= self.timeline.last

    def attach(self) -> None:
        """Mask weights after each step of each optimizer that trains some of them.

        Raises:
            ConfigError: None does.
        """
        ours = set(self.plan.parameters.values())
        if not ours:
            return
        owners = [o for o in self.trainer.optimizers if any(p in ours for g in o.param_groups for p in g["params"])]
        if not owners:
            raise ConfigError("no optimizer trains any of the weights that are to be pruned; name others with include")
        # Right after the step, so that no forward, average or checkpoint ever sees an unmasked weight, however many
        # optimizers there are and however often they step within a batch.
        self._handles = [o.register_step_post_hook(lambda *_: self.masks.apply()) for o in owners]
        self._observed = owners[0]
        self._gather_if_due()

    def detach(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._is_gathering = [], False
        self.plan.statistics.remove()

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Read gradients of the whole batch, unscaled and unclipped; then keep masked ones out of the clipped norm."""
        if self._is_gathering and optimizer is self._observed and self._gradients_count():
            self.plan.statistics.after_backward()
        if self._scales and optimizer is self._observed and not self.is_over:
            add_sparsity_gradient(self._scales, strength=self._penalty)
        if self.trainer.gradient_clip_val:
            self.masks.mask_gradients()

    def advance(self, step: int, decide: Callable[[int], float]) -> bool:
        """Do what is due after `step` optimizer steps; `decide` gives the fraction of the final sparsity.

        Returns:
            Whether masks changed.

        Raises:
            ValueError: The fraction is out of range.
        """
        before, self.step = self.step, step
        if self._rollbacks != self._count_rollbacks():  # the weights are older than the masks
            self._rollbacks = self._count_rollbacks()
            self.masks.apply()
        self._save_for_rewind()
        changed = False
        if self.timeline.is_due(before, step):
            changed = self._update(decide(step))
            self._rewind_if_due()
            self._last_update = step
        self._gather_if_due()
        return changed

    def is_shrink_due(self, before: int) -> bool:
        """Whether masked structures are to be removed in the steps after `before`."""
        moment = self.timeline.shrink
        return moment is not None and before < moment <= self.step

    def shrink(self) -> Edit | None:
        """Remove masked structures; return what was done."""
        self.detach()
        edit = self.plan.shrink(self.trainer)
        self._retire()
        self._is_shrunk, self._shrunk_to = True, count(self.plan.root)
        if is_compiled(self.trainer.lightning_module):
            torch.compiler.reset()  # else it would take the new sizes for variable ones
        return edit

    def _retire(self) -> None:
        self.plan.retire()
        self.masks, self._scales = Masks({}), []

    def follow(self, edit: Edit) -> None:
        """Take up the shapes of a network from which another pruner has removed structures."""
        self.detach()
        if self._spread:
            self._follow_whole(edit)
        else:
            if isinstance(edit, Shrink):
                self.masks.cut(edit)
                saved = self.rewind.saved
                self.rewind.saved = {n: cut(t, edit.kept[n]) if n in edit.kept else t for n, t in saved.items()}
            self.plan.follow(edit)
        self.attach()

    def _follow_whole(self, edit: Edit) -> None:
        """Cut whole masks and saved values; parts of the new shapes begin and end elsewhere."""
        layout = self.plan.layout
        whole = {name: self.masks.whole(name) for name in layout or ()}
        saved = self.rewind.state_dict()["saved"]
        self.plan.follow(edit)
        if isinstance(edit, Shrink):
            whole = {n: cut(t, edit.kept[n]) if n in edit.kept else t for n, t in whole.items()}
            saved = {n: cut(t, edit.kept[n]) if n in edit.kept else t for n, t in saved.items()}
        layout = self.plan.layout
        self.masks, self.rewind = Masks(self.plan.parameters, layout), self._make_rewind()
        if layout is not None:
            self.masks.update({name: layout.part(name, mask) for name, mask in whole.items() if name in layout.held})
        self.rewind.load_state_dict({"saved": saved})

    def _make_rewind(self) -> Rewind:
        if not self._spread or not self.schedule.rewind_points:
            return Rewind()
        return Rewind(Layout.of(tensors_of(self.plan.root)))

    def measures(self) -> dict[str, float]:
        """Return what is logged."""
        values = {"student/sparsity": 1.0 - self.plan.remaining(self.masks) / self.plan.total}
        if self.timeline.shrink is not None:
            values["student/params"] = float(count(self.plan.root))
        return values

    def stages(self, how: str) -> list[dict[str, Any]]:
        """Return what was done so far, as `{method, from_step, to_step, what}`.

        Args:
            how: The rules in a few words.
        """
        at, total = self.timeline, self.plan.total
        if self.step < at.start:
            return []
        left = self._shrunk_to if self._is_shrunk else self.plan.remaining(self.masks)
        share = f"{how}: {1 - left / total:.1%} of {total:,} weights"
        done = [{"method": "prune", "from_step": at.start, "to_step": min(at.end, self.step), "what": share}]
        if self._is_shrunk:
            removed = f"from {total:,} to {self._shrunk_to:,} parameters"
            done.append({"method": "shrink", "from_step": at.shrink, "to_step": at.shrink, "what": removed})
        return done

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers; every process must call it."""
        statistics = self.plan.statistics
        return {
            "timeline": self.timeline.to_state(),
            "step": self.step,
            "last_update": self._last_update,
            "fraction": self.fraction,
            "updates": self.updates,
            "is_shrunk": self._is_shrunk,
            "shrunk_to": self._shrunk_to,
            "masks": self.masks.state_dict(),
            "plan": self.plan.state_dict(),
            "rewind": self.rewind.state_dict(),
            "statistics": gather(statistics.state_dict()) if statistics.needs else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        if state["is_shrunk"]:
            self._retire()
        else:
            self.plan.refresh()
            self.masks = Masks(self.plan.parameters, self.plan.layout)
            self.rewind = self._make_rewind()
        self._is_shrunk, self._shrunk_to = state["is_shrunk"], state["shrunk_to"]
        self.step, self._last_update = state["step"], state["last_update"]
        self.fraction, self.updates = state["fraction"], state["updates"]
        self.plan.load_state_dict(state["plan"])
        self.masks.load_state_dict(state["masks"])
        self.rewind.load_state_dict(state["rewind"])
        ranks = state["statistics"]
        if len(ranks) == self.trainer.world_size:
            self.plan.statistics.load_state_dict(_with_shared(ranks[self.trainer.global_rank], ranks[0]))
        elif ranks:
            self.plan.statistics.load_state_dict(only_weight_shaped(ranks[0]))
            rank_zero_warn(
                f"The checkpoint holds what {len(ranks)} processes had observed and is resumed by "
                f"{self.trainer.world_size}: pruning observes inputs anew, so the run is correct but not the "
                "uninterrupted one"
            )

    def _gather_if_due(self) -> None:
        """Begin or end to gather evidence: only so long before an update, and only if the criterion reads any."""
        needs, left = self.plan.statistics.needs, self.timeline.steps_to_next(self.step)
        wanted = bool(needs) and left is not None and (left <= self.observe_steps or bool(needs & _ALWAYS))
        if wanted == self._is_gathering:
            return
        self._is_gathering = wanted
        compiled = is_compiled(self.trainer.lightning_module)
        if wanted:
            install(self.plan.statistics, eagerly=compiled)
        else:
            self.plan.statistics.remove()
        if compiled:
            torch.compiler.reset()

    def _gradients_count(self) -> bool:
        """Whether a loss scaler is going to take this step."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            return True  # what else is not finite is the guard's business
        found = [p.grad for p in self.plan.parameters.values() if p.grad is not None]
        return not is_bad(found, together=self._spread)

    def _count_rollbacks(self) -> int:
        return sum(guard.rollbacks for guard in self._guards)

    def _update(self, fraction: float) -> bool:
        """Choose masks anew if there is a reason to, and apply them everywhere."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(
                f"step {self.step}: decide() gave {fraction}; it is a fraction of the final sparsity, 0 to 1"
            )
        statistics = self.plan.statistics
        if self.trainer.world_size > 1 and statistics.needs:
            statistics.reduce(lambda tensor: self.trainer.strategy.reduce(tensor, reduce_op="mean"))
        new = self._choose(fraction)
        self.fraction = fraction
        statistics.reset()
        if new is None:
            return False
        newly = self.masks.update(new)
        self.masks.apply()
        self.masks.clear_moments(self.trainer.optimizers, newly=newly)
        mask_averages(self.trainer, self.root_name, self.masks)
        self.updates += 1
        return True

    def _choose(self, fraction: float) -> dict[str, Tensor] | None:
        if fraction != self.fraction:
            return self.plan.choose(fraction)
        if not self.updates:
            return None
        exchanged = self.plan.exchange(self.masks, progress=self.timeline.progress(self.step), update=self.updates)
        # The same scores at the same sparsity give the same masks.
        return self.plan.choose(fraction) if exchanged is None and self.plan.needs else exchanged

    def _save_for_rewind(self) -> None:
        if not self.schedule.rewind_points or self.rewind.saved or self.step < self.timeline.start:
            return
        if self.timeline.progress(self.step) >= self.schedule.rewind_to:
            self.rewind.save(self.plan.root)

    def _rewind_if_due(self) -> None:
        """Put all weights back to earlier values once a round of training, at whose end masks were chosen, is over."""
        past, now = self.timeline.progress(self._last_update), self.timeline.progress(self.step)
        if any(past < point <= now for point in self.schedule.rewind_points):
            self.rewind.restore(self.plan.root, self.trainer.optimizers)
            self.masks.apply()


def _with_shared(own: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Add to one process's sums those that only the first one has saved for all of them."""
    return own | {"sums": only_weight_shaped(first)["sums"] | own["sums"]}


def install(statistics: Statistics, *, eagerly: bool) -> None:
    """Begin to observe forward passes; what is observed in compiled code is computed outside of it."""
    if eagerly:
        vars(statistics).setdefault("_observe", torch.compiler.disable(statistics._observe))
    statistics.install()


def count(root: nn.Module) -> int:
    """Return how many parameters a network has."""
    return sum(parameter.numel() for parameter in root.parameters())


def _scales_of(root: nn.Module) -> list[nn.Parameter]:
    try:
        return batch_norm_scales(root)
    except ValueError as error:
        raise ConfigError(f"penalty: {error}") from error
