"""SparseGPT against an optimal brain surgeon that is worked row by row in float64, and one-shot pruning of models."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.pruning.criteria import Magnitude, Random, Snip, Wanda
from lightning_opt.pruning.patterns import NM, Block, Element, Rows
from lightning_opt.pruning.solvers import SlabChooser, SparseGPT, prune_with
from lightning_opt.pruning.sparse_gpt import keep_largest


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows=400, width=16, seed=0):
    """Inputs of different sizes that hang together, as activations do."""
    mixed = draw(rows, width, seed=seed) @ draw(width, width, seed=seed + 1)
    return mixed * torch.linspace(0.2, 3.0, width)


def surgeon(weight, inputs, mask, damping=0.01):
    """Remove each row's masked weights from left to right; correct what comes later by the inverse Hessian.

    LeCun's and Hassibi's formula on the weights that are not done yet: -w_j / (H^-1)_jj * (H^-1)_j, with H^-1 computed
    anew each time.
    """
    x = inputs.double().numpy()
    hessian = x.T @ x
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    new = weight.double().numpy().copy()
    for row, keep in zip(new, mask.numpy(), strict=True):
        for j in range(len(row)):
            inverse = np.linalg.inv(hessian[j:, j:])
            if not keep[j]:
                row[j:] -= row[j] / inverse[0, 0] * inverse[0]
                row[j] = 0.0
    return new


def error(weight, new, inputs):
    x = inputs.double().numpy()
    return np.linalg.norm(x @ (weight.double().numpy() - np.asarray(new, dtype=float)).T) ** 2


def best_error(weight, mask, inputs):
    """Return what no choice of the kept weights can beat: least squares, row by row."""
    x, total = inputs.double().numpy(), 0.0
    for row, keep in zip(weight.double().numpy(), mask.numpy(), strict=True):
        left = np.linalg.lstsq(x[:, keep], x @ row, rcond=None)[0]
        total += np.linalg.norm(x @ row - x[:, keep] @ left) ** 2
    return total


@pytest.mark.parametrize("block_size", [1, 4, 7, 16, 128])
def test_solve_equals_the_surgeon_for_fixed_masks(block_size):
    weight, inputs = draw(6, 16, seed=2), correlated()
    mask = draw(6, 16, seed=3) > 0
    places = iter(range(0, 16, block_size))

    def fixed(scores):
        start = next(places)
        return mask[:, start : start + scores.shape[1]]

    new, found = SparseGPT(block_size=block_size).solve(weight, inputs.T @ inputs, fixed)
    assert torch.equal(found, mask)
    assert (new[~mask] == 0).all()
    np.testing.assert_allclose(new.numpy(), surgeon(weight, inputs, mask), rtol=2e-3, atol=2e-4)
    assert not np.allclose(new.numpy(), (weight * mask).numpy(), atol=1e-2)  # what is kept was corrected


@pytest.mark.parametrize("pattern", [Element(), NM(2, 4), NM(1, 4), Block(1, 4)])
def test_reconstruction_is_between_the_optimum_and_magnitude_and_wanda(pattern):
    weight, inputs = draw(32, 16, seed=2), correlated()
    chooser = SlabChooser(pattern, 0.5)
    new, mask = SparseGPT().solve(weight, inputs.T @ inputs, chooser)
    density = 0.5 if pattern.density is None else pattern.density
    assert mask.float().mean().item() == pytest.approx(density)
    ours = error(weight, new.numpy(), inputs)
    norm = torch.from_numpy(np.linalg.norm(inputs.numpy(), axis=0))
    for scores in (weight.abs(), weight.abs() * norm):
        assert ours < error(weight, (weight * chooser(scores)).numpy(), inputs)
    assert ours < error(weight, (weight * mask).numpy(), inputs)
    assert best_error(weight, mask, inputs) <= ours < 2.0 * best_error(weight, mask, inputs)
    # Its choice is good as well: the best correction of a random mask is worse.
    lots = keep_largest(draw(32, 16, seed=5), round(16 * density))
    assert ours < best_error(weight, lots, inputs)


def test_n_of_m_holds_in_every_group_and_blocks_are_whole():
    weight, inputs = draw(8, 32, seed=2), correlated(width=32)
    gram = inputs.T @ inputs
    new, mask = SparseGPT(block_size=8).solve(weight, gram, SlabChooser(NM(2, 4)))
    assert (mask.view(8, -1, 4).sum(-1) == 2).all()
    assert (new.view(8, -1, 4) != 0).sum(-1).max() == 2
    _, mask = SparseGPT().solve(weight, gram, SlabChooser(Block(2, 4), 0.75))
    blocks = mask.view(4, 2, 8, 4).sum(dim=(1, 3))
    assert set(blocks.unique().tolist()) == {0, 8}
    assert (blocks > 0).sum() == 8


def test_inputs_that_were_never_seen_go_first_and_do_no_harm():
    weight, inputs = draw(4, 8, seed=2), correlated(width=8)
    inputs[:, 3] = 0.0
    new, mask = SparseGPT().solve(weight, inputs.T @ inputs, SlabChooser(Element(), 0.125))
    assert not mask[:, 3].any()
    assert error(weight, new.numpy(), inputs) == pytest.approx(0.0, abs=1e-3)


def test_more_damping_corrects_less():
    weight, inputs = draw(4, 8, seed=2), correlated(width=8)
    gram, moved = inputs.T @ inputs, []
    for damping in (0.01, 1e6):
        new, mask = SparseGPT(damping=damping).solve(weight, gram, SlabChooser(Element(), 0.5))
        moved.append(((new - weight)[mask]).abs().max().item())
    assert moved[0] > 0.1 > 1e-4 > moved[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGPT(damping=0.0), "damping must be more than 0, not 0.0"),
        (lambda: SparseGPT(block_size=0), "block_size must be at least 1, not 0"),
        (lambda: SlabChooser(Element(), 1.0), "sparsity must be at least 0 and less than 1, not 1.0"),
        (lambda: SparseGPT().solve(draw(4, 8), draw(7, 7), SlabChooser(Element())), r"does not fit a gram of \(7, 7\)"),
        (
            lambda: SparseGPT(block_size=6).solve(draw(4, 8), torch.eye(8), SlabChooser(NM(2, 4))),
            "block_size must be a multiple of the pattern's 4 columns, not 6",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Conv1D(nn.Module):
    """Keeps its weight as `(in, out)`; square, so that no shape tells which is which."""

    def __init__(self, width):
        super().__init__()
        self.nf = width
        self.weight, self.bias = nn.Parameter(draw(width, width, seed=8) / width**0.5), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    """Query and key read the same tensor; the convolution and the layer after them read what those write."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.turned = Conv1D(16)
        self.head = nn.Linear(16, 11)
        self.calls = 0

    def forward(self, ids):
        self.calls += 1
        x = self.embedding(ids)
        x = torch.relu(self.query(x)) * torch.sigmoid(self.key(x))
        x = torch.relu(self.conv(x.mT).mT)
        return self.head(torch.relu(self.turned(x)))


