"""Insert quantizers into a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.quantization.calls import record_calls
from lightning_opt.quantization.convert import take_out
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.placement import Placement, Refusal, place
from lightning_opt.quantization.placement_check import check_modes, check_placement
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import is_quantized
from lightning_opt.surgery import record


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did.

    Attributes:
        placement: Where each quantizer is, and what it was decided from.
    """

    placement: Placement

    @property
    def edit(self) -> QuantizeEdit:
        """The edit that was applied, and recorded in the model's recipe."""
        return self.placement.edit

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """What stays in float although the scheme asks for it."""
        return self.placement.refused


def prepare(
    model: nn.Module, example_inputs: Inputs, scheme: Scheme | str = "w8a8", *, exclude: Sequence[str] = ()
) -> Prepared:
    """Insert quantizers into `model`, in place and switched off, and record that in its recipe.

    Args:
        model: Any module whose forward can be run with `example_inputs`.
        example_inputs: What `forward` takes.
        scheme: What to quantize and how, or its short name.
        exclude: Patterns of module names that stay in float.

    Raises:
        ConfigError: The model cannot be followed; the message names the module.
        ValueError: The scheme is not known, or a pattern of `exclude` matches nothing.
    """
    if is_quantized(model):
        raise ConfigError(f"{type(model).__name__} has quantizers already; prepare a model without them")
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    scheme = scheme.with_rules(_excluded(model, exclude))
    placement = place(record_calls(model, example_inputs), model, scheme)
    check_modes(model, example_inputs, placement)
    placement.edit.apply(model)
    try:
        check_placement(model, example_inputs, placement)
    except BaseException:
        take_out(model)
        raise
    record(model, placement.edit)
    return Prepared(placement)


def _excluded(model: nn.Module, patterns: Sequence[str]) -> Mapping[str, None]:
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not pattern.startswith("type:") and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude={pattern!r} matches no module of {type(model).__name__}")
    return dict.fromkeys(patterns)
