"""The configuration of a shrunk Hugging Face model, such that plain `from_pretrained` builds the same shapes.

No table of architectures: each number of the configuration is varied on the meta device to see which sizes follow it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_opt.surgery import DropLayers, recipe_of

CONFIG_AS_BUILT = "_lightning_opt_config"
_PROBE = 8
_LENGTH = -1  # stands for the number of layers of a stack, beside the dims of tensors


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What `hugging_face_config` found.

    Attributes:
        values: The edited configuration; None if no configuration gives these shapes.
        changed: Only the entries that differ from the model's configuration.
        reason: Why there is none; empty if there is one.
    """

    values: dict[str, Any] | None
    changed: dict[str, Any]
    reason: str = ""


def hugging_face_config(model: nn.Module) -> HuggingFaceConfig:
    """Find the configuration with which `from_pretrained` loads the weights of a shrunk Hugging Face model.

    Depth, and widths that are the same in all layers, can be said in a configuration; different widths cannot, and some
    architectures compute one size from others (BERT: head size = hidden size / heads).

    Args:
        model: A `PreTrainedModel`, or a module that holds one; it is not changed.
    """
    inner = pretrained_inside(model)
    if inner is None:
        return HuggingFaceConfig(None, {}, f"{type(model).__name__} holds no Hugging Face model")
    config: Any = inner.config
    wanted = _sizes(inner)
    trial = _Trial(inner, _kept_layers(inner, model))
    changed: dict[str, Any] = {}
    for key, value in _held_by_modules(inner, config):
        trial.set(changed, key, value)
    for _ in range(4):  # a number may show only once another is right
        if not (left := trial.differing(changed, wanted)):
            break
        known = dict(changed)
        for key in trial.numbers():
            trial.improve(changed, key, wanted)
        if changed == known:
            break
    if left := trial.differing(changed, wanted):
        return HuggingFaceConfig(None, {}, _reason(left[0], wanted, trial.sizes(changed) or {}, config))
    values = trial.config(changed).to_dict()
    return HuggingFaceConfig(values, {key: value for key, value in changed.items() if value != getattr(config, key)})


def update_config(model: nn.Module) -> bool:
    """Give a shrunk Hugging Face model the configuration that fits it, so that `save_pretrained` writes it.

    Returns:
        Whether there is one; without one the model keeps its own.
    """
    found = hugging_face_config(model)
    inner = pretrained_inside(model)
    if found.values is None or inner is None:
        return False
    old: Any = inner.config
    new = copy.deepcopy(old)
    for key, value in found.changed.items():
        setattr(new, key, value)
    for module in inner.modules():
        if vars(module).get("config") is old:
            module.config = new
    # What the model's constructor was given: a recipe starts from there.
    vars(inner).setdefault(CONFIG_AS_BUILT, old)
    return True


