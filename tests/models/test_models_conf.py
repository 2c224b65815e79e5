"""Every conf/model/*.yaml builds a model of the advertised kind."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_opt import models

FOLDER = Path(__file__).parents[2] / "conf" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))
TEXT = {"text_encoder", "bag_of_embeddings", "hf_encoder", "minilm"}
TOKENS = {"gpt", "hf_causal_lm"}
SIGNALS = {"conv1d", "gru"}


def read(path):
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text.replace("${task.num_outputs}", "5").replace("${paths.cache_dir}", "/tmp"))


def example(name):
    if name in TEXT | TOKENS:
        return torch.randint(0, 5, (2, 12))
    return torch.randn(2, 40) if name in SIGNALS else torch.randn(2, 1, 28, 28)


def test_the_presets_are_there():
    wanted = (
        "mlp cnn cnn_small conv1d resnet20 resnet56 resnet8x4 resnet32x4 wrn_16_2 wrn_40_2 resnet18 resnet34 resnet50"
    )
    wanted += " mobile vit gru gpt text_encoder hf_encoder hf_causal_lm minilm"
    assert set(wanted.split()) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_yaml_explains_itself_and_its_keys(path):
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert re.match(rf"# .+ python train\.py \+experiment=\w+.* model={path.stem}$", first)
    for line in rest:
        assert "  #" in line or " # " in line or line.lstrip().startswith(("_target_", "- [")), line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_yaml_builds_a_model_that_answers(path):
    values = read(path)
    target = values.pop("_target_").removeprefix("lightning_opt.models.")
    build = getattr(models, target)
    assert set(values) <= set(inspect.signature(build).parameters)
    if path.stem in {"hf_encoder", "hf_causal_lm", "minilm"}:
        pytest.importorskip("transformers")
    if path.stem == "minilm":
        values["pretrained"] = False
    model = build(**values).eval()
    with torch.no_grad():
        assert model(example(path.stem)).shape == ((2, 12, 5) if path.stem in TOKENS else (2, 5))
