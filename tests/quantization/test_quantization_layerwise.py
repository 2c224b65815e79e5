"""Layers are visited in the order of their calls, with what they read, and rows of weights go there and back."""

import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.state import evaluation_mode
from lightning_opt.pruning.inputs import reader_for
from lightning_opt.quantization.layerwise import Stage, inputs_of, paired_inputs_of, stages
from lightning_opt.quantization.rounding import Lattice, from_rows, to_rows


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Layers are held in another order than that of their calls; one is called twice, one never."""

    def __init__(self):
        super().__init__()
        self.last, self.twice, self.never, self.right, self.left = (nn.Linear(4, 4) for _ in range(5))
        self.passes = 0

    def forward(self, x):
        x = self.left(x) * self.right(x)
        x = self.twice(torch.relu(self.twice(x)))
        self.passes += 1
        return self.last(input=torch.relu(x))


def test_stages_are_in_the_order_of_calls():
    found = stages(Net(), ["last", "twice", "never", "right", "left"], draw(2, 4))
    assert found == (Stage(("left", "right"), 2), Stage(("twice",), 2), Stage(("last",), 1))


def test_inputs_are_those_of_every_call_and_the_run_ends_there():
    model, x = Net().train(), draw(2, 4)
    (first,) = inputs_of(model, Stage(("left",), 1), x)["left"]
    assert torch.equal(first, x)
    once, again = inputs_of(model, Stage(("twice",), 2), x)["twice"]
    assert torch.equal(once, model.left(x) * model.right(x))
    assert torch.equal(again, torch.relu(model.twice(once)))
    assert model.passes == 0
    assert torch.equal(inputs_of(model, Stage(("last",), 1), x)["last"][0], torch.relu(model.twice(again)))
    assert model.training
    assert not any(part._forward_pre_hooks for part in model.modules())


class Routed(nn.Module):
    """What a layer is given depends on values."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.layer = shift, nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x[x[:, 0] > self.shift])


def test_pairs_of_models_and_what_they_must_agree_on():
    pairs = list(paired_inputs_of(Routed(-9.0), Routed(-8.0), Stage(("layer",), 1), [draw(3, 4), draw(5, 4)]))
    assert [(path, len(x), torch.equal(x, wanted)) for path, x, wanted in pairs] == [
        ("layer", 3, True),
        ("layer", 5, True),
    ]
    with pytest.raises(ConfigError, match="layer layer is given other shapes once values are rounded; exclude it"):
        list(paired_inputs_of(Routed(-9.0), Routed(0.0), Stage(("layer",), 1), [draw(30, 4)]))


def test_modes_are_given_back_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), evaluation_mode(model):
        model(draw(1, 3))
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("shape", "output_dim", "groups"), [((6, 4), 0, 1), ((4, 6), 1, 1), ((6, 2, 3, 3), 0, 3), ((6, 3, 5), 0, 2)]
)
def test_rows_there_and_back(shape, output_dim, groups):
    weight = draw(*shape).to(torch.bfloat16)
    rows = to_rows(weight.float(), output_dim=output_dim, groups=groups)
    assert rows.shape == (groups, 6 // groups, weight.numel() // 6)
    assert torch.equal(from_rows(rows, weight, output_dim=output_dim), weight)


def test_rows_of_a_convolution_meet_the_rows_of_its_inputs():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    x = draw(2, 4, 7, 7)
    product = reader_for(conv, "weight").rows(x) @ to_rows(conv.weight, groups=2).mT  # (groups, rows, outputs)
    by_rows = product.movedim(0, 1).flatten(1).detach()
    wanted = conv(x).movedim(1, -1).flatten(0, -2).detach()
    torch.testing.assert_close(by_rows, wanted, rtol=1e-5, atol=1e-5)


def test_lattice_of_runs():
    scale = torch.tensor([[[0.5, 2.0]]])
    lattice = Lattice(scale, torch.tensor([[[0.0, 1.0]]]), -2, 3, 3)
    found = lattice.nearest(torch.tensor([[[0.3, -9.0, 9.0, 2.9, -20.0]]]))
    assert found.tolist() == [[[0.5, -1.0, 1.5, 2.0, -6.0]]]
