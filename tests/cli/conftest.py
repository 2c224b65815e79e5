"""What tests of the stages share."""

import pytest

from lightning_opt.config.checks import check
from lightning_opt.config.compose import compose_config, plain, read_command_line

DISTILL = (
    "+experiment=distill",
    "data=digits",
    "data.batch_size=256",
    "model.image_size=8",
    "teacher.model.image_size=8",
    "teacher.model.widths=[4]",
    "teacher.model.hidden=null",
    "teacher.train.max_epochs=1",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "callbacks=none",
)


@pytest.fixture
def distill(tmp_path):
    """Return what composes a small distillation with more words."""

    def composed(*words):
        line = read_command_line([*DISTILL, *words, f"paths.cache_dir={tmp_path}"], config_name="train")
        values = plain(compose_config(line))
        check(values)
        return values

    return composed
