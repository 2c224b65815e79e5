"""`model._target_=my_pkg.Net`: another class in the place of an option's own.

The option's arguments belong to its class. What the new class does not take is dropped, unless it was typed on the same
command line, so that a class of the user's own needs no config file. An experiment's file may name a class in the same
way: what it sets counts as typed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_opt.config.schema import PLAIN
from lightning_opt.config.signatures import signature_of

_WORDS = ("_target_", "_partial_", "_convert_", "_recursive_")


def adopt_targets(config: DictConfig, overrides: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """Drop, in place, the arguments that classes named on the command line or by an experiment do not take.

    Args:
        config: Composed.
        overrides: The words of the command line.
        folders: Where experiments are looked for, the first that has one of a name first.
    """
    typed = [word.lstrip("+").partition("=")[0] for word in [*_set_by_experiments(overrides, folders), *overrides]]
    for path in dict.fromkeys(key.removesuffix("._target_") for key in typed if key.endswith("._target_")):
        node = OmegaConf.select(config, path)
        if not isinstance(node, DictConfig):
            continue
        accepted = _accepted(str(node["_target_"]))
        if accepted is None:
            continue
        mine = {key[len(path) + 1 :].partition(".")[0] for key in typed if key.startswith(f"{path}.")}
        with open_dict(node):
            for name in [str(name) for name in node if name not in _WORDS]:
                if name not in accepted and name not in mine:
                    del node[name]


def _set_by_experiments(overrides: Sequence[str], folders: Sequence[Path]) -> Iterator[str]:
    """Yield the dotted keys that the chosen experiments' own files set."""
    for word in overrides:
        group, _, names = word.lstrip("+").partition("=")
        if group != "experiment":
            continue
        for name in names.strip("[]").split(","):
            files = [folder / "experiment" / f"{name.strip()}.yaml" for folder in folders]
            file = next((file for file in files if file.is_file()), None)
            if file is not None:
                yield from _keys(OmegaConf.to_container(OmegaConf.load(file)))


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{name}"
        yield from _keys(value, f"{prefix}{name}.")


def arguments_of_own_classes(overrides: Sequence[str]) -> list[str]:
    """Let `model.width=64` stand beside `model._target_=my_pkg.Net`: its arguments are not in any option of ours.

    Hydra refuses keys that no option has; the check of the config refuses those that the class does not take.
    """
    named = [word.lstrip("+").partition("._target_=")[0] for word in overrides if "._target_=" in word]
    return [f"++{word}" if any(word.startswith(f"{path}.") for path in named) else word for word in overrides]


def is_argument(config: DictConfig, override: str) -> bool:
    """Tell whether an override without a plus gives a class or a stage what it knows and the config does not list."""
    key, equals, _ = override.partition("=")
    return bool(equals) and OmegaConf.select(config, key) is None and key in arguments_beside(config, key)


def arguments_beside(config: DictConfig, key: str) -> list[str]:
    """Return the dotted names of all that may stand beside `key`: its class's arguments, or what our stages read."""
    path = key.rpartition(".")[0]
    node = OmegaConf.select(config, path) if path and path[0].isalpha() else None
    if not isinstance(node, DictConfig):
        return []
    if not isinstance(node.get("_target_"), str):
        return [f"{path}.{name}" for name in PLAIN.get(path, {}) if name != "*"]
    try:
        signature = signature_of(node["_target_"])
    except LookupError:
        return []
    return [f"{path}.{name}" for name in signature.annotations] if signature is not None else []


def _accepted(target: str) -> set[str] | None:
    """Return the arguments that a class takes; None where nothing is to be dropped."""
    try:
        signature = signature_of(target)
    except LookupError:
        return None  # the check of the config says what is wrong with the name
    if signature is None:
        return set()
    return None if signature.open else set(signature.annotations)