def net():
    torch.manual_seed(0)
    return Net()


def ids(count=3):
    return [torch.randint(0, 11, (8, 12), generator=torch.Generator().manual_seed(i)) for i in range(count)]


PRUNED = ["query.weight", "key.weight", "conv.weight", "turned.weight"]


def divergence(model, dense, batches):
    with torch.no_grad():
        return sum((model(x) - dense(x)).double().square().mean().item() for x in batches)


@pytest.mark.parametrize("pattern", [Element(), NM(2, 4)])
def test_one_shot_order_of_the_methods(pattern):
    """The outputs of a whole model move least with SparseGPT, and with any method less than by lot."""
    dense, moved = net(), {}
    for by in (SparseGPT(), Wanda(), Magnitude(), Random()):
        model = net()
        masks = prune_with(model, ids(), by, pattern=pattern, sparsity=0.5, exclude=["head.*"])
        assert list(masks) == PRUNED
        parameters = dict(model.named_parameters())
        for name, mask in masks.items():
            assert mask.shape == parameters[name].shape
            assert mask.float().mean().item() == pytest.approx(0.5)
            assert (parameters[name][~mask] == 0).all()
        for name in ("embedding.weight", "head.weight", "conv.bias"):
            assert torch.equal(parameters[name], dict(dense.named_parameters())[name])
        moved[type(by).__name__] = divergence(model, dense, ids())
    assert moved["SparseGPT"] < min(moved["Wanda"], moved["Magnitude"])
    assert max(moved["Wanda"], moved["Magnitude"]) < moved["Random"]


