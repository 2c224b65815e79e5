"""The one way in which this package calls a network and reads its answer.

A batch's inputs are a tensor, a tuple of tensors (positional) or a dict of tensors (by keyword, as Hugging Face models
want them). An answer is a tensor, a tuple whose first item is the tensor, or an object or dict with `logits`.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """Call `model` with a tensor, positional tensors or keyword tensors."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def logits_of(output: Any) -> Tensor:
    """Read the main tensor of a network's answer.

    Raises:
        TypeError: The answer holds no tensor where one is expected.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned {type(output).__name__}; expected a tensor or an answer with 'logits'")
    return output


def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """Call `model` and return its main tensor, such as `(B, C)` logits."""
    return logits_of(forward(model, inputs))


def map_inputs(inputs: Inputs, fn: Any) -> Any:
    """Apply `fn` to each tensor of a batch's inputs, keeping their form."""
    if isinstance(inputs, Mapping):
        return {name: fn(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(fn(value) for value in inputs)
    return fn(inputs)


def batch_size_of(inputs: Inputs) -> int:
    """Return the number of samples in a batch's inputs: the length of the first tensor."""
    if isinstance(inputs, Mapping):
        return len(next(iter(inputs.values())))
    if isinstance(inputs, tuple | list):
        return len(inputs[0])
    return len(inputs)
