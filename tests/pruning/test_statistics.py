"""What is observed, against sums worked independently in float64 numpy."""

import io
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_opt.pruning.inputs import reader_for
from lightning_opt.pruning.statistics import Statistics

NEEDS = {"input_norm", "gram", "output_norm"}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observe(layer, batches, needs=NEEDS, name="weight"):
    model = nn.Sequential(layer)
    statistics = Statistics(model, [f"0.{name}"], needs)
    statistics.install()
    outputs = [model(x) for x in batches]
    statistics.remove()
    return statistics.evidence(f"0.{name}"), outputs


def check_rows(evidence, rows, groups=1):
    """Compare with the rows of inputs, `(rows, features)`, one matrix a group."""
    rows = rows if isinstance(rows, list) else [rows]
    norms = np.concatenate([np.sqrt((r**2).sum(0)) for r in rows])
    np.testing.assert_allclose(evidence.input_norm.numpy(), norms, rtol=1e-5)
    grams = np.stack([r.T @ r for r in rows])
    np.testing.assert_allclose(evidence.gram.numpy(), grams if groups > 1 else grams[0], rtol=1e-4, atol=1e-4)
    assert evidence.groups == groups


def windows(x, layer):
    """Unfold a batch by plain indexing: `(rows, channels * kernel)`, in the order of `unfold`."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    pads = [p for pad in reversed(layer.padding) for p in (pad, pad)]
    x = F.pad(x, pads, mode=mode).double().numpy()
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    rows = []
    for b, place in product(range(x.shape[0]), product(*map(range, sizes))):
        row = []
        for c, offset in product(range(x.shape[1]), product(*map(range, kernel))):
            at = tuple(p * s + o * d for p, s, o, d in zip(place, stride, offset, dilation, strict=True))
            row.append(x[(b, c, *at)])
        rows.append(row)
    return np.array(rows)


def test_linear():
    layer, batches = nn.Linear(4, 3), [draw(2, 5, 4), draw(3, 5, 4, seed=1)]
    evidence, outputs = observe(layer, batches)
    check_rows(evidence, torch.cat([x.flatten(0, 1) for x in batches]).double().numpy())
    y = torch.cat([y.flatten(0, 1) for y in outputs]).detach().double().numpy()
    np.testing.assert_allclose(evidence.output_norm.numpy(), np.sqrt((y**2).sum(0)), rtol=1e-5)
    assert evidence.input_dim == 1


CONVS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "strided, padded": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 2, 7, 5)),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2, padding=1), (2, 2, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding=1), (2, 3, 5, 5)),
    "reflecting": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
    "1d": (nn.Conv1d(3, 4, 5, stride=2), (2, 3, 11)),
    "3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("kind", CONVS)
def test_convolutions(kind):
    layer, shape = CONVS[kind]
    batches = [draw(*shape), draw(*shape, seed=1)]
    evidence, outputs = observe(layer, batches)
    rows = np.concatenate([windows(x, layer) for x in batches])
    check_rows(evidence, np.split(rows, layer.groups, axis=1), groups=layer.groups)
    y = torch.cat(outputs).detach().double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(evidence.output_norm.numpy(), np.sqrt((y**2).sum(1)), rtol=1e-5)
    # The rows are what the weight multiplies, in the weight's own order.
    part = rows[:, : rows.shape[1] // layer.groups] @ layer.weight[0].detach().double().flatten().numpy()
    first = torch.cat(outputs)[:, 0].detach().double().flatten().numpy() - layer.bias[0].item()
    np.testing.assert_allclose(part, first, atol=1e-5)


def test_embedding_counts_its_rows():
    ids = torch.tensor([[0, 2, 2], [4, 2, 0]])
    evidence, _ = observe(nn.Embedding(5, 3), [ids], {"input_norm", "output_norm"})
    np.testing.assert_allclose(evidence.input_norm.numpy(), np.sqrt([2, 0, 3, 0, 1]), rtol=1e-6)
    assert evidence.input_dim == 0
    with pytest.raises(ValueError, match="diagonal"):
        observe(nn.Embedding(5, 3), [ids], {"gram"})


class InFirst(nn.Module):
    """A layer of somebody's own, with the weight as `(in, out)`, as Hugging Face's Conv1D keeps it."""

    def __init__(self, inputs, outputs, turned=True):
        super().__init__()
        shape = (inputs, outputs) if turned else (outputs, inputs)
        self.weight, self.bias = nn.Parameter(draw(*shape, seed=3)), nn.Parameter(draw(outputs, seed=4))
        self.turned = turned

    def forward(self, x):
        return x @ (self.weight if self.turned else self.weight.T) + self.bias


@pytest.mark.parametrize("outputs", [6, 4])
@pytest.mark.parametrize("turned", [True, False])
def test_a_layer_of_an_unknown_type_tells_its_layout(outputs, turned):
    x = draw(7, 4)
    evidence, _ = observe(InFirst(4, outputs, turned), [x])
    assert evidence.input_dim == (0 if turned else 1)
    check_rows(evidence, x.double().numpy())
    assert evidence.output_norm.shape == (outputs,)


def test_hugging_face_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    evidence, _ = observe(pytorch_utils.Conv1D(4, 4), [draw(2, 3, 4)])
    assert evidence.input_dim == 0


def test_transposed_convolution_and_gru():
    x = draw(2, 3, 5, 5)
    evidence, _ = observe(nn.ConvTranspose2d(3, 4, 3), [x], {"input_norm", "output_norm"})
    rows = x.double().movedim(1, -1).flatten(0, 2).numpy()
    np.testing.assert_allclose(evidence.input_norm.numpy(), np.sqrt((rows**2).sum(0)), rtol=1e-5)
    assert (evidence.input_dim, evidence.output_norm.shape) == (0, (4,))
    x = draw(2, 6, 3)
    evidence, _ = observe(nn.GRU(3, 5, batch_first=True), [x], {"input_norm"}, name="weight_ih_l0")
    np.testing.assert_allclose(evidence.input_norm.numpy(), np.sqrt((x.double().numpy() ** 2).sum((0, 1))), rtol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.LayerNorm(3), nn.MultiheadAttention(4, 2)])
def test_what_meets_no_inputs_has_no_reader(layer):
    name = "bias" if hasattr(layer, "bias") else "in_proj_weight"
    assert reader_for(layer, name) is None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


NAMES = ["b.weight", "a.weight", "a.bias"]


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def step(model, statistics, x, *, share=1.0, last=True):
    (share * F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long))).backward()
    statistics.after_backward(last=last)


def train(model, statistics, batches, lr=0.1):
    for x in batches:
        model.zero_grad()
        step(model, statistics, x)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad


def test_mean_gradients():
    model, batches = net(), [draw(6, 5, seed=i) for i in range(4)]
    statistics = Statistics(model, NAMES, {"gradient", "squared_gradient"})
    exact = net().double()
    wanted = []
    for x in batches:
        loss = F.cross_entropy(exact(x.double()), torch.zeros(6, dtype=torch.long))
        wanted.append(torch.autograd.grad(loss, exact.a.weight)[0])
        model.zero_grad()
        step(model, statistics, x)
    evidence = statistics.evidence("a.weight")
    torch.testing.assert_close(evidence.gradient.double(), torch.stack(wanted).mean(0), rtol=1e-4, atol=1e-7)
    squares = torch.stack(wanted).square().mean(0)
    torch.testing.assert_close(evidence.squared_gradient.double(), squares, rtol=1e-4, atol=1e-9)
    assert evidence.input_norm is None


def test_accumulated_micro_batches_count_as_their_batch():
    """`.grad` grows over micro-batches; only the last one holds the batch's gradient."""
    x, whole, parts, naive = draw(8, 5), net(), net(), net()
    needs = {"gradient", "squared_gradient", "movement"}
    found = {}
    for key, model in (("whole", whole), ("parts", parts), ("naive", naive)):
        statistics = found[key] = Statistics(model, NAMES, needs)
        for _ in range(2):
            model.zero_grad()
            if key == "whole":
                step(model, statistics, x)
                continue
            for i, part in enumerate(x.chunk(4)):
                step(model, statistics, part, share=0.25, last=key == "naive" or i == 3)
    for name in NAMES:
        a, b, c = (found[key].evidence(name) for key in ("whole", "parts", "naive"))
        for need in needs:
            torch.testing.assert_close(getattr(a, need), getattr(b, need), rtol=1e-5, atol=1e-8)
        assert not torch.allclose(a.gradient, c.gradient, rtol=1e-3)  # counted each time, early parts weigh too much


