"""LightningModules and what they are made of."""

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
