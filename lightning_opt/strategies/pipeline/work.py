"""What a stage does with one micro-batch: run its layers, read features, and compute the losses that belong to it.

The losses of a step are shared out over the stages: a loss over logits is computed on the last one, a loss over
features on the stage of its deepest tap; features of earlier stages travel along with the activations. The gradient of
a loss that is computed inside the network enters the backward of its stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_opt.errors import ConfigError
from lightning_opt.forward import logits_of
from lightning_opt.losses import Signals
from lightning_opt.modules import TaskModule
from lightning_opt.modules.context import StepContext
from lightning_opt.modules.taps import match_modules
from lightning_opt.strategies.pipeline.recording import floats_of
from lightning_opt.strategies.pipeline.stages import Stage

_INPUT = ":in"


class Shares:
    """Say which stage computes which part of the loss, and which features travel.

    Args:
        module: Whose parts they are.
        stages: All stages of its network.

    Raises:
        ConfigError: A tapped module runs in no stage.
    """

    def __init__(self, module: TaskModule, stages: Sequence[Stage]) -> None:
        last = len(stages) - 1
        readers = module.readers()
        self.reads = {name: match_modules(module.model, patterns) for name, patterns in readers.items() if patterns}
        wanted = dict.fromkeys(feature for features in self.reads.values() for feature in features)
        self.homes = {feature: _home(feature, stages) for feature in wanted}
        self.terms: list[list[str]] = [[] for _ in stages]
        for name in readers:
            features = self.reads.get(name, [])
            deepest = last if readers[name] is None else max(self.homes[one] for one in features)
            self.terms[deepest].append(name)
        self.names = list(readers)

    def carried(self, number: int) -> list[str]:
        """Return the features that leave a stage for a later one, in order."""
        needed = {one for names in self.terms[number + 1 :] for name in names for one in self.reads.get(name, [])}
        return [feature for feature, home in self.homes.items() if home <= number and feature in needed]

    def tapped(self, number: int) -> list[str]:
        """Return the features that are read in a stage."""
        return [feature for feature, home in self.homes.items() if home == number]


def _home(feature: str, stages: Sequence[Stage]) -> int:
    name = feature.removesuffix(_INPUT)
    real = [stage.number for stage in stages if name in (stage.takes if feature.endswith(_INPUT) else stage.runs)]
    if not real:
        raise ConfigError(f"loss.terms: the tapped module {name!r} does not run; tap a module that always runs")
    return real[-1]  # of a module that runs several times the last answer counts


class StageWork(nn.Module):
    """One stage as the pipeline's engine calls it: activations in, activations or the step's loss out.

    Args:
        stage: What it runs.
        shares: Which parts of the loss it computes.
        module: Whose parts they are.
        precision: Makes the context in which forward passes run, such as autocast.
    """

    stage: Stage
    module: TaskModule

    def __init__(
        self,
        stage: Stage,
        shares: Shares,
        module: TaskModule,
        *,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        # Neither is a part of this module: their parameters are the LightningModule's.
        vars(self).update(stage=stage, module=module)
        self.shares, self.precision = shares, precision
        self.terms = shares.terms[stage.number]
        self.carried_in = shares.carried(stage.number - 1) if stage.number else []
        self.carried_out = shares.carried(stage.number)
        self.values: dict[str, Tensor] = {}
        self._pieces: Sequence[StepContext] = ()
        self._whole: StepContext | None = None
        self._counts: Mapping[str, Tensor] = {}
        self._features: dict[str, tuple[Tensor, int]] = {}
        self._is_trial = False
        self._handles = self._install_taps()

    def begin(self, whole: StepContext, pieces: Sequence[StepContext]) -> None:
        """Take the batch of a step and its parts."""
        self._whole, self._pieces = whole, pieces
        self._counts, self.values = {}, {}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameters that this stage's backward reaches, those of its losses included."""
        named = dict(self.stage.network.model.named_parameters(remove_duplicate=False))
        seen = {id(named[name]): named[name] for name in self.stage.parameters}
        yield from seen.values()
        for name, parameter in self.module.named_parameters():
            if not name.startswith("model.") and self.terms:
                yield parameter

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Run without a trace: batch statistics and logged numbers stay as they are."""
        kept = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        self._is_trial = True
        try:
            yield
        finally:
            self._is_trial = False
            for buffer, value in kept:
                buffer.copy_(value)

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()

    def forward(self, *received: Tensor, index: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run one micro-batch.

        Args:
            received: What the stage before said, and the features that travel; nothing for the first stage.
            index: `(1,)` number of the micro-batch, on the host.

        Returns:
            What the next stage must be given; the micro-batch's share of the loss, `(1,)`, on the last stage.
        """
        piece = self._pieces[int(index)]
        self._features.clear()
        with self.precision():
            said = self.stage(received[0] if received else None, piece.inputs)
            features = dict(zip(self.carried_in, received[1:], strict=True)) | self._read()
            share = self._loss(said, piece, features)
        if self.stage.is_last:
            # a step in which no part counts still has a loss to go back from
            return (0.0 * logits_of(said).float().sum() if share is None else share).reshape(1)
        out = _hand_on(said, share)
        return (out, *(_hand_on(features[name]) for name in self.carried_out)) if self.carried_out else out

    def _loss(self, said: Any, piece: StepContext, features: dict[str, Tensor]) -> Tensor | None:
        """Return the sum of this stage's parts, each weighed as much as the micro-batch counts in the whole batch."""
        if not self.terms:
            return None
        logits = logits_of(said) if self.stage.is_last else torch.empty(0, device=said.device)
        read = {one for name in self.terms for one in self.shares.reads.get(name, [])}
        features = {name: features[name] for name in features if name in read}
        parts = self.module.loss_terms(Signals(logits=logits, features=features), piece, only=self.terms)
        if not parts:
            return None
        assert self._whole is not None
        self._counts = self._counts or self.module.term_counts(self._whole, features)
        counts = self.module.term_counts(piece, features)
        weighed = {name: counts[name] / self._counts[name].clamp(min=1.0) * part for name, part in parts.items()}
        if not self._is_trial:
            for name, part in weighed.items():
                before = self.values.get(name)
                self.values[name] = part.detach() if before is None else before + part.detach()
        return torch.stack([part.float() for part in weighed.values()]).sum()

    def _install_taps(self) -> list[RemovableHandle]:
        handles = []
        model = self.stage.network.model
        for feature in self.shares.tapped(self.stage.number):
            module = model.get_submodule(feature.removesuffix(_INPUT))
            if feature.endswith(_INPUT):
                handles.append(module.register_forward_pre_hook(self._tap_input(feature), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(self._tap_output(feature)))
        return handles

    def _tap_input(self, feature: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._put(feature, (args, kwargs))

        return hook

    def _tap_output(self, feature: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._put(feature, output)

        return hook

    def _put(self, feature: str, value: Any) -> None:
        tensor = next(floats_of(value), None)
        if self.stage.network.runs_now(self.stage) and tensor is not None:
            self._features[feature] = (tensor, tensor._version)

    def _read(self) -> dict[str, Tensor]:
        features = {}
        for name in self.shares.tapped(self.stage.number):
            if name not in self._features:
                raise ConfigError(f"tap {name!r}: the module gave no tensor; tap a module that returns one")
            tensor, version = self._features[name]
            if tensor._version != version:
                raise ConfigError(
                    f"tap {name!r}: a later module changed this feature in place; tap that module, or build it with "
                    "inplace=False"
                )
            features[name] = tensor
        return features


def _hand_on(activation: Tensor, loss: Tensor | None = None) -> Tensor:
    """Return what leaves a stage, with a loss joined to its backward; never a view, which torch could not detach."""
    if loss is None and activation.grad_fn is not None and not activation._is_view():
        return activation
    handed: Tensor = _HandOn.apply(activation, loss)
    return handed


class _HandOn(torch.autograd.Function):
    """Hand an activation on, and let the backward that comes back through it also go into a loss."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor | None) -> Tensor:
        ctx.kind = None if loss is None else loss.dtype
        return activation.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        into = None if ctx.kind is None else torch.ones((), dtype=ctx.kind, device=gradient.device)
        return gradient, into
