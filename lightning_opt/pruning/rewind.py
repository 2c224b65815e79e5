"""Take weights back to what they were at an early step (lottery tickets)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.pruning.parts import Layout, local_of


class Rewind:
    """Values of a model's parameters and buffers at one step, and the way back to them.

    Frankle, Carbin (2019), arXiv 1803.03635; Frankle et al. (2020), arXiv 1912.05671. What is saved is a copy: training
    after a return does not write into it, so every round starts from the same values. The masks stay as they are (apply
    them afterwards), and the optimizers forget all that they have learnt of these parameters.

    Args:
        layout: Which parts of the model's tensors this process holds; None: all of them. With it all processes must ask
            for the state together, which is whole.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        self.saved: dict[str, Tensor] = {}
        self.layout = layout

    def save(self, model: nn.Module) -> None:
        """Copy the values of `model` as they are now."""
        self.saved = {name: tensor.clone() for name, tensor in _tensors(model).items()}

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Write the saved values into `model`, and clear the optimizers' state of its parameters.

        Learning rates are the schedulers' and stay where they are.

        Raises:
            ValueError: Nothing was saved, or the model has other tensors than then.
        """
        live = _tensors(model)
        changed = [
            name for name, tensor in live.items() if name in self.saved and tensor.shape != self.saved[name].shape
        ]
        wrong = [*(self.saved.keys() ^ live.keys()), *changed]
        if wrong:
            raise ValueError(f"weights can't be rewound: {sorted(wrong)[0]} is not what it was when they were saved")
        for name, tensor in live.items():
            tensor.copy_(self.saved[name])
        parameters = set(model.parameters())
        for optimizer in optimizers:
            for parameter in [p for p in optimizer.state if p in parameters]:
                del optimizer.state[parameter]

    def state_dict(self) -> dict[str, Any]:
        """Return the saved values as plain tensors."""
        if self.layout is None or not self.saved:
            return {"saved": dict(self.saved)}
        return {"saved": {name: self.layout.whole(name, self.saved.get(name)) for name in self.layout}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of `state_dict`."""
        saved: Mapping[str, Tensor] = state["saved"]
        layout = self.layout
        if layout is None:
            self.saved = {name: tensor.clone() for name, tensor in saved.items()}
        else:
            self.saved = {name: layout.part(name, t) for name, t in saved.items() if name in layout.held}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what this process holds of them."""
    return {name: local_of(tensor).detach() for name, tensor in tensors_of(model).items()}
