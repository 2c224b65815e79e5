"""Plain tensors for the modules of one unit while it runs, in place of the `DTensor`s that they hold."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

View: TypeAlias = Callable[[DTensor, nn.Module], Tensor | None]


def views_of(module: nn.Module, special: Mapping[str, View]) -> dict[str, View]:
    """Return a view for each parameter of a module itself: the special one, or this process's piece."""
    return {name: special.get(name, _own) for name, one in module._parameters.items() if one is not None}


class LocalViews:
    """Give the modules of a unit plain tensors for the length of a forward, and their parameters back afterwards.

    Args:
        views: For each module of the unit, how its parameters are seen, by name.
        after: Called when the unit has run.
    """

    def __init__(self, views: Mapping[nn.Module, Mapping[str, View]], *, after: Callable[[], None]) -> None:
        self._views = [(module, name, view) for module, own in views.items() for name, view in own.items()]
        self._after = after
        self._kept: list[tuple[nn.Module, str, Any]] = []
        self._depth = 0
        self._undo: list[Callable[[], Any]] = []

    def install(self, unit: nn.Module, *, methods: Iterable[str] = ()) -> None:
        """Show the views while `unit` is called, or one of its other methods is."""
        if isinstance(unit, nn.Module) and not methods:
            self._undo.append(unit.register_forward_pre_hook(lambda *_: self.show()).remove)
            self._undo.append(unit.register_forward_hook(lambda *_: self.hide(), always_call=True).remove)
        for name in methods:
            vars(unit)[name] = partial(self._around, getattr(unit, name))
            self._undo.append(partial(vars(unit).pop, name, None))

    def undo(self) -> None:
        """Take the views off."""
        for one in reversed(self._undo):
            one()
        self._undo = []

    def show(self) -> None:
        """Put plain tensors into the modules' parameter slots."""
        self._depth += 1
        if self._depth > 1:
            return
        seen: dict[tuple[int, Any], Tensor | None] = {}
        for module, name, view in self._views:
            parameter = module._parameters[name]
            if isinstance(parameter, DTensor):
                key = (id(parameter), view if view is _own else (module, name))  # what is tied stays tied
                if key not in seen:
                    seen[key] = view(parameter, module)
                self._kept.append((module, name, parameter))
                module._parameters[name] = seen[key]

    def hide(self) -> None:
        """Put the parameters back."""
        self._depth -= 1
        if self._depth:
            return
        for module, name, parameter in self._kept:
            module._parameters[name] = parameter
            vars(module).pop("_withheld_bias", None)
        self._kept.clear()
        self._after()

    def _around(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.show()
        try:
            return method(*args, **kwargs)
        finally:
            self.hide()


def _own(parameter: DTensor, module: nn.Module) -> Tensor:
    return parameter.to_local()
