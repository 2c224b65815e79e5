"""What a model computes, written down while it runs once: which function reads and gives which value, in which module.

Two tensors are one value when they are the same object; a tensor that is changed in place is a new value from then on.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_opt.forward import Inputs, forward
from lightning_opt.pruning.structure.program import evaluating, without_cache
from lightning_opt.quantization.placement_names import common_name, is_in_place


@dataclass(frozen=True)
class Value:
    """One tensor.

    Attributes:
        shape: Its sizes.
        is_floating: Whether it holds floating-point numbers.
        source: "call", "input" (of the model), "parameter", "buffer" or "unknown" (made where the record cannot see).
        call: The number of the call that made it.
        name: Full name of the parameter or buffer.
    """

    shape: tuple[int, ...]
    is_floating: bool
    source: str
    call: int | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a tensor function.

    Attributes:
        number: Its place in the record.
        function: Its name, one for all spellings: `x += y` is "add".
        run: The forward of a module that called it (the number of the innermost one).
        inputs: The values among its arguments.
        outputs: The values that it gave, those changed in place among them.
        args: Its arguments, with tensors replaced by `None`.
        kwargs: Its arguments by keyword, likewise.
        in_place: Whether it changed its first argument.
    """

    number: int
    function: str
    run: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False


@dataclass
class Run:
    """One forward of one module.

    Attributes:
        number: Its place in the record.
        path: The module's full name; "" is the model.
        parent: The run around it; None for the model's own.
        given: The value of each argument, those by keyword after the others; None for what is no tensor.
        returned: The value of what was returned, or of each item of a tuple; None for what is no tensor.
        is_tuple: Whether a tuple was returned.
        start: The number of the first call inside.
        end: The number of the first call after it.
    """

    number: int
    path: str
    parent: int | None
    given: tuple[int | None, ...]
    start: int
    returned: tuple[int | None, ...] = ()
    is_tuple: bool = False
    end: int = 0


@dataclass(frozen=True, eq=False)
class CallGraph:
    """The record of one forward of a model.

    Attributes:
        values: All tensors.
        calls: All calls of functions, in order.
        runs: All forwards of modules, in order; the first is the model's.
    """

    values: tuple[Value, ...]
    calls: tuple[Call, ...]
    runs: tuple[Run, ...]

    def path_of(self, call: Call) -> str:
        """Return the full name of the module that called a function."""
        return self.runs[call.run].path

    def around(self, run: int) -> Iterator[Run]:
        """Yield a run and those around it, from the inside out."""
        number: int | None = run
        while number is not None:
            yield self.runs[number]
            number = self.runs[number].parent

    def runs_of(self, path: str) -> list[Run]:
        """Return the forwards of one module."""
        return [run for run in self.runs if run.path == path]


def record_calls(model: nn.Module, example_inputs: Inputs, *, training: bool = False) -> CallGraph:
    """Run `model` once, without gradients, and write down what it computes.

    Nothing in the model changes: modes, buffers, random numbers and settings are put back.

    Args:
        model: Any module.
        example_inputs: What `forward` takes.
        training: Run it in training mode, but for batch norms; otherwise in eval mode.
    """
    with evaluating(model), _training(model, training), without_cache(model), _one_way():
        return _Recorder(model).record(example_inputs)


