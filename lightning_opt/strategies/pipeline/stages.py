"""Run one stage of a network through the network's own forward.

Nothing of the network is rewritten. What comes before the stage is not run: each module there gives at once something
of the right shape. The module with which the stage begins is handed what the stage before said, and the module with
which the next stage begins ends the run. Names of modules and parameters stay as they are.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_opt.forward import Inputs, forward
from lightning_opt.strategies.pipeline.recording import Call, CallKey, Recording, floats_of


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where one stage ends and the next begins: at the entrance of a call.

    Attributes:
        key: The call.
        light: Whether modules without parameters that run before it are run again in every later stage (what they say
            is needed there: rotary positions, masks), instead of being skipped like the others.
    """

    key: CallKey
    light: bool = False

    def __str__(self) -> str:
        name, number = self.key
        return name if number == 0 else f"{name} (call {number + 1})"


@dataclass
class Stage:
    """A part of a network that runs on one process.

    Attributes:
        number: From 0.
        start: Where it begins; None for the first.
        stop: Where the next one begins; None for the last.
        parameters: Names of the parameters that it needs, under every name that they have.
        buffers: Names of the buffers that it keeps.
        runs: Names of the modules whose answer is real in this stage.
        takes: Names of the modules whose input is real in this stage.
        cost: What it is said to cost, in seconds or parameters.
    """

    network: "StagedNetwork"
    number: int
    start: Cut | None
    stop: Cut | None
    parameters: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    runs: set[str] = field(default_factory=set)
    takes: set[str] = field(default_factory=set)
    cost: float = 0.0

    def __call__(self, received: Tensor | None, inputs: Inputs) -> Any:
        """Run the stage: on what the stage before said (None for the first) and the network's own inputs.

        Returns:
            What the next stage must be given; the network's answer where this is the last one.
        """
        return self.network.run(self, received, inputs)

    @property
    def is_last(self) -> bool:
        """Whether the network's answer comes from here."""
        return self.stop is None


class _Stopped(Exception):  # noqa: N818 - no error
    """Carries what a stage says out of the network's forward."""

    def __init__(self, said: Tensor) -> None:
        self.said = said


@dataclass(frozen=True)
class _Plan:
    """What each call does in a stage, and what the stage was given when the network was recorded."""

    actions: Mapping[CallKey, "Call | str"]
    taken: Tensor | None


@dataclass
class _Run:
    plan: _Plan
    received: Tensor | None
    seen: Counter[str] = field(default_factory=Counter)


_START, _STOP = "start", "stop"


class StagedNetwork:
    """A network whose modules can be told to stand in for what another stage does.

    Args:
        model: The network; `release` gives it its own behaviour back.
        recording: What a run of it showed.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model = model
        self.recording = recording
        self.forward = model.forward
        self._wrapped: dict[str, nn.Module] = {}
        self._plans: dict[tuple[Cut | None, Cut | None], _Plan] = {}
        self._running: _Run | None = None

    def run(self, stage: Stage, received: Tensor | None, inputs: Inputs) -> Any:
        """Run one stage; see `Stage.__call__`."""
        plan = self._plan(stage.start, stage.stop)
        before, self._running = self._running, _Run(plan, received)
        try:
            return forward(self.forward, inputs)  # type: ignore[arg-type]
        except _Stopped as stopped:
            return stopped.said
        finally:
            self._running = before

    def runs_now(self, stage: Stage) -> bool:
        """Whether it is this stage that is running."""
        return self._running is not None and self._running.plan is self._plan(stage.start, stage.stop)

    def release(self) -> None:
        """Give every module its own forward back."""
        for module in self._wrapped.values():
            vars(module).pop("forward", None)
        self._wrapped.clear()
        self._plans.clear()

    def _plan(self, start: Cut | None, stop: Cut | None) -> _Plan:
        if (start, stop) not in self._plans:
            actions: dict[CallKey, Call | str] = {}
            taken: Tensor | None = None
            if start is not None:
                actions |= {call.key: call for call in self._skipped(start)}
                actions[start.key] = _START
                taken = self.recording.calls[self.recording.position(start.key)].takes
            if stop is not None:
                actions[stop.key] = _STOP
            for name, _ in actions:
                self._wrap(name)
            self._plans[start, stop] = _Plan(actions, taken)
        return self._plans[start, stop]

    def has_light_calls(self, start: Cut) -> bool:
        """Whether any module without parameters runs before a cut."""
        return not all(call.holds_parameters for call in self._skipped(start))

    def _skipped(self, start: Cut) -> list[Call]:
        """Return the outermost calls that are over before a stage begins."""
        first = self.recording.position(start.key)
        running = self.recording.ancestors(first) | {-1}
        before = self.recording.calls[:first]
        over = [call for n, call in enumerate(before) if n not in running and call.parent in running]
        return [call for call in over if call.holds_parameters or not start.light]

    def _wrap(self, name: str) -> None:
        if name in self._wrapped:
            return
        module = self.model.get_submodule(name)
        vars(module)["forward"] = _StandIn(self, name, module.forward)
        self._wrapped[name] = module


class _StandIn:
    """Takes the place of a module's forward: does what the running stage's plan says, or the module's own work."""

    def __init__(self, network: StagedNetwork, name: str, own: Callable[..., Any]) -> None:
        self.network, self.name, self.own = network, name, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.network._running
        if run is None:
            return self.own(*args, **kwargs)
        key = (self.name, run.seen[self.name])
        run.seen[self.name] += 1
        action = run.plan.actions.get(key)
        if action is None:
            return self.own(*args, **kwargs)
        if action == _STOP:
            raise _Stopped(next(floats_of((args, kwargs))))
        received, taken = run.received, run.plan.taken
        assert received is not None
        assert taken is not None
        if action == _START:
            args, kwargs = _exchange((args, kwargs), received)
            return self.own(*args, **kwargs)
        assert isinstance(action, Call)
        run.seen.update(self.network.recording.inside(action))
        return pytree.tree_map(lambda value: _stand_in(value, taken, received), action.output)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.name} belongs to a pipeline: copy the network after the pipeline is torn down")


