"""A shrunk model answers as the masked one, has the widths asked for, and a bad request is one clear error."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.pruning.criteria import GroupNorm, Magnitude
from lightning_opt.pruning.structure import trace
from lightning_opt.pruning.structured import GlobalSizes, Structures, choose, score, shrink
from lightning_opt.surgery import Recipe, recipe_of, replay


class Conv(nn.Module):
    """Two convolutions with a residual, a third, and a head: 24 and 40 channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.block = nn.Conv2d(24, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 40, 3, stride=2)
        self.head = nn.Linear(40, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.block(x))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    model = Conv()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def structure(conv):
    return trace(conv, X)


@pytest.fixture(scope="module")
def groups(structure):
    return {group.size: group for group in Structures().of(structure)}


def loss_by_hand(model, width):
    """The squared L2 norm of what goes with each unit, added up by hand."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    if width == 40:
        parts = [(state["wide.weight"], 0), (state["wide.bias"], 0), (state["head.weight"], 1)]
    else:
        tensors = ["stem.weight", "stem.bias", "norm.weight", "norm.bias", "block.weight", "block.bias"]
        parts = [*((state[name], 0) for name in tensors), (state["block.weight"], 1), (state["wide.weight"], 1)]
    return sum((np.moveaxis(value, dim, 0).reshape(width, -1) ** 2).sum(1) for value, dim in parts)


def test_the_smallest_norms_go_and_the_rest_computes_as_the_masked_model(conv):
    model = copy.deepcopy(conv)
    recipe = shrink(model, X, ratio=0.5)
    keep = {width: np.sort(np.argsort(-loss_by_hand(conv, width))[: width // 2]) for width in (24, 40)}
    assert model.wide.weight.shape == (20, 12, 3, 3)
    assert torch.equal(model.norm.running_mean, conv.norm.running_mean[keep[24]])
    assert torch.equal(model.head.weight, conv.head.weight[:, keep[40]])
    masked = copy.deepcopy(conv)
    with torch.no_grad():
        gone = np.setdiff1d(np.arange(24), keep[24])
        for name in ("norm.weight", "norm.bias", "block.weight", "block.bias"):
            masked.get_parameter(name)[gone] = 0
        masked.head.weight[:, np.setdiff1d(np.arange(40), keep[40])] = 0
    assert (model(X) - masked(X)).abs().max() < 1e-6
    assert (model(X) - conv(X)).abs().max() > 1e-3
    assert recipe_of(model) == recipe
    fresh = replay(Conv(), Recipe.from_json(recipe.to_json()))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X), model(X))


@pytest.mark.parametrize(
    ("ratio", "round_to", "widths"),
    [
        (0.25, 1, (18, 30)),
        (0.75, 1, (6, 10)),
        (0.6, 1, (10, 16)),  # 9.6 and 16
        (0.5, 8, (16, 24)),  # 12 and 20 lie in the middle: the larger
        (0.75, 8, (8, 8)),
        (0.9, 8, (8, 8)),  # a width of 8 at least
        (0.5, 16, (16, 16)),
        (0.05, 16, (24, 40)),  # nearest is to leave all
        (0.0, 1, (24, 40)),
    ],
)
def test_widths(structure, groups, conv, ratio, round_to, widths):
    scores = score(structure, tuple(groups.values()), conv)
    kept = choose(structure, scores, ratio=ratio, round_to=round_to)
    found = tuple(len(kept.get(groups[size].name, range(size))) for size in (24, 40))
    assert found == widths


def test_a_global_share_compares_all_units(structure, groups):
    generator = torch.Generator().manual_seed(0)
    narrow, wide = groups[24].name, groups[40].name
    scores = {narrow: torch.rand(24, generator=generator) + 0.5, wide: torch.rand(40, generator=generator)}
    kept = choose(structure, scores, ratio=0.5, allocation="global")
    every = np.concatenate([scores[narrow].numpy(), scores[wide].numpy()])
    threshold = np.sort(every)[32]
    assert kept[narrow] == np.flatnonzero(scores[narrow].numpy() >= threshold).tolist()
    assert kept[wide] == np.flatnonzero(scores[wide].numpy() >= threshold).tolist()
    scores[narrow] += 10
    kept = choose(structure, scores, ratio=0.5, allocation="global")
    assert narrow not in kept
    assert len(kept[wide]) == 8
    with pytest.raises(ValueError, match=r"ratio=0\.9.*0\.5"):
        choose(structure, scores, ratio=0.9, allocation=GlobalSizes(max_ratio=0.5))


@pytest.mark.parametrize("of", ["params", "flops"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_share_of_parameters_or_flops_is_reached_and_not_passed_by_much(conv, of, allocation):
    model = copy.deepcopy(conv)
    shrink(model, X, ratio=0.4, of=of, allocation=allocation)

    def count(net):
        if of == "params":
            return sum(p.numel() for p in net.parameters())
        places = {"stem": 81, "block": 81, "wide": 16, "head": 1}
        return sum(net.get_parameter(f"{name}.weight").numel() * n for name, n in places.items())

    assert 0.4 <= 1 - count(model) / count(conv) < 0.48


def test_random_units_follow_the_seed(conv):
    def kept(seed):
        model = copy.deepcopy(conv)
        return shrink(model, X, ratio=0.5, importance="random", seed=seed)

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)
    assert kept(1) != shrink(copy.deepcopy(conv), X, ratio=0.5)


def test_importance_is_a_criterion_or_scores(conv, groups):
    by_hand = {name: shrink(copy.deepcopy(conv), X, importance=name) for name in ("l1", "l2")}
    assert by_hand["l1"] == shrink(copy.deepcopy(conv), X, importance=GroupNorm(Magnitude(p=1)))
    assert by_hand["l1"] == shrink(copy.deepcopy(conv), X, importance=Magnitude(p=1))
    assert by_hand["l1"] != by_hand["l2"]
    scores = {group.name: torch.arange(float(size)) for size, group in groups.items()}
    model = copy.deepcopy(conv)
    shrink(model, X, ratio=0.75, importance=scores)
    assert torch.equal(model.head.weight, conv.head.weight[:, 30:])


def test_what_is_ignored_stays(conv):
    for ignore in (["wide"], ["wide.weight"], ["w*e"]):
        model = copy.deepcopy(conv)
        with pytest.raises(ValueError, match=r"kinds=.*nothing of these to prune.*ignored"):
            shrink(model, X, ignore=[*ignore, "stem"])
        shrink(model, X, ignore=["head"])
        assert model.wide.weight.shape == (40, 12, 3, 3)


def test_optimizers_go_along(conv):
    model = copy.deepcopy(conv).train()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    shrink(model, X, optimizers=optimizer)
    assert model.training
    assert optimizer.state[model.wide.weight]["exp_avg"].shape == (20, 12, 3, 3)
    model(X).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, r"ratio=1\.0"),
        ({"ratio": -0.1}, r"ratio=-0\.1"),
        ({"ratio": "half"}, "ratio='half'"),
        ({"ratio": 0.99}, r"ratio=0\.99 would leave nothing of the 24 units of 'stem'"),
        ({"ignore": ["wid"]}, r"ignore: 'wid'.*near names: .*wide"),
        ({"ignore": "wide"}, "ignore='wide'.*list"),
        ({"kinds": ["heads"]}, r"kinds=\('heads',\).*stem \(channels\)"),
        ({"kinds": []}, "kinds"),
        ({"round_to": 0}, "round_to"),
        ({"importance": "l3"}, "importance.*'l3'"),
        ({"importance": {"stam": [1.0]}}, r"'stam'.*near names: .*stem"),
        ({"importance": {"stem": [1.0]}}, r"'stem' has 24 units.*\(1,\)"),
        ({"importance": {"stem": [1.0] * 24}}, "no scores for wide"),
        ({"allocation": "even"}, "allocation.*'even'"),
        ({"of": "weights"}, "of='weights'"),
        ({"of": "params", "ratio": 0.998}, r"ratio=0\.998 of the params"),
    ],
)
def test_a_bad_request_names_the_argument_and_changes_nothing(conv, options, words):
    model = copy.deepcopy(conv)
    with pytest.raises(ValueError, match=words):
        shrink(model, X, **options)
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in conv.state_dict().items()}
    assert len(recipe_of(model)) == 0


def test_min_keep_takes_the_place_of_the_refusal(conv):
    model = copy.deepcopy(conv)
    shrink(model, X, ratio=0.99, min_keep=3)
    assert model.wide.weight.shape == (3, 3, 3, 3)
