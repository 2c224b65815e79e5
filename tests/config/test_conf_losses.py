"""Every file in conf/loss builds, and gives a finite number where logits are enough."""

from pathlib import Path

import hydra
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lightning_opt import losses
from lightning_opt.losses import DistillationLoss, Signals, Supervision, Term
from lightning_opt.losses.schedules import value_at

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "loss"
# What only changes the batches (`sampling`) compares nothing.
FILES = sorted(path for path in FOLDER.glob("*.yaml") if "terms:" in path.read_text(encoding="utf-8"))
REGRESSION = {"regression_kd", "bounded_regression_kd"}
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def terms_of(path):
    config = OmegaConf.merge({"seed": 1}, {"loss": OmegaConf.load(path)})
    return hydra.utils.instantiate(config.loss.terms, _convert_="all")


def targets(node):
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for value in node.values():
            yield from targets(value)


@by_file
def test_builds_terms_under_their_own_names(path):
    terms = terms_of(path)
    assert terms
    assert all(isinstance(term, Term) for term in terms.values())
    # The key names the term in the logs too, unless the file says otherwise, which would confuse.
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))["terms"]
    assert all(node.get("name", key) == key for key, node in raw.items())
    assert all(value_at(term.weight, 0.5) > 0 for term in terms.values())


@by_file
def test_says_what_it_is_and_how_to_use_it(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert "python train.py +experiment=" in first
    assert first.endswith(f"loss={path.stem}")
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == ["terms"]


@by_file
def test_no_two_files_use_one_key_for_different_terms(path):
    """Files are merged in `loss=[kd,rkd]`, so a key must not stand for two things."""
    mine = yaml.safe_load(path.read_text(encoding="utf-8"))["terms"]
    for other in FILES:
        if other != path:
            assert not set(mine) & set(yaml.safe_load(other.read_text(encoding="utf-8"))["terms"]), other.name


@by_file
def test_logits_are_enough_where_nothing_else_is_needed(path):
    generator = torch.Generator().manual_seed(0)
    shape = (8, 1) if path.stem in REGRESSION else (8, 80)
    student = torch.randn(shape, generator=generator, requires_grad=True)
    teacher = torch.randn(shape, generator=generator)
    labels = torch.zeros(8) if path.stem in REGRESSION else torch.arange(8)
    for key, term in terms_of(path).items():
        if "features" in term.loss.needs:
            assert term.loss.student_taps, key
            assert term.loss.teacher_taps, key
            continue
        value = term(Signals(logits=student), Signals(logits=teacher), Supervision(labels=labels, progress=0.5))
        value.backward()
        assert value.shape == ()
        assert value.isfinite()
        assert value > 0
        assert student.grad.abs().sum() > 0


def test_every_loss_has_a_file():
    exported = [getattr(losses, name) for name in losses.__all__]
    classes = {x.__name__ for x in exported if isinstance(x, type) and issubclass(x, DistillationLoss)}
    used = {
        target.removeprefix("lightning_opt.losses.")
        for path in FILES
        for target in targets(yaml.safe_load(path.read_text(encoding="utf-8")))
    }
    assert classes - {"DistillationLoss"} <= used


def test_files_merge_to_one_list_of_terms():
    merged = OmegaConf.merge(*(OmegaConf.load(FOLDER / f"{name}.yaml") for name in ("kd", "rkd")))
    assert list(merged.terms) == ["kd", "rkd_distance", "rkd_angle"]


def test_a_weight_and_a_temperature_may_be_schedules():
    config = OmegaConf.load(FOLDER / "kd.yaml")
    linear = {"_target_": "lightning_opt.losses.Linear", "start": 8.0, "end": 2.0}
    config.terms.kd.weight = {"_target_": "lightning_opt.losses.Cosine", "start": 1.0, "end": 0.0}
    config.terms.kd.loss.temperature = linear
    term = hydra.utils.instantiate(config.terms, _convert_="all")["kd"]
    assert [term.weight_at(progress) for progress in (0.0, 1.0)] == [1.0, 0.0]
    assert value_at(term.loss.temperature, 0.5) == 5.0


@pytest.mark.parametrize("path", sorted((FOLDER.parent / "schedule").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("key", ["loss.terms.kd.weight", "loss.terms.kd.loss.temperature"])
def test_schedules_take_the_place_of_a_number(path, key):
    name = path.stem
    change = {"constant": "value=2.0", "step": "values=[2.0,0.5]"}.get(name, "end=0.5")
    with hydra.initialize_config_dir(config_dir=str(FOLDER.parent), version_base="1.3"):
        config = hydra.compose("train", overrides=["loss=kd", f"+schedule@{key}={name}", f"{key}.{change}"])
    term = hydra.utils.instantiate(config.loss.terms.kd, _convert_="all")
    schedule = term.weight if key.endswith("weight") else term.loss.temperature
    assert type(schedule).__name__.lower() == name
    values = [schedule(progress) for progress in (0.0, 1.0)]
    assert values == {"constant": [2.0, 2.0], "step": [2.0, 0.5]}.get(name, [1.0, 0.5])
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"python train.py +experiment=distill +schedule@loss.terms.kd.weight={name}" in first
