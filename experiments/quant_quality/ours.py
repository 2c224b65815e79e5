"""Our arms: post-training quantization of the control, and training with quantizers from the float net on."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from arms import Arm, Bench
from torch import nn

from lightning_opt.callbacks import Quantize
from lightning_opt.quantization import (
    GPTQ,
    MSE,
    AdaRound,
    BiasCorrection,
    CrossLayerEqualization,
    Entropy,
    MinMax,
    Percentile,
    Scheme,
    SmoothQuant,
    convert,
    quantize,
)

IMPROVEMENTS: dict[str, Callable[[], Sequence[Any]]] = {
    "smooth": lambda: [SmoothQuant()],
    "equalize": lambda: [CrossLayerEqualization()],
    "bias": lambda: [BiasCorrection()],
    "adaround": lambda: [AdaRound()],
    "gptq": lambda: [GPTQ()],
    "gptq_bias": lambda: [GPTQ(), BiasCorrection()],
}
OBSERVERS: dict[str, dict[str, Any]] = {
    "mse": {"weight_observer": MSE()},
    "mse_percentile": {"weight_observer": MSE(), "activation_observer": Percentile()},
    "mse_entropy": {"weight_observer": MSE(), "activation_observer": Entropy()},
}


def scheme_of(bits: int, *, learnable: bool = False, **changed: Any) -> Scheme:
    """Return weights in `bits` bits and activations in 8, embedding tables in as many as weights."""
    scheme = Scheme.parse(f"w{bits}a8{'_lsq' if learnable else ''}")
    return dataclasses.replace(scheme, embedding=scheme.weight, **changed)


def post_training(
    bench: Bench, *, bits: int, improve: Callable[[], Sequence[Any]] = tuple, dynamic: bool = False, **changed: Any
) -> nn.Module:
    """Quantize the control; ranges of activations are those of all samples, as a scheme's short name has it."""
    scheme = dataclasses.replace(scheme_of(bits, **{"activation_observer": MinMax(), **changed}), dynamic=dynamic)
    batches = bench.batches()
    return quantize(bench.control(), batches[0], scheme=scheme, calibration=batches, improve=improve())


def trained(
    bench: Bench, *, bits: int, learnable: bool = False, scales: float | None = None, **changed: Any
) -> nn.Module:
    """Take the extra steps with quantizers: conf/quantizer/qat.yaml from the first step on."""
    model = bench.float_net()
    callback = Quantize(
        scheme_of(bits, learnable=learnable, **changed),
        start="0 steps",
        freeze_observers=0.5,
        freeze_batch_norm=0.8,
        module="model",
        example_inputs=bench.batches()[0],
    )
    bench.extra(model, callbacks=[callback], scales=scales)
    return convert(copy.deepcopy(model.eval()))


def ours_of() -> list[dict[str, Arm]]:
    """Name our arms, first those that conditions speak of."""
    first: dict[str, Arm] = {f"ptq_w{bits}": partial(post_training, bits=bits) for bits in (8, 4, 2)}
    second: dict[str, Arm] = {}
    for bits in (4, 2):
        second[f"qat_w{bits}"] = partial(trained, bits=bits)
        second[f"lsq_w{bits}"] = partial(trained, bits=bits, learnable=True)
        second[f"qat_mse_w{bits}"] = partial(trained, bits=bits, weight_observer=MSE())
        second[f"lsq_mse_w{bits}"] = partial(trained, bits=bits, learnable=True, scales=0.03, weight_observer=MSE())
    third: dict[str, Arm] = {}
    for bits in (4, 2):
        third |= {
            f"ptq_w{bits}_{key}": partial(post_training, bits=bits, improve=how) for key, how in IMPROVEMENTS.items()
        }
        third |= {f"ptq_w{bits}_{key}": partial(post_training, bits=bits, **how) for key, how in OBSERVERS.items()}
    fourth: dict[str, Arm] = {
        "ptq_w8_dynamic": partial(post_training, bits=8, dynamic=True),
        "qat_w8": partial(trained, bits=8),
    }
    return [first, second, third, fourth]
