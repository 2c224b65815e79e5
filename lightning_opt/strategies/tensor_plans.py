"""Which layers are cut across the processes that share a layer, as data: module-name pattern -> kind of cut."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.models import MLP
from lightning_opt.modules.taps import match_modules, near_names
from lightning_opt.strategies.tensor_families import FAMILIES, Family

Plan: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """What becomes of one module.

    Args:
        cut: Which side of its weight is cut: what comes out, what goes in, the rows of a table, or nothing.
        parts: How many matrices lie one behind the other in it; each is cut.
        enters: Whether it reads a whole tensor that every process reads.
        answer: What is done with what it returns: the processes' answers are summed, or put together; or it is
            handed on to cut layers.
        shared: Whether its weights are whole, but see only a part of the values: their gradients are summed.
    """

    cut: Literal["out", "in", "rows"] | None = None
    parts: int = 1
    enters: bool = False
    answer: Literal["sum", "join", "hand_on"] | None = None
    shared: bool = False


KINDS: dict[str, Kind] = {
    "colwise": Kind(cut="out", enters=True),
    "rowwise": Kind(cut="in", answer="sum"),
    "fused_qkv": Kind(cut="out", parts=3, enters=True),
    "fused_gate": Kind(cut="out", parts=2, enters=True),
    "gathered": Kind(cut="out", enters=True, answer="join"),
    "vocab": Kind(cut="rows", answer="sum"),
    "shared": Kind(shared=True),
    "replicate": Kind(),
    "hands_on": Kind(answer="hand_on"),
    "joined": Kind(answer="join"),
}
"""The kinds that a plan may name.

