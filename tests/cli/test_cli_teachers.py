"""Where a teacher can come from: trained once and kept, several, a chain, a file; its layers in the student."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_opt.cli import teachers
from lightning_opt.cli.start import starter
from lightning_opt.cli.teachers import find_teachers, teacher_config, teacher_key
from lightning_opt.config.build import build_model
from lightning_opt.config.build_fit import build_data
from lightning_opt.errors import ConfigError


def test_trained_once_and_kept_by_its_recipe(distill, monkeypatch):
    first = find_teachers(distill())
    assert first.steps == 4
    monkeypatch.setattr(teachers, "build_data", lambda recipe: pytest.fail("it was trained again"))
    monkeypatch.setattr("lightning_opt.cli.fitting.build_run", lambda *a, **k: pytest.fail("it was trained again"))
    monkeypatch.setattr(teachers, "build_data", build_data)
    again = find_teachers(distill("seed=7", "optimizer.lr=0.5"))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(first.teachers[0](x).logits, again.teachers[0](x).logits)


@pytest.mark.parametrize(
    "word",
    ["teacher.train.max_epochs=2", "teacher.model.widths=[5]", "teacher.train.optimizer.lr=1", "data.split_seed=3"],
)
def test_another_recipe_is_another_teacher(distill, word):
    assert teacher_key(teacher_config(distill())) != teacher_key(teacher_config(distill(word)))


@pytest.mark.parametrize("word", ["data.num_workers=2", "model.widths=[4]", "seed=5", "run_dir=x", "loss=dkd"])
def test_what_does_not_change_the_teacher_does_not_train_it_again(distill, word):
    assert teacher_key(teacher_config(distill())) == teacher_key(teacher_config(distill(word)))


def test_members_differ_and_a_chain_has_an_assistant(distill):
    found = find_teachers(distill("teacher.members=2"))
    assert len(found.teachers) == 2
    x = torch.randn(3, 1, 8, 8)
    assert not torch.equal(found.teachers[0](x).logits, found.teachers[1](x).logits)
    chain = distill()
    assistant = {**chain["teacher"], "train": {**chain["teacher"]["train"], "max_epochs": 1}}
    chain["teacher"]["train"] |= {"teacher": assistant, "loss": chain["loss"], "seed": 3}
    recipe = teacher_config(chain)
    assert recipe["teacher"] == assistant
    assert len(find_teachers(chain).folders) == 1


def test_from_a_file_and_as_built(distill, tmp_path):
    values = distill()
    model = build_model(values["teacher"]["model"])
    save_file(model.state_dict(), tmp_path / "t.safetensors")
    values["teacher"] |= {"weights": str(tmp_path / "t.safetensors")}
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(find_teachers(values).teachers[0](x).logits, model.eval()(x))
    values["teacher"] |= {"weights": None, "train": False}
    assert find_teachers(values).folders == []


def test_a_file_of_another_network_is_refused(distill, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "t.safetensors")
    values = distill()
    values["teacher"] |= {"weights": str(tmp_path / "t.safetensors")}
    with pytest.raises(ConfigError, match=r"t\.safetensors"):
        find_teachers(values)


def test_a_students_layers_start_from_the_teachers(distill):
    values = distill("model.widths=[4]", "model.stride=1", "teacher.init_student={stages: stages}")
    found = find_teachers(values)
    student = build_model(values["model"])
    starter(values, found.teachers)(student)
    for name, value in student.stages.state_dict().items():
        assert torch.equal(value, found.teachers[0].model.stages.state_dict()[name])
