"""Ways to quantize a trained model, behind one interface: ours, and those of others to compare with.

Packages of others are imported when they are used, never before.
"""

from lightning_opt.quantization.backends.base import Backend, QuantizedModel
from lightning_opt.quantization.backends.nncf import Nncf
from lightning_opt.quantization.backends.onnx_runtime import OnnxRuntime
from lightning_opt.quantization.backends.ours import Ours
from lightning_opt.quantization.backends.torchao import TorchAO

__all__ = ["Backend", "Nncf", "OnnxRuntime", "Ours", "QuantizedModel", "TorchAO"]
