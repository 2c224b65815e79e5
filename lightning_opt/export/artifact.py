"""The artifact: a folder that holds a model as data, and the way back to an `nn.Module`.

`model.safetensors` holds the weights, `architecture.json` says how the original model is built, `recipe.json` what was
done to its structure, `manifest.json` the sha256 and size of each file. The manifest is written last: a folder without
one is no artifact. Nothing in the folder is ever run.
"""

import inspect
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_opt.errors import ConfigError, StorageError, UntrustedInputError
from lightning_opt.export.files import make_folder, read_bytes, storing, write_text
from lightning_opt.export.manifest import (
    MANIFEST,
    MAX_JSON_BYTES,
    plain_json,
    read_json,
    read_manifest,
    verify,
    write_manifest,
)
from lightning_opt.export.safetensors import read_safetensors, write_safetensors
from lightning_opt.export.trust import build_trusted, check_trusted, declared_models, targets_of
from lightning_opt.surgery import Recipe, replay, whole_recipe

WEIGHTS, RECIPE, ARCHITECTURE = "model.safetensors", "recipe.json", "architecture.json"
CONFIG_AS_BUILT = "_lightning_opt_config"  # where a model keeps it once its configuration follows its smaller shapes
_FILES = (WEIGHTS, RECIPE, ARCHITECTURE)