def test_observes_in_training_or_when_calibrating_only():
    model, x = net(), draw(6, 5)
    statistics = Statistics(model, ["a.weight"], {"input_norm"})
    statistics.install()
    model.eval()
    model(x)
    assert statistics.evidence("a.weight").input_norm is None
    with statistics.calibrating():
        model(x)
    once = statistics.evidence("a.weight").input_norm.clone()
    np.testing.assert_allclose(once.numpy(), np.linalg.norm(x.double().numpy(), axis=0), rtol=1e-5)
    model(x)
    assert torch.equal(statistics.evidence("a.weight").input_norm, once)
    model.train()
    model(x)
    torch.testing.assert_close(statistics.evidence("a.weight").input_norm, once * 2**0.5)
    statistics.remove()
    model(x)
    torch.testing.assert_close(statistics.evidence("a.weight").input_norm, once * 2**0.5)
    statistics.reset()
    assert statistics.evidence("a.weight").input_norm is None


def hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_nothing_is_hooked_that_nobody_reads():
    model = net()
    statistics = Statistics(model, NAMES, {"gradient", "movement"})
    statistics.install()
    assert hooks(model) == 0
    statistics = Statistics(model, NAMES, {"input_norm"})
    assert hooks(model) == 0
    statistics.install()
    statistics.install()
    assert hooks(model) == 2  # one a layer, and none for a bias
    with statistics.calibrating():
        assert hooks(model) == 2
    assert hooks(model) == 2
    statistics.remove()
    with statistics.calibrating():
        assert hooks(model) == 2
    assert hooks(model) == 0
    idle = Statistics(model, NAMES, set())
    step(model, idle, draw(2, 5))
    assert idle.state_dict()["sums"] == {}


