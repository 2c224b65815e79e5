"""Each backend on one small trained network; those of missing packages are skipped, and say what to install."""

import importlib.util
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError, MissingExtraError
from lightning_opt.quantization.backends import Nncf, OnnxRuntime, Ours, TorchAO
from lightning_opt.quantization.calibration import CalibrationError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, image):
        return self.head(self.body(image))


def images(n=256):
    return torch.randn(n, 1, 10, 10, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net, x = Net(), images()
    target = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()
    return net.eval()


NEEDS = {"nncf": "nncf", "torchao": "torchao"}
CASES = [
    (Ours(), "w8a8", "static", "ONNX Runtime"),
    (Ours(), "w8", "weight_only", "ONNX Runtime"),
    (Ours(engine="openvino"), "w8a8", "static", "OpenVINO"),
    (Ours(engine="torch"), "w8a8", "static", "torch eager"),
    (OnnxRuntime(), "w8a8", "static", "ONNX Runtime"),
    (OnnxRuntime(), "w8a8_dynamic", "dynamic", "ONNX Runtime"),
    (Nncf(), "w8a8", "static", "OpenVINO"),
    (Nncf(), "w8", "weight_only", "OpenVINO"),
    (Nncf(), "w4g32", "weight_only", "OpenVINO"),
    (TorchAO(compile=False), "w8a8_dynamic", "dynamic", "torch eager"),
    (TorchAO(compile=False), "w8", "weight_only", "torch eager"),
    (TorchAO(compile=False), "w4g32", "weight_only", "torch eager"),
]


@pytest.mark.parametrize(
    ("backend", "scheme", "kind", "engine"), CASES, ids=lambda value: getattr(value, "name", value)
)
def test_a_quantized_model_answers_as_the_float_model_does(net, backend, scheme, kind, engine, tmp_path):
    for package in ("onnxruntime", "onnxscript", "openvino", NEEDS.get(backend.name, "torch")):
        pytest.importorskip(package)
    x = images()
    made = backend.quantize(net, x[:2], scheme, calibration=x.split(64), folder=tmp_path)
    assert (made.backend, made.kind, made.engine, made.dtype) == (backend.name, kind, engine, "float32")
    with torch.no_grad():
        wanted = net(x)
    found = made.predict(x)
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() > (0.97 if scheme != "w4g32" else 0.8)
    assert not torch.equal(found, wanted)
    made.bind(x[:1])()
    held = sum(path.stat().st_size for path in tmp_path.iterdir())
    if made.path is not None:
        assert made.path.parent == tmp_path
        assert made.size_bytes == held  # nothing else is left there
    linear = 64 * 128 + 5 * 64
    if engine != "OpenVINO" or kind != "static":  # an .xml of a small network is larger than its weights
        assert (
            linear * (0.5 if scheme == "w4g32" and backend.name != "torchao" else 1)
            < made.size_bytes
            < 3 * linear + 12_000
        )
    assert type(net.head[1]) is nn.Linear  # a copy was quantized


@pytest.mark.parametrize(
    ("backend", "package", "extra"),
    [
        (Ours(), "onnxruntime", "export"),
        (Ours(engine="openvino"), "openvino", "openvino"),
        (OnnxRuntime(), "onnxscript", "export"),
        (Nncf(), "nncf", "openvino"),
        (TorchAO(), "torchao", "peers"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(net, backend, package, extra, tmp_path, monkeypatch):
    def without(name, *rest):
        return None if name == package else find_spec(name, *rest) or object()

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for module in ("quantization.backends.base", "export.onnx", "export.openvino"):
        monkeypatch.setattr(f"lightning_opt.{module}.find_spec", without)
    with pytest.raises(MissingExtraError, match=rf"{package}.*lightning_opt\[{extra}\]"):
        backend.quantize(net, images(2), "w8a8_dynamic", folder=tmp_path)


@pytest.mark.parametrize(
    ("backend", "scheme", "named"),
    [
        (OnnxRuntime(), "w8", "weight_only"),
        (OnnxRuntime(), "w4a8", "4-bit weights"),
        (OnnxRuntime(), "fp8", "float8"),
        (OnnxRuntime(), "w8a4", "asks for 4"),
        (Nncf(), "w8a8_dynamic", "dynamic"),
        (Nncf(), "w4a8", "static"),
        (TorchAO(), "w8a8", "static"),
        (TorchAO(), "w2", "2-bit weights"),
    ],
)
def test_what_a_backend_cannot_do_is_said_before_anything_is_done(net, backend, scheme, named, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_opt.quantization.backends.base.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=rf"{backend.name}.*{named}"):
        backend.quantize(net, images(2), scheme, calibration=[images(2)], folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", [Ours(), OnnxRuntime(), Nncf()], ids=lambda backend: backend.name)
def test_a_static_scheme_needs_calibration(net, backend, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_opt.quantization.backends.base.find_spec", lambda name: object())
    with pytest.raises(CalibrationError, match="calibration"):
        backend.quantize(net, images(2), "w8a8", folder=tmp_path)


@pytest.mark.parametrize("name", ["nncf", "torchao"])
def test_what_others_refuse_is_one_sentence(name, tmp_path):
    pytest.importorskip(name)
    backend = {"nncf": Nncf(), "torchao": TorchAO()}[name]
    with pytest.raises(ConfigError, match=rf"{name} cannot quantize Sequential"):
        backend.quantize(nn.Sequential(nn.Linear(17, 4)).eval(), torch.randn(2, 17), "w4g32", folder=tmp_path)


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="'tensorrt'"):
        Ours(engine="tensorrt")
