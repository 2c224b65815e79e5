"""A quantized model's files compute in integers, in every engine, and answer as the model does."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.export import compare, export, export_program, fused_layers, write_onnx, write_openvino
from lightning_opt.export.onnx import OnnxRunner
from lightning_opt.export.openvino import OpenVinoRunner
from lightning_opt.export.runner import EagerRunner
from lightning_opt.forward import predict
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.scheme import Scheme

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
SCHEME = "w7a8"  # sums of 7-bit weights are exact on every processor


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right, self.mix = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.pool, self.head = nn.AvgPool2d(4), nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.head(self.pool(torch.relu(self.mix(x))).flatten(1))


class Together(nn.Module):
    """Several networks over one input in one graph, since tracing a graph takes seconds."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, x):
        return torch.stack([net(x) for net in self.nets.values()], 1)


def images():
    from lightning_opt.models import MLP, CifarResNet, ConvNet, MobileNet, ViT

    stages = ((4, 8, 2, 2),)
    return {
        "mlp": MLP(num_outputs=5, input_shape=(3, 16, 16), hidden=(32, 32), norm=nn.BatchNorm1d),
        "cnn": ConvNet(num_outputs=5, in_channels=3, widths=(8, 16)),
        "resnet": CifarResNet(num_outputs=5, depth=8, in_channels=3),
        "mobile": MobileNet(num_outputs=5, stages=stages, stem_channels=8, stem_stride=1, last_channels=32),
        "concat": Joined(),
        "vit": ViT(num_outputs=5, image_size=16, patch_size=4, dim=32, depth=1, heads=2),
    }


class Reader(nn.Module):
    """A text classifier and a language model over one input."""

    def __init__(self):
        super().__init__()
        from lightning_opt.models import GPT, encoder_classifier

        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = {"model_type": "bert", "vocab_size": 64, "max_position_embeddings": 32, **sizes}
        self.minilm = encoder_classifier(source=None, num_outputs=64, config=config)
        self.gpt = GPT(vocab_size=64, context_length=16, dim=32, depth=1, heads=2, tied_embeddings=False)

    def forward(self, input_ids, attention_mask):
        return self.gpt(input_ids) + self.minilm(input_ids=input_ids, attention_mask=attention_mask)[:, None]


def texts(batch, length):
    return {"input_ids": torch.randint(0, 64, (batch, length)), "attention_mask": torch.ones(batch, length).long()}


def trained(model, inputs):
    """Move the running statistics of batch norms away from where they begin."""
    with torch.no_grad():
        for _ in range(3):
            predict(model.train(), inputs)
    return model.eval()


def layers_of(model):
    return sum(isinstance(module, nn.Linear | nn.modules.conv._ConvNd) for module in model.modules())


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    torch.manual_seed(0)
    folder, x = tmp_path_factory.mktemp("images"), torch.randn(32, 3, 16, 16)
    dense = trained(Together(images()), x)
    model = quantize(dense, x[:1], SCHEME, calibration=[x])
    entries = export(model, x[:2], folder, formats=["onnx", "openvino"], batches=[x], latency=None)
    return dense, folder, {entry["format"]: entry for entry in entries}


def test_every_layer_of_image_networks_is_of_integers_in_both_engines(seen):
    dense, folder, _ = seen
    many = layers_of(dense)
    assert many > 30
    assert fused_layers(folder / "model.onnx") == {"onnxruntime": (many, many), "openvino": (many, many)}
    assert fused_layers(folder / "model.xml") == {"openvino": (many, many)}