def test_sums_are_float32_under_autocast_and_survive_inference_mode():
    model, x = net(), draw(64, 5)
    statistics = Statistics(model, ["a.weight"], {"gram"})
    with statistics.calibrating(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    with statistics.calibrating():
        model(x)
    rows = x.double().numpy()
    np.testing.assert_allclose(statistics.evidence("a.weight").gram.numpy(), 2 * rows.T @ rows, rtol=1e-5, atol=1e-4)
    rounded = x.bfloat16().double().numpy()
    assert not np.allclose(2 * rounded.T @ rounded, 2 * rows.T @ rows, rtol=1e-5, atol=1e-4)


ALL = {"gradient", "squared_gradient", "movement", "input_norm", "gram", "output_norm"}


def test_a_resumed_run_is_bit_equal():
    """Stop after 3 of 6 steps, save with plain tensors, go on with fresh objects."""
    batches = [draw(6, 5, seed=i) for i in range(6)]

    def start(model):
        statistics = Statistics(model, NAMES, ALL, pull=(0.01, 1.0))
        statistics.install()
        return statistics

    model = net()
    statistics = start(model)
    train(model, statistics, batches[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "statistics": statistics.state_dict()}, file)
    train(model, statistics, batches[3:])  # uninterrupted: must not reach into what was saved
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net(seed=9)
    other.load_state_dict(saved["model"])
    resumed = start(other)
    resumed.load_state_dict(saved["statistics"])
    train(other, resumed, batches[3:])
    forgetful = start(other)
    forgetful.load_state_dict(saved["statistics"])
    different = 0
    for name in NAMES:
        a, b, c = (s.evidence(name) for s in (statistics, resumed, forgetful))
        for need in ALL:
            left, right = getattr(a, need), getattr(b, need)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right), (name, need)
            different += left is not None and not torch.equal(left, getattr(c, need))
        assert torch.equal(statistics.last_value(name), resumed.last_value(name))
    assert different > 5


