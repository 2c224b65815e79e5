"""Layers timed inside engines: the file is the layer, and the time is that of its kernels."""

import pytest
import torch
from torch import nn

from lightning_opt.pruning.engine_times import onnx_layer, time_in_onnxruntime, time_in_openvino

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LAYERS = {
    "strided": (nn.Conv2d(6, 10, 3, stride=2, padding=1), (1, 6, 9, 9)),
    "without bias": (nn.Conv2d(8, 8, 1, bias=False), (2, 8, 5, 5)),
    "depthwise, dilated": (nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), (1, 8, 9, 9)),
    "one dimension": (nn.Conv1d(4, 6, 3, padding=1), (1, 4, 11)),
    "transposed": (nn.ConvTranspose2d(6, 4, 2, stride=2), (1, 6, 5, 5)),
    "linear": (nn.Linear(12, 7), (2, 5, 12)),
    "linear without bias": (nn.Linear(12, 7, bias=False), (5, 12)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_is_the_layer(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    session = onnxruntime.InferenceSession(onnx_layer(layer, x), providers=["CPUExecutionProvider"])
    answer = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(answer, layer(x).relu().detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("timer", [time_in_onnxruntime, time_in_openvino])
def test_eight_times_the_work_takes_longer(timer):
    pytest.importorskip("openvino")
    small, large = (timer(nn.Conv2d(width, 128, 3, padding=1), torch.zeros(1, width, 28, 28)) for width in (16, 128))
    assert 0.0 < 2 * small < large < 1e3


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="padded with zeros"):
        onnx_layer(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="padding='same'"):
        onnx_layer(nn.Conv2d(2, 2, 3, padding="same"), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="linear layer, not LayerNorm"):
        onnx_layer(nn.LayerNorm(4), torch.zeros(1, 4))
