import pickle
import re
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_opt.errors import ConfigError, StorageError, UntrustedInputError
from lightning_opt.models import MLP, LogitsOf, load_weights


def net(outputs=3):
    return MLP(in_features=4, hidden=(5,), num_outputs=outputs)


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


class Answers(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(4, 2), wrap

    def forward(self, x, *, scale=1.0):
        return self.wrap(self.inner(x) * scale)


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (y, None), lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y)],
    ids=["tensor", "tuple", "dict", "object"],
)
def test_logits_of_answers_with_the_tensor(wrap):
    model, x = Answers(wrap), torch.randn(3, 4)
    assert torch.equal(LogitsOf(model)(x, scale=2.0), model.inner(x) * 2.0)
    assert [name for name, _ in LogitsOf(model).named_parameters()] == ["model.inner.weight", "model.inner.bias"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_come_back_from_each_kind_of_file(tmp_path, suffix, key):
    source, target, path = net(), net(), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({key: source.state_dict(), "epoch": 3} if key else source.state_dict(), path)
    report = load_weights(target, path)
    assert same(target, source)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())


def test_a_prefix_picks_one_model_of_a_checkpoint(tmp_path):
    source, target = net(), net()
    state = {f"student.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "teacher.weight": torch.zeros(1)}}, tmp_path / "last.ckpt")
    load_weights(target, tmp_path / "last.ckpt", prefix="student.")
    assert same(target, source)
    with pytest.raises(ConfigError, match=r"no weights whose name begins with 'nobody\.'"):
        load_weights(target, tmp_path / "last.ckpt", prefix="nobody.")


def test_missing_and_unexpected_names_are_told_and_nothing_is_changed(tmp_path):
    source, target = net(), net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = {name.replace("head", "classifier"): value for name, value in source.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError) as error:
        load_weights(target, tmp_path / "a.safetensors")
    for words in ("a.safetensors", "lacks head.weight, head.bias", "has unknown classifier.bias, classifier.weight"):
        assert words in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_another_number_of_classes_is_told_as_such_and_can_be_left_out(tmp_path):
    source, target = net(outputs=7), net(outputs=3)
    head = target.head.weight.clone()
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=re.escape("was trained for 7 outputs but the model has 3 (head.weight)")):
        load_weights(target, tmp_path / "a.safetensors")
    report = load_weights(target, tmp_path / "a.safetensors", strict=False)
    assert report.mismatched == ("head.weight", "head.bias")
    assert torch.equal(target.layers[0][0].weight, source.layers[0][0].weight)
    assert torch.equal(target.head.weight, head)


def test_other_widths_are_told_with_both_shapes(tmp_path):
    save_file(MLP(in_features=4, hidden=(6,), num_outputs=3).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=re.escape("layers.0.0.weight: (6, 4) in the file, (5, 4) in the model")):
        load_weights(net(), tmp_path / "a.safetensors")


def test_not_strict_still_refuses_a_file_of_which_nothing_fits(tmp_path):
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"lacks layers\.0\.0\.weight, layers\.0\.0\.bias, head\.weight and 1 more"):
        load_weights(net(), tmp_path / "a.safetensors", strict=False)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path, kind):
    path, marker = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"state_dict": OrderedDict(net().state_dict()), "callbacks": {"nested": [Evil(marker)]}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UntrustedInputError, match=r"evil\.pt holds more than tensors"):
        load_weights(net(), path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, damage):
    path = tmp_path / name
    save_file(net().state_dict(), path) if name.endswith("s") else torch.save(net().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"\x00\xffnoise" * 50, "empty": b""}[damage])
    with pytest.raises(StorageError) as error:
        load_weights(net(), path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_file_without_weights(tmp_path):
    with pytest.raises(StorageError, match="there is no weights file"):
        load_weights(net(), tmp_path / "none.pt")
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="holds no table of named weights"):
        load_weights(net(), tmp_path / "a.pt")