def test_a_state_of_other_weights_is_refused():
    model = net()
    statistics = Statistics(model, ["a.weight"], {"gradient"})
    step(model, statistics, draw(4, 5))
    state = statistics.state_dict()
    with pytest.raises(ValueError, match=r"gradient of 'a.weight', which is not observed here"):
        Statistics(model, ["b.weight"], {"gradient"}).load_state_dict(state)
    state["sums"]["gradient"]["a.weight"] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"gradient of 'a.weight' has shape \(2, 5\), the weight has \(4, 5\)"):
        statistics.load_state_dict(state)


def test_ranks_agree_on_what_one_process_sees():
    """Two ranks with half of each batch: the mean of norms squared is half the whole's, gradients are the mean."""
    x = draw(8, 5)
    ranks = []
    for part in x.chunk(2):
        model = net()
        statistics = Statistics(model, [*NAMES, "unused.weight"], ALL)
        statistics.install()
        step(model, statistics, part)
        ranks.append(statistics)
    flats = []
    for statistics in ranks:
        statistics.reduce(lambda flat: flats.append(flat.clone()) or flat)
    for statistics in ranks:
        statistics.reduce(lambda flat: (flats[0] + flats[1]) / 2)
    one = net()
    whole = Statistics(one, [*NAMES, "unused.weight"], ALL)
    whole.install()
    step(one, whole, x)
    for name in NAMES:
        a, b, w = ranks[0].evidence(name), ranks[1].evidence(name), whole.evidence(name)
        for need in ALL:
            assert getattr(a, need) is None or torch.equal(getattr(a, need), getattr(b, need))
        torch.testing.assert_close(a.gradient, w.gradient, rtol=1e-5, atol=1e-7)
        if w.input_norm is not None:
            torch.testing.assert_close(a.input_norm * 2**0.5, w.input_norm, rtol=1e-5, atol=1e-7)
    assert not torch.equal(flats[0], flats[1])


class Readers(nn.Module):
    """Two layers read one tensor; a third reads it after it was changed in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        first = self.a(x), self.b(x)
        x.add_(1.0)
        return first, self.c(x)


@pytest.mark.parametrize("inference", [False, True])
def test_what_layers_share_is_counted_for_each(inference):
    names = ["a.weight", "b.weight", "c.weight"]
    model = Readers()
    statistics = Statistics(model, names, {"gram", "input_norm"})
    batches = [draw(6, 4, seed=i) for i in range(2)]
    before = torch.cat(batches).double()
    with statistics.calibrating(), torch.inference_mode(mode=inference), torch.no_grad():
        for x in batches:
            model(x.clone())
    for name in names[:2]:
        torch.testing.assert_close(statistics.evidence(name).gram.double(), before.T @ before, rtol=1e-5, atol=1e-5)
    after = before + 1.0
    torch.testing.assert_close(statistics.evidence("c.weight").gram.double(), after.T @ after, rtol=1e-5, atol=1e-5)


def test_sparse_gradients_of_an_embedding():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    statistics = Statistics(model, ["0.weight"], {"gradient"})
    model(torch.tensor([1, 1, 3])).sum().backward()
    statistics.after_backward()
    gradient = statistics.evidence("0.weight").gradient
    assert torch.equal(gradient, torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])[:, None].expand(5, 3))


def test_unknown_names_and_needs_are_refused():
    with pytest.raises(ValueError, match=r"names has 'a.wieght'.*near names: a.weight"):
        Statistics(net(), ["a.wieght"], {"gradient"})
    with pytest.raises(ValueError, match="needs has 'hessian'; known are gradient, "):
        Statistics(net(), NAMES, {"hessian"})
