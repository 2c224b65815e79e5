"""The command line and the config of one point of a sweep."""

import copy
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, open_dict

from lightning_opt.config.compose import CommandLine, compose_config, plain, with_arguments_of_classes
from lightning_opt.config.sweeps import Point, Space


class Composer:
    """Puts a point's words together and composes them.

    Args:
        line: The sweep's command line; its overrides are not read.
        space: Says which words stand and which vary.
    """

    def __init__(self, line: CommandLine, space: Space) -> None:
        self.line, self.space = line, space
        self._configs: dict[str, dict[str, Any]] = {}
        self._forced: dict[tuple[str, ...], set[str]] = {}

    def words(self, point: Point) -> list[str]:
        """Return a point's words, with a plus where only a class knows the key: `++trainer.limit_val_batches=5`."""
        typed = self.space.words(point)
        groups = tuple(word for word in typed if "." not in word.partition("=")[0])
        if groups not in self._forced:
            found = with_arguments_of_classes(self._job(typed)).overrides
            self._forced[groups] = {_key(word) for word, before in zip(found, typed, strict=True) if word != before}
        return [f"++{word}" if _key(word) in self._forced[groups] else word for word in typed]

    def composed(self, point: Point) -> DictConfig:
        """Compose a point's config.

        Raises:
            ConfigError: It does not compose.
        """
        return without_sweep(compose_config(self._job(self.words(point))))

    def config(self, point: Point) -> dict[str, Any]:
        """Return a point's config as plain values.

        Raises:
            ConfigError: It does not compose.
        """
        key = repr(point)
        if key not in self._configs:
            self._configs[key] = plain(self.composed(point))
        return copy.deepcopy(self._configs[key])

    def _job(self, words: list[str]) -> CommandLine:
        return replace(self.line, overrides=words, multirun=False)


def without_sweep(config: DictConfig) -> DictConfig:
    """Empty `sweep` in place: one job of it is no sweep, also where an experiment chooses one."""
    if config.get("sweep") is not None:
        with open_dict(config):
            config["sweep"] = None
    return config


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]