def test_every_layer_of_text_networks_is_of_integers_in_both_engines(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    inputs = texts(4, 12)
    dense = Reader().eval()
    model = quantize(dense, inputs, SCHEME, calibration=[inputs])
    path = write_onnx(export_program(model, inputs, batches=[texts(2, 7)], engines=True), tmp_path / "model.onnx")
    many = layers_of(dense)
    assert many > 12
    assert fused_layers(path) == {"onnxruntime": (many, many), "openvino": (many, many)}
    other = texts(3, 9)  # neither the batch nor the length that was traced
    for runner in (OnnxRunner(path, threads=1), OpenVinoRunner(path, threads=1)):
        found = compare(EagerRunner(model), runner, [other])
        assert found.argmax_agreement == 1.0
        assert found.steps <= 2


def test_engines_answer_as_the_model(seen):
    for entry in seen[2].values():
        assert entry["precision"] == "int7 weights, int8 values"
        assert entry["argmax_agreement"] >= 0.95  # untrained: ties abound
        assert entry["steps"] <= 10


def test_files_hold_integers(seen):
    """The sizes of all formats stay near one byte a weight; an fp32 file would have four."""
    dense, folder, entries = seen
    weights = sum(p.numel() for p in dense.parameters())
    assert (folder / "model.bin").stat().st_size < 1.5 * weights
    assert entries["onnx"]["size_bytes"] < 2.5 * weights
    model = onnx.load(folder / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    assert largest.data_type == onnx.TensorProto.INT8
    assert not [node for node in model.graph.node if node.domain]
    assert str(folder.home()) not in str(model)
    assert "/site-packages/" not in str(model)  # nothing of where it was made


FRESH = """
import sys, torch
program = torch.export.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(program.module()(x), sys.argv[3])
print([name for name in sys.modules if name.startswith("lightning")])
"""


def test_the_program_needs_nothing_of_this_package(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    model = quantize(trained(Joined(), x), x, "w4a8", calibration=[x])
    for entry in export(model, x[:2], tmp_path, formats=["safetensors", "torch_export"], latency=None):
        assert entry["max_abs_diff"] == 0
        assert entry["precision"] == "int4 weights, int8 values"
    torch.save(x[:5], tmp_path / "x.pt")
    command = [sys.executable, "-c", FRESH, tmp_path / "model.pt2", tmp_path / "x.pt", tmp_path / "y.pt"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    assert out.stdout.strip() == "[]"
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), model(x[:5]))


def tower(*rest):
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), *rest, nn.Linear(64, 5))


class Sequence(nn.Module):
    """A tower over sequences: products with one axis more."""

    def __init__(self):
        super().__init__()
        self.body = tower()

    def forward(self, x):
        return self.body(x.unsqueeze(1)).mean(1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(64, 48), nn.Linear(48, 48), nn.Linear(48, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.relu(self.body(self.table((x[:, :3] > 0).long().sum(1)))))[:, :5]


SEVEN = {"bits": 7}
NETS = {
    "w4a8": (tower, {"weight": {"bits": 4}}),
    "w8": (tower, {"activation": None, "weight": SEVEN}),
    "w4g32": (tower, {"activation": None, "weight": {"bits": 4, "group_size": 32}}),
    "dynamic": (tower, {"dynamic": True, "weight": SEVEN}),
    "w7a4": (tower, {"activation": {"bits": 4}, "weight": SEVEN}),
    "long": (Sequence, {"weight": SEVEN}),
    "long_w4": (Sequence, {"activation": None, "weight": {"bits": 4, "group_size": 32}}),
    "long_dynamic": (Sequence, {"dynamic": True, "weight": SEVEN}),
    "tied": (Tied, {"weight": SEVEN, "embedding": SEVEN}),
    "sparse": (tower, {"weight": SEVEN}),
    "mixed": (tower, {"weight": SEVEN}),
}
INTEGER = {"w4a8": 3, "dynamic": 3, "w7a4": 3, "long": 3, "long_dynamic": 3, "tied": 2, "sparse": 3, "mixed": 2}


@pytest.fixture(scope="module")
def schemes(tmp_path_factory):
    torch.manual_seed(0)
    net, x = Together({name: make() for name, (make, _) in NETS.items()}).eval(), torch.randn(64, 64)
    mask = torch.rand(64, 64) < 0.5
    with torch.no_grad():
        net.nets["sparse"][2].weight[mask] = 0
    rules = {f"nets.{name}.*": rule for name, (_, rule) in NETS.items()} | {"nets.mixed.2": None}
    model = quantize(net, x, Scheme(rules=rules), calibration=[x])
    folder = tmp_path_factory.mktemp("schemes")
    program = export_program(model, x, engines=True)
    path, xml = write_onnx(program, folder / "model.onnx"), write_openvino(program, folder / "model.xml")
    return model, x, mask, path, xml


def initializers(path):
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def test_layers_of_other_schemes_are_of_integers_where_engines_can(schemes):
    """A layer that was left out, and those of which only the weight is quantized, are floats in the count."""
    net, path = schemes[0], schemes[3]
    many = 3 * len(NETS) - 1
    assert fused_layers(path)["onnxruntime"] == (sum(INTEGER.values()), many)
    assert len([m for m in net.modules() if isinstance(m, nn.Linear)]) == many


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_engines_answer_as_models_of_other_schemes(schemes, engine):
    model, x, _, path, xml = schemes
    runner = OnnxRunner(path, threads=1) if engine == "onnx" else OpenVinoRunner(xml, threads=1)
    for inputs in (x, x[:1]):
        expected, found = EagerRunner(model).predict(inputs), runner.predict(inputs)
        for index, name in enumerate(NETS):
            difference = (expected - found)[:, index].abs().max()
            step = (expected[:, index].max() - expected[:, index].min()) / (15 if "a4" in name else 255)
            assert difference <= 8 * step, (name, float(difference / step))


def test_no_two_layers_share_the_zero_points_of_a_weight(schemes, seen):
    """ONNX Runtime derives names from those of a layer's constants, and cannot load a file in which two share one."""
    for path in (schemes[3], seen[1] / "model.onnx"):
        graph = onnx.load(path).graph
        many = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims) > 1}
        read = [node.input[2] for node in graph.node if node.op_type == "DequantizeLinear" and len(node.input) > 2]
        read = [name for name in read if name in many]
        assert len(read) > 10
        assert len(set(read)) == len(read)


