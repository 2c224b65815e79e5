"""Against torch's own kernels, numpy in float64, one-node ONNX Runtime sessions, and the formulas of the papers."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_opt.quantization.functional import (
    dequantize,
    dynamic_fake_quantize,
    fake_quantize,
    lsq,
    pact,
    quantize,
    scale_and_zero_point,
)
from lightning_opt.quantization.grid import Grid

ACTIVATION = Grid(symmetric=False, signed=False, narrow=False)
WEIGHT = Grid(axis=0)
GRIDS = [
    ACTIVATION,
    Grid(bits=3, symmetric=False),
    Grid(symmetric=True, signed=False),
    Grid(bits=4),
    WEIGHT,
    Grid(bits=2, axis=1, narrow=False),
    Grid(bits=4, axis=0, group_size=5),
    Grid(bits=4, axis=1, group_size=8, symmetric=False, signed=False),
    Grid(dtype="float8_e4m3fn"),
    Grid(dtype="float8_e5m2", axis=0),
]


def tensor(seed=0, shape=(6, 4, 3, 3), spread=2.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def fitted(x, grid, seed=1):
    """Return scales and zero points that leave some values outside the range."""
    n = grid.channels(x)
    generator = torch.Generator().manual_seed(seed)
    low, high = -1 - torch.rand(n, generator=generator), 1 + torch.rand(n, generator=generator)
    return scale_and_zero_point(low, high, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_fake_is_quantize_and_dequantize_bit_for_bit(grid, needs_grad):
    x = tensor().requires_grad_(needs_grad)
    scale, zero_point = fitted(x, grid)
    q = quantize(x.detach(), scale, zero_point, grid)
    assert (q.dtype, q.shape) == (grid.storage, x.shape)
    assert q.float().min() >= grid.qmin
    assert q.float().max() <= grid.qmax
    fake = fake_quantize(x, scale, zero_point, grid).detach()
    back = dequantize(q, scale, zero_point, grid)
    assert torch.equal(fake.view(torch.int32), back.view(torch.int32))  # the sign of zero too
    learned = [rule(x, scale, zero_point, grid).detach() for rule in (lsq, pact)]
    assert all(torch.equal(values.view(torch.int32), back.view(torch.int32)) for values in learned)
    assert (fake != x).any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-4, 50),
    zero_point=st.integers(0, 255),
    spread=st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e4]),
)
def test_values_are_those_of_torch_per_tensor(seed, scale, zero_point, spread):
    x = tensor(seed, (257,), spread)
    scale, zero_point = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    assert torch.equal(fake_quantize(x, scale, zero_point, ACTIVATION), theirs)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_values_and_gradients_are_those_of_torch_per_channel(axis):
    x, grid = tensor().requires_grad_(), Grid(axis=axis, bits=5, symmetric=False, signed=False)
    scale, zero_point = fitted(x, grid)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, grid.qmin, grid.qmax)
    ours = fake_quantize(x, scale, zero_point, grid)
    assert torch.equal(ours, theirs)
    grad = tensor(5)
    (wanted,) = torch.autograd.grad(theirs, x, grad)
    (found,) = torch.autograd.grad(ours, x, grad)
    assert torch.equal(found, wanted)
    assert (wanted == 0).any()


def test_gradient_per_tensor_is_that_of_torch():
    x = tensor(spread=3.0).requires_grad_()
    scale, zero_point = torch.tensor([0.013]), torch.tensor([90], dtype=torch.int32)
    (wanted,) = torch.autograd.grad(torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255).sum(), x)
    (found,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, ACTIVATION).sum(), x)
    assert torch.equal(found, wanted)
    assert set(wanted.unique().tolist()) == {0.0, 1.0}


def test_a_covered_gradient_passes_everywhere():
    x = tensor().requires_grad_()
    scale, zero_point = scale_and_zero_point(x.detach().amin().reshape(1), x.detach().amax().reshape(1), ACTIVATION)
    grad = tensor(3)
    (found,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, ACTIVATION, is_covered=True), x, grad)
    assert torch.equal(found, grad)
    (looked_at,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, ACTIVATION), x, grad)
    assert torch.equal(looked_at, grad)  # it was true that nothing is outside


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_integers_are_those_of_numpy(bits, symmetric, seed):
    grid = Grid(bits=bits, symmetric=symmetric, signed=symmetric)
    x = tensor(seed, (64,))
    scale, zero_point = scale_and_zero_point(x.amin().reshape(1), x.amax().reshape(1), grid)
    exact = x.double().numpy() / scale.double().numpy()
    assume((np.abs(exact - np.floor(exact) - 0.5) > 1e-5).all())  # a tie may fall either way in float32
    wanted = np.clip(np.rint(exact) + zero_point.numpy(), grid.qmin, grid.qmax)
    assert (quantize(x, scale, zero_point, grid).numpy() == wanted).all()


def test_halves_are_rounded_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    assert quantize(x, one, zero, Grid()).tolist() == [0, 2, 2, 0, -2, -2]


def run_node(op, inputs, *, opset=21, **attributes):
    """Run one ONNX node in ONNX Runtime."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    names = [f"i{place}" for place in range(len(inputs))]
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for value in inputs]
    outputs = {"DynamicQuantizeLinear": 3}.get(op, 1)
    node = onnx.helper.make_node(op, names, [f"o{place}" for place in range(outputs)], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [
            onnx.helper.make_tensor_value_info(name, kind, value.shape)
            for name, kind, value in zip(names, kinds, inputs, strict=True)
        ],
        [onnx.helper.make_empty_tensor_value_info(f"o{place}") for place in range(outputs)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    session = ort.InferenceSession(inferred.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("grid", [ACTIVATION, WEIGHT, Grid(axis=1, symmetric=False)], ids=str)
def test_integers_and_values_are_those_of_onnx(grid):
    x = tensor()
    scale, zero_point = fitted(x, grid)
    scale = torch.exp2(scale.log2().round())  # with powers of two a division and a reciprocal are the same
    axis = {} if grid.axis is None else {"axis": grid.axis}
    zero = zero_point.numpy().astype(np.uint8 if grid.storage == torch.uint8 else np.int8)
    if grid.axis is None:
        scale_np, zero = scale.numpy().reshape(()), zero.reshape(())
    else:
        scale_np = scale.numpy()
    (theirs,) = run_node("QuantizeLinear", [x.numpy(), scale_np, zero], **axis)
    ours = quantize(x, scale, zero_point, grid)
    if grid.symmetric:  # -128 is theirs alone
        theirs = np.maximum(theirs, grid.qmin)
    assert (ours.numpy() == theirs).all()
    (back,) = run_node("DequantizeLinear", [theirs, scale_np, zero], **axis)
    assert (dequantize(ours, scale, zero_point, grid).numpy() == back).all()


def test_groups_are_the_blocks_of_onnx():
    grid = Grid(axis=0, group_size=16)
    x = tensor(shape=(3, 64))
    scale, zero_point = fitted(x, grid)
    q = quantize(x, scale, zero_point, grid)
    (back,) = run_node("DequantizeLinear", [q.numpy(), scale.reshape(3, 4).numpy()], axis=1, block_size=16)
    assert (dequantize(q, scale, zero_point, grid).numpy() == back).all()


def test_the_last_group_may_be_short():
    grid, x = Grid(bits=4, axis=0, group_size=5), tensor(shape=(2, 7))
    scale, zero_point = fitted(x, grid)
    assert scale.numel() == 4
    parts = [x[row, start : start + 5] for row in range(2) for start in (0, 5)]
    each = [fake_quantize(part, scale[i : i + 1], zero_point[:1], Grid(bits=4)) for i, part in enumerate(parts)]
    assert torch.equal(fake_quantize(x, scale, zero_point, grid).flatten(), torch.cat(each))


def test_dynamic_is_dynamic_quantize_linear():
    x = tensor(7, (5, 33)) + 0.7
    theirs, scale, zero_point = run_node("DynamicQuantizeLinear", [x.numpy()], opset=20)
    wanted = (theirs.astype(np.float32) - zero_point.astype(np.float32)) * scale
    off = np.abs(dynamic_fake_quantize(x, ACTIVATION).numpy() - wanted)
    assert off.max() <= scale * 1.001  # a value in the middle may fall to either side
    assert (off > scale * 0.01).mean() < 0.01


@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e4), bits=st.integers(2, 8), symmetric=st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_grid_covers_the_range_and_holds_zero(low, width, bits, symmetric):
    grid = Grid(bits=bits, symmetric=symmetric, signed=symmetric)
    high = low + width
    scale, zero_point = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), grid)
    least = (grid.qmin - int(zero_point)) * float(scale)
    most = (grid.qmax - int(zero_point)) * float(scale)
    slack = float(scale) * 0.5001
    assert least <= min(low, 0) + slack
    assert most >= max(high, 0) - slack
    zeros = torch.zeros(3)
    assert torch.equal(fake_quantize(zeros, scale, zero_point, grid), zeros)


