"""Find a teacher's stored answers, or ask for them once: about the student's samples, or about versions of them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_opt.cli.log import log
from lightning_opt.cli.teachers import alone, node_of_training
from lightning_opt.config.build import Config, build_terms, build_weighting
from lightning_opt.config.build_fit import build_data
from lightning_opt.data import DataModule
from lightning_opt.errors import ConfigError
from lightning_opt.losses.teachers import FixedWeights
from lightning_opt.modules import Teacher, TeacherCache
from lightning_opt.modules.matching import mix_of, readers_of_features
from lightning_opt.modules.teacher_cache import Views, cache_key, store
from lightning_opt.tasks import Example, Task


def find_cache(config: Config, teachers: Sequence[Teacher], datamodule: pl.LightningDataModule, task: Task) -> Any:
    """Return the teachers' stored answers, computed first where needed; None where none are wanted or can be kept.

    Raises:
        ConfigError: The data's samples are not replayable.
    """
    spec = (config.get("teacher") or {}).get("cache")
    if not spec or not teachers:
        return None
    if not hasattr(datamodule, "fingerprint"):
        log.warning(
            "warning: teacher.cache is not used: %s has no fingerprint(), so stored answers could not be told from "
            "those on other data; the teacher answers each batch (derive from lightning_opt.data.DataModule to store)",
            type(datamodule).__name__,
        )
        return None
    if readers := readers_of_features(build_terms(config["loss"]["terms"])):
        log.warning(
            "warning: teacher.cache is not used: loss.terms.%s reads the teacher's features and only its logits are "
            "stored; the teacher answers each batch",
            readers[0],
        )
        return None
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    versions = max(int(getattr(datamodule, "variants", 0)), 1)
    weighting = build_weighting(config["teacher"]) or FixedWeights()
    views, seen = _views(config, task, len(loader.dataset), versions)
    spec = {"outputs": spec.get("outputs", "full"), "k": spec.get("k", 64)}
    key = cache_key(
        teachers,
        data_fingerprint=datamodule.fingerprint(),
        versions=versions,
        spec=spec | ({"views": seen} if views else {}),
        weighting=weighting,
    )
    folder = Path(config["paths"]["cache_dir"]).expanduser() / "teacher_outputs" / key[:24]
    with alone(folder):
        if folder.is_dir():
            return TeacherCache(folder)
        log.info(
            "teacher: storing its answers on %d samples in %d version(s)",
            len(loader.dataset),
            views.count if views else versions,
        )
        return store(
            folder,
            teachers,
            fetch=partial(_example, task, loader),
            num_samples=len(loader.dataset),
            versions=versions,
            weighting=weighting,
            mix=mix_of(task),
            views=views,
            batch_size=config["teacher"]["cache"].get("batch_size", 256),
            **spec,
        )


def _views(config: Config, task: Task, num_samples: int, versions: int) -> tuple[Views | None, str]:
    """Return the versions that only the teacher sees, and the fingerprint of their data.

    Raises:
        ConfigError: They are not of the student's samples.
    """
    node = config["teacher"]["cache"]
    count = node.get("average_versions")
    if not count:
        return None, ""
    if versions > 1:
        log.warning(
            "warning: teacher.cache.average_versions is not used: the student's own samples change (data.augment), and "
            "each version has its own answer"
        )
        return None, ""
    budget = node_of_training(config)
    change = node.get("data") or budget.get("data") or {}
    data = build_data(
        {**config, "data": {**config["data"], "seed": budget.get("seed") or 0, **change, "variants": count}}
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(data, DataModule) or data.variants != count:
        log.warning(
            "warning: teacher.cache.average_versions is not used: the teacher's data have no versions; say in "
            "teacher.cache.data how they are made, as data.augment would"
        )
        return None, ""
    if len(loader.dataset) != num_samples:
        raise ConfigError(
            f"teacher.cache.data: it has {len(loader.dataset)} training samples and the student's data have "
            f"{num_samples}; only change what is done to them"
        )
    return Views(fetch=partial(_example, task, loader), count=count), data.fingerprint()


def _example(task: Task, loader: Any, version: int, rows: Sequence[int]) -> Example:
    return task.read(_collated(loader, [(version, row) for row in rows]))


def _collated(loader: Any, keys: list[tuple[int, int]]) -> Any:
    return loader.collate_fn(loader.dataset.__getitems__(keys))
