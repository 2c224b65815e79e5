"""Tasks against scikit-learn and formulas worked by hand."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import nn

from lightning_opt.tasks import Classification, LanguageModeling, Multilabel, Regression


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_reads_tuple_with_and_without_index():
    task = Classification(num_outputs=3)
    x, y, index = torch.zeros(4, 2), torch.arange(4) % 3, torch.arange(4) + 7
    assert task.read((x, y)).index is None
    example = task.read([x, y, index])
    assert torch.equal(example.index, index)
    assert torch.equal(example.labels, y)
    assert example.token_mask is None


def test_reads_dict_and_keeps_what_the_model_is_called_with():
    task = Classification(num_outputs=2)
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1] * 5]),
        "labels": torch.tensor([0, 1]),
        "index": torch.tensor([3, 4]),
    }
    example = task.read(batch)
    assert set(example.inputs) == {"input_ids", "attention_mask"}
    assert example.token_mask.dtype == torch.bool
    assert example.token_mask.sum() == 7
    assert torch.equal(example.index, batch["index"])


@pytest.mark.parametrize("batch", [torch.zeros(3), (torch.zeros(1),), 5])
def test_refuses_other_batches_and_says_what_it_got(batch):
    with pytest.raises(TypeError, match="the loader gave a"):
        Classification(num_outputs=2).read(batch)


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x * 2)


@pytest.mark.parametrize("wrap", [lambda x: x, Answer, lambda x: (x, None), lambda x: {"logits": x}])
def test_reads_plain_and_hugging_face_like_answers(wrap):
    x = torch.randn(3, 4, generator=rng())
    assert torch.equal(Classification(num_outputs=4).logits(Wrapped(wrap), x), 2 * x)


def test_classification_loss_and_accuracy_equal_sklearn():
    logits, labels = torch.randn(200, 5, generator=rng()), torch.randint(5, (200,), generator=rng(1))
    task = Classification(num_outputs=5)
    probabilities = logits.softmax(-1).numpy()
    assert float(task.loss(logits, labels)) == pytest.approx(sk.log_loss(labels, probabilities), abs=1e-5)
    metrics = task.metrics()
    for part in range(0, 200, 50):
        metrics.update(*task.for_metrics(logits[part : part + 50], labels[part : part + 50]))
    values = metrics.compute()
    assert next(iter(values)) == task.main_metric == "acc"
    assert float(values["acc"]) == pytest.approx(sk.accuracy_score(labels, logits.argmax(-1)))
    assert float(values["f1"]) == pytest.approx(sk.f1_score(labels, logits.argmax(-1), average="macro"), abs=1e-6)


def test_multilabel_equals_sklearn():
    logits, labels = torch.randn(150, 4, generator=rng()), torch.randint(2, (150, 4), generator=rng(1))
    task = Multilabel(num_outputs=4)
    p = logits.sigmoid().double().numpy()
    y = labels.numpy()
    by_hand = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert float(task.loss(logits, labels)) == pytest.approx(by_hand, abs=1e-6)
    metrics = task.metrics()
    metrics.update(*task.for_metrics(logits, labels))
    values = metrics.compute()
    assert float(values["f1"]) == pytest.approx(sk.f1_score(y, p > 0.5, average="macro"), abs=1e-6)
    assert float(values["map"]) == pytest.approx(sk.average_precision_score(y, p, average="macro"), abs=1e-5)


def test_regression_takes_a_trailing_axis_and_does_not_broadcast():
    preds, target = torch.randn(64, 1, generator=rng()), torch.randn(64, generator=rng(1))
    task = Regression()
    assert float(task.loss(preds, target)) == pytest.approx(sk.mean_squared_error(target, preds[:, 0]), abs=1e-6)
    metrics = task.metrics()
    metrics.update(*task.for_metrics(preds, target))
    values = metrics.compute()
    assert float(values["mae"]) == pytest.approx(sk.mean_absolute_error(target, preds[:, 0]), abs=1e-6)
    assert float(values["pearson"]) == pytest.approx(np.corrcoef(preds[:, 0], target)[0, 1], abs=1e-5)
    assert not task.higher_is_better


def test_regression_refuses_another_number_of_answers():
    with pytest.raises(ValueError, match="the model gave"):
        Regression().loss(torch.zeros(4, 2), torch.zeros(4))


def test_language_modeling_ignores_marked_positions():
    logits = torch.randn(2, 6, 9, generator=rng())
    labels = torch.randint(9, (2, 6), generator=rng(1))
    labels[0, 3:] = -100
    task = LanguageModeling(num_outputs=9)
    kept = labels != -100
    log_probs = logits.double().log_softmax(-1)[kept]
    nats = -log_probs[torch.arange(len(log_probs)), labels[kept]].mean()
    assert float(task.loss(logits, labels)) == pytest.approx(float(nats), abs=1e-6)
    assert torch.equal(task.mask(labels), kept)
    metrics = task.metrics()
    metrics.update(*task.for_metrics(logits, labels))
    values = metrics.compute()
    assert float(values["perplexity"]) == pytest.approx(float(nats.exp()), rel=1e-5)
    assert float(values["acc"]) == pytest.approx(float((logits.argmax(-1)[kept] == labels[kept]).double().mean()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Classification(num_outputs=1), "num_outputs must be at least 2"),
        (lambda: Classification(num_outputs=3, label_smoothing=1.0), "label_smoothing"),
        (lambda: Multilabel(num_outputs=3, threshold=0.0), "threshold"),
        (lambda: Regression(num_outputs=0), "num_outputs"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
