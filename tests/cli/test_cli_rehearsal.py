"""What the parts of a run refuse once they are built, found before a run has a folder."""

import gc

import pytest
import torch

from lightning_opt.cli import train
from lightning_opt.cli.rehearsal import rehearse
from lightning_opt.config.checks import check
from lightning_opt.config.compose import compose_config, plain, read_command_line
from lightning_opt.errors import ConfigError

DISTILL = ("+experiment=distill", "data=digits", "model.image_size=8", "teacher.model.image_size=8")


def composed(*words):
    config = plain(compose_config(read_command_line(list(words), config_name="train")))
    check(config)
    return config


def test_what_the_experiments_ask_for_passes():
    rehearse(composed(*DISTILL))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer=sgd", "+optimizer.dampening=0.5"], "optimizer: Nesterov"),
        (["scheduler._target_=torch.optim.lr_scheduler.ExponentialLR", "+scheduler.gamma=0.5"], "scheduler: .*total"),
        ([*DISTILL, "+loss.terms.kd.name=task"], "loss: losses: the name 'task' is taken twice"),
        ([*DISTILL, "teacher.model.widths=[]"], "teacher.model .*widths"),
        (["task.num_outputs=7"], "set task.num_outputs=10"),
    ],
)
def test_refused_before_a_folder_exists(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        rehearse(composed(*words))
    assert list(tmp_path.iterdir()) == []


def test_gpu_is_refused_where_there_is_none(monkeypatch):
    config = composed("trainer.accelerator=cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=cuda"):
        rehearse(config)


def test_collector_works_again_after_a_refusal():
    assert gc.isenabled()
    with pytest.raises(ConfigError):
        train._job(composed("model._target_=torch.nn.Identity", "task.num_outputs=7"), "", [])
    assert gc.isenabled()
