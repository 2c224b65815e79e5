"""Numbers that modules hold about their sizes, and what they become when units are cut.

There is no table of module types. A number is set when it counts an axis that changes: because the module owns the
weight and the attribute has a customary name (`out_features`, `num_features` ...), because it was seen to reach an
operation as a size (a view, a split), or because the module attends and the attribute's name speaks of heads. What this
gets wrong shows when the smaller model is traced again.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_opt.pruning.structure.axes import Axis, Factor, Reason, mark_inexact, unify
from lightning_opt.pruning.structure.calls import Link
from lightning_opt.pruning.structure.provenance import Calls, source_of
from lightning_opt.pruning.structure.units import kept_count

# Names that speak of a role; used where a number counts an axis of that role and no operation was handed it.
_ROLES = {
    "heads": re.compile(r"^(?!.*(dim|size|group|layer|token))(.*heads?|n_?kv|nh)$"),
    "queries": re.compile(r"(groups|n_rep|repeats|queries)"),
    "all_heads": re.compile(r"(all_head|inner_dim|attn_dim)"),
    "head_dim": re.compile(
        r"(head_?dim|head_?size|size_per_head|d_kv|d_head|kv_proj_dim|value_proj_dim|dim_head|head_ch)"
    ),
}


def attributes_of(
    model: nn.Module, links: Sequence[Link], calls: Calls, counts: Mapping[Factor, int]
) -> dict[str, dict[str, Any]]:
    """Return the numbers to set in modules: `{module: {attribute: value}}`.

    Args:
        model: The model as it is now.
        links: What the walk noted.
        calls: Where the numbers of operations come from.
        counts: How many units stay, for each factor that is cut.
    """
    modules = dict(model.named_modules())
    claims: dict[tuple[str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for link in links:
        new = kept_count(link.axis, counts)
        source = source_of(calls, link)
        if source is not None:
            claims[source]["used"].add(new)
        for name, value in vars(modules[link.module]).items() if link.names and link.module in modules else ():
            if _is_size(value) and value == link.size and (strength := _strength(name, link)):
                claims[link.module, name][strength].add(new)
            elif isinstance(value, tuple) and name in link.names and new != link.size:
                found[link.module].setdefault(name, list(value))[link.item] = new
    for (module, name), by_strength in claims.items():
        sizes = next((values for strength in _STRENGTHS if (values := by_strength.get(strength))), set())
        if len(sizes) == 1 and sizes != {vars(modules[module])[name]}:
            found[module][name] = sizes.pop()
    for module, scales in _scales(modules, links, counts).items():
        found[module].update(scales)
    return {module: values for module, values in found.items() if values}


def tie_shared_numbers(model: nn.Module, links: Sequence[Link], calls: Calls) -> None:
    """Tie axes whose sizes are read from one attribute: they can only change together."""
    first: dict[tuple[str, str], Axis] = {}
    for link in links:
        source = source_of(calls, link)
        if source is not None:
            where = f"attribute {source[1]} of {source[0] or 'the model'}"
            unify(first.setdefault(source, link.axis), link.axis, Reason("has its size from a number", where))
    modules = dict(model.named_modules())
    for link in links:
        if "scale" in link.names and (names := _scale_names(modules, link)):
            where = f"attribute {names[0][0]} of {link.module or 'the model'}"
            mark_inexact(link.axis, Reason("sets the scale of attention by its size", where))


# A number that an operation was seen to use says most; then one with a customary name in the owner of a weight.
_STRENGTHS = ("used", "named", "role")


def _strength(name: str, link: Link) -> str | None:
    if name in link.names:
        return "named"
    return "role" if any(role in _ROLES and _ROLES[role].search(name) for role in link.names) else None


def _scales(
    modules: Mapping[str, nn.Module], links: Sequence[Link], counts: Mapping[Factor, int]
) -> dict[str, dict[str, float]]:
    """Return the scales of attention, the root of a head's size or one over it, where that size changes."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for link in links:
        new = kept_count(link.axis, counts) if "scale" in link.names else link.size
        for name, power in _scale_names(modules, link) if new != link.size else ():
            found[link.module][name] = new**power
    return found


def _scale_names(modules: Mapping[str, nn.Module], link: Link) -> list[tuple[str, float]]:
    """Return the attributes that hold a power of the axis's size, with the power."""
    held = vars(modules[link.module]) if link.module in modules else {}
    floats = [(name, value) for name, value in held.items() if isinstance(value, float) and link.size > 1]
    return [(name, p) for name, value in floats for p in (-0.5, 0.5) if abs(value - link.size**p) < 1e-6 * value]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
