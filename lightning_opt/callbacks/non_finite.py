"""What to do when a loss or a gradient is NaN or infinite."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt.callbacks.shards import is_spread
from lightning_opt.errors import NonFiniteError
from lightning_opt.pruning.parts import sum_over_ranks

Policy = Literal["stop", "skip", "rollback"]

_MAX_STATISTIC = 1 << 16  # elements: running means and ranges, not weight-sized masks


class NonFiniteGuard(pl.Callback):
    """Finds a NaN or an infinity in the loss or a gradient before it reaches a weight.

    `stop` raises `NonFiniteError` (exit code 5), and no checkpoint is written any more. `skip` leaves that step out:
    parameters, moments and the buffers that hold statistics are as if the batch had not been. `rollback` also puts
    the weights and the optimizer back to those of the last checkpoint, and goes on with the next batch.

    Acts: before each optimizer step, with one fused reduction over the gradients and one bool read back. With a
    gradient scaler (`16-mixed`), infinite gradients are its normal business: only the loss is looked at. Leaves in a
    checkpoint: how many steps were skipped and rolled back. Strategies: all; with several ranks the decision to skip
    or roll back is taken from the gradients, which a bad loss makes bad on every rank.

    Args:
        policy: What to do.
        limit: How many steps in a row may be skipped, and how often in all may be rolled back, before it stops.

    Raises:
        ValueError: If the policy is unknown or the limit below 1.
    """

    def __init__(self, policy: Policy = "stop", *, limit: int = 10) -> None:
        if policy not in ("stop", "skip", "rollback"):
            raise ValueError(f"policy={policy!r}: give 'stop', 'skip' or 'rollback'")
        if limit < 1:
            raise ValueError(f"limit={limit}: give 1 or more")
        self.policy, self.limit = policy, limit
        self.tripped = False
        self.skipped_steps, self.rollbacks, self._in_a_row = 0, 0, 0
        self._loss: Tensor | None = None
        self._roll_back = False
        self._buffers: list[tuple[nn.Module, str]] = []
        self._before: list[Tensor] = []
        self._step_done = True

    @override
    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": self.skipped_steps, "rollbacks": self.rollbacks, "in_a_row": self._in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped_steps, self.rollbacks = state_dict["skipped_steps"], state_dict["rollbacks"]
        self._in_a_row = state_dict["in_a_row"]

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.tripped, self._loss, self._roll_back, self._step_done = False, None, False, True

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._buffers = []  # anew each epoch: callbacks may change the model

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self.policy == "stop" or not self._step_done:  # with accumulation, the step began some batches ago
            return
        self._step_done = False
        self._buffers = self._buffers or _statistics_of(pl_module)
        self._before = [module._buffers[name].clone() for module, name in self._buffers]  # type: ignore[union-attr]

    @override
    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss  # a bad one stays bad in a sum

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        loss, self._loss = self._loss, None
        self._step_done = True
        if trainer.world_size > 1 and self.policy != "stop":
            loss = None
        gradients = [] if _scales_gradients(trainer) else _gradients(optimizer)
        if not is_bad(gradients, loss, together=is_spread(trainer.strategy)):
            self._in_a_row = 0
            return
        self._decide(trainer.global_step, what=_culprit(pl_module, loss))
        optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters that have no gradient
        for (module, name), old in zip(self._buffers, self._before, strict=True):
            module._buffers[name].copy_(old)  # type: ignore[union-attr]

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._roll_back:
            self._roll_back = False
            restore_weights(trainer, pl_module)

    def _decide(self, step: int, *, what: str) -> None:
        """Count a bad step, and stop if that is the policy or the limit is reached."""
        self._in_a_row += 1
        count = self.rollbacks + 1 if self.policy == "rollback" else self._in_a_row
        if self.policy == "stop" or count > self.limit:
            self.tripped = True
            tried = "" if self.policy == "stop" else f" after {self.limit} times {self.policy}"
            raise NonFiniteError(
                f"step {step}: {what} is not finite{tried}; the last good checkpoint is intact. Lower the learning "
                "rate, clip gradients or look at the data, and resume"
            )
        rank_zero_warn(f"step {step}: {what} is not finite: the step is left out (policy={self.policy})")
        self.skipped_steps += 1
        if self.policy == "rollback":
            self.rollbacks, self._roll_back = self.rollbacks + 1, True


def is_bad(gradients: list[Tensor], loss: Tensor | None = None, *, together: bool = False) -> bool:
    """Whether a NaN or an infinity is in any of the gradients or the loss: one reduction, one value read back.

    Args:
        gradients: Of `DTensor`s, the parts here are looked at.
        loss: The loss.
        together: Whether each process sees a part of the gradients: all must ask, and get the same answer.
    """
    tensors = [getattr(g, "_local_tensor", g) for g in gradients]
    tensors += [loss] if loss is not None else []
    bad = ~finite_norms(tensors) if tensors else torch.zeros(1, dtype=torch.bool)
    if not _anywhere(bad, together=together):
        return False
    # the norm of very large but finite values may overflow: only then is each value looked at
    each = [~torch.isfinite(t).all().cpu() for t in tensors]
    return _anywhere(torch.stack(each or [torch.zeros((), dtype=torch.bool)]), together=together)


def finite_norms(tensors: list[Tensor]) -> Tensor:
    """Return for each tensor whether its L2 norm is finite, as `(tensors,)` bools on one device."""
    norms = list(torch._foreach_norm(tensors, 2))
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        norms = [norm.to(norms[0].device, torch.float32) for norm in norms]
    return torch.isfinite(torch.stack(norms))


def _anywhere(bad: Tensor, *, together: bool) -> bool:
    found = bad.any()
    if together:  # each process sees its parts only, and all must take the same way
        found = sum_over_ranks(found.float()) > 0
    return bool(found)


def restore_weights(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Put a running fit's weights and optimizers back to those of its last checkpoint.

    Raises:
        NonFiniteError: If there is none yet.
    """
    paths = [getattr(callback, "last_path", "") for callback in trainer.checkpoint_callbacks]
    if not any(paths):
        raise NonFiniteError(f"step {trainer.global_step}: there is no checkpoint yet to roll back to; use policy=skip")
    checkpoint = trainer.strategy.load_checkpoint(next(path for path in paths if path))
    # what schedules have set since then goes on
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in trainer.optimizers]
    trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    for optimizer, groups in zip(trainer.optimizers, settings, strict=True):
        for group, setting in zip(optimizer.param_groups, groups, strict=True):
            group.update(setting)


def _statistics_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (owner, name)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and buffer.numel() <= _MAX_STATISTIC
    ]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [g._values() if g.is_sparse else g.detach() for g in found if g.numel()]


def _scales_gradients(trainer: "pl.Trainer") -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _culprit(pl_module: "pl.LightningModule", loss: Tensor | None) -> str:
    if loss is not None and not bool(torch.isfinite(loss)):
        return f"the loss ({float(loss)})"
    for name, parameter in pl_module.named_parameters():
        gradient = parameter.grad
        if gradient is not None and is_bad([gradient._values() if gradient.is_sparse else gradient]):
            return f"the gradient of {name}"
    return "a gradient"  # whose part is another process's