colwise, rowwise: a linear layer cut along what comes out or goes in; the second follows the first. fused_qkv and
fused_gate: colwise, of three or two matrices in one. gathered: colwise, and its answer is put together. vocab: an
embedding cut along the vocabulary. shared: whole, but applied to values that are cut (a norm inside each head).
replicate: whole.
hands_on, joined: without weights of their own, where a network multiplies with a cut weight outside of its layer.
"""

_LINEAR_HEADS = {"vocab", "gathered", "hands_on", "joined"}  # what cuts a vocabulary: all of it or nothing
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")
_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Dropout, nn.Identity, nn.Flatten)
_FROM_CONFIG = {  # how Hugging Face's configurations call the same
    "colwise": "colwise",
    "rowwise": "rowwise",
    "colwise_gather_output": "gathered",
    "replicated_with_grad_allreduce": "shared",
    "packed_colwise": "fused_gate",
}


@functools.singledispatch
def axes(layer: nn.Module) -> tuple[int, int] | None:
    """Return along which dimensions of its weight a layer's outputs and inputs lie; None: it cannot be cut.

    Register a handler for a layer type of your own: `axes.register(MyLinear, lambda layer: (0, 1))`.
    """
    is_conv1d = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")  # transformers need not be there
    return (1, 0) if is_conv1d else None


axes.register(nn.Linear, lambda layer: (0, 1))
axes.register(nn.Embedding, lambda layer: (0, 1))


def resolve(network: nn.Module, plan: Plan | None, *, size: int) -> dict[str, Kind]:
    """Return what becomes of each module that a plan speaks of, by name.

    Args:
        network: What is cut; its parameters are whole and plain.
        plan: Pattern -> kind; None: the built-in plan for a network with such names.
        size: Among how many processes.

    Raises:
        ConfigError: The plan matches nothing, names an unknown kind, or cuts what cannot be cut evenly.
    """
    named = _given(network, plan) if plan is not None else _built_in(network, size)
    kinds = {name: KINDS[kind] for name, kind in named.items()}
    for name, kind in kinds.items():
        _check_layer(network, name, kind, size)
    _check_tied(network, kinds)
    return kinds


def _given(network: nn.Module, plan: Plan) -> dict[str, str]:
    names = [name for name, _ in network.named_modules()]
    for pattern, kind in plan.items():
        if kind not in KINDS:
            near = near_names(str(kind), list(KINDS), count=3)
            raise ConfigError(f"strategy.plan: {pattern!r} is {kind!r}; choose one of {', '.join(near)} and so on")
        if not any(fnmatchcase(name, pattern) for name in names):
            near = near_names(pattern, names)
            raise ConfigError(
                f"strategy.plan: {pattern!r} matches no module of the network; near names: {', '.join(near) or 'none'}"
            )
    if not any(KINDS[kind].cut for kind in plan.values()):
        raise ConfigError("strategy.plan cuts no layer: name some colwise and rowwise, or use strategy=fsdp2")
    return _matched(names, plan)


def _matched(names: list[str], plan: Plan) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern, kind in plan.items():  # what is named later wins
        found |= dict.fromkeys((name for name in names if fnmatchcase(name, pattern)), kind)
    return found


def _built_in(network: nn.Module, size: int) -> dict[str, str]:
    names = [name for name, _ in network.named_modules()]
    plans = [_matched(names, one.plan) for one in FAMILIES if _fits(names, one)]
    plans += [_of_configuration(network, names), _of_chain(network)]
    best = max(plans, key=len)
    cuts = {KINDS[kind].cut for kind in best.values()}
    if not {"out", "in"} <= cuts:
        known = ", ".join(one.name for one in FAMILIES)
        raise ConfigError(
            f"strategy: no built-in tensor-parallel plan knows the layers of {type(network).__name__}; known are "
            f"{known}; give strategy.plan={{pattern: kind}} or use strategy=fsdp2"
        )
    uneven = any(not _is_even(network, name, KINDS[kind], size) for name, kind in best.items() if kind in _LINEAR_HEADS)
    return {name: kind for name, kind in best.items() if not (uneven and kind in _LINEAR_HEADS)}


def _fits(names: list[str], family: Family) -> bool:
    def is_there(pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names)

    return all(map(is_there, family.has)) and not any(map(is_there, family.lacks))


def _of_configuration(network: nn.Module, names: list[str]) -> dict[str, str]:
    """Read the plan that a Hugging Face model brings along; one that says what is unknown here is not used."""
    found: dict[str, str] = {}
    for part in network.modules():
        said = getattr(part, "config", None)
        plan = getattr(said, "base_model_tp_plan", None) or {}
        if plan and set(plan.values()) <= set(_FROM_CONFIG):
            found |= _matched(names, {f"*{pattern}": _FROM_CONFIG[kind] for pattern, kind in plan.items()})
    return found


def _of_chain(network: nn.Module) -> dict[str, str]:
    """Cut every first of two linear layers along its outputs and the second along its inputs."""
    leaves = [(name, part) for name, part in network.named_modules() if not any(True for _ in part.children())]
    is_chain = isinstance(network, MLP) or all(
        isinstance(part, nn.Sequential) for _, part in network.named_modules() if any(True for _ in part.children())
    )
    linear = [name for name, part in leaves if isinstance(part, nn.Linear)]
    if not is_chain or not all(isinstance(part, (nn.Linear, *_ELEMENTWISE)) for _, part in leaves):
        return {}
    pairs = zip(linear[::2], linear[1::2], strict=False)
    return {name: kind for pair in pairs for name, kind in zip(pair, ("colwise", "rowwise"), strict=True)}


def width(layer: nn.Module, kind: Kind) -> int:
    """Return how many rows, outputs or inputs of a layer are shared out."""
    dims = axes(layer)
    assert dims is not None
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return int(weight.shape[dims[1] if kind.cut == "in" else dims[0]])


def _is_even(network: nn.Module, name: str, kind: Kind, size: int) -> bool:
    layer = network.get_submodule(name)
    return kind.cut is None or axes(layer) is None or width(layer, kind) % (size * kind.parts) == 0


def _check_layer(network: nn.Module, name: str, kind: Kind, size: int) -> None:
    layer = network.get_submodule(name)
    if kind.cut is None:
        return
    if axes(layer) is None or isinstance(layer, nn.Embedding) != (kind.cut == "rows"):
        raise ConfigError(
            f"strategy.plan: {name!r} is a {type(layer).__name__}; linear layers can be colwise or rowwise, embeddings "
            "vocab, all else replicate"
        )
    if isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward:
        raise ConfigError(
            f"strategy.plan: {name!r} is a {type(layer).__name__}, which does more than a linear layer: cut over "
            "processes it would see a part of its weight only; use strategy=fsdp2"
        )
    values = width(layer, kind) // kind.parts
    parent = network.get_submodule(name.rpartition(".")[0])
    head = next((getattr(parent, one) for one in _HEAD_WIDTHS if isinstance(getattr(parent, one, None), int)), 1)
    heads, rest = divmod(values, head)
    if head > 1 and rest == 0 and heads % size:
        raise ConfigError(
            f"strategy.tensor_parallel_size={size} does not divide the {heads} heads of {name!r}; choose a size that "
            f"divides {heads}"
        )
    if values % size:
        raise ConfigError(f"strategy.tensor_parallel_size={size} does not divide the {values} values of {name!r}")


def _check_tied(network: nn.Module, kinds: Mapping[str, Kind]) -> None:
    """Refuse to cut a weight that a layer outside the plan reads, too: it would see a part of it only."""
    owners: dict[int, list[str]] = {}
    for name, part in network.named_modules():
        if axes(part) is not None:
            owners.setdefault(id(part.weight), []).append(name)
    for names in owners.values():
        cut = [name for name in names if name in kinds and kinds[name].cut]
        outside = [name for name in names if name not in cut]
        if cut and outside:
            raise ConfigError(
                f"strategy.plan: {cut[0]!r} shares its weight with {outside[0]!r}, which the plan leaves whole; name "
                "both or none"
            )


def check_taps(network: nn.Module, kinds: Mapping[str, Kind], patterns: Sequence[str]) -> None:
    """Refuse losses on features of which each process has a part only.

    Raises:
        ConfigError: Naming the module.
    """
    by_parent: dict[str, set[str | None]] = {}
    for name, kind in kinds.items():
        by_parent.setdefault(name.rpartition(".")[0], set()).add(kind.cut)
    for name in match_modules(network, patterns) if patterns and kinds else []:
        found = kinds.get(name)
        between = found is None and {"out", "in"} <= by_parent.get(name.rpartition(".")[0], set())
        bare = not any(True for _ in network.get_submodule(name).parameters())
        if (found is not None and found.cut == "out" and found.answer is None) or (between and bare):
            raise ConfigError(
                f"loss: {name!r} is cut over processes by the tensor-parallel plan, so no process has all of its "
                "features; compare those of a whole block, or use strategy=fsdp2"
            )