def test_a_tensor_of_zeros_has_an_ordinary_scale():
    scale, zero_point = scale_and_zero_point(torch.zeros(1), torch.zeros(1), WEIGHT)
    assert torch.isfinite(1 / scale).all()
    assert scale.item() == pytest.approx(1 / 127)
    assert zero_point.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [ACTIVATION, WEIGHT, GRIDS[6], GRIDS[8]], ids=str)
def test_half_precision_is_rounded_in_float32(dtype, grid):
    x = tensor().to(dtype).requires_grad_()
    scale, zero_point = fitted(x, grid)
    wide = fake_quantize(x.detach().float(), scale, zero_point, grid)
    ours = fake_quantize(x, scale, zero_point, grid)
    assert ours.dtype == dtype
    assert torch.equal(ours, wide.to(dtype))
    ours.sum().backward()
    assert x.grad.dtype == dtype
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(
        quantize(x.detach(), scale, zero_point, grid).float(),
        quantize(x.detach().float(), scale, zero_point, grid).float(),
    )


def lsq_by_hand(v, s, q_least, q_most, grad):
    """Esser et al. (2019), equations 1 to 5 and section 2.2, in float64, for one step size."""
    ratio = v / s
    inside = (ratio > q_least) & (ratio < q_most)
    by_step = np.where(inside, -ratio + np.rint(ratio), np.where(ratio <= q_least, q_least, q_most))
    return (grad * by_step).sum() / np.sqrt(v.size * q_most), np.where(inside, grad, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_learned_steps_follow_the_paper(bits, axis):
    x, grad = tensor(3, (6, 40)).requires_grad_(), tensor(4, (6, 40))
    n = x.shape[axis]
    scale = (torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.05).requires_grad_()
    grid = Grid(bits=bits, axis=axis)
    lsq(x, scale, torch.zeros(n, dtype=torch.int32), grid).backward(grad)
    rows = (value.detach().movedim(axis, 0).double().numpy() for value in (x, grad, x.grad))
    for v, g, found, s, found_of_step in zip(*rows, scale.tolist(), scale.grad.tolist(), strict=True):
        of_step, of_value = lsq_by_hand(v, s, grid.qmin, grid.qmax, g)
        assert found_of_step == pytest.approx(of_step, rel=1e-4, abs=1e-5)
        assert np.allclose(found, of_value)


def test_learned_steps_of_one_scale_and_a_zero_point():
    x, grad = tensor(3, (400,)), tensor(4, (400,))
    scale = torch.tensor([0.011], requires_grad=True)
    lsq(x.requires_grad_(), scale, torch.tensor([100], dtype=torch.int32), ACTIVATION).backward(grad)
    wanted, of_value = lsq_by_hand(x.detach().double().numpy(), scale.item(), -100, 155, grad.double().numpy())
    assert scale.grad.item() == pytest.approx(wanted * np.sqrt(155 / 255), rel=1e-4)  # the grid's qmax is 255
    assert np.allclose(x.grad.numpy(), of_value)


def test_clipping_learns_from_what_is_clipped():
    x, grad = tensor(3, (400,)).abs(), tensor(4, (400,))
    alpha = 1.7  # the clipping value of Choi et al.
    scale = torch.tensor([alpha / 255], requires_grad=True)
    pact(x.requires_grad_(), scale, torch.zeros(1, dtype=torch.int32), ACTIVATION).backward(grad)
    above = x.detach() > alpha
    assert float(scale.grad) == pytest.approx(255 * float(grad[above].double().sum()), rel=1e-5)
    assert torch.equal(x.grad, grad * ~above)


def test_learned_steps_need_no_gradient_of_the_input():
    scale = torch.tensor([0.1], requires_grad=True)
    lsq(tensor(), scale, torch.zeros(1, dtype=torch.int32), Grid(bits=4)).sum().backward()
    assert torch.isfinite(scale.grad).all()
    assert scale.grad.abs().sum() > 0
