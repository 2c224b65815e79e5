"""Each kind of layer: rounded in eval mode and converted it gives the same answers, bit for bit."""

import itertools

import pytest
import torch
from layer_helpers import ACTIVATION, insert, shake, trained
from torch import nn

from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers import IntegerLayer, LayerPlan


def _images(*size):
    return torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(1))


def _conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


CASES = {
    "conv1d": lambda: (nn.Conv1d(6, 4, 3), _images(9)),
    "conv2d": lambda: (nn.Conv2d(6, 4, 3, stride=2, dilation=2), _images(9, 8)),
    "conv2d_same": lambda: (nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"), _images(7, 8)),
    "conv2d_grouped": lambda: (nn.Conv2d(6, 4, 3, groups=2, padding=1), _images(7, 8)),
    "conv2d_depthwise": lambda: (nn.Conv2d(6, 6, 3, groups=6, bias=False), _images(7, 8)),
    "conv3d": lambda: (nn.Conv3d(6, 4, 2), _images(4, 3, 5)),
    "transposed1d": lambda: (nn.ConvTranspose1d(6, 4, 3), _images(9)),
    "transposed2d": lambda: (nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2), _images(5, 4)),
    "transposed3d": lambda: (nn.ConvTranspose3d(6, 4, 2, bias=False), _images(3, 4, 2)),
    "linear": lambda: (nn.Linear(6, 5), torch.randn(3, 2, 6)),
    "linear_no_bias": lambda: (nn.Linear(6, 5, bias=False), torch.randn(3, 6)),
    "embedding": lambda: (nn.Embedding(11, 6, padding_idx=2), torch.tensor([[1, 2, 3], [10, 0, 1]])),
    "bag": lambda: (nn.EmbeddingBag(11, 6, mode="mean"), torch.tensor([[1, 2, 3], [10, 0, 1]])),
    "bag_padded": lambda: (nn.EmbeddingBag(11, 6, mode="sum", padding_idx=1), torch.tensor([[1, 2, 3], [10, 0, 1]])),
    "conv1d_of_transformers": lambda: (_conv1d_of_transformers(), torch.randn(3, 2, 6)),
}
GRIDS = {
    "channel": {"axis": 0},
    "tensor": {},
    "group": {"axis": 0, "group_size": 4},
    "affine": {"axis": 0, "symmetric": False},
    "affine_unsigned": {"axis": 0, "symmetric": False, "signed": False},
    "float8": {"axis": 0, "dtype": "float8_e4m3fn"},
}
VARIANTS = [
    *itertools.product(CASES, ["channel"], [2, 3, 4, 5, 8]),
    *itertools.product(CASES, ["tensor", "group", "affine_unsigned"], [4, 8]),
    *itertools.product(["conv2d", "linear", "embedding"], ["affine"], [2, 4, 8]),
    *itertools.product(["conv2d", "linear", "embedding"], ["float8"], [8]),
]


@pytest.mark.parametrize(("case", "how", "bits"), VARIANTS)
def test_integers_answer_as_rounded_weights_do(case, how, bits):
    torch.manual_seed(0)
    layer, x = CASES[case]()
    table = isinstance(layer, nn.Embedding | nn.EmbeddingBag)
    activation = {} if table else {"input": ACTIVATION, "output": ACTIVATION}
    model = nn.Sequential(layer)
    insert(model, QuantizeEdit({"0": LayerPlan(weight=Grid(bits=bits, **GRIDS[how]), **activation)}))
    before = model.eval()(x)
    expected = trained(model, x)(x)
    assert not torch.equal(expected, before), "something is rounded"
    convert(model)
    assert isinstance(model[0], IntegerLayer)
    assert not model[0].stored.dtype.is_floating_point or how == "float8"
    assert torch.equal(model(x), expected)
    dense = [t for t in model.state_dict().values() if t.dtype == torch.float32 and t.dim() > 1]
    assert not dense, "no float copy of the weight is kept"