def _exchange(given: tuple[Any, Any], received: Tensor) -> tuple[Any, Any]:
    """Put what was received where the first floating tensor stands, and wherever else that same tensor stands."""
    first = next(floats_of(given))
    exchanged: tuple[Any, Any] = pytree.tree_map(lambda value: received if value is first else value, given)
    return exchanged


def _stand_in(value: Any, taken: Tensor, received: Tensor) -> Any:
    """Return something of the shape that a skipped module would have given for the batch at hand."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == taken.shape and value.is_floating_point():
        return received  # what follows may go around the stage's entrance, and then this is the right tensor
    sizes = dict(zip(taken.shape[:2], received.shape[:2], strict=True))
    shape = [sizes.get(size, size) if axis < 2 else size for axis, size in enumerate(value.shape)]
    dtype = received.dtype if value.is_floating_point() else value.dtype
    return torch.zeros((), dtype=dtype, device=received.device).expand(shape)


def keep_only(model: nn.Module, stages: Sequence[Stage], *, device: torch.device) -> "Dropped":
    """Drop the parameters and buffers that none of the stages needs; see `Dropped`."""
    wanted = {name for stage in stages for name in (*stage.parameters, *stage.buffers)}
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return Dropped(model, [name for name, _ in held if name not in wanted], device=device)


class Dropped:
    """Tensors that a process does not keep.

    In the place of each stands a tensor of its shape and kind without memory of its own: what the network's forward
    does beside its modules may look at it.

    Args:
        root: The module that holds them.
        names: Of parameters and buffers, under every name that they have.
        device: Where the stand-ins seem to be.
    """

    def __init__(self, root: nn.Module, names: Sequence[str], *, device: torch.device) -> None:
        self.root, self.names = root, list(names)
        self._learn: dict[str, bool] = {}
        self._same: dict[str, int] = {}
        for name in self.names:
            module, attribute = _at(root, name)
            held = module._parameters if attribute in module._parameters else module._buffers
            value = held[attribute]
            assert value is not None
            if held is module._parameters:
                self._learn[name] = value.requires_grad
            self._same[name] = id(value)
            held[attribute] = None
            vars(module)[attribute] = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)

    def fill(self, name: str, value: Tensor, made: dict[int, Tensor]) -> None:
        """Put a tensor back.

        Args:
            name: One of the names.
            value: The tensor.
            made: What was put back so far: a parameter that has several names is one parameter again.
        """
        module, attribute = _at(self.root, name)
        vars(module).pop(attribute)
        if name in self._learn:
            made.setdefault(self._same[name], nn.Parameter(value, requires_grad=self._learn[name]))
            module._parameters[attribute] = made[self._same[name]]  # type: ignore[assignment]
        else:
            module._buffers[attribute] = value

    def like(self, name: str) -> Tensor:
        """Return what stands in the place of a tensor."""
        module, attribute = _at(self.root, name)
        stand_in: Tensor = vars(module)[attribute]
        return stand_in


def _at(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return root.get_submodule(path), attribute
