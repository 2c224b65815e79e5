"""A student that starts from its teacher's layers."""

import copy

import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.modules.initialise import every_nth_layer, initialise_from_teacher


class Encoder(nn.Module):
    def __init__(self, layers, width=4):
        super().__init__()
        self.embeddings = nn.Embedding(9, width)
        self.layer = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(layers))


def changed(module):
    torch.manual_seed(5)
    for value in module.state_dict().values():
        value.copy_(torch.randn(value.shape) * 10)
    return module


@pytest.fixture
def teacher():
    return changed(Encoder(6))


def test_layers_by_map_with_buffers(teacher):
    student = Encoder(2)
    names = initialise_from_teacher(
        student, teacher, {"embeddings": "embeddings", "layer.0": "layer.1", "layer.1": "layer.4"}
    )
    assert set(names) == set(student.state_dict())
    assert names[0] == "embeddings.weight"
    assert torch.equal(student.embeddings.weight, teacher.embeddings.weight)
    for ours, theirs in ((0, 1), (1, 4)):
        expected = teacher.layer[theirs].state_dict()
        assert all(torch.equal(expected[key], value) for key, value in student.layer[ours].state_dict().items())


def test_only_what_is_named_changes_and_nothing_is_shared(teacher):
    student = Encoder(2)
    before = copy.deepcopy(student.state_dict())
    initialise_from_teacher(student, teacher, {"layer.1": "layer.4"})
    assert torch.equal(student.embeddings.weight, before["embeddings.weight"])
    student.layer[1][0].weight.data.zero_()
    assert teacher.layer[4][0].weight.abs().sum() > 0


def test_an_empty_prefix_is_the_whole_model(teacher):
    student = Encoder(6)
    assert set(initialise_from_teacher(student, teacher, {"": ""})) == set(student.state_dict())
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in student.state_dict().items())
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    initialise_from_teacher(layer, teacher, {"": "layer.3"})
    assert torch.equal(layer[0].weight, teacher.layer[3][0].weight)
    other = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))})
    initialise_from_teacher(other, layer, {"inner": ""})
    assert torch.equal(other["inner"][0].weight, layer[0].weight)


def test_layer_1_does_not_take_layer_10():
    student, teacher = Encoder(2), changed(Encoder(12))
    names = initialise_from_teacher(student, teacher, {"layer.1": "layer.1"})
    assert torch.equal(student.layer[1][0].weight, teacher.layer[1][0].weight)
    assert all(name.startswith("layer.1.") for name in names)


def test_a_single_tensor_keeps_the_students_type(teacher):
    student = Encoder(1).bfloat16()
    assert initialise_from_teacher(student, teacher, {"layer.0.0.bias": "layer.3.0.bias"}) == ["layer.0.0.bias"]
    assert student.layer[0][0].bias.dtype == torch.bfloat16
    torch.testing.assert_close(student.layer[0][0].bias.float(), teacher.layer[3][0].bias, rtol=0.01, atol=0.01)


def test_slice_takes_the_leading_rows_and_columns(teacher):
    student = Encoder(1, width=3)
    initialise_from_teacher(student, teacher, {"layer.0": "layer.2"}, slice=True)
    assert torch.equal(student.layer[0][0].weight, teacher.layer[2][0].weight[:3, :3])
    assert torch.equal(student.layer[0][1].running_var, teacher.layer[2][1].running_var[:3])


@pytest.mark.parametrize(
    ("width", "leading", "mapping", "message"),
    [
        (3, False, {"layer.0": "layer.2"}, r"shape \(3, 3\).*\(4, 4\).*slice=True"),
        (5, True, {"layer.0": "layer.2"}, "no leading part"),
        (4, False, {"layer.0": "layer.7"}, r"teacher has nothing under 'layer\.7'; near names: .*layer\."),
        (4, False, {"embedings": "embeddings"}, "student has nothing under 'embedings'; near names: embeddings"),
        (4, False, {"layer.0": "embeddings"}, r"no tensor 'embeddings\.0\.weight'.*near names: embeddings\.weight"),
    ],
)
def test_errors_write_nothing(teacher, width, leading, mapping, message):
    student = Encoder(1, width=width)
    before = copy.deepcopy(student.state_dict())
    first = {"embeddings": "embeddings"} if width == 4 else {}
    with pytest.raises(ConfigError, match=message):
        initialise_from_teacher(student, teacher, {**first, **mapping}, slice=leading)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_every_nth_layer():
    assert every_nth_layer("layer", 3, 12) == {"layer.0": "layer.0", "layer.1": "layer.4", "layer.2": "layer.8"}
    assert list(every_nth_layer("l", 4, 6).values()) == ["l.0", "l.1", "l.3", "l.4"]
    with pytest.raises(ValueError, match="student_layers=7"):
        every_nth_layer("layer", 7, 6)


def test_every_nth_layer_feeds_the_copy(teacher):
    student = Encoder(3)
    initialise_from_teacher(student, teacher, every_nth_layer("layer", 3, 6))
    assert [torch.equal(student.layer[i][0].weight, teacher.layer[2 * i][0].weight) for i in range(3)] == [True] * 3
