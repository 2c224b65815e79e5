"""Checkers for quantization: what training, resumed runs and conversion expect of observers, layers and schemes."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs, batch_size_of, predict
from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import Observer, ObserverState, observer_from_dict
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import (
    freeze_observers,
    quantizers,
    set_enabled,
    set_observing,
    switch_on,
    weight_quantizers,
)
from lightning_opt.surgery import Recipe, recipe_of, replay

_ACTIVATION = Grid(bits=8, symmetric=False, signed=False, narrow=False)
_MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "sum": torch.add,
    "mean": lambda one, other: (one + other) / 2,
}
_EXACT = ("min", "max", "sum")
_STEPS = 4


def check_observer(observer: Observer, *, grid: Grid = _ACTIVATION, values: Tensor | None = None) -> None:
    """Assert that an observer finds ranges as `callbacks.Quantize` needs it.

    It is made again from its plain values; what it is shown is not changed; its range is finite, has one end below the
    other for each scale, and is the same for the same values; what it has seen survives a checkpoint; and what two
    ranks have seen can be merged: exactly into what one would have seen, unless means are taken.

    Args:
        observer: What is checked.
        grid: The grid that a range is looked for.
        values: What it is shown, `(N, ...)`; draws from a fixed seed when not given.

    Raises:
        AssertionError: What is wrong, in one sentence.

    >>> from lightning_opt.quantization import Percentile
    >>> check_observer(Percentile(q=0.99))
    """
    who = type(observer).__name__
    again = observer_from_dict(observer.to_dict())
    assert again == observer, f"{who}: from_dict(to_dict()) is {again}, another one"
    x = _draws() if values is None else values
    channels, halves = grid.channels(x), x.chunk(2)
    if grid.axis == 0:
        halves = (x, x)
    whole, twin, first, second = (observer.start(grid, channels) for _ in range(4))
    kept = x.clone()
    for state in (whole, twin):
        state.update(x)
    assert torch.equal(x, kept), f"{who}.update changes what it is shown"
    low, high = whole.range()
    assert low.shape == high.shape == (channels,), f"{who}.range gives {tuple(low.shape)}, not ({channels},)"
    assert bool((low.isfinite() & high.isfinite() & (low <= high)).all()), f"{who}.range is no range: {low} to {high}"
    assert all(map(torch.equal, whole.range(), twin.range())), f"{who}: the same values give another range"
    twin = observer.start(grid, channels)
    twin.load_state_dict(whole.state_dict())
    assert all(map(torch.equal, whole.range(), twin.range())), f"{who}: the range is another one after a checkpoint"
    first.update(halves[0])
    second.update(halves[-1])
    _check_merge(who, first, second, whole)


def _check_merge(who: str, first: ObserverState, second: ObserverState, whole: ObserverState) -> None:
    """Merge what two states have seen, as ranks do, and compare it with what one has seen."""
    mine, theirs = first.reductions(), second.reductions()
    owned = {id(buffer) for buffer in first.buffers()}
    for tensor, how in mine:
        assert how in _MERGES, f"{who}.reductions has {how!r}; known are {', '.join(_MERGES)}"
        assert id(tensor) in owned, f"{who}.reductions gives a tensor that is no buffer of its state"
    for (tensor, how), (other, _) in zip(mine, theirs, strict=True):
        tensor.copy_(_MERGES[how](tensor, other))
    merged, expected = first.range(), whole.range()
    if all(how in _EXACT for _, how in mine):
        for one, other in zip(merged, expected, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-4, atol=1e-5, msg=f"{who}: two ranks see {one}, one with all values {other}"
            )


def _draws() -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1


def check_quantizer(model: nn.Module, inputs: Inputs, *, scheme: Scheme | str = "w8a8") -> None:
    """Assert that a scheme, with its observers and the layers of your model, trains, resumes and converts as it must.

    Inserted and switched off, quantizers change no answer, no parameter and no name of a weight. The recipe gives a
    fresh copy the same structure. In evaluation nothing is looked at; in training gradients reach every weight that
    they reached before. Rounded weights lie on their grids; frozen ranges stay; copies answer alike; and integers give
    the same answers, bit for bit. `model` itself is left as it was: everything runs on copies.

    Args:
        model: Has layers that can be quantized.
        inputs: A batch; the mean square of the answer stands for a loss.
        scheme: What is checked.

    Raises:
        AssertionError: What is wrong, in one sentence.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> check_quantizer(model, torch.randn(5, 8), scheme="w4a8")
    """
    assert batch_size_of(inputs) > 0, "inputs are empty"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _check_insertion(model, inputs, scheme)
        _check_recipe(model, made)
        _check_observing(made, inputs)
        _check_training(model, made, inputs)
        _check_grids(made)
        _check_frozen(made, inputs)
        _check_copies(made, inputs)


def _answer(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return predict(model.eval(), inputs)


def _check_insertion(model: nn.Module, inputs: Inputs, scheme: Scheme | str) -> nn.Module:
    made = copy.deepcopy(model)
    parameters, expected = dict(made.named_parameters()), _answer(copy.deepcopy(model), inputs)
    prepare(made, inputs, scheme)
    set_observing(made, False)
    assert list(weight_quantizers(made)), f"scheme {scheme} quantizes no layer of {type(model).__name__}"
    for name, parameter in parameters.items():
        assert made.get_parameter(name) is parameter, f"{name} is another object once quantizers are inserted"
    lost = sorted(set(model.state_dict()) - set(made.state_dict()))
    assert not lost, f"the state dict has lost {lost[0]!r}"
    assert torch.equal(_answer(made, inputs), expected), "quantizers that are switched off change the answer"
    return made


def _check_recipe(model: nn.Module, made: nn.Module) -> None:
    fresh = replay(copy.deepcopy(model), Recipe.from_json(recipe_of(made).to_json()))
    fresh.load_state_dict(made.state_dict())
    assert quantizers(fresh).keys() == quantizers(made).keys(), "the recipe gives other quantizers"


def _check_observing(made: nn.Module, inputs: Inputs) -> None:
    before = _state(made)
    set_observing(made, True)
    switch_on(made)
    set_enabled(made, True)
    _answer(made, inputs)
    changed = [n for n, v in _state(made).items() if ".observer." in n and not torch.equal(v, before[n])]
    assert not changed, f"{changed[0]} has changed in evaluation: only training and calibration are looked at"


def _check_training(model: nn.Module, made: nn.Module, inputs: Inputs) -> None:
    reached = _reached(copy.deepcopy(model).train(), inputs)
    lost = sorted(reached - _reached(made.train(), inputs))
    assert not lost, f"no gradient reaches {lost[0]} once it is rounded"
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        predict(made, inputs).float().square().mean().backward()
        optimizer.step()
    bad = [name for name, parameter in made.named_parameters() if not bool(parameter.isfinite().all())]
    assert not bad, f"{bad[0]} is not finite after {_STEPS} steps"


def _reached(model: nn.Module, inputs: Inputs) -> set[str]:
    model.zero_grad()
    predict(model, inputs).float().square().mean().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    model.zero_grad()
    return names


def _check_grids(made: nn.Module) -> None:
    freeze_observers(made)
    for name, quantizer in quantizers(made).items():
        assert quantizer.is_fitted, f"{name} has seen nothing in training: exclude what it belongs to"
    for layer, quantizer in weight_quantizers(made):
        _check_levels(type(layer).__name__, quantizer, layer.deployed_weight()[0].detach())


def _check_levels(name: str, quantizer: FakeQuantizer, weight: Tensor) -> None:
    rounded, grid = quantizer(weight), quantizer.grid
    again = quantizer.values(quantizer.int_values(weight))
    assert torch.equal(rounded.float(), again.float()), f"{name}: rounded weights are not those of their integers"
    if grid.axis is not None and grid.group_size is None and not grid.is_float:
        most = max(len(row.unique()) for row in rounded.movedim(grid.axis, 0).flatten(1))
        assert most <= grid.levels, f"{name}: a channel takes {most} values, its grid has {grid.levels}"


def _check_frozen(made: nn.Module, inputs: Inputs) -> None:
    before = _state(made)
    with torch.no_grad():
        predict(made.train(), inputs)
    changed = [name for name, value in _state(made).items() if not torch.equal(value, before[name])]
    assert not changed, f"{changed[0]} has changed after the freeze"


def _check_copies(made: nn.Module, inputs: Inputs) -> None:
    expected = _answer(made, inputs)
    copies = {"a deepcopy": copy.deepcopy(made), "the converted model": convert(copy.deepcopy(made).eval())}
    for what, one in copies.items():
        assert torch.equal(_answer(one, inputs), expected), f"{what} answers in another way"


def _state(model: nn.Module) -> Mapping[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, quantizer in quantizers(model).items()
        for key, value in quantizer.state_dict().items()
    }