def pretrained_inside(model: nn.Module) -> Any:
    """Return the Hugging Face model that `model` is or holds, or None."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "save_pretrained") and hasattr(config, "to_dict"):
            return module
    return None


class _Trial:
    """Builds the model on the meta device, where nothing is allocated, with some numbers changed."""

    def __init__(self, model: Any, kept_layers: list[int] | None) -> None:
        self.model, self.original, self.kept_layers = model, model.config, kept_layers
        self._known: dict[str, dict[tuple[str, int], int] | None] = {}

    def numbers(self) -> Iterator[str]:
        for key, value in self.original.to_dict().items():
            is_size = (type(value) is int and value > 1) or value is None
            if is_size and not key.startswith("_") and not key.endswith(("_token_id", "_id", "_index")):
                yield key

    def set(self, changed: dict[str, Any], key: str, value: int) -> None:
        """Set a number, and shorten the lists that have an entry for each layer."""
        old = getattr(self.original, key)
        if value == old:
            return
        changed[key] = value
        for name, entries in self.original.to_dict().items():
            if "layer" in key and isinstance(entries, list) and len(entries) == old:
                keep = self.kept_layers if self.kept_layers and len(self.kept_layers) == value else range(value)
                changed[name] = [entries[place % old] for place in keep]

    def config(self, changed: dict[str, Any]) -> Any:
        config = copy.deepcopy(self.original)
        for key, value in changed.items():
            setattr(config, key, value)
        return config

    def sizes(self, changed: dict[str, Any]) -> dict[tuple[str, int], int] | None:
        """Return the sizes of the model with some numbers changed; None where it cannot be built."""
        key = str(sorted(changed.items()))
        if key not in self._known:
            try:
                with torch.device("meta"):
                    sizes = _sizes(type(self.model)(self.config(changed)))
                self._known[key] = {place: n for place, n in sizes.items() if not _left_out(self.model, place[0])}
            except Exception:  # a combination that the architecture refuses, in whatever way
                self._known[key] = None
        return self._known[key]

    def differing(self, changed: dict[str, Any], wanted: dict[tuple[str, int], int]) -> list[tuple[str, int]]:
        found = self.sizes(changed)
        if found is None:
            return [("", 0)]
        return [place for place in sorted({*found, *wanted}) if found.get(place) != wanted.get(place)]

    def improve(self, changed: dict[str, Any], key: str, wanted: dict[tuple[str, int], int]) -> None:
        """Set one number to what the sizes that follow it call for, if that brings the model nearer."""
        now, value = self.sizes(changed), changed.get(key, getattr(self.original, key, None))
        varied = dict(changed)
        probe = _PROBE if value is None else value * 2 if value % 2 else value // 2
        self.set(varied, key, probe)
        other = self.sizes(varied)
        if now is None or other is None:
            return
        follow = [place for place in now if place in other and place in wanted and now[place] != other[place]]
        # A number that is not set (GPT-2's n_inner) means one that the architecture computes; it is set from the probe.
        start, from_sizes = (probe, other) if value is None else (value, now)
        ratios = {wanted[place] / from_sizes[place] for place in follow}
        if len(ratios) != 1:
            return
        new = start * ratios.pop()
        better = dict(changed)
        self.set(better, key, round(new))
        if new == round(new) and len(self.differing(better, wanted)) < len(self.differing(changed, wanted)):
            changed.clear()
            changed.update(better)


def _sizes(model: nn.Module) -> dict[tuple[str, int], int]:
    """Return the size of each dim of each parameter, and the number of layers of each stack."""
    found = {(name, dim): size for name, p in model.named_parameters() for dim, size in enumerate(p.shape)}
    stacks = {(name, _LENGTH): len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return {**found, **stacks}


def _left_out(model: nn.Module, name: str) -> bool:
    """Tell whether a part of the model was set to None on purpose, such as a pooler that nothing reads."""
    for part in name.split("."):
        children = model._modules
        if part not in children:
            return False
        if children[part] is None:
            return True
        model = children[part]  # type: ignore[assignment]
    return False


def _held_by_modules(model: nn.Module, config: Any) -> Iterator[tuple[str, int]]:
    """Yield the numbers of the configuration that modules hold under the same name, all with one other value."""
    for key, value in config.to_dict().items():
        held = {vars(module).get(key) for module in model.modules()} - {None}
        if type(value) is int and len(held) == 1 and type(new := held.pop()) is int and new != value:
            yield key, new


def _kept_layers(inner: nn.Module, model: nn.Module) -> list[int] | None:
    """Return which of the original layers are left, by the model's own recipe."""
    kept: list[int] | None = None
    for edit in (*recipe_of(model), *(recipe_of(inner) if inner is not model else ())):
        if isinstance(edit, DropLayers):
            kept = list(edit.kept) if kept is None else [kept[place] for place in edit.kept]
    return kept


def _reason(
    place: tuple[str, int], wanted: dict[tuple[str, int], int], found: dict[tuple[str, int], int], config: Any
) -> str:
    name, dim = place
    if not name:
        return f"{type(config).__name__} refuses the numbers of this model"
    what = "has {} layers" if dim == _LENGTH else f"has {{}} entries along dim {dim}"
    there = what.format(wanted[place]) if place in wanted else "is not there"
    return (
        f"{name} {there}, and every {type(config).__name__} that was tried gives {found.get(place, 'none')}; widths "
        "must be the same in all layers, and those that the architecture computes from others cannot be set"
    )
