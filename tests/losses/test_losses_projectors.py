"""Projectors: the right kind for each layout; and losses that train them, end to end on pairs of networks."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import predict
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.contrastive import CRD
from lightning_opt.losses.feature import AttentionTransfer, FitNets, HiddenStates, SimilarityPreserving
from lightning_opt.losses.projectors import make_projector
from lightning_opt.losses.relation import MiniLMRelations, RKDAngle
from lightning_opt.losses.review import ReviewKD
from lightning_opt.modules.taps import FeatureTaps


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((2, 3), (2, 5), "auto"),
        ((2, 7, 3), (2, 7, 5), "auto"),
        ((2, 7, 3), (2, 7, 5), "linear"),
        ((2, 3, 8, 8), (2, 5, 4, 4), "auto"),
        ((2, 3, 9), (2, 5, 9), "conv"),
    ],
)
def test_gives_the_teachers_width(student, teacher, kind):
    projector = make_projector(torch.randn(student), torch.randn(teacher), kind=kind)
    axis = 1 if kind == "conv" or len(student) == 4 else -1
    expected = list(student)
    expected[axis] = 5
    assert list(projector(torch.randn(student)).shape) == expected


@pytest.mark.parametrize("shape", [(2, 3), (2, 7, 3), (2, 3, 8, 8)])
def test_equal_widths_need_nothing(shape):
    assert isinstance(make_projector(torch.randn(shape), torch.randn(shape)), nn.Identity)


def test_maps_get_a_pointwise_convolution_with_batch_norm():
    x = torch.randn(4, 3, 6, 6)
    projected = make_projector(x, torch.randn(4, 5, 6, 6))(x)
    torch.testing.assert_close(projected.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    permuted = make_projector(x, torch.randn(4, 5, 6, 6)).eval()
    torch.testing.assert_close(permuted(x.flip(3)), permuted(x).flip(3))  # each position for itself


def test_seeded():
    example = torch.randn(2, 3), torch.randn(2, 5)
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(make_projector(*example).weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [((2, 3), (2, 3, 4), "auto"), ((2, 3, 4, 4), (2, 5, 4, 4), "linear"), ((2, 3), (2, 5), "conv")],
)
def test_layouts_that_do_not_fit(student, teacher, kind):
    with pytest.raises(ConfigError, match=f"kind='{kind}'"):
        make_projector(torch.randn(student), torch.randn(teacher), kind=kind)


def train(student, teacher, loss, inputs, supervision, *, steps=25):
    """Distil for a few steps as a training loop does; return the first and the last value of the loss."""
    theirs, ours = FeatureTaps(teacher, loss.teacher_taps), FeatureTaps(student, loss.student_taps)
    teacher.eval().requires_grad_(False)
    student.train()
    before = [p.detach().clone() for p in teacher.parameters()]

    def look(model, taps):
        return Signals(logits=predict(model, inputs), features=taps.collect())

    with theirs, ours:
        loss.build(look(student, ours), look(teacher, theirs))
        optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=3e-3)
        values = []
        for _ in range(steps):
            with torch.no_grad():
                answer = look(teacher, theirs)
            value = loss(look(student, ours), answer, supervision)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
    assert all(torch.equal(old, new) for old, new in zip(before, teacher.parameters(), strict=True))
    return values[0], values[-1]


def cnn(width):
    return nn.Sequential(
        OrderedDict(
            layer1=nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
            layer2=nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            head=nn.Linear(2 * width, 5),
        )
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: FitNets({"layer*": "layer*"}),
        lambda: AttentionTransfer({"layer*": "layer*"}),
        lambda: SimilarityPreserving({"layer2": "layer2"}),
        lambda: ReviewKD({"layer*": "layer*", "head:in": "head:in"}),
        lambda: RKDAngle({"pool": "pool"}),
        lambda: CRD({"layer2": "layer2"}, n_data=20, n_negatives=8, feature_dim=4),
    ],
    ids=["fitnets", "attention", "similarity", "review", "rkd", "crd"],
)
def test_cnn_pair_end_to_end(make):
    torch.manual_seed(0)
    supervision = Supervision(labels=torch.arange(6) % 3, index=torch.arange(6))
    first, last = train(cnn(4), cnn(10), make(), torch.randn(6, 3, 8, 8), supervision)
    assert last < 0.9 * first


def bert(width, layers):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: HiddenStates({"**.layer.0": "**.layer.1", "**.layer.1": "**.layer.3"}),
        lambda: HiddenStates({"bert.encoder.layer.1": "bert.encoder.layer.3"}, distance="cosine"),
        lambda: AttentionTransfer({"**.layer.1.output.dense": "**.layer.3.output.dense"}),
        lambda: MiniLMRelations({"bert.encoder.layer.1": "bert.encoder.layer.3"}, relation_heads=4),
    ],
    ids=["mse", "cosine", "attention", "minilm"],
)
def test_bert_pair_end_to_end(make):
    torch.manual_seed(0)
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    inputs = {"input_ids": torch.randint(30, (4, 7)), "attention_mask": mask}
    first, last = train(bert(8, 2), bert(16, 4), make(), inputs, Supervision(token_mask=mask.bool()))
    assert last < 0.95 * first
