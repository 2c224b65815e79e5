"""Which classes a config that arrives with a run folder may name.

Such a config is data from elsewhere, not code of ours: it is never instantiated freely. Each `_target_` must be an
exact name that this package's own configs declare, or one that the operator typed on the command line.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from lightning_opt.config.paths import conf_dir

_TARGET = re.compile(r"^\s*(?:- +)?_target_:\s*(lightning_opt\.[\w.]+)\s*(?:#.*)?$", re.MULTILINE)


@lru_cache(maxsize=1)
def declared_targets() -> frozenset[str]:
    """Return every class of ours that the shipped configs name."""
    texts = (file.read_text(encoding="utf-8") for file in conf_dir().rglob("*.yaml"))
    return frozenset(name for text in texts for name in _TARGET.findall(text))


def allowed_targets(trusted: Sequence[str]) -> frozenset[str]:
    """Return the declared classes and those that the operator trusts."""
    return declared_targets() | frozenset(trusted)
