"""LightningModules and what they are made of.

Names are imported when they are first used: a teacher, a tap or a schedule needs no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_opt.modules.base import TaskModule
    from lightning_opt.modules.distillation import Distillation
    from lightning_opt.modules.initialise import every_nth_layer, initialise_from_teacher
    from lightning_opt.modules.supervised import Supervised
    from lightning_opt.modules.taps import FeatureTaps, match_modules
    from lightning_opt.modules.teacher import Teacher
    from lightning_opt.modules.teacher_cache import TeacherCache

__all__ = [
    "Distillation",
    "FeatureTaps",
    "Supervised",
    "TaskModule",
    "Teacher",
    "TeacherCache",
    "every_nth_layer",
    "initialise_from_teacher",
    "match_modules",
]

_HOME = {
    "base": ("TaskModule",),
    "distillation": ("Distillation",),
    "initialise": ("every_nth_layer", "initialise_from_teacher"),
    "supervised": ("Supervised",),
    "taps": ("FeatureTaps", "match_modules"),
    "teacher": ("Teacher",),
    "teacher_cache": ("TeacherCache",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
