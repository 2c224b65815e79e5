"""Read Hugging Face models as data: safetensors only, no code from elsewhere, each failure in one sentence."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_opt.errors import ConfigError, MissingExtraError, StorageError
from lightning_opt.models.checks import one_of

ATTENTION = ("sdpa", "eager")
"""Attention implementations that come with transformers; other names could fetch kernels from elsewhere."""


def build(
    auto_class: str,
    source: str | None,
    config: Mapping[str, Any] | None,
    *,
    attention: str,
    revision: str | None,
    local_files_only: bool,
) -> Any:
    """Build transformers' own module, with random weights or with those of `source`, in float32.

    Args:
        auto_class: Name of transformers' factory, such as "AutoModel".
        source: A folder or a hub name; None: random weights.
        config: The configuration, or values that replace the source's own.
        attention: One of `ATTENTION`.
        revision: Commit hash of a hub model.
        local_files_only: Never use the network.

    Raises:
        ConfigError: The configuration cannot work, or transformers is missing.
        StorageError: The source cannot be read.
        ValueError: An unknown `attention`.
    """
    one_of("attention", attention, ATTENTION)
    if source is None and not config:
        raise ConfigError("give source (a folder or a hub name) or config (with a 'model_type')")
    transformers = _transformers()
    safe = {"trust_remote_code": False}
    if source is None:
        settings = _settings(transformers, config or {})
        with _plain_errors(f"config {settings.model_type!r}"):
            factory = getattr(transformers, auto_class)
            return factory.from_config(settings, attn_implementation=attention, **safe)
    place = _place(source, revision=revision, local_files_only=local_files_only)
    with _plain_errors(f"source {source!r}"):
        settings = transformers.AutoConfig.from_pretrained(source, **_overrides(config or {}), **place, **safe)
        model, info = getattr(transformers, auto_class).from_pretrained(
            source,
            config=settings,
            attn_implementation=attention,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **place,
            **safe,
        )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"source {source!r} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}; "
            "choose a source that was saved from such a model"
        )
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", extra="text", needed_for="a Hugging Face model") from error
    return transformers


def _settings(transformers: Any, config: Mapping[str, Any]) -> Any:
    values = _overrides(config)
    model_type = values.pop("model_type", None)
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(f"config.model_type is {model_type!r}, which transformers does not know; such as 'bert'")
    with _plain_errors(f"config {model_type!r}"):
        return transformers.AutoConfig.for_model(model_type, **values)


def _overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in config:
        if key.startswith("_") or key in {"auto_map", "attn_implementation", "trust_remote_code"}:
            raise ConfigError(f"config.{key} is not allowed: it could bring in code from elsewhere; remove it")
    return dict(config)


def _place(source: str, *, revision: str | None, local_files_only: bool) -> dict[str, Any]:
    """Say where to read from: nothing for a folder; for a hub name the revision and whether the network may be used."""
    if Path(source).expanduser().is_dir():
        return {"local_files_only": True}
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise StorageError(f"there is no folder {source}; check source")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        warnings.warn(
            f"{source} is read at revision {revision or 'main'}, which can change; "
            "set revision to a commit hash (40 hex digits)",
            stacklevel=4,
        )
    return {"revision": revision or "main", "local_files_only": local_files_only}


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Turn transformers' errors into one sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {what} ({_line(error)}); check the name, or fetch it beforehand") from error
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise ConfigError(f"{what} cannot be built ({_line(error)}); check its values") from error


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".")[:200] if text else type(error).__name__
