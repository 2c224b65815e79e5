import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import lightning_opt.data as room
from lightning_opt.data import DataModule

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "data"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_names_every_argument_with_its_default(path):
    text = path.read_text()
    node = yaml.safe_load(text)
    module, _, name = node.pop("_target_").rpartition(".")
    target = getattr(import_module(module), name)
    assert issubclass(target, DataModule)
    defaults = {key: one.default for key, one in inspect.signature(target).parameters.items()}
    assert set(node) == set(defaults)
    assert node.pop("seed") == "${seed}"
    assert node.pop("cache_dir") == "${paths.cache_dir}"
    for key, value in node.items():
        if isinstance(value, dict):
            nested = inspect.signature(getattr(room, value.pop("_target_").rpartition(".")[2])).parameters
            assert set(value) <= set(nested)
        elif value not in ("???", None) and key not in ("text_columns", "input_columns"):
            assert value == defaults[key] or tuple(value) == defaults[key], key
    assert text.startswith("# ")
    assert f"data={path.stem}" in text.splitlines()[0]
    assert all("#" in line for line in text.splitlines() if ":" in line and "_target_" not in line)


def test_every_data_module_has_a_file():
    targets = {yaml.safe_load(path.read_text())["_target_"].rpartition(".")[2] for path in FILES}
    classes = {
        name
        for name in room.__all__
        if inspect.isclass(getattr(room, name)) and issubclass(getattr(room, name), DataModule)
    }
    assert classes - {"DataModule"} == targets
