"""What cannot be spread over processes is refused by name before any of them is started."""

import pytest

from lightning_opt.cli.precheck import check_before_fits
from lightning_opt.cli.rehearsal import rehearse
from lightning_opt.config.build import build_task
from lightning_opt.config.build_fit import build_data
from lightning_opt.config.checks import check
from lightning_opt.config.compose import compose_config, plain, read_command_line
from lightning_opt.errors import ConfigError

CPU = ("trainer.accelerator=cpu", "callbacks=none")
TEXT = ("data=synthetic_tokens", "model=text_encoder", "task.num_outputs=2", "model.dim=32", "model.vocab_size=1000")
DISTILL = ("+experiment=distill", "data=digits", "model.image_size=8", "teacher.model.image_size=8")


def composed(*words):
    config = plain(compose_config(read_command_line([*words, *CPU], config_name="train")))
    check(config)
    return config


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trainer.devices=3", "strategy=fsdp2", "strategy.data_parallel_size=2"], r"strategy\.data_parallel_size=2"),
        (["trainer.devices=3", "strategy=fsdp2_tp"], r"strategy\.tensor_parallel_size=2"),
        (["trainer.devices=3", "strategy=pipeline_ddp"], r"strategy\.data_parallel_size=2"),
        (["trainer.devices=2", "strategy=pipeline", "pruner=channels"], "(?i)pipeline.*pattern="),
        (["trainer.devices=2", "strategy=pipeline", "quantizer=qat"], "(?i)pipeline.*scheme="),
        (["trainer.devices=2", "strategy=tensor_parallel", "quantizer=qat"], "(?i)tensor.*scheme="),
        (["trainer.devices=2", "strategy=fsdp2", "quantizer=static"], "(?i)post_training"),
        ([*DISTILL, "trainer.devices=2", "strategy=ddp", "teacher.placement=ranks"], r"teacher\.placement=ranks"),
        ([*DISTILL, "teacher.placement=sharded"], r"teacher\.placement=sharded needs several processes"),
        ([*DISTILL, "trainer.devices=2", "strategy=pipeline", "loss=rkd"], "compares the samples of a batch"),
    ],
)
def test_a_pair_is_refused_by_name(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        rehearse(composed(*words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["strategy=tensor_parallel", "strategy.plan={blockz.*: colwise}"], r"blockz.*near names: blocks"),
        (["trainer.devices=3", "strategy=tensor_parallel"], "(?i)heads"),
        (["strategy=pipeline", "strategy.split=[blockz.1]"], r"blockz.*near names: blocks"),
        (["strategy=fsdp2", "strategy.wrap=[blockz.*]"], r"blockz.*near names: blocks"),
    ],
)
def test_a_network_is_refused_where_it_cannot_be_split(words, says):
    config = composed(*TEXT, "trainer.devices=2", *words)
    with pytest.raises(ConfigError, match=says):
        check_before_fits(config, build_task(config), build_data(config))


@pytest.mark.parametrize("strategy", ["fsdp2", "tensor_parallel", "pipeline"])
def test_what_can_be_split_passes(strategy):
    config = composed(*TEXT, "trainer.devices=2", f"strategy={strategy}")
    rehearse(config)
    check_before_fits(config, build_task(config), build_data(config))
