"""Torchao, NNCF and modelopt on the same nets: post-training quantization, and training with it.

They come from the extra `peers`; where they are missing they are laid into a folder of their own, without torch and
without what this environment has.
"""

import contextlib
import copy
import io
import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peers" / "quantization"
VERSIONS = {"torchao": "0.18.0", "nncf": "3.4.0", "nvidia-modelopt": "0.47.0"}  # those that were measured
# What these import and the rest of the environment lacks; everything else they ask for is there already.
BESIDE = ("tabulate", "psutil", "pydot", "ninja", "pulp", "nvidia-ml-py", "pydantic", "pydantic-core")
BESIDE += ("annotated-types", "typing-inspection")


def install(folder: Path = FOLDER) -> None:
    """Lay the peers into a folder where they are missing, and make them importable."""
    if not (folder / "nncf").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        command += ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([*command, *requirements(), *BESIDE], check=True)
    sys.path.append(str(folder))
    os.environ["PATH"] += os.pathsep + str(folder / "bin")  # ninja, with which NNCF compiles its kernels once
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "170")
    logging.getLogger("nncf").setLevel(logging.ERROR)


def requirements() -> list[str]:
    """Name the peers as the extra `peers` has them, or, where it leaves one out, in the version that was measured."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name: line for line in extras["peers"] for name in VERSIONS if line.startswith(name)}
    return [named.get(name, f"{name}=={version}") for name, version in VERSIONS.items()]


def modelopt(model: nn.Module, batches: list[Tensor], *, bits: int) -> nn.Module:
    """Quantize with modelopt's INT8_DEFAULT_CFG, the weights in `bits` bits; ready to be trained on."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for name, rule in _rules(config["quant_cfg"]):
        if "weight_quantizer" in name and isinstance(rule, dict) and rule.get("num_bits") == 8:
            rule["num_bits"] = bits

    def calibrate(net: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                net(batch)

    with _quiet():
        return mtq.quantize(model.eval(), config, calibrate)


def _rules(config: Any) -> Iterator[tuple[str, Any]]:
    """Name the rules of a configuration, which is a dict in some releases and a list in others."""
    if isinstance(config, dict):
        yield from config.items()
        return
    for rule in config:
        yield str(rule.get("quantizer_name")), rule.get("cfg")


def nncf(model: nn.Module, batches: list[Tensor], *, bits: int, text: bool) -> nn.Module:
    """Quantize with NNCF, the weights in `bits` bits (8, or 4 as for an NPU); ready to be trained on."""
    import nncf as package
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    how: dict[str, Any] = {"subset_size": len(batches)}
    if bits < 8:
        weights = QuantizationParameters(num_bits=bits)
        how["advanced_parameters"] = AdvancedQuantizationParameters(weights_quantization_params=weights)
        how["target_device"] = package.TargetDevice.NPU
    if text:
        how["model_type"] = package.ModelType.TRANSFORMER
    with _quiet():
        return package.quantize(model.eval(), package.Dataset(batches), **how)


def torchao_prepare(model: nn.Module, *, bits: int) -> nn.Module:
    """Put torchao's fake quantization into the linear layers: weights per output, activations per row, dynamic."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(_torchao_base(bits), step="prepare"))
    return model


def torchao_convert(model: nn.Module, *, bits: int) -> nn.Module:
    """Turn a model that was trained with torchao's fake quantization into one with integers."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(_torchao_base(bits), step="convert"))
    return model


def torchao_post_training(model: nn.Module, *, bits: int) -> nn.Module:
    """Quantize linear layers after training with torchao."""
    from torchao.quantization import quantize_

    quantize_(model, _torchao_base(bits))
    return model


def _torchao_base(bits: int) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis

    dtype = {8: torch.int8, 4: torch.int4, 2: torch.int2}[bits]
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=PerAxis(0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
