"""Networks and helpers for the tests of quantization in training; the training itself is that of `prune_job`."""

import copy
from functools import partial

import torch
from prune_job import Stranger, fit, make_run
from torch import nn

from lightning_opt.callbacks import Quantize
from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.state import quantizers

FEATURES = 16
START, FREEZE = 6, 12  # of 18 steps
QAT = partial(Quantize, start=f"{START} steps", freeze_observers=f"{FREEZE} steps", freeze_batch_norm=f"{FREEZE} steps")


class Residual(nn.Module):
    """Convolutions with batch norm, a residual add, pooling and a head over `(B, 16)`."""

    def __init__(self, width=8, norm=nn.BatchNorm2d, dropout=0.1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), norm(width))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x.reshape(-1, 1, 4, 4))
        x = torch.relu(x + self.two(self.one(x)))
        return self.head(self.drop(x.mean((2, 3))))


def module(make=None, net=Residual, lr=0.01):
    return Stranger(net(), make=make, lr=lr)


def run_of(folder, *callbacks, module=module, **options):
    return make_run(folder, *callbacks, module=module, features=FEATURES, **options)


def train(folder, *callbacks, **options):
    return fit(run_of(folder, *callbacks, **{"save": False, **options}))


def answers(net, samples=32):
    """Return what a network answers in eval mode."""
    x = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return net.eval()(x)


def converted(net):
    return convert(copy.deepcopy(net).eval())


def levels(tensor, dim=0):
    """Return the most values that any index along `dim` takes."""
    return max(len(row.unique()) for row in tensor.detach().movedim(dim, 0).flatten(1))


def state_of(net):
    """Return all numbers of a network's quantizers by name."""
    found = {}
    for name, quantizer in quantizers(net).items():
        found |= {f"{name}.{key}": value.detach().clone() for key, value in quantizer.state_dict().items()}
    return found


def of(run, kind=Quantize):
    """Return the callback of a run."""
    return next(callback for callback in run.trainer.callbacks if isinstance(callback, kind))
