"""What a run that pruned puts into its record: both models timed together, stages, and the recipe."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import lightning_opt
from lightning_opt.cli.fitting import Fitted
from lightning_opt.cli.measuring import measure_all
from lightning_opt.cli.pruned import dense_of, was_pruned
from lightning_opt.cli.stages import stages_of
from lightning_opt.cli.teachers import Found
from lightning_opt.config.build import build_model
from lightning_opt.config.build_fit import build_data
from lightning_opt.config.compose import compose_config, plain, read_command_line
from lightning_opt.reporting import new_record, render, write_record
from lightning_opt.surgery import Recipe, Shrink, replay

WORDS = ("data=digits", "model=mlp", "model.input_shape=[1,8,8]", "model.hidden=[32,16]", "export=false")
TIMING = ("benchmark.engines=[torch]", "benchmark.batch_sizes=[1]", "benchmark.max_seconds=0.3")
KEPT = list(range(0, 32, 2))
SHRINK = Shrink(
    kept={"layers.0.0.weight": {0: KEPT}, "layers.0.0.bias": {0: KEPT}, "layers.1.0.weight": {1: KEPT}},
    attributes={"layers.0.0": {"out_features": 16}, "layers.1.0": {"in_features": 16}},
)
STAGE = {"method": "prune", "from_step": 2, "to_step": 8, "what": "Element, Magnitude, 0.9 reached"}


@pytest.fixture(scope="module")
def config():
    return plain(compose_config(read_command_line([*WORDS, *TIMING], config_name="train")))


@pytest.fixture(scope="module")
def data(config):
    made = build_data(config)
    made.prepare_data()
    return made


def fitted(model, *, stages=(), acc=0.5):
    return Fitted(model=model, quality={"acc": acc}, best_value=None, steps=9, wall_seconds=0.1, stages=list(stages))


def masked(config):
    model = build_model(config["model"]).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= torch.tensor(rng.random(weight.shape) >= 0.9, dtype=torch.float32)
    return model


def none_found(*teachers):
    return Found(teachers=list(teachers), folders=[])


@pytest.fixture(scope="module")
def shrunk(config, data, tmp_path_factory):
    """Give folder, model and record parts of a run whose model was shrunk, with its dense control."""
    folder = tmp_path_factory.mktemp("shrunk")
    model = replay(build_model(config["model"]), Recipe([SHRINK])).eval()
    fits = {"baseline": fitted(build_model(config["model"]).eval()), "student": fitted(model, stages=[STAGE])}
    return folder, model, measure_all(config, folder, fits, none_found(), data)


def test_the_dense_and_the_pruned_model_are_measured_together(shrunk):
    _, _, parts = shrunk
    assert list(parts["models"]) == ["baseline", "student"]
    assert parts["pruning"]["reference"] == "baseline"
    rows = parts["pruning"]["latency"]
    assert [(row["engine"], row["batch"]) for row in rows] == [("torch eager", 1)]
    for name, key in (("baseline", "dense_ms"), ("student", "pruned_ms")):
        assert rows[0][key] == parts["models"][name]["latency_ms"][0]["p50"]
    assert rows[0]["ratio"] == pytest.approx(rows[0]["dense_ms"] / rows[0]["pruned_ms"])


def test_shapes_parameters_and_operations_before_and_after(shrunk):
    _, _, parts = shrunk
    totals = parts["pruning"]["totals"]
    before, after = (64 * width + width + width * 16 + 16 + 16 * 10 + 10 for width in (32, 16))
    assert (totals["params_before"], totals["params"]) == (before, after)
    assert totals["flops"] == 2 * (64 * 16 + 16 * 16 + 16 * 10)
    assert parts["pruning"]["kind"] == "structured"


def test_the_recipe_is_in_the_record_and_in_the_artifact(shrunk):
    folder, model, parts = shrunk
    assert [edit["op"] for edit in parts["recipe"]] == ["shrink"]
    assert Recipe(parts["recipe"]) == Recipe([SHRINK])
    assert json.loads((folder / "artifact" / "recipe.json").read_text()) == json.loads(json.dumps(parts["recipe"]))
    loaded = lightning_opt.load(folder / "artifact")
    inputs = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(inputs), model(inputs))


def test_stages_come_after_the_training_that_they_belong_to(shrunk):
    _, _, parts = shrunk
    assert [stage["method"] for stage in parts["stages"]] == ["supervised", "supervised", "prune"]
    assert parts["stages"][-1] == STAGE
    assert "dense model alone" in parts["stages"][0]["what"]


def test_the_parts_make_a_valid_record_and_a_report(shrunk):
    folder, _, parts = shrunk
    record = new_record("train.py", seed=1, config_sha256=None) | json.loads(json.dumps(parts))
    write_record(folder, record | {"status": "finished", "finished": record["started"], "wall_seconds": 1.0})
    _, markdown = render(folder)
    words = markdown.read_text(encoding="utf-8")
    assert "What pruning did" in words
    assert "| torch eager |" in words


def test_without_a_control_the_unpruned_shapes_are_timed_but_not_judged(config, data, tmp_path):
    parts = measure_all(config, tmp_path, {"student": fitted(masked(config), stages=[STAGE])}, none_found(), data)
    dense = parts["models"]["dense"]
    assert dense["quality"] is None
    assert "not trained" in dense["reasons"]["quality"]
    assert dense["latency_ms"][0]["p50"] > 0
    assert parts["pruning"]["kind"] == "unstructured"
    assert parts["pruning"]["reference"] == "dense"


def test_a_run_that_did_not_prune_is_as_before(config, data, tmp_path):
    alone = {**config, "benchmark": None}
    parts = measure_all(alone, tmp_path, {"student": fitted(build_model(config["model"]).eval())}, none_found(), data)
    assert "pruning" not in parts
    assert list(parts["models"]) == ["student"]
    assert parts["recipe"] == []


def test_what_counts_as_pruned(config):
    plain_model = build_model(config["model"])
    assert not was_pruned(config, fitted(plain_model))
    assert was_pruned({**config, "pruner": {"_target_": "x"}}, fitted(plain_model))
    assert was_pruned(config, fitted(plain_model, stages=[STAGE]))
    assert was_pruned(config, fitted(replay(build_model(config["model"]), Recipe([SHRINK]))))


def test_a_teacher_of_the_same_shapes_is_the_dense_model(config):
    same, other = build_model(config["model"]), nn.Linear(3, 3)
    student = masked(config)
    assert dense_of(config, {"teacher": same, "student": student}) == ("teacher", same)
    name, model = dense_of(config, {"teacher": other, "student": student})
    assert name == "dense"
    assert model is not other
    assert dense_of(config, {"teacher": same, "baseline": other, "student": student}) == ("baseline", other)


class Told:
    def stages(self):
        return [
            {"method": "prune", "from_step": torch.tensor(3), "to_step": None, "what": 7},
            "no stage",
            {"method": ""},
        ]


class Silent:
    stages = "not a method"


def test_stages_are_what_callbacks_say_in_plain_values():
    class Trainer:
        callbacks = (Silent(), Told(), object())

    assert stages_of(Trainer()) == [{"method": "prune", "from_step": 3, "to_step": None, "what": "7"}]
