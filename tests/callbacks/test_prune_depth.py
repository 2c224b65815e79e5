"""Layers that leave in mid-fit: which, with what becomes of optimizers, and after a stop."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from prune_job import STEPS, Stranger, fit, make_run
from torch import nn

from lightning_opt.callbacks import Prune, PruneDepth
from lightning_opt.errors import ConfigError
from lightning_opt.surgery import recipe_of, replay
from lightning_opt.testing.resume import check_resume

pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Deep(nn.Module):
    def __init__(self, layers=5):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


def deep_run(folder, *callbacks, **options):
    return make_run(folder, *callbacks, module=lambda: Stranger(Deep()), **options)


AT = 7
DROP = partial(PruneDepth, 2, at=f"{AT} steps", samples=8)


class Before(PruneDepth):
    """Remembers the network as it was when the choice was made."""

    def _choose(self, trainer, pl_module, root):
        self.network, self.step = root, trainer.global_step
        self.saved = {name: value.clone() for name, value in root.state_dict().items()}
        return super()._choose(trainer, pl_module, root)


def angles(network, inputs, span):
    """Work out, apart from the package, how far each run of layers turns what passes."""
    states = [inputs]
    with torch.no_grad():
        for block in network.eval().blocks:
            states.append(block(states[-1]))
    pairs = zip(states, states[span:], strict=False)
    return [float(nn.functional.cosine_similarity(a, b).double().arccos().mean()) for a, b in pairs]


def test_the_layers_that_turn_least_leave_model_and_optimizer(tmp_path):
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    make = partial(Before, 2, at=f"{AT} steps", example_inputs=inputs)
    run = fit(deep_run(tmp_path, make))
    callback = next(c for c in run.trainer.callbacks if isinstance(c, Before))
    assert callback.step == AT
    assert callback.is_settled
    assert callback.stages()[0]["from_step"] == AT
    before = Deep()
    before.load_state_dict(callback.saved)
    turned = angles(before, inputs, span=2)
    first = turned.index(min(turned))
    recipe = recipe_of(run.module.net)
    assert list(recipe.edits[0].kept) == [n for n in range(5) if n not in (first, first + 1)]
    assert len(run.module.net.blocks) == 3
    left = {id(p) for p in run.module.net.parameters()}
    optimizer = run.trainer.optimizers[0]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left
    assert set(map(id, optimizer.state)) == left
    assert len(run.module.seen) == STEPS
    replay(Deep(), recipe).load_state_dict(run.module.net.state_dict())


def test_resumes_bit_equal(tmp_path):
    check_resume(lambda folder: deep_run(folder, DROP), folder=tmp_path, stop_at_steps=[(AT - 1, AT, AT + 4)])


def test_resumes_bit_equal_beside_an_average(tmp_path):
    callbacks = [partial(EMAWeightAveraging, decay=0.5), DROP]
    check_resume(lambda folder: deep_run(folder, *callbacks), folder=tmp_path, stop_at_steps=[(AT - 2, AT + 3)])


class Forgetful(PruneDepth):
    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def test_comparison_notices_a_callback_that_forgets(tmp_path):
    make = partial(Forgetful, 1, at=f"{AT} steps", samples=8)
    with pytest.raises((AssertionError, ConfigError)):
        check_resume(lambda folder: deep_run(folder, make), folder=tmp_path, stop_at_steps=[AT + 2])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (partial(PruneDepth, 5), "drop=5"),
        (partial(PruneDepth, 1, path="nothing"), "path='nothing'"),
        (partial(PruneDepth, 1, at="99 steps"), "at='99 steps'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, make, says):
    with pytest.raises(ConfigError, match=says):
        fit(deep_run(tmp_path, make, save=False))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"drop": 0}, "drop=0"), ({"drop": 1, "at": 2.0}, "at=2.0"), ({"drop": 1, "position": "first"}, "position")],
)
def test_arguments_are_checked(arguments, says):
    with pytest.raises(ValueError, match=says):
        PruneDepth(**arguments)


def test_two_kinds_at_once_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="another pruner"):
        fit(deep_run(tmp_path, DROP, Prune, save=False))


def test_a_network_without_a_stack_is_refused(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 4)

        def forward(self, x):
            return self.net(x)

    with pytest.raises(ConfigError, match="path=None"):
        fit(make_run(tmp_path, DROP, module=lambda: Stranger(Flat()), save=False))
