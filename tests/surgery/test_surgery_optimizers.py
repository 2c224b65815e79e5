"""Training after the surgery is the training of the dense model with the same structure masked; control: no state."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from lightning_opt.errors import ConfigError
from lightning_opt.surgery import DropLayers, Shrink, apply_with_optimizers, recipe_of

STEPS_BEFORE, STEPS_AFTER = 6, 12
GONE = [1, 2, 6, 7, 11]
KEPT = [place for place in range(12) if place not in GONE]
EDIT = Shrink(
    kept={
        **{f"{layer}": {0: KEPT} for layer in ("conv.weight", "norm.weight", "norm.bias")},
        **{f"norm.running_{what}": {0: KEPT} for what in ("mean", "var")},
        "head.weight": {1: KEPT},
    },
    attributes={"conv": {"out_channels": 7}, "norm": {"num_features": 7}, "head": {"in_features": 7}},
)
STRUCTURE = {"conv.weight": 0, "norm.weight": 0, "norm.bias": 0, "head.weight": 1}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(functional.relu(self.norm(self.conv(x))).mean((2, 3)))


class Lion(torch.optim.Optimizer):
    """Chen 2023 (arXiv 2302.06675), algorithm 2: a stranger's optimizer."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * momentum + 0.1 * p.grad).sign())
                momentum.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "lion": lambda p: Lion(p, lr=0.005),
}


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS_BEFORE + STEPS_AFTER):
        x = torch.randn(8, 2, 6, 6, generator=generator)
        yield x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0].std((1, 2)) > 1).long()


def zero_structure(model):
    with torch.no_grad():
        for name, dim in STRUCTURE.items():
            model.get_parameter(name).index_fill_(dim, torch.tensor(GONE), 0)


