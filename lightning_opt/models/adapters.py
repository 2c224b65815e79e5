"""Fit models from elsewhere to what the rest of the package expects: plain logits, and weights from a file."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_opt.errors import ConfigError, StorageError, UntrustedInputError
from lightning_opt.forward import logits_of

NESTED = ("state_dict", "model", "model_state_dict", "weights")
"""Keys under which training scripts keep the weights inside a checkpoint."""


class LogitsOf(nn.Module):
    """Wrap a model that answers with an object, dict or tuple, so that it answers with its logits.

    Args:
        model: Any module; its parameters are seen as `model.<name>`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the model with the same arguments and return its main tensor."""
        return logits_of(self.model(*args, **kwargs))


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What `load_weights` left as it was.

    Attributes:
        missing: Names that the model has and the file has not.
        unexpected: Names that the file has and the model has not.
        mismatched: Names in both, with other shapes.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def load_weights(model: nn.Module, path: str | Path, *, strict: bool = True, prefix: str = "") -> LoadedWeights:
    """Load weights from a file into `model`, in place.

    Args:
        model: Gets the weights.
        path: A `.safetensors` file, or a torch checkpoint (`.pt`, `.pth`, `.ckpt`, `.bin`), of which only tensors and
            plain values are read. Weights kept under a key such as "state_dict" are found.
        strict: Every name and shape must fit. False: what fits is loaded and the rest is returned.
        prefix: Read only names that begin with it, without it, such as "student." of a training checkpoint.

    Returns:
        What was not loaded; all empty when `strict`.

    Raises:
        StorageError: The file is missing or damaged.
        UntrustedInputError: The file holds more than tensors and plain values.
        ConfigError: The weights do not fit the model.
    """
    path = Path(path)
    state = {name[len(prefix) :]: value for name, value in _read(path).items() if name.startswith(prefix)}
    if not state:
        raise ConfigError(f"{path} holds no weights whose name begins with {prefix!r}; give another prefix")
    report = _compare(model.state_dict(), state)
    if strict or not set(state) & set(model.state_dict()):
        _refuse_misfits(path, model, state, report)
    model.load_state_dict({k: v for k, v in state.items() if k not in report.mismatched}, strict=False)
    return report


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise StorageError(f"there is no weights file {path}; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_plain(path, error) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(f"cannot read the weights file {path} ({reason}); fetch or save it again") from error
    return _tensors(path, content)


def _not_plain(path: Path, error: Exception) -> Exception:
    with open(path, "rb") as file:
        is_pickle = file.read(1) == b"\x80"
    # Bytes that are no pickle at all fail at the first one that is no instruction.
    if "Unsupported operand" in str(error) and not is_pickle:
        return StorageError(f"{path} is not a torch checkpoint or is damaged; fetch or save it again")
    return UntrustedInputError(
        f"{path} holds more than tensors and plain values, so reading it could run code; "
        "save its state_dict as .safetensors where you trust it"
    )


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ConfigError(f"{path} holds no table of named weights; save model.state_dict() in it")
    return tensors


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LoadedWeights:
    return LoadedWeights(
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(name for name in own if name in state and own[name].shape != state[name].shape),
    )


def _refuse_misfits(path: Path, model: nn.Module, state: Mapping[str, Tensor], report: LoadedWeights) -> None:
    own = model.state_dict()
    if not report.missing and not report.unexpected and report.mismatched:
        raise ConfigError(_shape_sentence(path, own, state, report.mismatched))
    parts = [
        f"{word} {_first(names)}"
        for word, names in (("lacks", report.missing), ("has unknown", report.unexpected))
        if names
    ]
    if parts:
        raise ConfigError(
            f"the weights in {path} do not fit {type(model).__name__}: the file {' and '.join(parts)}; "
            "build the model that they were saved from, or set prefix or strict=False"
        )


def _shape_sentence(
    path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor], mismatched: tuple[str, ...]
) -> str:
    head = [name for name in list(own)[-2:] if name in mismatched]
    if len(head) == len(mismatched):
        theirs, ours = state[head[0]].shape[0], own[head[0]].shape[0]
        return (
            f"{path} was trained for {theirs} outputs but the model has {ours} ({head[0]}); "
            f"set num_outputs={theirs}, or strict=False to keep the new head"
        )
    name = mismatched[0]
    return (
        f"the weights in {path} have other shapes than the model, first {name}: {tuple(state[name].shape)} in the "
        f"file, {tuple(own[name].shape)} in the model; build the model with the sizes that they were saved from"
    )


def _first(names: tuple[str, ...], *, count: int = 3) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