@pytest.mark.parametrize("case", ["conv1d", "conv2d", "conv2d_depthwise", "transposed1d", "conv3d"])
@pytest.mark.parametrize("bits", [3, 8])
def test_integers_answer_as_rounded_weights_do_with_a_batch_norm(case, bits):
    torch.manual_seed(0)
    layer, x = CASES[case]()
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()](layer.out_channels)
    model = shake(nn.Sequential(layer, norm, nn.ReLU()))
    plan = LayerPlan(weight=Grid(bits=bits, axis=0), input=ACTIVATION, output=ACTIVATION, batch_norm="1")
    expected = trained(insert(model, QuantizeEdit({"0": plan})), x)(x)
    convert(model)
    assert torch.equal(model(x), expected)
    assert not list(model[1].parameters())
    assert not list(model[1].buffers())


@pytest.mark.parametrize("case", ["conv2d", "linear", "embedding", "bag"])
@pytest.mark.parametrize("how", ["channel", "tensor", "group"])
def test_learned_steps_convert_too(case, how):
    torch.manual_seed(0)
    layer, x = CASES[case]()
    model = nn.Sequential(layer)
    plan = LayerPlan(weight=Grid(bits=4, **GRIDS[how]), learnable=True)
    trained(insert(model, QuantizeEdit({"0": plan})), x)
    quantizer = model[0].weight_quantizer
    assert quantizer.scale.requires_grad
    assert quantizer.scale.dim() == 1
    assert float(quantizer.scale.grad.abs().max()) > 0, "the steps learn"
    expected = model(x)
    assert torch.equal(convert(model)(x), expected)
    assert not list(model.parameters())


def test_per_channel_scales_run_along_the_outputs_of_every_kind():
    outputs = {"conv2d_grouped": 4, "transposed1d": 4, "linear": 5, "conv1d_of_transformers": 5, "embedding": 11}
    for case, count in outputs.items():
        model = nn.Sequential(CASES[case]()[0])
        insert(model, QuantizeEdit({"0": LayerPlan(weight=Grid(axis=0))}))
        assert model[0].weight_quantizer.scale.numel() == count, case


def test_weights_are_rounded_as_a_formula_says():
    """The transposed convolution is the one whose channels lie along axis 1."""
    torch.manual_seed(0)
    layer, x = CASES["transposed1d"]()
    model = nn.Sequential(layer)
    insert(model, QuantizeEdit({"0": LayerPlan(weight=Grid(bits=4, axis=0))}))
    answer = trained(model, x, steps=0)(x)
    weight = layer.weight.detach().double()
    scale = weight.abs().amax(dim=(0, 2), keepdim=True) / 7
    expected = nn.functional.conv_transpose1d(x.double(), (weight / scale).round() * scale, layer.bias.double())
    torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=1e-5)


def test_dynamic_inputs_convert():
    torch.manual_seed(0)
    layer, x = CASES["linear"]()
    model = nn.Sequential(layer)
    insert(model, QuantizeEdit({"0": LayerPlan(weight=Grid(axis=0), input=ACTIVATION, dynamic=True)}))
    expected = trained(model, x)(x)
    assert torch.equal(convert(model)(x), expected)
    step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    exact = nn.functional.linear(x, model[0].float_weight(), layer.bias)
    worst = step / 2 * model[0].float_weight().abs().sum(1).max()
    assert 0 < (expected - exact).abs().max().item() <= worst.item()


def test_the_memory_format_of_a_weight_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3)).to(memory_format=torch.channels_last)
    x = _images(9, 8).to(memory_format=torch.channels_last)
    insert(model, QuantizeEdit({"0": LayerPlan(weight=Grid(bits=4, axis=0))}))
    expected = trained(model, x)(x)
    assert torch.equal(convert(model)(x), expected)
    assert model[0].float_weight().is_contiguous(memory_format=torch.channels_last)
