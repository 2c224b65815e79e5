"""Find where a network can be cut into stages, and cut it so that the stages cost alike.

A network can be cut at the entrance of a module if what enters there, together with the network's own inputs, is all
that the rest needs. Whether this is so is not guessed from the code but tried: the rest is run on it alone, and must
give the network's answer, to the last bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, logits_of
from lightning_opt.modules.taps import near_names
from lightning_opt.strategies.pipeline.costs import balanced, measure
from lightning_opt.strategies.pipeline.recording import CallKey, Recording, floats_of, in_eval_mode, record
from lightning_opt.strategies.pipeline.stages import Cut, Stage, StagedNetwork

Costs = Literal["measured", "parameters"]
_SHOWN = 8


def split(
    model: nn.Module,
    example_inputs: Inputs,
    stages: int,
    *,
    costs: Costs = "measured",
    names: Sequence[str] | None = None,
    cuts: Sequence[Cut] | None = None,
) -> list[Stage]:
    """Cut a network into stages that run one after the other and together do what it does.

    Args:
        model: The network; nothing in it changes but that its modules know of the stages (`StagedNetwork.release`
            ends it).
        example_inputs: A small batch.
        stages: How many.
        costs: What is shared out evenly: the "measured" seconds of forward and backward, or the number of "parameters".
        names: Modules with which the stages after the first begin. None: they are chosen.
        cuts: The same as an earlier call found it, which then need not be searched.

    Raises:
        ConfigError: It cannot be cut so; the message says where it can.
    """
    with in_eval_mode(model):
        recording = record(model, example_inputs)
        network = StagedNetwork(model, recording)
        if cuts is None:
            cuts = choose_cuts(network, example_inputs, stages, costs=costs, names=names)
        found = stages_between(network, cuts)
        _check_whole(found, example_inputs)
        _share_out(found, example_inputs)
    return found


def choose_cuts(
    network: StagedNetwork, inputs: Inputs, stages: int, *, costs: Costs, names: Sequence[str] | None
) -> list[Cut]:
    """Return where a network is best cut into stages; see `split`."""
    if names is not None:
        return _named_cuts(network, inputs, stages, names)
    if stages == 1:
        return []
    possible, entries = possible_cuts(network, inputs, stages)
    segments = stages_between(network, possible)
    owned = [set(_trained(segment, inputs, entries)) for segment in segments]
    sizes = {name: parameter.numel() for name, parameter in network.model.named_parameters()}
    if costs == "measured":
        prices = measure(segments, inputs)
    else:
        prices = [float(sum(sizes.get(name, 0) for name in names)) for names in owned]
    learns = {name for name, parameter in network.model.named_parameters() if parameter.requires_grad}
    starts = balanced(
        prices,
        stages,
        allowed=lambda start, end: not learns or any(names & learns for names in owned[start:end]),
    )
    if len(starts) != stages - 1:
        where = ", ".join(str(cut) for cut in possible[:_SHOWN]) or "nowhere"
        raise ConfigError(
            f"strategy.stages: {type(network.model).__name__} cannot be cut into {stages} stages that all learn; it "
            f"can be cut before {where}{', ...' if len(possible) > _SHOWN else ''} ({len(possible)} places). Take "
            "fewer stages, or a model that is a chain of modules with one tensor between them"
        )
    return [possible[start - 1] for start in starts]


def possible_cuts(network: StagedNetwork, inputs: Inputs, stages: int) -> tuple[list[Cut], dict[CallKey, Tensor]]:
    """Return where a network can be cut, in its own order, and what enters there.

    Modules that are small already are not looked into.
    """
    recording = network.recording
    candidates = [
        key for key in _candidates(recording, network.model, stages) if _call_takes(recording, key) is not None
    ]
    entries = _entries(network.model, candidates, inputs)
    cuts = (_possible(network, key, entries[key], inputs) for key in candidates)
    return [cut for cut in cuts if cut is not None], entries


def stages_between(network: StagedNetwork, cuts: Sequence[Cut]) -> list[Stage]:
    """Return the stages that some cuts make."""
    ends = [None, *cuts, None]
    return [Stage(network, n, ends[n], ends[n + 1]) for n in range(len(cuts) + 1)]


def _named_cuts(network: StagedNetwork, inputs: Inputs, stages: int, names: Sequence[str]) -> list[Cut]:
    called = {call.key[0]: call.key for call in reversed(network.recording.calls)}
    if len(names) != stages - 1:
        raise ConfigError(
            f"strategy.split names {len(names)} modules; {stages} stages need {stages - 1}: those with which each "
            "stage after the first begins"
        )
    for name in names:
        if name not in called:
            near = ", ".join(near_names(name, list(called))) or "none"
            raise ConfigError(f"strategy.split: {name!r} is no module that runs; near names: {near}")
    keys = sorted((called[name] for name in names), key=network.recording.position)
    entries = _entries(network.model, [key for key in keys if _call_takes(network.recording, key) is not None], inputs)
    cuts = []
    for key in keys:
        cut = _possible(network, key, entries[key], inputs) if key in entries else None
        if cut is None:
            possible = ", ".join(str(one) for one in possible_cuts(network, inputs, stages)[0][:_SHOWN])
            raise ConfigError(
                f"strategy.split: {type(network.model).__name__} cannot be cut before {key[0]!r}: more than one tensor "
                f"passes there; it can be cut before {possible or 'nothing'}"
            )
        cuts.append(cut)
    return cuts


def _candidates(recording: Recording, model: nn.Module, stages: int) -> list[CallKey]:
    """Return the calls at whose entrance a cut is tried; what is small beside a stage is not looked into."""
    total_seconds = sum(recording.calls[n].seconds for n in recording.children(-1)) or 1.0
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    found: list[int] = []
    waiting = list(recording.children(-1))
    while waiting:
        position = waiting.pop()
        call = recording.calls[position]
        found.append(position)
        held = sum(parameter.numel() for parameter in model.get_submodule(call.key[0]).parameters())
        if max(call.seconds / total_seconds, held / total) > 1.0 / (2 * stages):
            waiting += recording.children(position)
    # the first call is where the network begins, and a module that holds nothing is no place to begin
    return [recording.calls[n].key for n in sorted(found)[1:] if recording.calls[n].holds_parameters]


def _call_takes(recording: Recording, key: CallKey) -> Tensor | None:
    return recording.calls[recording.position(key)].takes


def _entries(model: nn.Module, keys: Iterable[CallKey], inputs: Inputs) -> dict[CallKey, Tensor]:
    """Return what enters at some calls."""
    wanted = set(keys)
    entries: dict[CallKey, Tensor] = {}
    seen: dict[str, int] = {}
    handles = []
    for name in {name for name, _ in wanted}:

        def enter(module: nn.Module, args: object, kwargs: object, name: str = name) -> None:
            key = (name, seen.get(name, 0))
            seen[name] = key[1] + 1
            if key in wanted:
                entries[key] = next(floats_of((args, kwargs))).clone()  # later modules may work in place

        handles.append(model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True))
    try:
        record(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return entries


def _possible(network: StagedNetwork, key: CallKey, entry: Tensor, inputs: Inputs) -> Cut | None:
    """Return the cut at a call, if the rest of the network needs nothing but what enters there."""
    ways = [Cut(key=key), Cut(key=key, light=True)]
    for cut in ways if network.has_light_calls(ways[0]) else ways[:1]:
        try:
            with torch.no_grad():
                said = logits_of(Stage(network, 1, cut, None)(entry.clone(), inputs))
        except Exception:  # whatever a forward raises on what it does not expect: it cannot be cut here
            continue
        if _same(said, logits_of(network.recording.answer)):
            return cut
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    exact = one.device.type == "cpu"
    return torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _check_whole(stages: Sequence[Stage], inputs: Inputs) -> None:
    """Run the stages one after the other and compare with the network.

    Raises:
        ConfigError: They say something else.
    """
    received: Tensor | None = None
    with torch.no_grad():
        for stage in stages[:-1]:
            received = stage(received, inputs)
        said = logits_of(stages[-1](received, inputs))
    if not _same(said, logits_of(stages[0].network.recording.answer)):
        cuts = ", ".join(str(stage.start) for stage in stages[1:])
        raise ConfigError(
            f"strategy.split: {type(stages[0].network.model).__name__}, cut before {cuts}, does not answer as it does "
            "whole; name other modules"
        )


def _share_out(stages: Sequence[Stage], inputs: Inputs) -> None:
    """Say of each stage which parameters and buffers it needs, and which modules do their work there."""
    model, recording = stages[0].network.model, stages[0].network.recording
    entries = _entries(model, [stage.start.key for stage in stages if stage.start], inputs)
    used = [set(_trained(stage, inputs, entries)) for stage in stages]
    begins = [0, *(recording.calls[recording.position(s.start.key)].start for s in stages[1:] if s.start)]
    ends = [*begins[1:], float("inf")]
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    busy: dict[str, set[int]] = {}  # module -> stages during which it runs
    for stage, begin, end in zip(stages, begins, ends, strict=True):
        # the module with which a stage begins was entered, with the right input, at the end of the stage before
        stage.runs = {call.key[0] for call in recording.calls if begin < call.end <= end}
        stage.takes = {call.key[0] for call in recording.calls if begin < call.start <= end}
        for call in recording.calls:
            if call.start <= end and call.end > begin and call.start != end:
                busy.setdefault(call.key[0], set()).add(stage.number)
    for names in names_of.values():
        users = {stage.number for stage in stages if used[stage.number] & set(names)}
        users = users or set.union(*(busy.get(_owner(name), set()) for name in names)) or {0}
        for number in users:
            stages[number].parameters += names
    _place_buffers(model, stages, busy)


def _place_buffers(model: nn.Module, stages: Sequence[Stage], busy: Mapping[str, set[int]]) -> None:
    for name, _ in model.named_buffers(remove_duplicate=False):
        owner = _owner(name)
        everywhere = not any(True for _ in model.get_submodule(owner).parameters()) or owner == ""
        holders = range(len(stages)) if everywhere else busy.get(owner, {0})
        for number in holders:
            stages[number].buffers.append(name)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _trained(stage: Stage, inputs: Inputs, entries: Mapping[CallKey, Tensor]) -> list[str]:
    """Return the names of the parameters that a stage's answer depends on."""
    entry = None if stage.start is None else entries[stage.start.key].detach().requires_grad_()
    named = dict(stage.network.model.named_parameters())
    floats = {name: p for name, p in named.items() if p.is_floating_point()}
    before = {name: p.requires_grad for name, p in floats.items()}
    for parameter in floats.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            said = stage(entry, inputs)
            said = logits_of(said) if stage.is_last else said
            if not said.requires_grad:
                return []
            grads = torch.autograd.grad(said.float().sum(), list(floats.values()), allow_unused=True)
    finally:
        for name, parameter in floats.items():
            parameter.requires_grad_(before[name])
    return [name for name, grad in zip(floats, grads, strict=True) if grad is not None]
