"""Masks beside the model: zero weights stay zero, and the model knows nothing of it.

Nothing is written into the modules: state-dict names, strict loading, deepcopy, pickle and export are the dense
model's. After every optimizer step `apply` multiplies the weights with their masks in one fused call, so that whatever
weight decay, momentum or a clipped gradient did to a masked weight is undone before the next forward.

When masks change: `newly = masks.update(new)`, `masks.apply()`, `masks.clear_moments(optimizers, newly=newly)`.

Where weights are spread over processes (`layout`), each process has the masks of its parts, and shares are those of the
whole weights; what a checkpoint holds is whole, and the same however weights are spread.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.pruning.packing import pack_bits, unpack_bits
from lightning_opt.pruning.parts import Layout, local_of, sum_over_ranks
from lightning_opt.pruning.ranking import count_true

STATE_VERSION = 1


class Masks:
    """Bool masks of parameters, all True at first.

    A checkpoint holds one bit a weight (`state_dict`); in memory a masked weight has its bool and one 0 or 1 of its own
    type. Copies of the model (an average of weights, a deepcopy) are masked by `apply_to`.

    Args:
        parameters: Full name to parameter, as `named_parameters` gives them.
        layout: Which parts of them this process holds; None: all of them. With it all processes must make it, update
            it and ask for its state together.

    Raises:
        ValueError: Two names are the same parameter (tied weights), or one has no dimension.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], layout: Layout | None = None) -> None:
        _check_distinct(parameters)
        self._parameters, self._layout = dict(parameters), layout
        self._masks = {name: torch.ones_like(local_of(p), dtype=torch.bool) for name, p in self._parameters.items()}
        self._zeros = dict.fromkeys(self._parameters, 0)
        self._whole_zeros = dict.fromkeys(layout, 0) if layout is not None else self._zeros
        self._factors: dict[str, Tensor] = {}
        self._regrown: dict[str, Tensor] = {}
        self._live: list[Tensor] = []
        self._live_factors: list[Tensor] = []
        self._stale: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __len__(self) -> int:
        return len(self._masks)

    def as_dict(self) -> dict[str, Tensor]:
        """Return the masks by name; not copies: don't write into them, `update` does."""
        return dict(self._masks)

    @torch.no_grad()
    def update(self, new: Mapping[str, Tensor], *, only_shrink: bool = False) -> dict[str, Tensor]:
        """Replace the masks of some or all tensors; weights change at the next `apply`.

        Args:
            new: Name to bool mask of the weight's shape, or of this process's part; others stay as they are.
            only_shrink: Keep out what is out, whatever `new` says.

        Returns:
            What was kept so far and is masked from now on: name to bool, tensors without such weights left out.

        Raises:
            ValueError: A name is unknown, or a mask is not bool or has another shape.
        """
        self._check(new)
        newly: dict[str, Tensor] = {}
        for name, given in new.items():
            old = self._masks[name]
            mask = given.detach().to(old.device)
            if only_shrink:
                mask = mask & old
            gone = old > mask
            lost, zeros = count_true(gone), mask.numel() - count_true(mask)
            back = lost - (zeros - self._zeros[name])
            if lost:
                newly[name] = gone
            if back:
                self._regrown[name] = (mask > old) | self._regrown.get(name, torch.zeros_like(mask))
            if lost or back:
                old.copy_(mask)
                self._zeros[name] = zeros
                self._stale.add(name)
        self._count()
        return newly

    @torch.no_grad()
    def apply(self) -> None:
        """Set the masked weights to zero: one fused call, for the time after each optimizer step.

        Tensors without a masked weight are left out. Nothing is copied from the device, and nothing waits.
        """
        if self._stale or (self._live and self._live[0].device != self._live_factors[0].device):
            self._refresh()
        if self._live:
            torch._foreach_mul_(self._live if self._layout is None else _parts(self._live), self._live_factors)

    @torch.no_grad()
    def apply_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the same weights to zero in a copy of the model, such as an average of weights.

        Args:
            tensors: Name to tensor of the weight's shape (parameters or a state dict); names without a mask are left.

        Raises:
            ValueError: A tensor has another shape than its mask.
        """
        for name, tensor in tensors.items():
            if self._zeros.get(name):
                part, mask = local_of(tensor), self._masks[name]
                if part.shape != mask.shape:
                    raise ValueError(f"the copy of {name} is {tuple(part.shape)}, its mask {_shape(mask)}")
                part.mul_(mask.to(part.device))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero: optional, for the time before clipping.

        Weights need it not. It keeps masked weights out of the gradient's norm, and their moments at zero.
        """
        if self._stale:
            self._refresh()
        both = zip(self._live, self._live_factors, strict=True)
        pairs = [(local_of(p.grad), factor) for p, factor in both if p.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [factor for _, factor in pairs])

    @torch.no_grad()
    def clear_moments(
        self, optimizers: Iterable[torch.optim.Optimizer], newly: Mapping[str, Tensor] | None = None
    ) -> None:
        """Set the optimizers' memory of masked and of regrown weights to zero, after masks changed.

        Every state tensor of the weight's shape is meant (momentum, Adam's two moments and their largest); other ones,
        such as Adafactor's row and column means, hold sums over many weights and stay.

        Args:
            optimizers: All that may hold state of the parameters.
            newly: What `update` returned: only these tensors and those with regrown weights are looked at. None: all.
        """
        if self._stale:
            self._refresh()
        names = [name for name in self._factors if newly is None or name in newly]
        for optimizer in optimizers:
            moments = [(state, self._factors[name]) for name in names for state in self._moments(optimizer, name)]
            if moments:
                torch._foreach_mul_([m for m, _ in moments], [f.to(m.device) for m, f in moments])
            for name, back in self._regrown.items():
                for state in self._moments(optimizer, name):
                    state.masked_fill_(back.to(state.device), 0)
        self._regrown = {}

    def sparsity(self) -> float:
        """Return the share of masked weights among all that have a mask."""
        total = sum(self._numbers().values())
        return sum(self._whole_zeros.values()) / total if total else 0.0

    def per_layer(self) -> dict[str, float]:
        """Return the share of masked weights of each tensor."""
        return {name: self._whole_zeros[name] / number for name, number in self._numbers().items()}

    def whole(self, name: str) -> Tensor:
        """Return the mask of a whole weight; where weights are spread all processes must call it."""
        mask = self._masks.get(name)
        if self._layout is None:
            assert mask is not None
            return mask
        return self._layout.whole(name, mask, dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks as plain values: one bit a weight, eight in a uint8; nothing for a tensor without zeros."""
        masks = {
            name: {
                "shape": list(self._mask_shape(name)),
                "bits": pack_bits(self.whole(name).cpu()) if self._whole_zeros[name] else None,
            }
            for name in self._numbers()
        }
        return {"version": STATE_VERSION, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the masks of `state_dict`; weights change at the next `apply`.

        Raises:
            ValueError: The state is of another version, or its names or shapes are not those of the parameters.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"masks of version {state.get('version')!r} can't be read; this package has {STATE_VERSION}"
            )
        saved = state["masks"]
        different = sorted(saved.keys() ^ self._numbers().keys())
        if different:
            raise ValueError(f"saved masks and pruned weights differ in {different[0]!r} and {len(different) - 1} more")
        new = {}
        for name, entry in saved.items():
            shape = torch.Size(entry["shape"])
            if shape != self._mask_shape(name):
                wanted = tuple(self._mask_shape(name))
                raise ValueError(f"the saved mask of {name} is {tuple(shape)}, the weight {wanted}")
            bits = entry["bits"]
            mask = torch.ones(shape, dtype=torch.bool) if bits is None else unpack_bits(bits, shape)
            if name in self._masks:
                new[name] = mask if self._layout is None else self._layout.part(name, mask)
        self.update(new)
        self._regrown = {}

    def rebind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Point the masks at other parameters of the same names and shapes, such as those of a rebuilt model.

        Raises:
            ValueError: A name is missing or new, or a shape differs.
        """
        different = sorted(parameters.keys() ^ self._masks.keys())
        if different:
            raise ValueError(f"masks can't be bound: {different[0]!r} is on one side only")
        _check_distinct(parameters)
        for name, parameter in parameters.items():
            part = local_of(parameter)
            if part.shape != self._masks[name].shape:
                raise ValueError(
                    f"masks can't be bound: {name} is {tuple(part.shape)}, its mask {_shape(self._masks[name])}"
                )
        self._parameters = {name: parameters[name] for name in self._masks}
        self._factors = {}
        self._stale = set(self._masks)

    def cut(self, edit: Any) -> None:
        """Follow an edit that cuts tensors, before or after it is applied to the model.

        Args:
            edit: Has `kept`: {tensor name: {dim: indices}}, dims as numbers or text; a `surgery.Shrink`.

        Raises:
            RuntimeError: Weights are spread over processes; `whole` masks can be cut.
        """
        if self._layout is not None:
            raise RuntimeError("parts of masks can't be cut: cut whole ones, and give each process its part again")
        for name, dims in edit.kept.items():
            if name in self._masks:
                self._masks[name] = _cut(self._masks[name], dims)
                self._zeros[name] = self._masks[name].numel() - count_true(self._masks[name])
                if name in self._regrown:
                    self._regrown[name] = _cut(self._regrown[name], dims)
                self._factors.pop(name, None)
                self._stale.add(name)

    def _check(self, new: Mapping[str, Tensor]) -> None:
        for name, mask in new.items():
            if name not in self._masks:
                raise ValueError(f"there is no mask of {name!r}; masked are {', '.join(list(self._masks)[:3])}, ...")
            if mask.dtype != torch.bool or mask.shape != self._masks[name].shape:
                found = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
                raise ValueError(f"the mask of {name} must be bool {_shape(self._masks[name])}, not {found}")

    def _refresh(self) -> None:
        """Bring the multipliers up to date, each of its weight's own type, device and memory layout."""
        for name, parameter in self._parameters.items():
            factor = self._factors.get(name)
            if not self._zeros[name]:
                self._factors.pop(name, None)
            elif factor is None or factor.device != parameter.device or factor.dtype != parameter.dtype:
                like = local_of(parameter.detach())
                self._factors[name] = torch.empty_like(like).copy_(self._masks[name].view(torch.uint8))
            elif name in self._stale:
                factor.copy_(self._masks[name].view(torch.uint8))  # twice as fast as from bool
            self._masks[name] = self._masks[name].to(parameter.device)
        self._stale = set()
        self._live = [self._parameters[name] for name in self._factors]
        self._live_factors = list(self._factors.values())

    def _moments(self, optimizer: torch.optim.Optimizer, name: str) -> list[Tensor]:
        parameter = self._parameters[name]
        if parameter not in optimizer.state:
            return []
        states = optimizer.state[parameter].values()
        shaped = [state for state in states if isinstance(state, Tensor) and state.shape == parameter.shape]
        return [local_of(state) for state in shaped]

    def _count(self) -> None:
        """Find out how many weights all processes together have masked."""
        if self._layout is None:
            return
        mine = [self._zeros.get(name, 0) if self._layout[name].counts else 0 for name in self._layout]
        numbers = sum_over_ranks(torch.tensor(mine, dtype=torch.int64)).tolist()
        self._whole_zeros = dict(zip(self._layout, numbers, strict=True))

    def _numbers(self) -> dict[str, int]:
        """Return how many weights each tensor has."""
        if self._layout is None:
            return {name: mask.numel() for name, mask in self._masks.items()}
        return {name: self._layout[name].shape.numel() for name in self._layout}

    def _mask_shape(self, name: str) -> torch.Size:
        return self._masks[name].shape if self._layout is None else self._layout[name].shape


def _parts(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts anew at each step: FSDP2 may move them."""
    return [local_of(parameter) for parameter in parameters]


def _check_distinct(parameters: Mapping[str, nn.Parameter]) -> None:
    names: dict[int, str] = {}
    for name, parameter in parameters.items():
        if names.setdefault(id(parameter), name) != name:
            raise ValueError(f"{names[id(parameter)]} and {name} are one tied weight; give it one mask, under one name")
        if parameter.dim() == 0:
            raise ValueError(f"{name} is a single number and can't be masked")


def _cut(mask: Tensor, dims: Mapping[Any, Iterable[int]]) -> Tensor:
    for dim, indices in dims.items():
        mask = mask.index_select(int(dim), torch.as_tensor(list(indices), device=mask.device))
    return mask


def _shape(mask: Tensor) -> str:
    return str(tuple(mask.shape))
