"""GPTQ against an optimal brain quantizer that is worked row by row in float64 with a new inverse for each column."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.pruning.inverse import inverse_factor
from lightning_opt.quantization.gptq import GPTQ, solve
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.rounding import Lattice
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import quantizers


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows=400, width=16, seed=0):
    """Inputs of different sizes that hang together, as activations do."""
    mixed = draw(rows, width, seed=seed) @ draw(width, width, seed=seed + 1)
    return mixed * torch.linspace(0.2, 3.0, width)


def lattice_for(weight, bits=4, width=None):
    """Return the symmetric lattice of each output's (or each run's) largest weight."""
    width = width or weight.shape[-1]
    runs = weight.unflatten(-1, (-1, width))
    qmax = 2 ** (bits - 1) - 1
    scale = runs.abs().amax(-1) / qmax
    return Lattice(scale, torch.zeros_like(scale), -qmax, qmax, width)


def to_lattice(value, scale, qmax):
    return np.clip(np.round(value / scale), -qmax, qmax) * scale


def brain_quantizer(weight, inputs, scales, qmax, order, damping=0.01):
    """Round one weight after the other; move the rest by -e_j / (H^-1)_jj * (H^-1)_j, H^-1 worked anew."""
    x = inputs.double().numpy()
    hessian = x.T @ x
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    result = np.zeros(weight.shape)
    for row, out, scale in zip(weight.double().numpy().copy(), result, scales, strict=True):
        for place, j in enumerate(order):
            left = order[place:]
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            out[j] = to_lattice(row[j], scale[j], qmax)
            row[left] -= (row[j] - out[j]) / inverse[0, 0] * inverse[0]
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("block_size", "width"), [(1, 16), (5, 16), (128, 16), (128, 4), (6, 4)])
def test_solve_equals_the_brain_quantizer(act_order, block_size, width):
    weight, inputs = draw(6, 16, seed=2), correlated()
    lattice, gram = lattice_for(weight[None], width=width), inputs.T @ inputs
    new, same = solve(weight[None], gram[None], lattice, act_order=act_order, block_size=block_size)
    order = np.argsort(-np.diag(gram.numpy()), kind="stable") if act_order else np.arange(16)
    scales = lattice.scale[0].repeat_interleave(width, dim=-1).double().numpy()
    wanted = brain_quantizer(weight, inputs, scales, 7, order)
    np.testing.assert_allclose(new[0].numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert same is lattice
    assert not np.allclose(wanted, to_lattice(weight.double().numpy(), scales, 7))  # something was corrected


def test_groups_of_a_convolution_are_layers_of_their_own():
    weight, inputs = draw(3, 4, 8, seed=2), [correlated(width=8, seed=seed) for seed in range(3)]
    gram = torch.stack([x.T @ x for x in inputs])
    lattice = lattice_for(weight)
    together, _ = solve(weight, gram, lattice, act_order=True)
    for g in range(3):
        part = Lattice(lattice.scale[g : g + 1], lattice.zero_point[g : g + 1], -7, 7, 8)
        alone, _ = solve(weight[g : g + 1], gram[g : g + 1], part, act_order=True)
        assert torch.equal(together[g], alone[0])


def test_refit_takes_the_scale_of_a_run_from_its_corrected_weights():
    weight, inputs = draw(6, 16, seed=2), correlated()
    gram, seen = (inputs.T @ inputs)[None], []

    def refit(run):
        seen.append(run.clone())
        return run.abs().amax(-1) / 7, torch.zeros(run.shape[:2])

    new, lattice = solve(weight[None], gram, lattice_for(weight[None], width=4), refit=refit, block_size=6)
    assert torch.equal(seen[0], weight[None, :, :4])
    assert all(not torch.equal(run, weight[None, :, 4 * i : 4 * i + 4]) for i, run in enumerate(seen[1:], 1))
    assert torch.equal(lattice.scale, torch.stack([run.abs().amax(-1) / 7 for run in seen], -1))
    levels = new / lattice.scale.repeat_interleave(4, -1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-5)
    assert levels.abs().max() <= 7.001


@pytest.mark.parametrize("bits", [3, 4])
def test_outputs_change_less_than_by_rounding_to_nearest(bits):
    weight, inputs = draw(1, 32, 24, seed=2), correlated(width=24)
    gram, lattice = (inputs.T @ inputs)[None], lattice_for(weight, bits)
    x = inputs.double().numpy()
    nearest = np.linalg.norm(x @ (lattice.nearest(weight) - weight)[0].double().numpy().T) ** 2
    for act_order, limit in ((False, 0.8), (True, 0.6)):
        new, _ = solve(weight, gram, lattice, act_order=act_order)
        error = np.linalg.norm(x @ (new - weight)[0].double().numpy().T) ** 2
        assert error < limit * nearest


def test_zeros_stay_and_inputs_never_seen_spread_nothing():
    weight, inputs = draw(4, 8, seed=2), correlated(width=8)
    weight[:, ::3] = 0.0
    inputs[:, 4] = 0.0
    new, _ = solve(weight[None], (inputs.T @ inputs)[None], lattice_for(weight[None]), act_order=True)
    assert (new[0][weight == 0] == 0).all()
    assert torch.equal(new[..., 4], lattice_for(weight[None]).nearest(weight[None])[..., 4])


def test_a_singular_gram_is_damped_and_nan_is_refused():
    inputs = torch.ones(50, 6)
    factor = inverse_factor((inputs.T @ inputs)[None], 1e-9)
    assert torch.isfinite(factor).all()
    with pytest.raises(ValueError, match="no Cholesky factor even with much damping"):
        inverse_factor(torch.full((1, 4, 4), torch.nan), 0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTQ(damping=0.0), "damping must be more than 0, not 0.0"),
        (lambda: GPTQ(block_size=0), "block_size must be at least 1, not 0"),
        (lambda: solve(draw(1, 4, 8), draw(1, 7, 7), lattice_for(draw(1, 4, 8))), r"do not fit a gram of \(1, 7, 7\)"),
        (
            lambda: solve(
                draw(1, 4, 8), torch.eye(8)[None], lattice_for(draw(1, 4, 8)), act_order=True, refit=lambda run: run
            ),
            "act_order takes columns out of the order",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Net(nn.Module):
    """A convolution with a batch norm, a depthwise and a grouped one, two linear layers that read one tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.left, self.right = nn.Linear(12, 16), nn.Linear(12, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.grouped(torch.relu(self.depthwise(x)))).mean((2, 3))
        return self.head(torch.relu(self.left(x)) + torch.relu(self.right(x)))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2.0)
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.weight[3] = 0.0
    return model.eval()


