"""Layers cut over processes: answers, gradients, losses and refusals against one process."""

import pytest
import torch
from parallel_job import STEPS, Data, distillation, encoder, fit
from parallel_models import Tower, hugging_face, ours
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_opt.errors import ConfigError
from lightning_opt.forward import forward, logits_of
from lightning_opt.losses import HiddenStates, OnPolicy, Term
from lightning_opt.models import GPT, MLP, ConvNet, TextEncoder
from lightning_opt.modules import Distillation, Supervised
from lightning_opt.strategies.sharded_presets import fsdp2, fsdp2_tp, tensor_parallel
from lightning_opt.strategies.spread import Spread
from lightning_opt.strategies.tensor_plans import resolve
from lightning_opt.tasks import Classification
from lightning_opt.testing.ranks import on_ranks

CLIPPED = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
FEW = ("text_encoder", "gpt_tied", "gpt2", "llama_tied")


def gradients(model, inputs):
    """Return the answer and the whole gradients of a random reading of it."""
    logits = logits_of(forward(model, inputs))
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return logits.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def compare(model, inputs, mesh):
    """Return by how much the answer and gradients of a spread network, and of one brought back, are off."""
    model.train()
    expected, whole = gradients(model, inputs)
    spread = Spread(model, model, mesh=mesh, kinds=resolve(model, None, size=mesh["tensor_parallel"].size()))
    spread.settle()
    share = sum(one.to_local().numel() for one in model.parameters()) / sum(one.numel() for one in model.parameters())
    logits, found = gradients(model, inputs)
    spread.undo()
    back, again = gradients(model, inputs)
    assert whole.keys() == found.keys()
    off = max(((whole[n] - found[n]).abs().max() / (1e-3 + whole[n].abs().max())).item() for n in whole)
    same = torch.equal(expected, back) and all(torch.equal(whole[n], again[n]) for n in whole)
    return (expected - logits).abs().max().item(), off, same, share


def supervised():
    return Supervised(encoder(1), task=Classification(num_outputs=3))


