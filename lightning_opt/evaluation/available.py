"""Which engines this machine has, and whether a narrow dtype is a rival here at all."""

from importlib.util import find_spec
from pathlib import Path

_NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}
_BF16_FLAGS = ("amx_bf16", "avx512_bf16")


def available_engines() -> list[str]:
    """Return the engines that are installed, each as `measure` wants it; bfloat16 only where the CPU has it."""
    found = ["torch", *(name for name, packages in _NEEDS.items() if all(find_spec(p) for p in packages))]
    if cpu_has_bfloat16():
        found += [f"{name}:bfloat16" for name in ("torch", "openvino") if name in found]
    return found


def cpu_has_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware; where it does not, bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(flag in flags for flag in _BF16_FLAGS)
