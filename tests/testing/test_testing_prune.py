"""The checker of pruners: parts of this package pass, and each fault is found."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_opt.pruning.allocation import ERK, LAMP, PerTensor, Uniform
from lightning_opt.pruning.criteria import Criterion, Magnitude, Movement, Random, Snip, Taylor, Wanda
from lightning_opt.pruning.patterns import NM, Block, Columns, Element, Rows
from lightning_opt.testing.prune import check_pruner

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("criterion", [Magnitude(), Snip(), Taylor(), Movement(), Wanda(), Random()])
@pytest.mark.parametrize("pattern", [Element(), NM(2, 4), Block(1, 4)], ids=str)
def test_parts_of_this_package_pass(criterion, pattern):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_pruner(model, X, criterion=criterion, pattern=pattern)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("allocation", [Uniform(), ERK(), LAMP()])
def test_allocations_pass(allocation):
    check_pruner(net(), X, criterion=Magnitude(), allocation=allocation)


@pytest.mark.parametrize("pattern", [Rows(), Columns()])
def test_lines_pass(pattern):
    check_pruner(net(), X, criterion=Magnitude(), pattern=pattern, sparsity=0.5, tolerance=0.05)


class WrongShape(Criterion):
    def score(self, weight, evidence):
        return weight.abs().sum(0)


class NotFinite(Criterion):
    def score(self, weight, evidence):
        return weight.abs() / 0.0


class Double(Criterion):
    def score(self, weight, evidence):
        return weight.abs().double()


class Fickle(Criterion):
    def score(self, weight, evidence):
        return torch.rand(weight.shape)


class Destroys(Criterion):
    def score(self, weight, evidence):
        return weight.mul_(2).abs()


class NeedsMore(Criterion):
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def score(self, weight, evidence):
        return weight.abs()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (WrongShape(), r"WrongShape\.score of 0\.weight has shape \(8,\)"),
        (NotFinite(), "not finite"),
        (Double(), "float64, not float32"),
        (Fickle(), "another one when asked again"),
        (Destroys(), "changes the weight"),
        (NeedsMore(), r"NeedsMore\.needs has \['hessian'\]"),
    ],
)
def test_faults_of_a_criterion_are_found(criterion, message):
    with pytest.raises(AssertionError, match=message):
        check_pruner(net(), X, criterion=criterion)


@dataclass(frozen=True)
class Compounds(PerTensor):
    """Takes its share of the weights that are left, as careless pruners do."""

    def keep(self, units, shapes, *, sparsity, fraction=1.0):
        kept = {}
        for name, scores in units.items():
            alive = int((scores > 0).sum())
            left = round((1 - sparsity * fraction) * alive)
            kept[name] = torch.zeros_like(scores, dtype=torch.bool)
            kept[name][scores.argsort(descending=True)[:left]] = True
        return kept

    def densities(self, shapes, sparsity):
        return dict.fromkeys(shapes, 1 - sparsity)


def test_a_share_that_compounds_is_found():
    with pytest.raises(AssertionError, match=r"masked after 4 updates, 0\.8000 were asked for"):
        check_pruner(net(), X, criterion=Magnitude(), allocation=Compounds())


@dataclass(frozen=True)
class Shifted(Block):
    def expand(self, kept, shape):
        return super().expand(kept, shape).roll(1, 1)


def test_a_pattern_that_does_not_give_back_what_it_pooled_is_found():
    with pytest.raises(AssertionError, match="pool and expand do not fit"):
        check_pruner(net(), X, criterion=Magnitude(), pattern=Shifted(1, 4))