def test_patterns_run_along_the_inputs_of_every_layout():
    model = net()
    prune_with(model, ids(), SparseGPT(), pattern=NM(2, 4), exclude=["head.*"])
    assert ((model.conv.weight != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    assert ((model.turned.weight != 0).T.unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    assert not ((model.turned.weight != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()


def test_later_layers_are_calibrated_on_the_pruned_model():
    """Solve the last layer by hand, once on the pruned model's inputs to it and once on the dense model's."""
    found, by, chooser = net(), SparseGPT(), SlabChooser(Element(), 0.5)
    prune_with(found, ids(), by, pattern=Element(), sparsity=0.5)
    grams = {}
    for key, model in (("pruned", found), ("dense", net())):
        rows = []
        model.head.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            for x in ids():
                model(x)
        grams[key] = torch.cat(rows).T @ torch.cat(rows)
    by_hand = {key: by.solve(net().head.weight, gram, chooser)[0] for key, gram in grams.items()}
    torch.testing.assert_close(found.head.weight.detach(), by_hand["pruned"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found.head.weight, by_hand["dense"], rtol=1e-2, atol=1e-2)


def test_layers_that_read_one_tensor_are_calibrated_in_one_pass():
    model = net()
    prune_with(model, ids(), Wanda(), pattern=Element(), sparsity=0.5, exclude=["head.*"])
    # One call to find the order; then query and key together, the convolution, the turned layer.
    assert model.calls == 1 + 3 * 3


def test_wanda_compares_within_outputs_and_magnitude_within_layers():
    model = net()
    masks = prune_with(model, ids(), Wanda(), pattern=Element(), sparsity=0.5, include=["query*", "turned*"])
    assert (masks["query.weight"].sum(1) == 8).all()
    assert (masks["turned.weight"].sum(0) == 8).all()
    masks = prune_with(net(), ids(), Magnitude(), pattern=Element(), sparsity=0.5, include=["query*"])
    assert (masks["query.weight"].sum(1) != 8).any()
    weight = net().query.weight.abs()
    assert torch.equal(masks["query.weight"], weight > weight.flatten().median())
    rows = prune_with(net(), ids(), Magnitude(), pattern=Rows(), sparsity=0.5, include=["query*"])
    assert set(rows["query.weight"].sum(1).tolist()) == {0, 16}


def test_modes_and_hooks_are_given_back():
    model = net().train()
    model.conv.eval()
    prune_with(model, ids(1), SparseGPT(), pattern=Element(), sparsity=0.5)
    assert model.training
    assert not model.conv.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": Snip()}, "Snip reads the gradient, which forward passes do not give"),
        ({"sparsity": None}, r"sparsity must be given: Element\(\) leaves it open"),
        ({"include": ["nothing.*"]}, r"include=\['nothing.\*'\] with exclude=\[\] leaves no weight"),
        ({"pattern": NM(2, 5)}, "weights of query.weight .*needs the input dimension to be divisible by 5, it is 16"),
        ({"batches": []}, "batches is empty"),
        ({"model": Unused()}, "the layer of spare.weight is not called by the model; exclude it"),
        ({"pattern": Rows()}, "SparseGPT chooses as it goes"),
    ],
)
def test_one_shot_refusals(arguments, message):
    given = {"model": net(), "batches": ids(1), "by": SparseGPT(), "pattern": Element(), "sparsity": 0.5, **arguments}
    with pytest.raises(ValueError, match=message):
        prune_with(given.pop("model"), given.pop("batches"), given.pop("by"), **given)
