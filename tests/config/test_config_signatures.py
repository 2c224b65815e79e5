"""Signatures read from source equal those that Python sees, and types are judged as a person would."""

import ast
import importlib
import inspect

import pytest

from lightning_opt.config.signatures import signature_of
from lightning_opt.config.types import fits

TARGETS = [
    "lightning.pytorch.Trainer",
    "torch.optim.AdamW",
    "torch.optim.SGD",
    "lightning_opt.tasks.Classification",
    "lightning_opt.models.ConvNet",
    "lightning_opt.data.Mnist5k",
    "lightning_opt.losses.KD",
    "lightning_opt.losses.Term",
    "lightning_opt.checkpointing.SaveCheckpoints",
    "lightning_opt.modules.schedulers.cosine",
    "lightning_opt.strategies.ddp",
    "lightning_opt.callbacks.Prune",
    "lightning_opt.pruning.ERK",
    "lightning_opt.pruning.RigL",
    "lightning_opt.pruning.Wanda",
    "lightning_opt.pruning.LatencyAware",
]


@pytest.mark.parametrize("target", TARGETS)
def test_source_and_python_agree(target):
    found = signature_of(target)
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    plain = [p for p in real.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert list(found.annotations) == [p.name for p in plain]
    assert found.required == {p.name for p in plain if p.default is p.empty}
    assert found.open == any(p.kind is p.VAR_KEYWORD for p in real.values())


def test_what_does_not_exist_is_said():
    with pytest.raises(LookupError, match="no module named 'no_such'"):
        signature_of("no_such.Net")
    with pytest.raises(LookupError, match="has no 'Nett'"):
        signature_of("lightning_opt.models.Nett")


@pytest.mark.parametrize(
    ("value", "annotation", "answer"),
    [
        (3, "int", True),
        (True, "int", False),
        (3, "float", True),
        ("3", "float", False),
        (None, "int | None", True),
        (None, "Optional[int]", True),
        ("a", "Literal['a', 'b']", True),
        ("c", "Literal['a', 'b']", False),
        ([1, 2], "list[int]", True),
        ([1, "x"], "Sequence[int]", False),
        (3, "Sequence[int] | int", True),
        ({"a": 1}, "Mapping[str, int]", True),
        ({"a": "x"}, "Mapping[str, int]", False),
        ("abc", "float | Tensor", False),
        (3, "SomeClassOfTheUser", True),
        ({"_target_": "x.Y"}, "Tensor", True),
        ("x", "str | Path", True),
        (1.5, "Union[int, float]", True),
    ],
)
def test_types(value, annotation, answer):
    assert fits(value, ast.parse(annotation, mode="eval").body) is answer
