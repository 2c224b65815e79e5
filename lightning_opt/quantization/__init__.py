"""Quantize models: schemes, observers, fake quantization, calibration, conversion to integers. Pure torch."""

from lightning_opt.quantization.adaround import AdaRound
from lightning_opt.quantization.bias_correction import BiasCorrection
from lightning_opt.quantization.calibration import CalibrationError, calibrate
from lightning_opt.quantization.convert import convert, float_twin
from lightning_opt.quantization.edits import Convert, QuantizeEdit, SwitchOn
from lightning_opt.quantization.equalize import CrossLayerEqualization
from lightning_opt.quantization.gptq import GPTQ
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.improvement import FloatImprovement, QuantizedImprovement
from lightning_opt.quantization.layers.base import LayerKind, handler
from lightning_opt.quantization.mixed_precision import MixedPrecision, mixed_precision
from lightning_opt.quantization.observers import MSE, Entropy, MinMax, MovingAverage, Observer, Percentile
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.prepare import Prepared, prepare
from lightning_opt.quantization.quantizer import FakeQuantizer, calibrating
from lightning_opt.quantization.scheme import LayerScheme, Scheme
from lightning_opt.quantization.sensitivity import LayerCost, sensitivity
from lightning_opt.quantization.smooth import SmoothQuant
from lightning_opt.quantization.state import (
    freeze_batch_norm,
    freeze_observers,
    is_converted,
    is_quantized,
    quantizers,
    set_enabled,
    set_observing,
    switch_on,
)
from lightning_opt.quantization.summary import quantization_summary

__all__ = [
    "GPTQ",
    "MSE",
    "AdaRound",
    "BiasCorrection",
    "CalibrationError",
    "Convert",
    "CrossLayerEqualization",
    "Entropy",
    "FakeQuantizer",
    "FloatImprovement",
    "Grid",
    "LayerCost",
    "LayerKind",
    "LayerScheme",
    "MinMax",
    "MixedPrecision",
    "MovingAverage",
    "Observer",
    "Percentile",
    "Prepared",
    "QuantizeEdit",
    "QuantizedImprovement",
    "Scheme",
    "SmoothQuant",
    "SwitchOn",
    "calibrate",
    "calibrating",
    "convert",
    "float_twin",
    "freeze_batch_norm",
    "freeze_observers",
    "handler",
    "is_converted",
    "is_quantized",
    "mixed_precision",
    "prepare",
    "quantization_summary",
    "quantize",
    "quantizers",
    "sensitivity",
    "set_enabled",
    "set_observing",
    "switch_on",
]
