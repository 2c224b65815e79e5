"""The program of a model: torch.export's ATen graph, with the names that the model itself uses."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs

_ONE_NAME = {
    **dict.fromkeys(("reshape", "_unsafe_view"), "view"),
    **dict.fromkeys(("split_with_sizes", "unsafe_split"), "split"),
    "broadcast_to": "expand",
    "tile": "repeat",
}


@dataclass(frozen=True)
class Program:
    """A traced model.

    Attributes:
        graph: The graph; its nodes' `meta["val"]` hold shapes.
        tensors: For each placeholder that is a parameter or buffer, the model's own name of it.
        constants: Placeholders that are tensors which the model holds neither as parameter nor as buffer.
    """

    graph: GraphModule
    tensors: dict[str, str]
    constants: frozenset[str]


class _TensorsOnly(nn.Module):
    """Calls the model and returns the tensors of its answer, without key and value caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_of(self.model(*args, **kwargs))


def tensors_of(answer: Any) -> list[Tensor]:
    """Return the tensors of a model's answer, only its `logits` if it has any; other objects are left out."""
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, dict) and isinstance(answer.get("logits"), Tensor):
        return [answer["logits"]]
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, tuple | list):
        return [tensor for item in answer for tensor in tensors_of(item)]
    return []


def export(model: nn.Module, example_inputs: Inputs) -> Program:
    """Trace `model` in eval mode with torch.export; its mode and settings are put back.

    Raises:
        ConfigError: torch.export cannot trace the model; the message holds its first line.
    """
    args, kwargs = _arguments(example_inputs)
    wrapper = _TensorsOnly(model)
    with evaluating(model), without_cache(model), _quiet():
        try:
            exported = torch.export.export(wrapper, args, kwargs, strict=False)
        except Exception as error:  # whatever the model's code or the tracer raises means the same to the user
            raise ConfigError(
                f"{type(model).__name__} cannot be traced by torch.export, so its structure is not known: "
                f"{_first_line(error)}; make that operation independent of the data (or exclude it from the model), "
                "or prune with masks only"
            ) from error
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    own = _own_names(model)
    tensors = {placeholder: own[_tensor_at(wrapper, name)] for placeholder, name in names.items()}
    constants = frozenset(signature.inputs_to_lifted_tensor_constants)
    return Program(exported.graph_module, tensors, constants)


def module_of(node: Node) -> str:
    """Return the full name of the module whose forward ran the operation; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).split("@")[0].removeprefix("model").removeprefix(".")


def operation_name(node: Node) -> str:
    """Return an operation's name without namespace of ATen and overload: "conv2d", "mylib::op"."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    return str(getattr(target, "__name__", target))


def common_name(operation: str) -> str:
    """Return one name for operations that differ only in how their sizes are handed over."""
    return _ONE_NAME.get(operation, operation)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, compiled ones eager, and each one back to its own mode after."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Switch off key and value caches that a `config.use_cache` asks for."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's own log of a failure from the user, who gets the error; gradients stay on."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # Off, attention modules may take a fused path that export cannot see into.
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (), dict(inputs)


def _own_names(model: nn.Module) -> dict[int, str]:
    """Return the first name of each parameter and buffer, by the tensor's identity."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in named}


def _tensor_at(module: nn.Module, name: str) -> int:
    owner, _, leaf = name.rpartition(".")
    return id(getattr(module.get_submodule(owner), leaf))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def tensor_nodes(value: Any) -> list[Node]:
    """Return the graph nodes inside an argument, in order."""
    return [item for item in pytree.tree_leaves(value) if isinstance(item, Node)]
