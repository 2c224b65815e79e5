"""The files of one network: float32, ours in int8, and the peers' in int8."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import Network
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.engines import HalfRunner, cpu_has_bfloat16
from lightning_opt.evaluation.size import safetensors_bytes
from lightning_opt.export import export, multiplies_int8_exactly
from lightning_opt.export.onnx import OnnxRunner, write_onnx
from lightning_opt.export.openvino import OpenVinoRunner, write_openvino
from lightning_opt.export.program import export_program, tensors_of
from lightning_opt.export.runner import EagerRunner, Runner
from lightning_opt.forward import Inputs
from lightning_opt.quantization import MinMax, Scheme, quantize

CALIBRATION = 4  # batches of 8
STATIC, SEVEN = "int8 ORT static, ONNX Runtime", "int8 with 7-bit weights"

Arms = dict[str, Runner]


def float_arms(model: nn.Module, example: Inputs, folder: Path) -> Arms:
    """Write and open the network in float32 in each engine, and in bfloat16 where the CPU multiplies it."""
    program = export_program(model, example)
    onnx = write_onnx(program, folder / "float.onnx")
    xml = write_openvino(program, folder / "float.xml")
    arms: Arms = {
        "fp32, torch eager": EagerRunner(model),
        "fp32, ONNX Runtime": OnnxRunner(onnx, threads=1),
        "fp32, OpenVINO": OpenVinoRunner(xml, threads=1),
    }
    if cpu_has_bfloat16():
        arms["bf16, torch eager"] = HalfRunner(model)
        arms["bf16, OpenVINO"] = OpenVinoRunner(xml, threads=1, dtype="bfloat16")
    return arms


def our_arms(model: nn.Module, network: Network, folder: Path) -> tuple[Arms, dict[str, Any], dict[str, str]]:
    """Quantize with this package, export, open the files, and say which could not be made.

    Without 8-bit dot products also with weights in 7 bits, with which the fast instructions are exact.
    """
    batches = [network.inputs(8) for _ in range(CALIBRATION)]
    arms: Arms = {}
    about: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for scheme, label in {"w8a8": "int8 ours", **({} if multiplies_int8_exactly() else {"w7a8": SEVEN})}.items():
        parsed, place = Scheme.parse(scheme), folder / scheme
        # A table may be the head's weight, too; ranges are those of all samples, as a scheme's short name has it.
        parsed = dataclasses.replace(parsed, embedding=parsed.weight, activation_observer=MinMax())
        small = quantize(model, batches[0], scheme=parsed, calibration=batches)
        place.mkdir()
        for kind in ("safetensors", "onnx", "openvino"):
            try:
                entry = export(small, batches[0], place, formats=(kind,), latency=None)[0]
            except ConfigError as error:  # it compares each file's answers, and refuses what is wrong on this processor
                reasons[f"{label}, {kind}"] = str(error)
                continue
            about[f"{scheme} {kind}"] = {key: entry[key] for key in ("size_bytes", "argmax_agreement")}
            if kind == "onnx":
                path = place / "model.onnx"
                arms[f"{label}, ONNX Runtime"] = Plain(path) if scheme == "w7a8" else OnnxRunner(path, threads=1)
            if kind == "openvino":
                arms[f"{label}, OpenVINO"] = OpenVinoRunner(place / "model.xml", threads=1)
    return arms, about, reasons


def peer_arms(network: Network, folder: Path) -> tuple[Arms, dict[str, str]]:
    """Quantize the float files with the peers' own post-training quantization, and say which could not."""
    arms: Arms = {}
    reasons: dict[str, str] = {}
    makers: dict[str, Callable[[], Runner]] = {
        "int8 NNCF, OpenVINO": lambda: OpenVinoRunner(_nncf(network, folder), threads=1),
        STATIC: lambda: OnnxRunner(_ort_static(network, folder), threads=1),
        "int8 ORT dynamic, ONNX Runtime": lambda: OnnxRunner(_ort_dynamic(folder), threads=1),
    }
    if not multiplies_int8_exactly():
        makers[f"{STATIC} as it comes"] = lambda: Plain(folder / "ort_static.onnx")
    if network.kind == "cnn":
        makers.pop("int8 ORT dynamic, ONNX Runtime")  # integer convolutions with a scale of each call are slower
    for name, make in makers.items():
        try:
            arms[name] = make()
            arms[name].predict(network.inputs(2))
        except Exception as error:  # a peer that cannot do this network is no rival on it
            arms.pop(name, None)
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return arms, reasons


class Plain:
    """Runs a file in ONNX Runtime with its defaults, on one thread: sums may be wrong on CPUs without VNNI."""

    engine, dtype = "ONNX Runtime", "int8"

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        self._session = onnxruntime.InferenceSession(path, options)
        self._names = [port.name for port in self._session.get_inputs()]

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        feed = {name: tensor.numpy() for name, tensor in zip(self._names, tensors_of(inputs), strict=True)}
        return lambda: self._session.run(None, feed)

    def predict(self, inputs: Inputs) -> Tensor:
        return torch.from_numpy(self.bind(inputs)()[0]).float()


def _feeds(network: Network, names: list[str], batch: int = 8) -> list[dict[str, np.ndarray]]:
    batches = [tensors_of(network.inputs(batch)) for _ in range(CALIBRATION)]
    return [dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)) for tensors in batches]


def _nncf(network: Network, folder: Path) -> Path:
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "float.xml")
    feeds = _feeds(network, [port.get_any_name() for port in model.inputs])
    kind = nncf.ModelType.TRANSFORMER if network.kind == "transformer" else None
    small = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), model_type=kind)
    openvino.save_model(small, folder / "nncf.xml", compress_to_fp16=False)
    return folder / "nncf.xml"


def _prepared(folder: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.onnx"
    if not path.exists():
        quant_pre_process(folder / "float.onnx", path, skip_symbolic_shape=True)
    return path


def _ort_static(network: Network, folder: Path) -> Path:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    path, out = _prepared(folder), folder / "ort_static.onnx"
    names = [port.name for port in onnxruntime.InferenceSession(path).get_inputs()]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(_feeds(network, names))

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.feeds, None)

    quantize_static(
        path,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return out


def _ort_dynamic(folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_prepared(folder), folder / "ort_dynamic.onnx", per_channel=True, weight_type=QuantType.QInt8)
    return folder / "ort_dynamic.onnx"


def sizes(model: nn.Module, folder: Path) -> dict[str, int]:
    """Return bytes on disk, embedding tables included."""
    files = {
        "fp32 ONNX": ["float.onnx"],
        "fp32 OpenVINO": ["float.xml", "float.bin"],
        "int8 ours ONNX": ["w8a8/model.onnx"],
        "int8 ours OpenVINO": ["w8a8/model.xml", "w8a8/model.bin"],
        "int8 ours safetensors": ["w8a8/model.safetensors"],
        "int8 NNCF": ["nncf.xml", "nncf.bin"],
        "int8 ORT static": ["ort_static.onnx"],
        "int8 ORT dynamic": ["ort_dynamic.onnx"],
    }
    found = {"fp32 safetensors": safetensors_bytes(model)}
    for name, parts in files.items():
        if all((folder / part).exists() for part in parts):
            found[name] = sum((folder / part).stat().st_size for part in parts)
    return found
