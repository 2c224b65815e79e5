"""Tasks: what "good" means for a model."""

from lightning_opt.tasks.base import Example, Task
from lightning_opt.tasks.classification import Classification
from lightning_opt.tasks.language_modeling import LanguageModeling
from lightning_opt.tasks.multilabel import Multilabel
from lightning_opt.tasks.regression import Regression

__all__ = ["Classification", "Example", "LanguageModeling", "Multilabel", "Regression", "Task"]
