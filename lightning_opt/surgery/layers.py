"""Drop whole layers from a stack of layers."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_opt.surgery.edits import Edit


@dataclass(frozen=True)
class DropLayers(Edit):
    """Keep some of the layers of an `nn.ModuleList` or `nn.Sequential`, in their order.

    Layers that are named by position are numbered anew from 0; layers with names of their own keep them. Numbers that
    the layers or the model hold elsewhere (such as a config's layer count) stay as they are.

    Attributes:
        path: Full name of the stack, such as "encoder.layer"; "" is the model itself.
        kept: Positions to keep, rising.
    """

    op: ClassVar[str] = "drop_layers"

    path: str
    kept: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise ValueError(f"path must be a module's name; got {self.path!r}")
        if not isinstance(self.kept, list | tuple) or any(type(item) is not int or item < 0 for item in self.kept):
            raise ValueError(f"kept must be a list of positions from 0; got {self.kept!r}")
        if not self.kept or any(b <= a for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError(f"kept must name at least one layer and rise; got {self.kept!r}")
        object.__setattr__(self, "kept", tuple(self.kept))

    def apply(self, model: nn.Module) -> nn.Module:
        stack = self._stack(model)
        names, layers = list(stack._modules), list(stack._modules.values())
        if self.kept[-1] >= len(layers):
            raise ValueError(f"kept names layer {self.kept[-1]}, but {self.path!r} has {len(layers)} layers")
        by_position = names == [str(place) for place in range(len(names))]
        new_names = [str(i) for i in range(len(self.kept))] if by_position else [names[i] for i in self.kept]
        stack._modules = OrderedDict(zip(new_names, (layers[i] for i in self.kept), strict=True))
        return model

    def under(self, path: str) -> "DropLayers":
        return DropLayers(f"{path}.{self.path}".rstrip("."), self.kept)

    def _stack(self, model: nn.Module) -> nn.Module:
        try:
            stack = model.get_submodule(self.path)
        except AttributeError as error:
            raise ValueError(f"path {self.path!r} names no module of {type(model).__name__}") from error
        if not isinstance(stack, nn.ModuleList | nn.Sequential):
            kind = type(stack).__name__
            raise ValueError(f"path {self.path!r} is a {kind}; layers are dropped from a ModuleList or a Sequential")
        return stack
