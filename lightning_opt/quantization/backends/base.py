"""What a backend is: one way to quantize a trained model for one engine, so that ways can be compared fairly."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from lightning_opt.errors import ConfigError, LightningOptError, MissingExtraError
from lightning_opt.export.runner import Runner
from lightning_opt.forward import Inputs
from lightning_opt.quantization.post_training import post_training_scheme
from lightning_opt.quantization.scheme import Scheme

Kind: TypeAlias = Literal["static", "dynamic", "weight_only"]


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A quantized model, ready to run; it can be measured beside others as any `Runner`.

    Attributes:
        backend: The name of what made it.
        kind: "static", "dynamic" or "weight_only".
        runner: What runs it.
        size_bytes: Of what has to be shipped.
        path: Its main file; None where the model is in memory only.
    """

    backend: str
    kind: Kind
    runner: Runner
    size_bytes: int
    path: Path | None = None

    @property
    def engine(self) -> str:
        """The engine that runs it, such as "ONNX Runtime"."""
        return self.runner.engine

    @property
    def dtype(self) -> str:
        """What the engine computes in where it does not compute in integers."""
        return self.runner.dtype

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        """Return a call without arguments that runs the model on `inputs`, conversions done beforehand."""
        return self.runner.bind(inputs)

    def predict(self, inputs: Inputs) -> Tensor:
        """Return the model's main tensor on the CPU, in float32."""
        return self.runner.predict(inputs)


class Backend(Protocol):
    """One way to quantize a trained model.

    Attributes:
        name: Such as "onnxruntime".
    """

    name: str

    def check(self) -> None:
        """Make sure that what it needs is installed.

        Raises:
            MissingExtraError: A package is missing; the message holds the line that installs it.
        """

    def quantize(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        scheme: Scheme | str = "w8a8",
        *,
        calibration: Iterable[Any] | None = None,
        folder: Path,
    ) -> QuantizedModel:
        """Quantize a copy of a model.

        Args:
            model: A trained float model in evaluation mode, on the CPU.
            example_inputs: What `forward` takes.
            scheme: What to quantize; a backend takes from it what it has a setting for.
            calibration: Batches, for static schemes.
            folder: Where files are written; it exists.

        Raises:
            CalibrationError: A static scheme has no calibration data, or they are not finite.
            ConfigError: The backend has no such scheme.
            MissingExtraError: A package is missing.
        """


def kind_of(scheme: Scheme) -> Kind:
    """Tell static, dynamic and weight-only schemes apart."""
    if scheme.activation is None:
        return "weight_only"
    return "dynamic" if scheme.dynamic else "static"


def understood(
    scheme: Scheme | str, *, backend: str, kinds: tuple[Kind, ...], weight_bits: tuple[int, ...]
) -> tuple[Scheme, Kind]:
    """Return the scheme and its kind, if a backend of others can do it.

    Args:
        scheme: What is asked for.
        backend: Its name.
        kinds: What it can do.
        weight_bits: How many bits a weight may have.

    Raises:
        ConfigError: It cannot.
    """
    scheme = post_training_scheme(scheme)
    kind, weight = kind_of(scheme), scheme.weight
    if kind not in kinds:
        raise ConfigError(f"backend {backend} has no {kind} quantization; it has {' and '.join(kinds)}")
    if weight is None or weight.is_float or weight.bits not in weight_bits:
        asked = "float weights" if weight is None else weight.dtype if weight.is_float else f"{weight.bits}-bit weights"
        known = ", ".join(map(str, weight_bits))
        raise ConfigError(f"backend {backend} cannot quantize to {asked}; its weights have {known} bits")
    if scheme.activation is not None and (scheme.activation.is_float or scheme.activation.bits != 8):
        raise ConfigError(f"backend {backend} has activations of 8 bits; the scheme asks for {scheme.activation.bits}")
    return scheme, kind


@contextmanager
def refusals(backend: str, model: nn.Module) -> Iterator[None]:
    """Turn whatever another package raises into one sentence.

    Raises:
        ConfigError: The package cannot quantize the model.
    """
    try:
        yield
    except LightningOptError:
        raise
    except Exception as error:
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"backend {backend} cannot quantize {type(model).__name__}: {text[:200]}") from error


def require(*packages: str, extra: str, backend: str) -> None:
    """Make sure that packages are installed.

    Raises:
        MissingExtraError: One is not.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra=extra, needed_for=f"quantization backend {backend}")
