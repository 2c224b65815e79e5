"""Small nets and plans that the tests of quantized layers share."""

import torch
from torch import nn

from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers import LayerPlan
from lightning_opt.quantization.state import quantizers, set_observing, switch_on
from lightning_opt.surgery import record

ACTIVATION = Grid(bits=8, symmetric=False, signed=False)


def weight_grid(bits=8, **values):
    return Grid(bits=bits, axis=0, **values)


class TiedNet(nn.Module):
    """Embedding, convolution with batch norm, linear layers; the last is tied to the embedding."""

    def __init__(self, words=24, width=8, channels=6):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.conv = nn.Conv1d(width, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(channels)
        self.act = nn.ReLU()
        self.hidden = nn.Linear(channels, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids).transpose(1, 2)
        x = self.act(self.norm(self.conv(x))).mean(-1)
        return self.head(self.hidden(x))


IDS = torch.arange(28).reshape(4, 7) % 24


def tied_edit(bits=8, grid=None, **values):
    plan = {"weight": grid or weight_grid(bits), **values}
    return QuantizeEdit(
        {
            "table": LayerPlan(**plan),
            "conv": LayerPlan(input=ACTIVATION, output=ACTIVATION, batch_norm="norm", **plan),
            "hidden": LayerPlan(input=ACTIVATION, output=ACTIVATION, **plan),
            "head": LayerPlan(**plan),
        },
        {"act": [["output", 0, {"grid": ACTIVATION.to_dict()}]]},
    )


def insert(model, edit):
    edit.apply(model)
    record(model, edit)
    return model


def shake(model, seed=0):
    """Give norms and biases values that nothing is silent under."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5, generator=generator)
                nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    return model


def trained(model, x, steps=2):
    """Switch quantizers on and train a little, so that every range is known; in eval mode afterwards."""
    set_observing(model, True)
    model.train()
    model(x)
    switch_on(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    assert all(q.is_fitted or q.observer is None for q in quantizers(model).values())
    return model.eval()
