"""What is refused before anything is created, and in which words."""

import copy

import pytest

from lightning_opt.config.checks import check
from lightning_opt.config.compose import compose_config, plain, read_command_line
from lightning_opt.errors import ConfigError


def composed(*words):
    return plain(compose_config(read_command_line(words, config_name="train")))


def refused(*words):
    with pytest.raises(ConfigError) as caught:
        check(composed(*words))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.batchsize=3", "data.batch_size"),
        ("+data.batchsize=3", "data.batch_size"),
        ("+trainer.max_epoch=3", "trainer.max_epochs"),
        ("++optimizer.learning_rate=1", "takes no such argument"),
        ("+sede=3", "seed"),
        ("loss.task_weigt=1", "loss.task_weight"),
        ("+teacher.modle=3", "teacher.model"),
        ("+callbacks.checkpoints.every_n_step=3", "every_n_steps"),
    ],
)
def test_misspelt_keys_name_the_near_one(word, says):
    words = [word, "teacher=cnn", "loss=kd"] if "teacher" in word else [word]
    assert says in refused(*words)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model=cnnn", "cnn"),
        ("+experiment=distil", "distill"),
        ("experiment=distil", "distill"),
        ("data=mnist5", "mnist5k"),
        ("optimizer=adamm", "adam"),
        ("experimant=distill", "experiment"),
    ],
)
def test_misspelt_options_name_the_near_ones(word, says):
    assert says in refused(word)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optimizer.lr=abc", "optimizer.lr='abc'"),
        ("optimizer.lr=0", "greater than 0"),
        ("optimizer.lr=-1e-3", "greater than 0"),
        ("data.batch_size=-3", "at least 1"),
        ("data.batch_size=0", "at least 1"),
        ("data.batch_size=2.5", "data.batch_size=2.5"),
        ("data.num_workers=-1", "at least 0"),
        ("seed=-1", "seed=-1"),
        ("seed=abc", "seed='abc'"),
        ("trainer.max_epochs=abc", "trainer.max_epochs"),
        ("baseline=3", "baseline=3"),
        ("scheduler.warmup_fraction=2", "at most 1"),
        ("task.label_smoothing=much", "task.label_smoothing"),
        ("benchmark.threads=0", "at least 1"),
        ("trainer.max_epochs=-1", "unlimited"),
        ("model._target_=lightning_opt.models.ConvNett", "ConvNet"),
        ("model._target_=no_such_pkg.Net", "no_such_pkg"),
        ("task=multilabel", "task.num_outputs"),
        ("loss=kd", "teacher"),
        ("teacher=cnn", "loss"),
        ("callbacks.checkpoints=5", "callbacks.checkpoints"),
    ],
)
def test_wrong_values_are_named_with_what_was_found(word, says):
    assert says in refused(word)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["teacher.run_dir=nowhere", "teacher.model=null"], "nowhere"),
        (["teacher.weights=nowhere.safetensors"], "nowhere.safetensors"),
        (["teacher.members=3", "teacher.train=null"], "members"),
        (["teacher.members=0"], "teacher.members=0"),
        (["teacher.model=null"], "neither"),
        (["teacher.dtype=int4"], "teacher.dtype"),
        (["loss.terms.kd.loss.temperature=-1"], "temperature"),
        (["loss.terms.kd.weight=heavy"], "weight"),
    ],
)
def test_impossible_teachers(words, says):
    assert says in refused("teacher=cnn", "loss=kd", *words)


def test_what_works_is_not_refused():
    config = composed("teacher=cnn", "loss=[kd,dkd]", "optimizer=sgd", "trainer.max_steps=5", "baseline=true")
    before = copy.deepcopy(config)
    assert check(config) == []
    assert config == before


def test_both_spellings_of_experiment_and_stage_switches():
    line = read_command_line(["experiment=distill", "export=false", "benchmark=true"], config_name="train")
    assert line.overrides == ["+experiment=distill", "export=none", "benchmark=default"]


def test_baseline_without_teacher_is_a_warning():
    assert any("baseline" in warning for warning in check(composed("baseline=true")))


def test_an_experiment_may_name_a_class_of_the_users_own(tmp_path, monkeypatch):
    """Of the option in whose place it stands only what the class takes is kept; what the file sets is checked."""
    (tmp_path / "my_net.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self, width: int = 3, dropout: float = 0.5): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    place = tmp_path / "conf" / "experiment"
    place.mkdir(parents=True)
    (place / "mine.yaml").write_text("# @package _global_\nmodel:\n  _target_: my_net.Net\n  width: 7\n")
    (place / "wrong.yaml").write_text("# @package _global_\nmodel:\n  _target_: my_net.Net\n  widht: 7\n")
    words = ("--config-dir", str(tmp_path / "conf"), "model=cnn_small")
    config = composed(*words, "+experiment=mine")
    check(config)
    assert set(config["model"]) - {"dropout"} == {"_target_", "width"}
    assert config["model"]["width"] == 7
    assert "did you mean model.width" in refused(*words, "+experiment=wrong")
    assert "takes no such argument" in refused(*words, "+experiment=mine", "++model.hidden=3")