def train(make, surgery):
    """Return the losses after `surgery(model, optimizer)`; masked weights are zeroed again after each step."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    losses, masked = [], False
    for step, (x, y) in enumerate(batches()):
        if step == STEPS_BEFORE:
            masked = surgery(model, optimizer)
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if masked:
            zero_structure(model)
        losses.append(loss.item())
    return torch.tensor(losses[STEPS_BEFORE:], dtype=torch.float64)


def mask(model, optimizer):
    zero_structure(model)
    return True


def shrink(model, optimizer):
    apply_with_optimizers(model, EDIT, optimizer)
    return False


def shrink_and_forget(model, optimizer):
    EDIT.apply(model)
    optimizer.state.clear()
    return False


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_in_the_masked_model(name):
    reference, ours = train(OPTIMIZERS[name], mask), train(OPTIMIZERS[name], shrink)
    assert (reference - ours).abs().max() < 2e-6
    if name != "adagrad":  # its sum of squares starts from nothing either way, and so differs least
        control = train(OPTIMIZERS[name], shrink_and_forget)
        assert (reference - control).abs().max() > 1e-3


def trained(make):
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    x, y = next(batches())

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, optimizer


def test_moments_are_cut_and_step_counts_stay():
    model, optimizer = trained(OPTIMIZERS["adam"])
    old = {key: value.clone() for key, value in optimizer.state[model.head.weight].items()}
    apply_with_optimizers(model, EDIT, [optimizer])
    new = optimizer.state[model.head.weight]
    assert torch.equal(new["step"], old["step"])
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(new[key], old[key][:, KEPT])
    assert recipe_of(model).edits == (EDIT,)
    fresh = EDIT.apply(Net())
    again = OPTIMIZERS["adam"](fresh.parameters())
    again.load_state_dict(optimizer.state_dict())  # the shapes are those of a model that was built small
    assert again.state[fresh.conv.weight]["exp_avg"].shape == fresh.conv.weight.shape


class Blockwise(torch.optim.Optimizer):
    """Keeps one scale for many weights, as 8-bit optimizers do."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        closure()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"state1": torch.zeros_like(parameter), "absmax": torch.zeros(4)}


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """Stands for the one of torch.distributed, which needs several processes to be made."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.Adafactor(p), r"Adafactor.*row_var.*conv\.weight.*\(12, 2, 3, 3\)"),
        (lambda p: torch.optim.LBFGS(p, max_iter=2), r"LBFGS.*flattened.*conv\.weight"),
        (Blockwise, r"Blockwise.*absmax.*\(4,\).*conv\.weight"),
        (lambda p: ZeroRedundancyOptimizer(p, lr=0.1), r"ZeroRedundancyOptimizer.*ranks"),
    ],
)
def test_states_that_cannot_be_cut_are_refused_before_anything_changes(make, words):
    model, optimizer = trained(make)
    other = torch.optim.Adam([model.head.bias])
    model.head.bias.grad = torch.ones(3)
    other.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match=words):
        apply_with_optimizers(model, EDIT, [other, optimizer])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert str(optimizer.state_dict()) == str(state)
    assert len(recipe_of(model)) == 0


def test_an_edit_that_does_not_fit_leaves_the_optimizer_alone():
    model, optimizer = trained(OPTIMIZERS["adam"])
    wrong = Shrink(kept=EDIT.kept, attributes={"conv": {"nothing": 1}})
    with pytest.raises(ValueError, match="nothing"):
        apply_with_optimizers(model, wrong, optimizer)
    assert optimizer.state[model.head.weight]["exp_avg"].shape == (3, 12)


def test_copies_are_cut_alike_and_go_on_averaging():
    model, optimizer = trained(OPTIMIZERS["adamw"])
    averaged = AveragedModel(model, use_buffers=True)
    holder = nn.ModuleDict({"module": copy.deepcopy(model)})
    with torch.no_grad():
        averaged.module.head.weight.add_(1)
    expected = averaged.module.head.weight.detach()[:, KEPT].clone()
    apply_with_optimizers(model, EDIT, optimizer, also=[averaged, holder])
    assert torch.equal(averaged.module.head.weight.detach(), expected)
    assert averaged.module.head.weight is not model.head.weight
    assert holder["module"].conv.out_channels == averaged.module.conv.out_channels == 7
    assert recipe_of(averaged.module) == recipe_of(holder["module"]) == recipe_of(model)
    averaged.update_parameters(model)
    with pytest.raises(ConfigError, match="holds no copy of Net"):
        apply_with_optimizers(model, EDIT, optimizer, also=[nn.Linear(2, 2)])
    two = nn.ModuleList([copy.deepcopy(model), copy.deepcopy(model)])
    with pytest.raises(ConfigError, match="holds 2 copies of Net"):
        apply_with_optimizers(model, DropLayers("", (0,)), optimizer, also=[two])


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_dropped_layers_leave_the_optimizer_and_the_rest_trains_on_as_before():
    torch.manual_seed(0)
    model = Deep()
    groups = [{"params": model.layers[1].parameters(), "lr": 0.02}, {"params": model.layers[2].parameters()}]
    groups.append({"params": [*model.layers[0].parameters(), *model.layers[3].parameters()]})
    optimizer = torch.optim.Adam(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    x = torch.randn(5, 4)
    model(x).square().mean().backward()
    optimizer.step()
    reference = copy.deepcopy(model)
    twin = torch.optim.Adam([*reference.layers[0].parameters(), *reference.layers[2].parameters()], lr=0.01)
    for ours, theirs in ((0, 0), (2, 2)):
        for name in ("weight", "bias"):
            state = optimizer.state[getattr(model.layers[ours], name)]
            twin.state[getattr(reference.layers[theirs], name)] = copy.deepcopy(state)
    dropped = model.layers[1].weight
    apply_with_optimizers(model, DropLayers("layers", (0, 2)), optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2, 2]
    assert dropped not in optimizer.state
    reference.layers = nn.ModuleList([reference.layers[0], reference.layers[2]])
    for group in twin.param_groups:
        group["lr"] = 0.009
    schedule.step()
    for net, opt in ((model, optimizer), (reference, twin)):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
