"""From a command line to one plain config: Hydra's composition, with errors a person can act on."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_opt.config.adopt import adopt_targets, arguments_beside, arguments_of_own_classes, is_argument
from lightning_opt.config.paths import conf_dir
from lightning_opt.errors import ConfigError

# Groups that name a stage of the run, so `export=false` reads better than `export=none`.
_STAGES = ("benchmark", "export", "diagnose")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What was asked for, before anything is composed.

    Attributes:
        overrides: Hydra overrides, normalised.
        config_dir: A folder of the user's own options, searched after ours.
        config_path: A folder that replaces ours as the primary one.
        config_name: Name of the primary config.
        multirun: Whether this is a sweep.
        flags: What only Hydra's own entry point answers, such as `--cfg job`.
    """

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_path: str | None = None
    config_name: str = "train"
    multirun: bool = False
    flags: list[str] = field(default_factory=list)


def read_command_line(argv: Sequence[str], *, config_name: str) -> CommandLine:
    """Split arguments into overrides and flags, accepting `experiment=NAME` and `export=false` as users write them."""
    values: dict[str, Any] = {"config_name": config_name, "overrides": [], "flags": []}
    named = {
        "--config-dir": "config_dir",
        "-cd": "config_dir",
        "--config-path": "config_path",
        "-cp": "config_path",
        "--config-name": "config_name",
        "-cn": "config_name",
    }
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in named and word.startswith("-"):
            if not equals and not rest:
                raise ConfigError(f"{flag} needs a value")
            values[named[flag]] = value if equals else rest.pop(0)
        elif word in ("-m", "--multirun"):
            values["multirun"] = True
        elif word.startswith("-"):
            values["flags"].append(word)
            if rest and "=" not in rest[0] and rest[0][0] not in "-~":
                values["flags"].append(rest.pop(0))
        else:
            values["overrides"].append(normalise(word))
    # A debug option has the last word: also where the experiment says otherwise.
    ordered = sorted(values["overrides"], key=lambda word: word.startswith("+debug="))
    values["overrides"] = arguments_of_own_classes(ordered)
    return CommandLine(**values)


def normalise(override: str) -> str:
    """Rewrite the spellings that users expect and Hydra refuses."""
    key, equals, value = override.partition("=")
    if key in ("experiment", "debug") and equals:
        return f"+{override}"
    if key in _STAGES and value.lower() in ("false", "true"):
        return f"{key}={'none' if value.lower() == 'false' else 'default'}"
    return override


def compose_config(line: CommandLine) -> DictConfig:
    """Compose the config of one job; nothing is written anywhere.

    Raises:
        ConfigError: The command line does not compose; the message names the override and what is near it.
    """
    folder = Path(line.config_path).resolve() if line.config_path else conf_dir()
    if not folder.is_dir():
        raise ConfigError(f"--config-path={line.config_path}: no such folder")
    overrides = list(line.overrides)
    if line.config_dir:
        if not Path(line.config_dir).is_dir():
            raise ConfigError(f"--config-dir={line.config_dir}: no such folder")
        overrides.append(f"hydra.searchpath=[file://{Path(line.config_dir).resolve()}]")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose(line.config_name, overrides=overrides)
            adopt_targets(config, line.overrides, folders_of(line))
            return config
    except MissingConfigException as error:
        raise ConfigError(_missing_option(error)) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        fuller = with_arguments_of_classes(line)
        if fuller != line:
            return compose_config(fuller)
        raise ConfigError(_explain(error, line)) from error


def folders_of(line: CommandLine) -> list[Path]:
    """Return the folders that a command line's options come from."""
    return [Path(line.config_path or conf_dir()), *([Path(line.config_dir)] if line.config_dir else [])]


def with_arguments_of_classes(line: CommandLine) -> CommandLine:
    """Let `trainer.limit_val_batches=5` stand without a plus: its class takes it, though no option of ours lists it."""
    config = _groups_alone(line)
    if config is None:
        return line
    return replace(line, overrides=[f"++{word}" if is_argument(config, word) else word for word in line.overrides])


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the config as plain containers, interpolations resolved.

    Raises:
        ConfigError: A value is still `???`, or an interpolation leads nowhere.
    """
    missing = [key for key, value in _leaves(OmegaConf.to_container(config, resolve=False)) if value == "???"]
    if missing:
        raise ConfigError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=VALUE")
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ConfigError(f"{key}: {_first_line(error)}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def unresolved_yaml(config: DictConfig) -> str:
    """Return the config as YAML with its interpolations kept, so that no value of the environment is written down."""
    return OmegaConf.to_yaml(config, resolve=False)


def _missing_option(error: MissingConfigException) -> str:
    """Turn Hydra's list of all options into the near ones."""
    wanted = str(error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, name = wanted.rpartition("/")
    options = [str(option) for option in error.options or ()]
    near = get_close_matches(name, options, n=3, cutoff=0.5) or options[:12]
    if not options:
        return f"{wanted}: there is no config of this name"
    return f"{group.lstrip('/')}={name}: there is no such option; {suggest(near, exact=len(options) <= 12)}"


def suggest(near: Sequence[str], *, exact: bool = False) -> str:
    """Return a did-you-mean phrase."""
    if not near:
        return "see --help for what there is"
    return f"{'choose from' if exact and len(near) > 1 else 'did you mean'} {', '.join(near)}?"


def _explain(error: Exception, line: CommandLine) -> str:
    # A composition error of Hydra may hide its cause in a chain, and say nothing itself.
    cause: BaseException | None = error
    while cause is not None and not str(cause).strip():
        cause = cause.__cause__ or cause.__context__
    cause = cause or error
    key = re.search(r"Could not override '([^']+)'", str(cause))
    if key:
        inner = getattr(cause.__cause__, "full_key", None)  # a value that is a dict may hold the unknown key
        name = inner or key.group(1)
        config = _groups_alone(line)
        known = [] if config is None else [*dotted(OmegaConf.to_container(config)), *arguments_beside(config, name)]
        return unknown_key(name, ["experiment", *dict.fromkeys(known)])
    return _first_line(cause)


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the message for a key that no config and no class has."""
    near = get_close_matches(key, known, n=3, cutoff=0.6)
    if not near:
        leaf = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf][:3]
    return f"{key}: there is no such key; {suggest(near)}"


def _groups_alone(line: CommandLine) -> DictConfig | None:
    """Compose the chosen options without any value; None where even that fails."""
    groups = [word for word in line.overrides if "/" not in word and _is_group(word)]
    if groups == line.overrides:
        return None
    try:
        return compose_config(replace(line, overrides=groups))
    except ConfigError:
        return None


def _is_group(override: str) -> bool:
    name = override.lstrip("+~").partition("=")[0].partition("@")[0]
    return "." not in name and (conf_dir() / name).is_dir()


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts that is no dict, with its dotted key."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dotted(node: Any, prefix: str = "") -> list[str]:
    """Return every key of nested dicts as a dotted name."""
    if not isinstance(node, dict):
        return []
    names = []
    for key, value in node.items():
        name = f"{prefix}{key}"
        names += [name, *dotted(value, f"{name}.")]
    return names


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
