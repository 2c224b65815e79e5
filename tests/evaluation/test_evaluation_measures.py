"""Counts against hand counts, clocks that tick as told, and engines against PyTorch."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_opt.errors import ConfigError
from lightning_opt.evaluation import (
    Price,
    class_fidelity,
    cost_per_million,
    count_flops,
    count_nonzero,
    count_parameters,
    evaluate,
    label_fidelity,
    measure,
    peak_memory,
    safetensors_bytes,
    time_interleaved,
    value_fidelity,
)
from lightning_opt.evaluation.engines import HalfRunner, build_runners, chosen_engines
from lightning_opt.evaluation.latency import fixed_threads, percentile_ms
from lightning_opt.export.runner import EagerRunner


class Attention(nn.Module):
    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (layer(x).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)


@pytest.mark.parametrize(
    ("model", "x", "by_hand"),
    [
        (nn.Linear(10, 3), torch.zeros(1, 10), 2 * 10 * 3),
        (nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 6, 6), 2 * 8 * 6 * 6 * 3 * 9),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), torch.zeros(1, 8, 6, 6), 2 * 8 * 6 * 6 * 9),
        (nn.Conv1d(2, 4, 5), torch.zeros(1, 2, 12), 2 * 4 * 8 * 2 * 5),
        # three projections, then scores and their product with the values
        (Attention(), torch.zeros(1, 5, 8), 3 * 2 * 5 * 8 * 8 + 2 * (2 * 2 * 5 * 5 * 4)),
        (nn.GRU(6, 4, batch_first=True), torch.zeros(1, 7, 6), 2 * 7 * (12 * 6 + 12 * 4)),
    ],
    ids=["linear", "conv", "depthwise", "conv1d", "attention", "gru"],
)
def test_operations_are_two_per_multiply_accumulate(model, x, by_hand):
    flops = count_flops(model.eval(), x)
    counted = flops.total if not flops.not_counted else None
    if counted is None:
        assert isinstance(model, nn.GRU), flops.not_counted
    else:
        assert counted == pytest.approx(by_hand, rel=0.01)


def test_an_operator_without_a_formula_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x @ x.T + torch.eye(len(x)))

    assert any("inv" in name for name in count_flops(Odd(), torch.randn(4, 4)).not_counted)


def test_parameters_count_tied_ones_once_and_zeros_apart():
    table = nn.Embedding(7, 3)
    head = nn.Linear(3, 7, bias=False)
    head.weight = table.weight
    model = nn.ModuleList([table, head])
    with torch.no_grad():
        table.weight[0] = 0.0
    assert count_parameters(model) == 21
    assert count_nonzero(model) == 18


def test_size_is_that_of_the_file(tmp_path):
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).to(torch.float16))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert safetensors_bytes(model) == (tmp_path / "m.safetensors").stat().st_size


def test_peak_memory_holds_weights_input_and_the_two_largest_neighbours():
    model = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 1))
    x = torch.zeros(1, 10)
    weights = 4 * (10 * 1000 + 1000 + 1000 + 1 + 10)
    # while the ReLU runs, its input and its output of 1000 numbers each are alive
    assert weights + 8000 <= peak_memory(model, x).bytes <= weights + 8000 + 256


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_rounds_call_everybody_once_in_rotating_order_and_percentiles_are_numpys():
    clock, order = Clock(), []
    steps = {"a": iter(np.linspace(0.001, 0.120, 130)), "b": iter(np.full(130, 0.002))}

    def call(name):
        order.append(name)
        clock.now += float(next(steps[name]))

    calls = {name: (lambda name=name: call(name)) for name in steps}
    timings = time_interleaved(calls, rounds=120, warmup_rounds=1, max_seconds=1e9, clock=clock)
    timed = order[2:]
    assert timed[:6] == ["a", "b", "b", "a", "a", "b"]
    assert timed.count("a") == timed.count("b") == 120
    expected = np.linspace(0.001, 0.120, 130)[1:121] * 1e3
    for percent in (50, 95, 99):
        assert percentile_ms(timings.samples_ms["a"], percent) == pytest.approx(np.percentile(expected, percent))
    assert timings.samples_ms["b"] == pytest.approx([2.0] * 120)


def test_time_is_limited_and_too_few_calls_give_no_p99():
    clock = Clock()

    def slow():
        clock.now += 1.0

    timings = time_interleaved({"slow": slow}, rounds=1000, min_rounds=5, max_seconds=3.0, clock=clock)
    assert len(timings.samples_ms["slow"]) == 5
    assert percentile_ms(timings.samples_ms["slow"], 99) is None


def test_threads_are_restored():
    before = torch.get_num_threads()
    with fixed_threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads"), fixed_threads(0):
        pass


def test_fidelity_by_hand():
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    got = class_fidelity(student, teacher)
    p, q = teacher.double().softmax(-1).numpy(), student.double().softmax(-1).numpy()
    assert got["argmax_agreement"] == pytest.approx(2 / 3)
    assert got["kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    masked = class_fidelity(student, teacher, mask=torch.tensor([True, True, False]))
    assert masked["argmax_agreement"] == 1.0
    assert label_fidelity(student, teacher)["label_agreement"] <= 1.0
    ranks = value_fidelity(torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]))
    assert ranks["rank_correlation"] == pytest.approx(0.8)


def test_evaluate_feeds_the_metric():
    class Mean:
        def __init__(self):
            self.seen = []

        def update(self, preds, target):
            self.seen += (preds - target).tolist()

        def compute(self):
            return {"error": torch.tensor(self.seen).mean()}

    batches = [(torch.ones(2), torch.zeros(2)), (torch.full((2,), 3.0), torch.zeros(2))]
    assert evaluate(lambda x: x, batches, Mean()) == {"error": pytest.approx(2.0)}


def test_cost():
    assert cost_per_million(1000.0, price=Price(per_hour=3.6, utilisation=0.5))["value"] == pytest.approx(2.0)


NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).to(self.table.weight.dtype)
        return (self.table(input_ids) * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_engines_answer_as_pytorch_does_at_any_batch(package, kind, tmp_path):
    pytest.importorskip(package)
    if package == "onnxruntime":
        pytest.importorskip("onnxscript")
    if kind == "tensor":
        model, example, other = NET, torch.randn(1, 1, 8, 8), torch.randn(5, 1, 8, 8)
    else:
        model = TwoInputs().eval()
        ids = torch.randint(11, (5, 7))
        mask = torch.ones(5, 7, dtype=torch.long)
        mask[0, 3:] = 0
        other = {"input_ids": ids, "attention_mask": mask}
        example = {name: value[:1] for name, value in other.items()}
    (runner,), failures = build_runners(model, example, [package], threads=1, folder=tmp_path)
    assert not failures
    torch.testing.assert_close(runner.predict(other), EagerRunner(model).predict(other), atol=1e-5, rtol=1e-4)


def test_half_precision_runs_on_a_copy():
    x = torch.randn(5, 1, 8, 8)
    half = HalfRunner(NET).predict(x)
    assert half.dtype == torch.float32
    assert NET[0].weight.dtype == torch.float32
    torch.testing.assert_close(half, NET(x).detach(), atol=0.05, rtol=0.05)
    assert not torch.equal(half, NET(x))


def test_an_engine_that_cannot_run_a_model_says_why(tmp_path):
    pytest.importorskip("onnxruntime")

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    runners, failures = build_runners(Branching(), torch.ones(1, 3), ["onnxruntime"], threads=1, folder=tmp_path)
    assert runners == []
    assert "exported" in failures["onnxruntime"]


def test_measure_gives_every_measure_or_a_reason_and_restores_modes():
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).train()
    result = measure(
        {"one": NET, "other": other}, torch.randn(1, 1, 8, 8), batch_sizes=(1, 3), rounds=25, max_seconds=1.0
    )
    assert other.training
    for entry in result.values():
        for name in ("params", "params_nonzero", "flops", "size_bytes", "latency_ms", "peak_memory_bytes", "runtime"):
            assert entry[name] is not None, name
        assert [row["batch"] for row in entry["latency_ms"]] == [1, 3]
        for name in ("energy_j_per_1k", "cost_per_1m"):
            assert entry[name] is not None or entry["reasons"][name]
        p50 = entry["latency_ms"][1]["p50"]
        assert entry["throughput_per_s"][1]["value"] == pytest.approx(3e3 / p50)


def test_unknown_engine_is_named():
    with pytest.raises(ConfigError, match="tensorrt"):
        chosen_engines(["tensorrt"])
    with pytest.raises(ConfigError, match="bfloat16"):
        chosen_engines(["onnxruntime:bfloat16"])
