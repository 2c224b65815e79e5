"""Refuse what cannot work before anything is created: no folder, no download, no second of training.

Everything here reads plain values. Nothing imports torch, so a refusal takes well under a second.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning_opt.config.schema import PLAIN, RANGES, Key
from lightning_opt.config.signatures import Signature, public_names, signature_of
from lightning_opt.config.types import describe, fits
from lightning_opt.errors import ConfigError

_INSTANTIATE_WORDS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
# Arguments that the build fills in, so a config need not give them.
_FILLED = {"dirpath", "run_dir", "save_dir", "params", "optimizer", "total_steps"}


def check(config: dict[str, Any]) -> list[str]:
    """Check a whole composed config and return warnings.

    Raises:
        ConfigError: The first thing found that cannot work: its key, its value, what to change.
    """
    _check_node("", config)
    _check_teacher(config)
    _check_start(config)
    _check_length(config)
    _check_order(config)
    return _warnings(config)


def _check_node(path: str, node: dict[str, Any]) -> None:
    """Check one dict and all below it: against its class where it names one, else against the table of plain keys."""
    if "_target_" in node:
        _check_target(path, node)
    elif (known := PLAIN.get(path)) is not None:
        _check_plain(path, node, known)
    for name, value in _children(path, node):
        _check_node(name, value)


def _children(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield name, value
        elif isinstance(value, list):
            for position, item in enumerate(value):
                if isinstance(item, dict):
                    yield f"{name}.{position}", item


def _check_plain(path: str, node: dict[str, Any], known: dict[str, Key]) -> None:
    for name, value in node.items():
        full = f"{path}.{name}" if path else str(name)
        rule = known.get(str(name)) or known.get("*")
        if rule is None:
            raise ConfigError(f"{full}: there is no such key; {_near(str(name), known, path)}")
        _check_value(full, value, rule)


def _check_value(full: str, value: Any, rule: Key) -> None:
    if not fits(value, rule.annotation):
        raise ConfigError(f"{full}={_show(value)}: must be {rule.type.replace(' | None', ' or null')}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_range(full, number, rule)


def _check_range(full: str, number: float, rule: Key) -> None:
    if number != number:
        raise ConfigError(f"{full}={number}: must be a number")
    if number == rule.also:
        return
    too_low = rule.low is not None and (number < rule.low or (rule.exclusive and number == rule.low))
    if too_low:
        word = "greater than" if rule.exclusive else "at least"
        raise ConfigError(f"{full}={number}: must be {word} {rule.low:g}")
    if rule.high is not None and number > rule.high:
        raise ConfigError(f"{full}={number}: must be at most {rule.high:g}")


def _check_target(path: str, node: dict[str, Any]) -> None:
    target = node["_target_"]
    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_={_show(target)}: must be a dotted name")
    try:
        signature = signature_of(target)
    except LookupError as error:
        module, _, name = target.rpartition(".")
        near = get_close_matches(name, public_names(module), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "; name a class that can be imported from here"
        raise ConfigError(f"{path}._target_={target}: {error}{hint}") from error
    if signature is not None:
        _check_arguments(path, node, signature)


def _check_arguments(path: str, node: dict[str, Any], signature: Signature) -> None:
    for name, value in node.items():
        if name in _INSTANTIATE_WORDS:
            continue
        full = f"{path}.{name}"
        if name not in signature.annotations:
            if signature.open:
                continue
            raise ConfigError(
                f"{full}: {node['_target_']} takes no such argument; {_near(name, signature.annotations, path)}"
            )
        annotation = signature.annotations[name]
        if not fits(value, annotation):
            assert annotation is not None
            raise ConfigError(f"{full}={_show(value)}: must be {describe(annotation)}")
        for pattern, rule in RANGES.items():
            if fnmatchcase(full, pattern):
                _check_value(full, value, rule)
    absent = sorted(signature.required - set(node) - _FILLED)
    if absent and not node.get("_partial_"):
        raise ConfigError(f"{path}.{absent[0]} has no value; {node['_target_']} needs it: {path}.{absent[0]}=VALUE")


def _near(name: str, known: Any, path: str = "") -> str:
    names = [key for key in known if key != "*"]
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(f'{path}.{n}' if path else n for n in near)}?"
    return f"there are {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_teacher(config: dict[str, Any]) -> None:
    """Check what a teacher and the losses ask of each other."""
    teacher, terms = config.get("teacher"), (config.get("loss") or {}).get("terms")
    if terms and not teacher:
        raise ConfigError(
            f"loss={'+'.join(terms)} compares with a teacher and there is none; add teacher=NAME or set loss=none"
        )
    if not teacher:
        return
    if not terms:
        raise ConfigError("teacher is given but no loss reads it; add loss=kd or set teacher=none")
    if teacher.get("run_dir") and teacher.get("model"):
        raise ConfigError(
            "teacher.run_dir and teacher.model are both given; a run folder knows its own model, drop one"
        )
    if not teacher.get("run_dir") and not teacher.get("model"):
        raise ConfigError("teacher has neither run_dir nor model; give teacher.run_dir=FOLDER or choose teacher=NAME")
    for key in ("run_dir", "weights"):
        path = teacher.get(key)
        if path and not Path(path).expanduser().exists():
            raise ConfigError(f"teacher.{key}={path}: no such file or folder")
    if teacher.get("members", 1) > 1 and not teacher.get("train"):
        raise ConfigError(
            "teacher.members is above 1 but the teacher is not trained here; set teacher.train or members=1"
        )
    if teacher.get("cache") and (config.get("loss") or {}).get("sampling"):
        raise ConfigError("teacher.cache stores answers on the training set; it cannot answer loss.sampling, drop one")


def _check_start(config: dict[str, Any]) -> None:
    """Check where the first weights come from."""
    path = config.get("start_from")
    if path and not Path(path).expanduser().exists():
        raise ConfigError(f"start_from={path}: no such file or folder")
    if path and (config.get("teacher") or {}).get("init_student"):
        raise ConfigError("start_from and teacher.init_student both give the first weights; drop one")


def _check_length(config: dict[str, Any]) -> None:
    """Refuse a run that would never end."""
    trainer = config.get("trainer") or {}
    endless_epochs = trainer.get("max_epochs") in (None, -1)
    endless_steps = trainer.get("max_steps", -1) == -1
    if endless_epochs and endless_steps and not trainer.get("max_time") and not trainer.get("fast_dev_run"):
        raise ConfigError("trainer.max_epochs and trainer.max_steps are both unlimited; give one of them")


def _check_order(config: dict[str, Any]) -> None:
    """Refuse to remove channels from a model whose quantizers are on; moments in other units are compared later.

    Raises:
        ConfigError: Naming both keys.
    """
    pruner, quantizer = config.get("pruner") or {}, config.get("quantizer") or {}
    start = quantizer.get("start")
    if not quantizer or quantizer.get("method", "qat") != "qat" or not isinstance(start, float | int):
        return
    if not str((pruner.get("pattern") or {}).get("_target_", "")).endswith(".Structures"):
        return
    key = "end" if pruner.get("shrink_at") is None else "shrink_at"
    cut = pruner.get(key)
    if isinstance(cut, float | int) and cut >= start:
        raise ConfigError(
            f"pruner.{key}={cut} and quantizer.start={start}: what is pruned must be gone before quantizers are "
            f"switched on; set quantizer.start above {cut}"
        )


def _warnings(config: dict[str, Any]) -> list[str]:
    found = []
    if config.get("baseline") and not any(config.get(key) for key in ("teacher", "pruner", "quantizer")):
        found.append("baseline=true has no effect: without teacher, pruner or quantizer the run is its own baseline")
    return found
