"""What training, or a few calibration batches, tell about the weights: the evidence that criteria read.

Nothing is observed that no criterion reads: without a need for inputs or outputs there are no hooks, without a need for
gradients `after_backward` returns at once.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_opt.pruning.criteria.base import Criterion, Evidence
from lightning_opt.pruning.criteria.groups import GroupCriterion
from lightning_opt.pruning.criteria.movement import SoftMovement
from lightning_opt.pruning.inputs import Reader, first_tensor, reader_for
from lightning_opt.pruning.parts import Layout, local_of, sum_over_ranks

_FROM_GRADIENTS = ("gradient", "squared_gradient", "movement")
_FROM_CALLS = ("input_norm", "gram", "output_norm")
# Sums that go on across resets: what `Movement` ranks by, and each weight's last value that was not zero.
_LASTING = ("movement", "last_value")
_WEIGHT_SHAPED = (*_FROM_GRADIENTS, "last_value")


class Statistics:
    """Sums over what is seen, for the weights that are named.

    Forward passes are observed in training mode (of `model` itself) or inside `calibrating()`, never in a validation.
    All arithmetic is float32, on the weights' device, without waiting for it. Where weights are spread over processes
    (`layout`), what has a weight's shape is that of the parts here; gradients are means over all processes then.

    Args:
        model: The model that the names start from.
        names: Full names of parameters, whose order is kept.
        needs: Names of fields of `Evidence`.
        pull: Strength and scale of the regularizer of `SoftMovement`.
        layout: Which parts of the weights this process holds; None: all of them.

    Raises:
        ValueError: A name or a need is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        needs: Iterable[str],
        *,
        pull: tuple[float, float] = (0.0, 1.0),
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout
        self.model, self.names, self.needs, self.pull = model, tuple(names), frozenset(needs), pull
        known = dict(model.named_parameters(remove_duplicate=False))
        for name in self.names:
            if name not in known:
                near = ", ".join(get_close_matches(name, known, n=3)) or f"such as {next(iter(known), 'none')}"
                raise ValueError(f"names has {name!r}, which is no parameter of the model; near names: {near}")
        for need in sorted(self.needs - {*_FROM_GRADIENTS, *_FROM_CALLS}):
            raise ValueError(f"needs has {need!r}; known are {', '.join((*_FROM_GRADIENTS, *_FROM_CALLS))}")
        self._parameters = {name: known[name] for name in self.names}
        self._readers = {name: reader for name in self.names if (reader := self._reader(name)) is not None}
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._backwards = 0
        self._calibrating = False
        self._handles: list[RemovableHandle] = []
        self._latest: tuple[weakref.ref[Tensor], int, dict[str, Tensor]] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        names: Iterable[str],
        criterion: Criterion | GroupCriterion,
        *,
        layout: Layout | None = None,
    ) -> "Statistics":
        """Observe what `criterion` needs; the regularizer of `SoftMovement` acts as the scores accumulate."""
        pull = (criterion.strength, criterion.scale) if isinstance(criterion, SoftMovement) else (0.0, 1.0)
        return cls(model, names, criterion.needs, pull=pull, layout=layout)

    def install(self) -> None:
        """Begin to observe forward passes; without a need for them, or when it has begun, nothing happens."""
        if self._handles or not self.needs.intersection(_FROM_CALLS):
            return
        owners: dict[str, list[str]] = {}
        for name in self._readers:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        for path, names in owners.items():
            hook = partial(self._observe, names)
            self._handles.append(self.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Stop observing forward passes; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._latest = [], None

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Observe forward passes in evaluation mode as well, with the hooks in place while inside."""
        installed = bool(self._handles)
        self.install()
        self._calibrating = True
        try:
            yield
        finally:
            self._calibrating = False
            if not installed:
                self.remove()

    @torch.no_grad()
    def after_backward(self, *, last: bool = True) -> None:
        """Add the gradients that a backward has left in `.grad`.

        To be called after each backward, before gradients are clipped; with a loss scaler after unscaling.

        Args:
            last: False for a backward after which `.grad` goes on growing (accumulation): the last one holds the sum,
                so the others are not counted.
        """
        if not last or not self.needs.intersection(_FROM_GRADIENTS):
            return
        names = [name for name in self.names if self._parameters[name].grad is not None]
        if not names:
            return
        gradients = [_dense(self._parameters[name]) for name in names]
        if "gradient" in self.needs:
            torch._foreach_add_(self._lists("gradient", names), gradients)
        if "squared_gradient" in self.needs:
            torch._foreach_addcmul_(self._lists("squared_gradient", names), gradients, gradients)
        if "movement" in self.needs:
            self._move(names, gradients)
        self._backwards += 1

    def evidence(self, name: str, seed: int = 0) -> Evidence:
        """Return what is known about one weight; what was not observed is None.

        Args:
            name: One of `names`.
            seed: For criteria that draw.
        """
        reader, backwards = self._readers.get(name), self._backwards
        roots = {need: self._sum(need, name).sqrt() for need in ("input_norm", "output_norm") if self._has(need, name)}
        means = {
            need: self._sum(need, name) / backwards
            for need in ("gradient", "squared_gradient")
            if self._has(need, name) and backwards
        }
        return Evidence(
            name=name,
            seed=seed,
            movement=self._sum("movement", name) if self._has("movement", name) else None,
            gram=self._sum("gram", name) if self._has("gram", name) else None,
            input_dim=1 if reader is None or reader.input_dim is None else reader.input_dim,
            groups=1 if reader is None else reader.groups,
            **roots,
            **means,
        )

    def last_value(self, name: str) -> Tensor | None:
        """Return the last value, other than zero, of each element, or None if movement is not observed.

        What a weight that is chosen again may be given back (see `Movement`).
        """
        return self._sum("last_value", name) if self._has("last_value", name) else None

    def reset(self, *, movement: bool = False) -> None:
        """Forget gradients, inputs and outputs; movement, which sums over the whole run, is kept.

        Args:
            movement: Forget it as well, as must be done when the shapes of the weights have changed.
        """
        self._sums = {} if movement else {field: self._sums[field] for field in _LASTING if field in self._sums}
        self._backwards = 0

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace all sums by their mean over ranks, so that every rank decides the same.

        Args:
            all_reduce: Returns the mean over ranks of a tensor; called once, on one flat float32 tensor, with the same
                length on all ranks: what a rank has not seen counts as zeros.
        """
        parts = self._reducible() if self.layout is None else self._called()
        if not parts:
            return
        mean = all_reduce(torch.cat([part.flatten() for part in parts]))
        for part, new in zip(parts, mean.split([part.numel() for part in parts]), strict=True):
            part.copy_(new.view_as(part))

    def state_dict(self, *, everywhere: bool = False) -> dict[str, Any]:
        """Return the sums as plain tensors; a run that is resumed from them goes on bit-equal.

        Where weights are spread all processes must call it; what has a weight's shape is whole, and only the first
        process returns it.

        Args:
            everywhere: All of them do.
        """
        sums = {field: dict(tensors) for field, tensors in self._sums.items()}
        if self.layout is not None:
            sums = {field: tensors for field, tensors in sums.items() if field in _FROM_CALLS} | self._put_together(
                everywhere=everywhere
            )
        return {
            "backwards": self._backwards,
            "input_dims": {name: r.input_dim for name, r in self._readers.items() if r.input_dim is not None},
            "sums": {
                field: {name: tensor.detach().clone() for name, tensor in tensors.items()}
                for field, tensors in sums.items()
            },
        }

    def _put_together(self, *, everywhere: bool) -> dict[str, dict[str, Tensor]]:
        """Return the whole sums of the weights' shapes, on the first process or on all."""
        assert self.layout is not None
        found: dict[str, dict[str, Tensor]] = {}
        for field in _WEIGHT_SHAPED:
            here = self._sums.get(field, {})
            there = sum_over_ranks(torch.tensor([name in here for name in self.layout], dtype=torch.int32)).tolist()
            for name, count in zip(self.layout, there, strict=True):
                if count:
                    whole = self.layout.whole(name, here.get(name), dtype=torch.float32)
                    if everywhere or torch.distributed.get_rank() == 0:
                        found.setdefault(field, {})[name] = whole
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: The state is of other weights or shapes.
        """
        sums: dict[str, dict[str, Tensor]] = {}
        for field, tensors in state["sums"].items():
            for name, tensor in tensors.items():
                elsewhere = self.layout is not None and name in self.layout
                if name not in self._parameters and not elsewhere:
                    raise ValueError(f"the saved statistics hold {field} of {name!r}, which is not observed here")
                if name in self._parameters:
                    sums.setdefault(field, {})[name] = self._taken(field, name, tensor)
        self._sums, self._backwards = sums, int(state["backwards"])
        for name, input_dim in state["input_dims"].items():
            if name in self._readers:
                self._readers[name].input_dim = input_dim

    def _taken(self, field: str, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of a saved sum, or of the part of it that belongs here."""
        weight = self._parameters[name]
        if field in _WEIGHT_SHAPED and tensor.shape != weight.shape:
            shapes = f"{tuple(tensor.shape)}, the weight has {tuple(weight.shape)}"
            raise ValueError(f"the saved {field} of {name!r} has shape {shapes}")
        if field in _WEIGHT_SHAPED and self.layout is not None:
            tensor = self.layout.part(name, tensor)
        return tensor.detach().to(weight.device, copy=True)

    def _reader(self, name: str) -> Reader | None:
        path, _, leaf = name.rpartition(".")
        return reader_for(self.model.get_submodule(path), leaf)

    def _observe(self, names: Sequence[str], owner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (self.model.training or self._calibrating):
            return
        x, y = first_tensor(args, kwargs), first_tensor(output)
        if x is None or y is None:
            return
        # Sums stay float32 under autocast, and stay ordinary tensors under inference mode.
        with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for name in names:
                self._add(name, x, y)

    def _add(self, name: str, x: Tensor, y: Tensor) -> None:
        reader = self._readers[name]
        if reader.input_dim is None:
            try:
                reader.find_input_dim(x, y)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for field, compute in (("input_norm", reader.squares), ("gram", reader.gram)):
            if field in self.needs:
                self._sum(field, name).add_(self._recalled(field, reader, x, compute))
        if "output_norm" in self.needs:
            squares, total = reader.outputs(y), self._sum("output_norm", name)
            if squares.shape == total.shape:  # a recurrent layer's weight has gates for rows, its answer has none
                total.add_(squares)

    def _recalled(self, field: str, reader: Reader, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute once what several layers want of one tensor, such as those of queries, keys and values."""
        if type(reader) is not Reader or x.is_inference():  # inference tensors do not count their changes
            return compute(x)
        if self._latest is None or self._latest[0]() is not x or self._latest[1] != x._version:
            self._latest = weakref.ref(x), x._version, {}
        found = self._latest[2]
        if field not in found:
            found[field] = compute(x)
        return found[field]

    def _move(self, names: Sequence[str], gradients: list[Tensor]) -> None:
        """Subtract gradient times weight, with the last value of weights that a mask has zeroed."""
        weights = [local_of(self._parameters[name].detach()).float() for name in names]
        scores, last = self._lists("movement", names), self._lists("last_value", names)
        there = torch._foreach_sign(weights)
        torch._foreach_abs_(there)
        torch._foreach_lerp_(last, weights, there)
        torch._foreach_addcmul_(scores, gradients, last, value=-1.0)
        strength, scale = self.pull
        if strength:
            slope = torch._foreach_mul(scores, scale)
            torch._foreach_sigmoid_(slope)
            torch._foreach_addcmul_(slope, slope, slope, value=-1.0)
            torch._foreach_add_(scores, slope, alpha=-strength * scale)

    def _lists(self, field: str, names: Sequence[str]) -> list[Tensor]:
        return [self._sum(field, name) for name in names]

    def _has(self, field: str, name: str) -> bool:
        return name in self._sums.get(field, {})

    def _sum(self, field: str, name: str) -> Tensor:
        """Return the sum itself, made of zeros if nothing was seen."""
        sums = self._sums.setdefault(field, {})
        if name not in sums:
            weight = self._parameters[name]
            shape = self._readers[name].shape(field) if field in _FROM_CALLS else local_of(weight).shape
            with torch.inference_mode(mode=False):
                sums[name] = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        return sums[name]

    def _reducible(self) -> list[Tensor]:
        fields = [field for field in _FROM_GRADIENTS if field in self.needs]
        parts = [self._sum(field, name) for field in fields for name in self.names]
        if "movement" in self.needs:
            parts += [self._sum("last_value", name) for name in self.names]
        return parts + self._called()

    def _called(self) -> list[Tensor]:
        called = [field for field in _FROM_CALLS if field in self.needs]
        return [self._sum(field, name) for field in called for name in self._readers]


def only_weight_shaped(state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a state that is the same for any number of processes: what gradients told."""
    return state | {"sums": {field: sums for field, sums in state["sums"].items() if field in _WEIGHT_SHAPED}}


def _dense(parameter: nn.Parameter) -> Tensor:
    """Return a gradient as a dense float32 tensor: of a sharded weight, the part that belongs to the weight's part."""
    gradient: Any = parameter.grad
    assert gradient is not None  # the caller has looked
    placements = getattr(parameter, "placements", None)
    if placements is not None and gradient.placements != placements:
        gradient = gradient.redistribute(placements=placements)
    gradient = local_of(gradient)
    dense: Tensor = (gradient.to_dense() if gradient.is_sparse else gradient).float()
    return dense
