"""DIST and multi-level distillation: what the papers promise, and sizes at the edge."""

import numpy as np
import pytest
import torch

from lightning_opt.losses import DIST, KD, MultiLevelKD, Signals, Supervision
from lightning_opt.losses.correlation import dist, gram_gaps, pearson
from lightning_opt.testing import check_loss

N, C = 8, 5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def says(array, *, grad=False):
    return Signals(logits=torch.tensor(array, requires_grad=grad))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class TestPearson:
    def test_is_the_correlation(self, rng):
        a, b = rng.normal(size=(2, N, C))
        expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(pearson(torch.tensor(a), torch.tensor(b)).numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize(("scale", "expected"), [(3.0, 1.0), (-0.5, -1.0)])
    def test_of_an_affine_map(self, rng, scale, expected):
        a = torch.tensor(rng.normal(size=(N, C)))
        torch.testing.assert_close(pearson(a, scale * a + 7.0), torch.full((N,), expected).double())

    def test_of_a_constant_is_zero_with_a_finite_gradient(self, rng):
        a = torch.ones(2, C, requires_grad=True)
        value = pearson(a, torch.tensor(rng.normal(size=(2, C))).float())
        value.sum().backward()
        assert value.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
        assert a.grad.isfinite().all()


class TestDIST:
    """Equation 5 of the paper: d(m u + n, v) = d(u, v) for m > 0, within samples and within classes."""

    def shrunk(self, p, share):
        """Mix each sample's probabilities with the uniform ones: an affine map of rows and, if shared, of columns."""
        return np.log(share * p + (1 - share) / C)

    def test_within_samples_each_sample_may_have_its_own_map(self, rng):
        student, teacher = softmax(rng.normal(size=(2, N, C)))
        share = rng.uniform(0.2, 0.9, size=(N, 1))
        plain, moved = (
            DIST(intra=0.0)(says(z), says(np.log(teacher)), Supervision()).item()
            for z in (np.log(student), self.shrunk(student, share))
        )
        assert plain > 0.1
        assert moved == pytest.approx(plain, abs=1e-6)

    def test_within_classes_all_samples_share_one(self, rng):
        student, teacher = softmax(rng.normal(size=(2, N, C)))
        intra = DIST(inter=0.0)
        plain, moved, torn = (
            intra(says(z), says(np.log(teacher)), Supervision()).item()
            for z in (
                np.log(student),
                self.shrunk(student, 0.4),
                self.shrunk(student, rng.uniform(0.2, 0.9, size=(N, 1))),
            )
        )
        assert moved == pytest.approx(plain, abs=1e-6)
        assert torn != pytest.approx(plain, abs=1e-3)

    def test_a_teacher_that_is_merely_surer_costs_nothing_but_costs_kd_much(self, rng):
        teacher = softmax(rng.normal(scale=2.0, size=(N, C)))
        student = says(self.shrunk(teacher, 0.3))
        assert DIST()(student, says(np.log(teacher)), Supervision()).item() == pytest.approx(0.0, abs=1e-6)
        assert KD(temperature=1.0)(student, says(np.log(teacher)), Supervision()).item() > 0.1

    def test_opposite_rankings_cost_two(self):
        teacher = np.log(softmax(np.array([[2.0, 0.0], [0.0, 2.0]])))
        value = dist(torch.tensor(teacher[:, ::-1].copy()), torch.tensor(teacher), inter=1.0, intra=0.0)
        assert value.item() == pytest.approx(2.0, abs=1e-6)

    def test_carries_the_square_of_the_temperature(self, rng):
        student, teacher = rng.normal(size=(2, N, C))
        warm = DIST(temperature=3.0)(says(student), says(teacher), Supervision()).item()
        scaled = DIST(temperature=1.0)(says(student / 3.0), says(teacher / 3.0), Supervision()).item()
        assert warm == pytest.approx(9.0 * scaled, abs=1e-6)


class TestGramGaps:
    def test_formula_with_loops(self, rng):
        ours, theirs = softmax(rng.normal(size=(2, N, C)))
        batch = sum((ours[i] @ ours[j] - theirs[i] @ theirs[j]) ** 2 for i in range(N) for j in range(N)) / N
        classes = (
            sum((ours[:, i] @ ours[:, j] - theirs[:, i] @ theirs[:, j]) ** 2 for i in range(C) for j in range(C)) / C
        )
        found = gram_gaps(torch.tensor(ours), torch.tensor(theirs), N)
        assert [x.item() for x in found] == pytest.approx([batch, classes], abs=1e-9)

    def test_predictions_of_other_samples_with_equal_relations_have_no_batch_gap(self, rng):
        p = softmax(rng.normal(size=(N, C)))
        order = rng.permutation(C)  # a permutation of the classes keeps every inner product of two samples
        batch, classes = gram_gaps(torch.tensor(p[:, order]), torch.tensor(p), N)
        assert batch.item() == pytest.approx(0.0, abs=1e-12)
        assert classes.item() > 1e-4

    def test_keeps_its_precision_under_autocast(self, rng):
        pair = [torch.tensor(softmax(rng.normal(size=(64, C)))).float() for _ in range(2)]
        expected = gram_gaps(*pair, 64)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(gram_gaps(*pair, 64), expected, rtol=1e-6, atol=0)


class TestMultiLevel:
    def test_one_level_alone_is_kd(self, rng):
        pair = [says(z) for z in rng.normal(size=(2, N, C))]
        level = MultiLevelKD(temperatures=[3.0], batch=0.0, classes=0.0)
        assert level(*pair, Supervision()).item() == pytest.approx(KD(temperature=3.0)(*pair, Supervision()).item())

    def test_temperatures_add_up(self, rng):
        pair = [says(z) for z in rng.normal(size=(2, N, C))]
        both, *each = (MultiLevelKD(temperatures=t)(*pair, Supervision()).item() for t in ([2.0, 5.0], [2.0], [5.0]))
        assert both == pytest.approx(sum(each))


@pytest.mark.parametrize("loss", [DIST(), MultiLevelKD()], ids=lambda loss: type(loss).__name__)
class TestEdges:
    def test_order_of_samples_does_not_matter(self, loss, rng):
        student, teacher = rng.normal(size=(2, N, C))
        order = rng.permutation(N)
        values = [
            loss(says(student[rows]), says(teacher[rows]), Supervision()).item() for rows in (np.arange(N), order)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-9)

    def test_nothing_counts(self, loss, rng):
        student = says(rng.normal(size=(N, C)), grad=True)
        nothing = Supervision(mask=torch.zeros(N, dtype=torch.bool))
        value = loss(student, says(rng.normal(size=(N, C))), nothing)
        value.backward()
        assert value.item() == 0.0
        assert not student.logits.grad.any()

    def test_huge_logits(self, loss):
        student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 1e4]], requires_grad=True)
        teacher = Signals(logits=torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]]))
        value = loss(Signals(logits=student), teacher, Supervision())
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()

    def test_behaves(self, loss, rng):
        student, teacher = (Signals(logits=torch.tensor(z).float()) for z in rng.normal(size=(2, N, C)))
        mask = torch.arange(N) % 3 > 0
        check_loss(loss, student, teacher, Supervision(mask=mask), zero_when_equal=True)