def test_integers_of_4_bits_take_4_bits(schemes):
    held = initializers(schemes[3])
    for name, bits in {"w4a8": 4, "w4g32": 4, "w8": 8, "dynamic": 8}.items():
        (tensor,) = [
            t
            for key, t in held.items()
            if key.startswith(f"model.nets.{name}.2.weight") and len(t.dims) == 2 and np.prod(t.dims) == 64 * 64
        ]
        assert len(tensor.raw_data) == 64 * 64 * bits // 8


def test_zero_weights_are_zero_in_the_file(schemes):
    mask = schemes[2].numpy()
    (tensor,) = [
        t for key, t in initializers(schemes[3]).items() if "sparse.2.weight" in key and np.prod(t.dims) == 4096
    ]
    q = onnx.numpy_helper.to_array(tensor)
    assert (q[mask] == 0).all()
    assert (q[~mask] != 0).mean() > 0.9


def test_a_table_that_is_also_a_head_is_held_once(schemes):
    tensors = [t for t in initializers(schemes[3]).values() if sorted(t.dims) == [48, 64]]
    assert [tensor.data_type for tensor in tensors] == [onnx.TensorProto.INT8]


def test_a_model_that_rounds_is_converted_in_a_copy(tmp_path):
    from lightning_opt.quantization.state import is_converted

    net, x = tower().eval(), torch.randn(16, 64)
    model = quantize(net, x, SCHEME, calibration=[x], convert=False)
    expected = model(x)
    (entry,) = export(model, x, tmp_path, formats=["safetensors"], latency=None, batches=[x])
    assert not is_converted(model)
    assert torch.equal(model(x), expected)
    assert entry["max_abs_diff"] == 0
    assert entry["size_bytes"] < 2 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("converted", [False, True])
def test_an_artifact_stays_whole(tmp_path, converted):
    import lightning_opt
    from lightning_opt.export import deployable, save_artifact
    from lightning_opt.models import MLP

    torch.manual_seed(0)
    arguments, x = {"in_features": 64, "num_outputs": 5, "hidden": [64]}, torch.randn(16, 64)
    model = quantize(MLP(**arguments).eval(), x, SCHEME, calibration=[x], convert=False)
    answers = model(x)
    model = deployable(model) if converted else model
    save_artifact(tmp_path, model, architecture={"_target_": "lightning_opt.models.MLP", **arguments})
    (entry,) = export(model, x, tmp_path, formats=["safetensors"], latency=None, batches=[x])
    assert entry["max_abs_diff"] == 0
    assert torch.equal(lightning_opt.load(tmp_path)(x), answers)
    assert (entry["size_bytes"] < 8_000) == converted