def save_artifact(
    folder: str | Path,
    model: nn.Module,
    *,
    architecture: Mapping[str, Any],
    recipe: Recipe | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` to `folder` as data, each file durably, the manifest last; other files are left alone.

    Args:
        folder: Made when it is not there.
        model: Its weights are written as they are now.
        architecture: How the original model is built: `{"_target_": "lightning_opt.models.ConvNet", ...plain values}`.
            The weights follow, so a `pretrained` in it is written as false, and a Hugging Face `source` is replaced by
            the configuration that was read from it.
        recipe: What was done to its structure since; when not given, what the model itself carries.
        meta: Plain values for the manifest, such as a summary of the metrics.

    Returns:
        The folder.

    Raises:
        StorageError: A file could not be written.
        ValueError: `architecture` or `meta` is not plain JSON, or the model's state holds more than dense tensors.
    """
    folder = Path(folder)
    model = getattr(model, "_orig_mod", model)  # the module inside a torch.compile wrapper
    recipe = whole_recipe(model) if recipe is None else recipe
    described = plain_json(architecture, "architecture")
    _check_architecture(described)
    described = _self_contained(described, model)
    meta = plain_json(dict(meta or {}), "meta")
    make_folder(folder)
    with storing(folder / MANIFEST):
        (folder / MANIFEST).unlink(missing_ok=True)  # while files are being replaced, no manifest may vouch for them
    write_safetensors(model, folder / WEIGHTS)
    write_text(folder / RECIPE, recipe.to_json() + "\n")
    write_text(folder / ARCHITECTURE, json.dumps(described, indent=2) + "\n")
    write_manifest(folder, _FILES, meta=meta)
    return folder


def load(path: str | Path, *, trusted_targets: Collection[str] = ()) -> nn.Module:
    """Rebuild the model of a run folder or an artifact, in eval mode, on the CPU.

    No code from the folder is run and the network is not used.

    Args:
        path: A run folder (its `artifact/` is used) or an artifact folder.
        trusted_targets: Exact names of your own classes or functions that the artifact may name, such as "my_pkg.Net".

    Raises:
        ConfigError: There is no artifact, or what it names cannot be imported or built.
        StorageError: A file is missing, damaged or not this model's; both sha256s are named.
        UntrustedInputError: The artifact asks for something that is not trusted.
    """
    folder = artifact_folder(path)
    verify(folder, read_manifest(folder), required=_FILES)
    recipe = Recipe.from_json(_read_text(folder / RECIPE))
    architecture = _offline(read_json(folder / ARCHITECTURE))
    allowed = frozenset((trusted_targets,) if isinstance(trusted_targets, str) else trusted_targets)
    if not targets_of(architecture) <= allowed:
        allowed |= declared_models()  # imported only where it is asked for
    with torch.random.fork_rng(devices=[]):  # first weights are drawn; the caller's random numbers stay as they are
        model = build_trusted(architecture, allowed=allowed)
        if not isinstance(model, nn.Module):
            raise UntrustedInputError(f"{folder / ARCHITECTURE} builds a {type(model).__name__}; expected an nn.Module")
        try:
            model = replay(model, recipe)
        except ValueError as error:
            raise StorageError(f"{folder / RECIPE} does not fit {architecture['_target_']}: {error}") from error
    return read_safetensors(model, folder / WEIGHTS).eval()


def artifact_folder(path: str | Path) -> Path:
    """Return the artifact folder that `path` is or holds.

    Raises:
        ConfigError: There is no artifact.
    """
    path = Path(path).expanduser()
    for folder in (path / "artifact", path):
        if (folder / MANIFEST).is_file():
            return folder
    raise ConfigError(
        f"{path} holds no artifact (neither artifact/{MANIFEST} nor {MANIFEST} is there); give the folder of a "
        "finished run or of an artifact"
    )


def verify_artifact(path: str | Path) -> dict[str, dict[str, Any]]:
    """Check every file of an artifact that is there, and return the manifest's entries by file name.

    Raises:
        ConfigError: There is no artifact.
        StorageError: The manifest or a file is damaged.
        UntrustedInputError: The manifest lists something that is no plain file of its folder.
    """
    folder = artifact_folder(path)
    manifest = read_manifest(folder)
    verify(folder, manifest)
    files: dict[str, dict[str, Any]] = manifest["files"]
    return files


def _check_architecture(architecture: Any) -> None:
    target = architecture.get("_target_") if isinstance(architecture, dict) else None
    if not isinstance(target, str):
        raise ValueError(f"architecture must hold '_target_', the model's full name; got {str(architecture)[:80]}")
    try:
        check_trusted(architecture, allowed=targets_of(architecture))
    except UntrustedInputError as error:
        raise ValueError(f"architecture could not be loaded again: {error}") from error


def _self_contained(described: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Free a description from sources of weights, since the weights follow."""
    if "pretrained" in described or _can_be_pretrained(described["_target_"]):
        described = {**described, "pretrained": False}
    config = _hugging_face_config(model)
    if config is None or described.get("source") is None or "config" not in described:
        return described
    return {**described, "source": None, "config": config} | ({"num_layers": None} if "num_layers" in described else {})


def _hugging_face_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the configuration that the Hugging Face model inside was built with, without what is private to it."""
    for module in model.modules():
        config = vars(module).get(CONFIG_AS_BUILT, getattr(module, "config", None))
        if config is not None and hasattr(config, "to_dict") and isinstance(getattr(config, "model_type", None), str):
            values = config.to_dict() | {"model_type": config.model_type}
            dropped = {"auto_map", "architectures", "transformers_version", "dtype", "torch_dtype"}
            kept = {key: value for key, value in values.items() if not key.startswith("_") and key not in dropped}
            found: dict[str, Any] = plain_json(kept, "the model's Hugging Face configuration")
            return found
    return None


def _can_be_pretrained(target: str) -> bool:
    """Tell whether a builder of this process fetches weights unless it is told not to."""
    module, _, name = target.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return callable(found) and "pretrained" in inspect.signature(found).parameters


def _offline(described: Any) -> Any:
    """Keep a description that may be foreign from fetching anything, at any depth: the weights are in the artifact."""
    if isinstance(described, list):
        return [_offline(each) for each in described]
    if not isinstance(described, dict):
        return described
    inside = {key: _offline(value) for key, value in described.items()}
    changed = {"pretrained": False} if "pretrained" in inside else {}
    return {**inside, **changed} | ({"local_files_only": True} if inside.get("source") is not None else {})


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, limit_bytes=MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is not UTF-8 text; restore it from a copy") from error