def fit_all(strategy, devices):
    losses, module, _ = fit(distillation, strategy=strategy(), devices=devices, **CLIPPED)
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    said = {"losses": losses, "weights": weights}
    options = {"steps": 4, "limit_val_batches": 1.0, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    losses, module, trainer = fit(supervised, strategy=strategy(), devices=devices, **options)
    metrics = trainer.validate(module, Data(), verbose=False)[0]
    count = module.val_loss.weight
    return {**said, "value": losses, "metrics": {k: float(v) for k, v in metrics.items()}, "count": count}


@pytest.fixture(scope="module")
def networks():
    return {**ours(), **hugging_face()}


@pytest.fixture(scope="module")
def single():
    return fit_all(lambda: "auto", 1)


@pytest.fixture(scope="module")
def line(networks):
    def job():
        said = fit_all(tensor_parallel, 2)
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
        dropped = drop(mesh)
        return said, {name: compare(*one, mesh) for name, one in networks.items()}, dropped

    return on_ranks(job, timeout_s=240)


@pytest.fixture(scope="module")
def square(networks):
    def job():
        said = fit_all(lambda: fsdp2_tp(tensor_parallel_size=2), 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
        return said, {name: compare(*networks[name], mesh) for name in FEW}

    return on_ranks(job, ranks=4, timeout_s=240)


def drop(mesh):
    """Return what a network with dropout says on each process after the strategy gave all the same random state."""
    from lightning_opt.strategies.mesh import copy_random_state

    torch.manual_seed(mesh["tensor_parallel"].get_local_rank())
    copy_random_state(device=torch.device("cpu"), group=mesh["tensor_parallel"].get_group())
    return nn.functional.dropout(torch.ones(64))


def test_every_family_answers_and_learns_as_in_one_process(line, networks):
    assert len(networks) == 22
    for rank in line:
        for name, (off, gradient_off, same, share) in rank[1].items():
            assert off < 1e-5, name
            assert gradient_off < 1e-5, name
            assert same, name
            assert share < 0.85, name
    assert torch.equal(line[0][2], line[1][2])


def test_cut_and_sharded_at_once(square):
    for rank in square:
        for name, (off, gradient_off, same, share) in rank[1].items():
            assert off < 1e-5, name
            assert gradient_off < 1e-5, name
            assert same, name
            assert share < 0.5, name


@pytest.mark.support(
    method=["distil_logit", "distil_feature"], strategy=["tensor_parallel", "fsdp2_tp"], feature="loss"
)
@pytest.mark.parametrize(("layout", "copies"), [("line", 2), ("square", 2)])
def test_a_distillation_learns_as_in_one_process(single, layout, copies, request):
    ranks = [rank[0] for rank in request.getfixturevalue(layout)]
    assert len(single["losses"]) == 2 * STEPS
    for name in ("losses", "value"):
        curve = torch.stack([rank[name] for rank in ranks[::copies]]).mean(0)
        assert torch.allclose(curve, single[name], rtol=0, atol=1e-5)
    for rank in ranks:
        assert all(torch.allclose(v, single["weights"][n], rtol=0, atol=1e-4) for n, v in rank["weights"].items())
        assert rank["metrics"] == pytest.approx(single["metrics"], abs=1e-5)


def test_a_plan_of_ones_own(single):
    def job():
        plan = {"first": "colwise", "second": "rowwise"}
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
        model = Tower()
        x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
        expected, whole = gradients(model, {"x": x})
        Spread(model, model, mesh=mesh, kinds=resolve(model, plan, size=2))
        logits, found = gradients(model, {"x": x})
        gathered = Tower()
        Spread(
            gathered, gathered, mesh=mesh, kinds=resolve(gathered, {"first": "gathered", "second": "rowwise"}, size=2)
        )
        logits_gathered = gathered(x)
        return expected - logits, {n: whole[n] - found[n] for n in whole}, logits_gathered.shape

    for off, gradients_off, shape in on_ranks(lambda: (torch.manual_seed(0), job())[1], group=True):
        assert off.abs().max() < 1e-6
        assert all(one.abs().max() < 1e-6 for one in gradients_off.values())
        assert shape == (4, 3)


@pytest.mark.parametrize(
    ("make", "model", "words"),
    [
        (lambda: tensor_parallel(tensor_parallel_size=3), lambda: encoder(0), "does not divide the 4 heads of 'blocks"),
        (lambda: tensor_parallel(tensor_parallel_size=2), lambda: ConvNet(num_outputs=3), "no built-in"),
        (lambda: tensor_parallel(tensor_parallel_size=2), Tower, "strategy.plan"),
        (
            lambda: tensor_parallel(tensor_parallel_size=3),
            lambda: MLP(num_outputs=3, in_features=6, hidden=(8,)),
            "8 values",
        ),
        (
            lambda: tensor_parallel(tensor_parallel_size=2, plan={"blocks.*.attn": "colwise"}),
            lambda: encoder(0),
            r"'blocks\.\*\.attn' matches no module.*blocks\.0\.attention",
        ),
        (lambda: tensor_parallel(tensor_parallel_size=2, plan={"first": "columns"}), Tower, "'columns'; choose one of"),
        (lambda: tensor_parallel(tensor_parallel_size=2, plan={"first": "replicate"}), Tower, "cuts no layer"),
        (
            lambda: fsdp2_tp(tensor_parallel_size=2, plan={"*norm1": "colwise"}),
            lambda: encoder(0),
            "is a LayerNorm",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_process_starts(make, model, words):
    with pytest.raises(ConfigError, match=words):
        make().check_model(model(), None)


def test_all_processes_are_meant_when_no_size_is_given():
    strategy = tensor_parallel()
    strategy.check_world(3)
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 does not divide the 4 heads"):
        strategy.check_model(encoder(0))
    with pytest.raises(ConfigError, match="tensor_parallel_size=0: give 1 or more"):
        tensor_parallel(tensor_parallel_size=0).check_world(2)


def test_a_weight_that_two_layers_read_is_cut_for_both_or_not_at_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match="shares its weight with '1'"):
        resolve(model, {"0": "colwise"}, size=2)


def test_a_vocabulary_that_does_not_divide_stays_whole():
    odd = resolve(GPT(vocab_size=41, dim=16, heads=4, depth=1), None, size=2)
    assert "token_embedding" not in odd
    assert "" not in odd
    even = resolve(GPT(vocab_size=40, dim=16, heads=4, depth=1), None, size=2)
    assert even["token_embedding"].cut == "rows"
    assert even[""].answer == "join"


def test_features_that_no_process_has_and_sampling_are_refused():
    def job():
        student = TextEncoder(num_outputs=3, vocab_size=40, max_length=10, dim=16, depth=2, heads=4)
        loss = Term(HiddenStates({"blocks.1.up": "blocks.1.up"}))
        make = lambda: Distillation(student, encoder(2), task=Classification(num_outputs=3), losses=[loss])  # noqa: E731
        with pytest.raises(ConfigError, match=r"'blocks\.1\.up' is cut over processes"):
            fit(make, strategy=tensor_parallel(), devices=2, steps=1)
        module = distillation()
        module.sampling = OnPolicy(fraction=0.5, source="student")
        with pytest.raises(ConfigError, match=r"loss\.sampling draws other sequences"):
            fit(lambda: module, strategy=fsdp2(), devices=2, steps=1)
        return True

    assert on_ranks(job) == [True, True]
