"""CRD against its objective worked in float64 numpy, and what a resumed run must repeat."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_opt.errors import ConfigError
from lightning_opt.losses import contrastive
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.contrastive import CRD, contrastive_nce, draw_negatives

N_DATA = 40
ROOT = Path(__file__).parents[2]


def expected_nce(scores, n_data, z):
    negatives = scores.shape[1] - 1
    p, noise = np.exp(scores) / z, negatives / n_data
    positive = np.log(p[:, 0] / (p[:, 0] + noise)).sum()
    return -(positive + np.log(noise / (p[:, 1:] + noise)).sum()) / len(scores)


def batch(step, *, size=8):
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(N_DATA, generator=generator)[:size]
    ours = torch.randn(size, 6, generator=generator, requires_grad=True)
    theirs = torch.randn(size, 3, 2, 2, generator=generator, requires_grad=True)
    supervision = Supervision(labels=index % 4, index=index)
    return Signals(logits=ours, features={"a": ours}), Signals(logits=ours, features={"b": theirs}), supervision


def make(**options):
    torch.manual_seed(0)
    loss = CRD({"a": "b"}, **{"n_data": N_DATA, "n_negatives": 16, "feature_dim": 5, **options})
    loss.build(*batch(0)[:2])
    return loss


def step(loss, number, optimizer=None):
    value = loss(*batch(number))
    value.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return value.item()


def test_objective_for_fixed_scores():
    scores = np.random.default_rng(0).normal(size=(4, 11)) / 0.07
    z = 1.7e5
    value = contrastive_nce(torch.tensor(scores), n_data=500, log_z=torch.tensor(z, dtype=torch.float64).log())
    assert value.item() == pytest.approx(expected_nce(scores, 500, z), abs=1e-6)


def test_whole_loss_for_a_fixed_bank_and_fixed_negatives(monkeypatch):
    loss = make(temperature=0.5).double()
    student, teacher, supervision = batch(3)
    negatives = torch.randint(N_DATA, (8, 16), generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(contrastive, "draw_negatives", lambda *_, **__: negatives)
    banks = [loss.bank_teacher.numpy().copy(), loss.bank_student.numpy().copy()]
    features = (
        student.features["a"].detach().double().numpy(),
        teacher.features["b"].detach().double().mean((2, 3)).numpy(),
    )
    embeds = loss.embed_student, loss.embed_teacher
    expected, chosen = 0.0, np.concatenate([supervision.index.numpy()[:, None], negatives.numpy()], axis=1)
    for x, embed, bank in zip(features, embeds, banks, strict=True):
        vector = x @ embed.weight.detach().numpy().T + embed.bias.detach().numpy()
        vector /= np.linalg.norm(vector, axis=1, keepdims=True)
        scores = np.einsum("bd,bkd->bk", vector, bank[chosen]) / 0.5
        expected += expected_nce(scores, N_DATA, np.exp(scores).mean() * N_DATA)
    assert loss(student, teacher, supervision).item() == pytest.approx(expected, abs=1e-6)


def test_bank_follows_the_vectors_with_momentum():
    loss = make(momentum=0.25)
    before, (student, teacher, supervision) = loss.bank_student.clone(), batch(5)
    loss(student, teacher, supervision)
    vector = loss.embed_student(student.logits).detach().numpy().astype(np.float64)
    vector /= np.linalg.norm(vector, axis=1, keepdims=True)
    rows = 0.25 * before[supervision.index].numpy() + 0.75 * vector
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(loss.bank_student[supervision.index].numpy(), rows, atol=1e-6)
    others = [i for i in range(N_DATA) if i not in supervision.index.tolist()]
    assert torch.equal(loss.bank_student[others], before[others])


def test_eval_mode_remembers_nothing():
    loss = make()
    step(loss, 0)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    loss(*batch(1))
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


def test_gradients_reach_student_and_embeddings_and_not_the_teacher():
    loss, (student, teacher, supervision) = make(), batch(1)
    loss(student, teacher, supervision).backward()
    assert student.features["a"].grad.abs().sum() > 0
    assert teacher.features["b"].grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())


def test_a_resumed_run_is_bit_equal():
    def run(stop=None):
        loss = make()
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        values = []
        for number in range(8):
            if number == stop:
                state = copy.deepcopy(loss.state_dict())
                torch.manual_seed(123)  # a new process has another random state
                loss = CRD({"a": "b"}, n_data=N_DATA, n_negatives=16, feature_dim=5)
                loss.build(*batch(0)[:2])
                loss.load_state_dict(state)
                optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
            values.append(step(loss, number, optimizer))
        return values, loss.state_dict()

    (whole, end), (resumed, end_resumed) = run(), run(stop=4)
    assert whole == resumed
    assert all(torch.equal(end[key], end_resumed[key]) for key in end)
    assert int(end["steps"]) == 8


def test_negatives_change_from_step_to_step_and_not_the_global_generator():
    loss = make()
    state = torch.get_rng_state()
    loss.log_z.fill_(3.0)
    loss.eval()  # same bank and batch: only the step differs
    first = loss(*batch(1)).item()
    loss._steps = 1
    second = loss(*batch(1)).item()
    loss._steps = 2
    assert second != loss(*batch(1)).item()
    assert first != second
    assert torch.equal(torch.get_rng_state(), state)


class TestDraw:
    CLASSES = torch.tensor([2, 0, 1, 0, -1, 2, 1, 0])

    def draw(self, labels, count=4000):
        return draw_negatives(
            self.CLASSES, torch.tensor(labels), count=count, generator=torch.Generator().manual_seed(0)
        )

    @pytest.mark.parametrize(("label", "others"), [(0, [0, 2, 4, 5, 6]), (1, [0, 1, 3, 4, 5, 7]), (9, list(range(8)))])
    def test_every_sample_of_another_class_equally_often(self, label, others):
        found, counts = np.unique(self.draw([label]).numpy(), return_counts=True)
        assert found.tolist() == others
        expected = 4000 / len(others)
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()

    def test_a_single_class_does_not_crash(self):
        same = torch.zeros(5, dtype=torch.int64)
        drawn = draw_negatives(same, same[:2], count=3, generator=torch.Generator())
        assert drawn.shape == (2, 3)
        assert int(drawn.max()) < 5

    def test_a_sample_is_never_its_own_negative_even_when_new(self, monkeypatch):
        seen = []

        def spy(classes, labels, **options):
            seen.append(draw_negatives(classes, labels, **options))
            return seen[-1]

        monkeypatch.setattr(contrastive, "draw_negatives", spy)
        loss, (student, teacher, supervision) = make(n_negatives=500, by_class=False), batch(2)
        loss(student, teacher, supervision)
        assert not (seen[0] == supervision.index[:, None]).any()


def test_build_twice_changes_nothing():
    loss = make()
    step(loss, 0)
    before = copy.deepcopy(loss.state_dict())
    loss.build(*batch(0)[:2])
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


def test_what_it_needs():
    assert set(CRD({"a": "b"}, n_data=3).needs) == {"features", "labels", "index"}
    assert set(CRD(n_data=3).needs) == {"logits", "labels", "index"}


def test_clear_refusals():
    loss, (student, teacher, _) = make(), batch(0)
    with pytest.raises(ConfigError, match="gives `index`"):
        loss(student, teacher, Supervision(labels=torch.zeros(8, dtype=torch.int64)))
    with pytest.raises(ConfigError, match=r"n_data=40 is less than .* sample 40"):
        loss(student, teacher, Supervision(labels=torch.zeros(8, dtype=torch.int64), index=torch.arange(33, 41)))
    with pytest.raises(ConfigError, match="by_class=false"):
        loss(student, teacher, Supervision(labels=torch.zeros(8, 3), index=torch.arange(8)))
    with pytest.raises(RuntimeError, match="call build"):
        CRD({"a": "b"}, n_data=N_DATA)(*batch(0))
    with pytest.raises(ValueError, match="n_data=0"):
        CRD({"a": "b"}, n_data=0)
    with pytest.raises(ValueError, match="momentum=1"):
        CRD({"a": "b"}, n_data=5, momentum=1.0)


def test_trained_embeddings_tell_samples_apart():
    torch.manual_seed(0)
    data = torch.randn(N_DATA, 6)
    loss = CRD(n_data=N_DATA, n_negatives=64, feature_dim=5)
    signals = Signals(logits=data), Signals(logits=data * 2.0)
    supervision = Supervision(labels=torch.arange(N_DATA) % 4, index=torch.arange(N_DATA))
    loss.build(*signals)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(*signals, supervision).backward()
        optimizer.step()
    own = (loss.bank_student * loss.bank_teacher).sum(1).mean()
    other = (loss.bank_student @ loss.bank_teacher.T).mean()
    assert own > 0.6
    assert other < 0.3


RANK = """
import sys, torch
from torch import distributed as dist
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.contrastive import CRD
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
loss = CRD(n_data=12, n_negatives=5, feature_dim=3)
index = torch.arange(4) + 4 * rank
ours, theirs = torch.randn(12, 6)[index], torch.randn(12, 6)[index]
loss.build(Signals(logits=ours), Signals(logits=theirs))
for _ in range(2):
    loss(Signals(logits=ours), Signals(logits=theirs), Supervision(labels=index % 3, index=index))
torch.save(loss.state_dict(), f"{place}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_share_what_they_remember(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["classes"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, -1, -1, -1, -1]