PER_TENSOR = Scheme(weight=Grid(bits=4, symmetric=False, signed=False), activation=None)


def images(count=4):
    return [draw(8, 3, 12, 12, seed=i) for i in range(count)]


@pytest.mark.parametrize("scheme", ["w4a8", "w4g9", "w3", PER_TENSOR])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_model_answers_more_like_the_float_model_and_converts_bit_equal(scheme, act_order):
    model, x = net(), torch.cat(images())
    plain = quantize(model, x[:1], scheme, calibration=images())
    improve = [GPTQ(act_order=act_order)]
    found = quantize(model, x[:1], scheme, calibration=images(), improve=improve, convert=False)
    converted = quantize(model, x[:1], scheme, calibration=images(), improve=improve)
    with torch.no_grad():
        assert torch.equal(found(x), converted(x))
        wanted = model(x)
        ours, theirs = (one(x) - wanted for one in (converted, plain))
    assert ours.norm() < 0.7 * theirs.norm()
    assert torch.equal(model.conv.weight, net().conv.weight)  # the user's model is as it was


def test_weights_lie_on_the_grid_and_the_grid_is_fixed():
    found = quantize(net(), images()[0], "w4a8", calibration=images(), improve=[GPTQ()], convert=False)
    for name in ("depthwise", "grouped", "left", "right", "head"):
        layer = getattr(found, name)
        quantizer = layer.weight_quantizer
        levels = layer.weight / quantizer.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert not any(quantizer.observing for quantizer in quantizers(found).values())


def test_transformers_conv1d_is_solved_along_its_inputs():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    turned, linear = Conv1D(24, 24), nn.Linear(24, 24)
    with torch.no_grad():
        turned.weight.normal_()
        linear.weight.copy_(turned.weight.T)
        linear.bias.copy_(turned.bias)
    rows = correlated(width=24)
    answers = [
        quantize(nn.Sequential(layer), rows[:1], "w4", calibration=rows.split(100), improve=[GPTQ()])(rows)
        for layer in (turned, linear)
    ]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_solved_is_named():
    table = nn.Sequential(nn.Embedding(7, 4))
    ids = torch.arange(7)[None]
    with pytest.raises(ConfigError, match="GPTQ finds no layer to rewrite in this model"):
        quantize(table, ids, "w4", calibration=[ids], improve=[GPTQ()])
    with pytest.raises(ConfigError, match=r"GPTQ finds no layer to rewrite .*of 8-bit floats"):
        quantize(nn.Sequential(nn.Linear(4, 4)), draw(2, 4), "fp8", calibration=[draw(2, 4)], improve=[GPTQ()])


def test_layers_are_visited_in_the_order_of_their_calls_on_rounded_inputs():
    """The head's weights are what solving it alone gives on the inputs that the rewritten layers before it give."""
    scheme = Scheme.parse("w3")
    found = quantize(net(), images()[0], scheme, calibration=images(), improve=[GPTQ()], convert=False)
    given = []
    found.head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        for x in images():
            found(x)
    rows, weight = torch.cat(given), net().head.weight.detach()[None]
    alone, _ = solve(weight, (rows.T @ rows)[None], lattice_for(weight, 3), act_order=True)
    torch.testing.assert_close(found.head.weight.detach(), alone[0], rtol=1e-4, atol=1e-5)
