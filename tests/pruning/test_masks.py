"""Masks beside the model: nothing revives a masked weight, and the model knows nothing of it."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.pruning.masks import Masks
from lightning_opt.surgery.shrink import Shrink

OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def prunable(model):
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def random_masks(parameters, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < density for name, p in parameters.items()}


def step(model, optimizer, masks, *, clip=None, gradients=False, dtype=torch.float32, seed=1):
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model(x).float().square().mean().backward()
    if gradients:
        masks.mask_gradients()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else None
    optimizer.step()
    optimizer.zero_grad()
    masks.apply()
    return norm


def masked_weights(parameters, masks):
    return torch.cat([parameters[name].detach()[~mask] for name, mask in masks.items()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_weights_stay_zero_and_the_others_train_as_if_alone(kind):
    model, dense = net(), net()
    optimizer, other = (OPTIMIZERS[kind](m.parameters()) for m in (model, dense))
    masks, new = Masks(prunable(model)), random_masks(prunable(model))
    step(model, optimizer, masks)  # moments exist before pruning
    step(dense, other, Masks({}))
    masks.clear_moments([optimizer], newly=masks.update(new))
    masks.apply()
    for number in range(5):
        with torch.no_grad():  # by hand: weights set to zero one tensor at a time, moments as they fall
            for name, p in dense.named_parameters():
                if name in new:
                    p[~new[name]] = 0
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer, masks, clip=0.5, seed=number)
        step(dense, other, Masks({}), clip=0.5, seed=number)
        assert bool((masked_weights(prunable(model), new) == 0).all())
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        for name, p in dense.named_parameters():
            mask = new.get(name, torch.ones_like(p, dtype=torch.bool))
            torch.testing.assert_close(p[mask], dict(model.named_parameters())[name][mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_of_newly_masked_weights_are_zero_and_the_others_untouched(kind):
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    masks, new = Masks(prunable(model)), random_masks(prunable(model))
    step(model, optimizer, masks)
    before = copy.deepcopy(optimizer.state_dict())["state"]
    newly = masks.update(new)
    masks.clear_moments([optimizer], newly=newly)
    names = [name for name, _ in model.named_parameters()]
    looked_at = 0
    for place, state in optimizer.state_dict()["state"].items():
        mask = new.get(names[place])
        for key, value in state.items():
            if torch.is_tensor(value) and mask is not None and value.shape == mask.shape:
                looked_at += 1
                assert torch.equal(value, before[place][key] * mask)
                assert bool((before[place][key][~mask] != 0).any())
            elif torch.is_tensor(value):
                assert torch.equal(value, before[place][key])
    assert looked_at > 0 or kind == "adafactor"  # all of its state of matrices is row and column means


def test_update_says_what_is_newly_masked_and_regrown_weights_start_without_moments():
    model = net()
    parameters = prunable(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    masks, first, second = Masks(parameters), random_masks(parameters), random_masks(parameters, seed=1)
    newly = masks.update(first)
    assert all(torch.equal(newly[name], ~first[name]) for name in first)
    masks.apply()
    step(model, optimizer, masks)  # gradients of masked weights reach the moments
    name = "4.weight"
    moments = optimizer.state[parameters[name]]["exp_avg"]
    back = second[name] & ~first[name]
    assert bool((moments[back] != 0).any())
    newly = masks.update(second)
    assert torch.equal(newly[name], first[name] & ~second[name])
    masks.apply()
    masks.clear_moments([optimizer], newly=newly)
    assert bool((moments[back] == 0).all())
    assert bool((moments[~second[name]] == 0).all())
    assert bool((moments[first[name] & second[name]] != 0).any())
    assert bool((parameters[name][back] == 0).all())
    step(model, optimizer, masks)
    assert bool((parameters[name][back] != 0).any())  # and they train


def test_only_shrink_never_gives_a_weight_back():
    parameters = prunable(net())
    masks, first, second = Masks(parameters), random_masks(parameters), random_masks(parameters, seed=1)
    masks.update(first)
    masks.update(second, only_shrink=True)
    for name in first:
        assert torch.equal(masks[name], first[name] & second[name])


def test_masked_gradients_leave_the_norm_to_the_weights_that_live():
    model = net()
    parameters, optimizer = prunable(model), torch.optim.Adam(model.parameters(), lr=0.1)
    masks, new = Masks(parameters), random_masks(parameters, density=0.1)
    masks.update(new)
    masks.apply()
    model(torch.randn(4, 3, 6, 6)).square().mean().backward()
    grads = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
    alive = [g[new[name].numpy()] if name in new else g for name, g in grads.items()]
    expected = np.sqrt(sum((g**2).sum() for g in alive))
    masks.mask_gradients()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)) == pytest.approx(expected, rel=1e-5)
    optimizer.step()
    assert bool((optimizer.state[parameters["4.weight"]]["exp_avg"][~new["4.weight"]] == 0).all())
    optimizer.zero_grad()
    masks.mask_gradients()  # without gradients there is nothing to do


def test_an_average_of_the_weights_is_masked_by_name():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks, new = Masks(prunable(model)), random_masks(prunable(model))
    average.update_parameters(model)
    masks.update(new)
    masks.apply()
    step(model, optimizer, masks)
    average.update_parameters(model)
    inner = dict(average.module.named_parameters())
    assert bool((masked_weights(inner, new) != 0).any())  # an average remembers
    masks.apply_to(average.module.state_dict())
    assert bool((masked_weights(inner, new) == 0).all())
    assert bool((inner["4.weight"][new["4.weight"]] != 0).any())
    with pytest.raises(ValueError, match=r"the copy of 4.weight is \(2, 2\)"):
        masks.apply_to({"4.weight": torch.ones(2, 2)})


def test_the_model_is_untouched_names_deepcopy_and_pickle():
    model, names = net(), list(net().state_dict())
    masks = Masks(prunable(model))
    masks.update(random_masks(prunable(model)))
    masks.apply()
    assert list(model.state_dict()) == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert len(pickle.dumps(model)) > 4 * sum(p.numel() for p in model.parameters())
    net().load_state_dict(model.state_dict(), strict=True)


def test_state_is_one_bit_a_weight_and_loads_as_plain_data():
    model = nn.Sequential(nn.Linear(100, 101), nn.Linear(101, 7))
    parameters = prunable(model)
    masks, new = Masks(parameters), random_masks(parameters)
    masks.update({"0.weight": new["0.weight"]})
    state = masks.state_dict()
    assert state["masks"]["0.weight"]["bits"].nbytes == (10100 + 7) // 8
    np.testing.assert_array_equal(
        state["masks"]["0.weight"]["bits"].numpy(), np.packbits(new["0.weight"].numpy().ravel())
    )
    assert state["masks"]["1.weight"]["bits"] is None
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = Masks(parameters)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(other[name], masks[name]) for name in parameters)
    assert other.sparsity() == masks.sparsity() > 0
    other.apply()
    assert torch.equal(parameters["0.weight"] != 0, new["0.weight"] & (parameters["0.weight"] != 0))
    assert bool((parameters["0.weight"][~new["0.weight"]] == 0).all())


def test_a_state_of_another_model_is_refused():
    masks = Masks(prunable(net()))
    state = masks.state_dict()
    with pytest.raises(ValueError, match="version 9"):
        masks.load_state_dict({**state, "version": 9})
    with pytest.raises(ValueError, match=r"differ in '4\.weight'"):
        masks.load_state_dict({**state, "masks": {"0.weight": state["masks"]["0.weight"]}})
    wrong = {**state["masks"], "4.weight": {"shape": [4, 2], "bits": None}}
    with pytest.raises(ValueError, match=r"saved mask of 4\.weight is \(4, 2\), the weight \(4, 128\)"):
        masks.load_state_dict({**state, "masks": wrong})


def test_sparsity_counts_masked_weights_of_all_that_have_a_mask():
    parameters = prunable(net())
    masks, new = Masks(parameters), random_masks(parameters)
    assert masks.sparsity() == 0
    masks.update(new)
    zeros = {name: int((~mask).sum()) for name, mask in new.items()}
    total = sum(mask.numel() for mask in new.values())
    assert masks.sparsity() == pytest.approx(sum(zeros.values()) / total)
    assert masks.per_layer() == {name: pytest.approx(zeros[name] / new[name].numel()) for name in new}
    masks.update({name: torch.ones_like(mask) for name, mask in new.items()})
    assert masks.sparsity() == 0


def test_tensors_without_zeros_are_left_out_of_the_fused_call(monkeypatch):
    model = net()
    masks = Masks(prunable(model))
    calls = []
    fused = torch._foreach_mul_
    monkeypatch.setattr(
        torch, "_foreach_mul_", lambda weights, factors: (calls.append(weights), fused(weights, factors))
    )
    masks.apply()
    assert calls == []
    masks.update({"4.weight": random_masks(prunable(model))["4.weight"]})
    masks.apply()
    masks.apply()
    assert [len(weights) for weights in calls] == [1, 1]
    assert calls[0][0] is model[4].weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_types_layouts_and_autocast(dtype, layout):
    model = net().to(dtype).to(memory_format=layout)
    parameters, optimizer = prunable(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    masks, new = Masks(parameters), random_masks(parameters)
    masks.update(new)
    masks.apply()
    strides = {name: p.stride() for name, p in parameters.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        step(model, optimizer, masks, dtype=dtype)
    masks.clear_moments([optimizer])
    for name, mask in new.items():
        assert parameters[name].dtype == dtype
        assert parameters[name].stride() == strides[name]
        assert masks._factors[name].stride() == strides[name]  # or a fused call on a GPU falls back to a loop
        assert torch.equal(parameters[name].detach() != 0, mask & (parameters[name].detach() != 0))
        assert bool((parameters[name][mask] != 0).float().mean() > 0.9)
        assert bool((optimizer.state[parameters[name]]["exp_avg"][~mask] == 0).all())


def test_a_model_that_changes_its_type_in_between_is_followed():
    model = net()
    masks, new = Masks(prunable(model)), random_masks(prunable(model))
    masks.update(new)
    masks.apply()
    model.double()
    with torch.no_grad():
        model[4].weight.fill_(1)
    masks.apply()
    assert torch.equal(model[4].weight.detach() != 0, new["4.weight"])


EDIT = Shrink(
    kept={
        "0.weight": {0: [0, 2, 5]},
        "0.bias": {0: [0, 2, 5]},
        "4.weight": {1: list(range(0, 128, 2)), 0: [1, 3]},
        "4.bias": {0: [1, 3]},
    }
)


@pytest.mark.parametrize("before", [True, False])
def test_masks_follow_a_shrink_before_or_after_it_is_applied(before):
    model = net()
    parameters, masks = prunable(model), Masks(prunable(model))
    new = random_masks(parameters)
    masks.update(new)
    masks.apply()

    if before:
        masks.cut(EDIT)
        EDIT.apply(model)
    else:
        EDIT.apply(model)
        masks.cut(EDIT)
    with torch.no_grad():
        for p in parameters.values():
            p.fill_(1)
    masks.apply()
    expected = {"0.weight": new["0.weight"][[0, 2, 5]], "4.weight": new["4.weight"][:, ::2][[1, 3]]}
    for name, mask in expected.items():
        assert torch.equal(parameters[name].detach() != 0, mask)
    zeros = sum(int((~mask).sum()) for mask in expected.values())
    assert masks.sparsity() == pytest.approx(zeros / sum(mask.numel() for mask in expected.values()))
    again = Masks(parameters)
    again.load_state_dict(masks.state_dict())
    assert all(torch.equal(again[name], mask) for name, mask in expected.items())


def test_masks_move_to_a_rebuilt_model():
    model, other = net(), net(1)
    masks, new = Masks(prunable(model)), random_masks(prunable(model))
    masks.update(new)
    masks.apply()
    masks.rebind(prunable(other))
    masks.apply()
    assert bool((masked_weights(prunable(other), new) == 0).all())
    with pytest.raises(ValueError, match=r"'4\.weight' is on one side only"):
        masks.rebind({"0.weight": other[0].weight})
    small = {"0.weight": other[0].weight, "4.weight": nn.Parameter(torch.zeros(4, 2))}
    with pytest.raises(ValueError, match=r"4\.weight is \(4, 2\), its mask \(4, 128\)"):
        masks.rebind(small)


def test_bad_masks_and_tied_weights_are_refused():
    model = net()
    masks = Masks(prunable(model))
    with pytest.raises(ValueError, match="no mask of 'nope'"):
        masks.update({"nope": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"must be bool \(4, 128\), not float32 \(4, 128\)"):
        masks.update({"4.weight": torch.ones(4, 128)})
    with pytest.raises(ValueError, match=r"must be bool \(4, 128\), not bool \(4,\)"):
        masks.update({"4.weight": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="a and b are one tied weight"):
        Masks({"a": model[4].weight, "b": model[4].weight})


def test_given_masks_are_copied():
    model = net()
    masks, new = Masks(prunable(model)), random_masks(prunable(model))
    masks.update(new)
    kept = new["4.weight"].clone()
    new["4.weight"].fill_(False)
    masks.apply()
    assert torch.equal(masks["4.weight"], kept)
    assert bool((model[4].weight != 0).any())