class _Recorder(TorchFunctionMode):
    """Sees each call of a function from Python, and by hooks each forward of a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.runs: list[Run] = []
        self.stack: list[int] = []
        self.known: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.storages: dict[int, list[Tensor]] = {}
        self.names = {module: name for name, module in model.named_modules()}

    def record(self, inputs: Inputs) -> CallGraph:
        """Run the model and return what happened."""
        for name, parameter in self.model.named_parameters():
            self._new(parameter, "parameter", name=name)
        for name, buffer in self.model.named_buffers():
            self._new(buffer, "buffer", name=name)
        for tensor in _tensors(dict(inputs) if not isinstance(inputs, Tensor | tuple | list) else inputs):
            self._new(tensor, "input")
        with self._hooked(), self, torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward(self.model, inputs)
        return CallGraph(tuple(self.values), tuple(self.calls), tuple(self.runs))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tuple(self._value(tensor) for tensor in _tensors([list(args), kwargs]))
        result = func(*args, **kwargs)
        in_place = (is_in_place(func) or func is Tensor.__setitem__ or kwargs.get("inplace") is True) and bool(inputs)
        changed = [args[0]] if in_place and args and isinstance(args[0], Tensor) else []
        if not changed and not _tensors(result):
            return result
        number = len(self.calls)
        outputs = [self._made(tensor, number) for tensor in self._sharing(changed)]
        outputs += [self._value(tensor, call=number) for tensor in _tensors(result)]
        given, named = pytree.tree_map(_without_tensors, (tuple(args), dict(kwargs)))
        made = tuple(dict.fromkeys(outputs))
        self.calls.append(Call(number, _name(func), self.stack[-1], inputs, made, given, named, bool(changed)))
        return result

    def _value(self, tensor: Tensor, *, call: int | None = None) -> int:
        found = self.known.get(id(tensor))
        if found is not None:
            return found
        return self._new(tensor, "unknown" if call is None else "call", call=call)

    def _made(self, tensor: Tensor, call: int) -> int:
        return self._new(tensor, "call", call=call)

    def _new(self, tensor: Tensor, source: str, *, call: int | None = None, name: str = "") -> int:
        number = len(self.values)
        self.values.append(Value(tuple(tensor.shape), tensor.is_floating_point(), source, call, name))
        if id(tensor) not in self.known:
            self.alive.append(tensor)  # an object that is gone would give its id to another one
            self.storages.setdefault(_storage(tensor), []).append(tensor)
        self.known[id(tensor)] = number
        return number

    def _sharing(self, changed: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors that were changed in place, and those that share their memory."""
        return [other for tensor in changed for other in [tensor, *self._others(tensor)]]

    def _others(self, tensor: Tensor) -> list[Tensor]:
        return [other for other in self.storages.get(_storage(tensor), []) if other is not tensor]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tuple(self._value(item) if isinstance(item, Tensor) else None for item in (*args, *kwargs.values()))
        parent = self.stack[-1] if self.stack else None
        path = self.names.get(module, self.runs[parent].path if parent is not None else "")
        self.stack.append(len(self.runs))
        self.runs.append(Run(len(self.runs), path, parent, given, len(self.calls)))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run = self.runs[self.stack.pop()]
        run.is_tuple = type(output) is tuple
        items = output if run.is_tuple else (output,)
        run.returned = tuple(self._value(item) if isinstance(item, Tensor) else None for item in items)
        if not any(value is not None for value in run.returned):
            run.returned = tuple(self._value(tensor) for tensor in _tensors(output)) if run.parent is None else ()
        run.end = len(self.calls)

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = [m.register_forward_pre_hook(self._enter, with_kwargs=True) for m in self.names]
        hooks += [m.register_forward_hook(self._leave, with_kwargs=True, prepend=True) for m in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def _training(model: nn.Module, is_on: bool) -> Iterator[None]:
    """Put all in training mode but batch norms, which would refuse a single sample; buffers are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if is_on else []
    try:
        for module in model.modules() if is_on else ():
            module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
        yield
    finally:
        for module in model.modules() if is_on else ():
            module.training = False
        for buffer, before in buffers:
            buffer.data.copy_(before)


@contextlib.contextmanager
def _one_way() -> Iterator[None]:
    """Keep attention modules from a fused path of inference, in which their layers are not called."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property such as x.T
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return common_name(name)


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors inside an argument or an answer, objects that hold a model's answer opened too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _without_tensors(value: Any) -> Any:
    return None if isinstance(value, Tensor) else value


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # no storage of its own: a subclass, a functional tensor
        return id(tensor)
