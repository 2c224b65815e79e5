"""What a foreign description may build: exact names that are what they say, and nothing else ever runs."""

import functools
import json
import sys
import types

import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError, UntrustedInputError
from lightning_opt.export import build_trusted, declared_models, load, save_artifact
from lightning_opt.surgery import Recipe

CONVNET = "lightning_opt.models.ConvNet"
SPEC = {"_target_": CONVNET, "num_outputs": 3, "in_channels": 1, "widths": [4], "convs_per_width": 1}


class Sentinel:
    """Runs when it is unpickled or called, and leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def gadgets(tmp_path):
    """Return descriptions each of which would leave `sentinel` behind, if it were built."""
    import numpy as np

    sentinel = tmp_path / "sentinel"
    touch, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    torch.save(Sentinel(sentinel), tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array([Sentinel(sentinel)], dtype=object), allow_pickle=True)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "hubconf.py").write_text(code)
    load_it = {"f": str(tmp_path / "x.pt"), "weights_only": False}
    return {
        "os.system": {"_target_": "os.system", "command": touch},
        "posix.system": {"_target_": "posix.system", "command": touch},
        "subprocess.run": {"_target_": "subprocess.run", "args": touch, "shell": True},
        "subprocess.Popen": {"_target_": "subprocess.Popen", "args": touch, "shell": True},
        "builtins.open": {"_target_": "builtins.open", "file": str(sentinel), "mode": "w"},
        "io.open": {"_target_": "io.open", "file": str(sentinel), "mode": "w"},
        "torch.load": {"_target_": "torch.load", **load_it},
        "torch.serialization.load": {"_target_": "torch.serialization.load", **load_it},
        "numpy.load": {"_target_": "numpy.load", "file": str(tmp_path / "x.npy"), "allow_pickle": True},
        "torch.hub.load": {"_target_": "torch.hub.load", "repo_or_dir": str(hub), "model": "m", "source": "local"},
        "collect_env": {"_target_": "torch.utils.collect_env.run", "command": touch},
        "shutil.copyfile": {"_target_": "shutil.copyfile", "src": __file__, "dst": str(sentinel)},
        "setuptools": {"_target_": "setuptools._distutils.spawn.spawn", "cmd": ["touch", str(sentinel)]},
        "models.torch.load": {"_target_": "lightning_opt.models.adapters.torch.load", **load_it},
        "artifact.json.os": {"_target_": "lightning_opt.export.files.os.system", "command": touch},
        "cli": {"_target_": "lightning_opt.export.files.write_text", "path": str(sentinel), "text": "x"},
    }


def _spellings(spec):
    """Hide a gadget in every place in which a description can hold one."""
    yield spec
    yield {**spec, "_partial_": True}
    yield {**SPEC, "widths": spec}
    yield {**SPEC, "widths": [4, [spec]]}
    yield {**SPEC, "extra": {"deep": {"er": spec}}}
    yield {"_target_": "functools.partial", "func": spec}


def test_no_gadget_runs_in_any_spelling(gadgets, tmp_path):
    allowed = declared_models()
    for name, gadget in gadgets.items():
        for spec in _spellings(gadget):
            with pytest.raises(UntrustedInputError) as caught:
                build_trusted(spec, allowed=allowed)
            target = gadget["_target_"] if spec["_target_"] != "functools.partial" else "functools.partial"
            assert caught.value.exit_code == 8
            assert f"trusted_targets=[{target}]" in str(caught.value) or f"[{gadget['_target_']}]" in str(caught.value)
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "sentinel").exists(), name


def test_aliases_and_the_standard_library_are_refused_even_where_they_are_named(gadgets, tmp_path):
    for name in ("os.system", "posix.system", "subprocess.run", "subprocess.Popen", "builtins.open", "io.open",
                 "shutil.copyfile", "models.torch.load", "artifact.json.os"):  # fmt: skip
        gadget = gadgets[name]
        with pytest.raises(UntrustedInputError, match="is not built"):
            build_trusted(gadget, allowed={gadget["_target_"]})
        assert not (tmp_path / "sentinel").exists(), name


def test_gadgets_in_an_artifact_do_not_run(gadgets, tmp_path):
    from lightning_opt.export.manifest import write_manifest

    folder = save_artifact(tmp_path / "artifact", nn.Linear(1, 1), architecture=SPEC)
    for gadget in gadgets.values():
        (folder / "architecture.json").write_text(json.dumps(gadget))
        write_manifest(folder, ["model.safetensors", "recipe.json", "architecture.json"])
        with pytest.raises(UntrustedInputError, match="trusted_targets="):
            load(folder)
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_convert_", "_mode_", "__class__", "_"])
def test_other_steering_keys_are_refused(key):
    for spec in ({**SPEC, key: [1]}, {**SPEC, "extra": {key: "all"}}):
        with pytest.raises(UntrustedInputError, match=key):
            build_trusted(spec, allowed={CONVNET})


@pytest.mark.parametrize(
    "target", [None, 3, ["os.system"], "", CONVNET + " ", CONVNET.lower(), "ConvNet", "lightning_opt.*"]
)
def test_names_must_be_exact(target):
    with pytest.raises(UntrustedInputError):
        build_trusted({**SPEC, "_target_": target}, allowed={CONVNET})


@pytest.mark.parametrize("value", [object(), b"x", {1, 2}, torch.ones(1), float("nan"), float("inf"), print, 1j])
def test_values_must_be_plain(value):
    with pytest.raises(UntrustedInputError, match="plain"):
        build_trusted({**SPEC, "extra": [value]}, allowed={CONVNET})


def test_keys_must_be_text_and_a_description_must_name_something():
    for spec in ({**SPEC, "extra": {1: 2}}, {}, [SPEC], "lightning_opt.models.ConvNet", None):
        with pytest.raises(UntrustedInputError):
            build_trusted(spec, allowed={CONVNET})


def test_partial_must_be_true_or_false():
    with pytest.raises(UntrustedInputError, match="_partial_"):
        build_trusted({**SPEC, "_partial_": "yes"}, allowed={CONVNET})


def test_depth_and_size_are_capped():
    deep = 1
    for _ in range(500):
        deep = [deep]
    for value in (deep, [0] * 200_000, "x" * (2 << 20)):
        with pytest.raises(UntrustedInputError):
            build_trusted({**SPEC, "extra": value}, allowed={CONVNET})


def test_a_hostile_name_cannot_forge_a_line():
    with pytest.raises(UntrustedInputError) as caught:
        build_trusted({"_target_": "a\nerror: all is well\x1b[2J"}, allowed={CONVNET})
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.fixture
def operators_module(monkeypatch):
    """An operator's package, with classes and functions of its own and some that only look so."""
    module = types.ModuleType("operators_pkg")
    code = """
import functools, subprocess
from torch import nn
class Net(nn.Module):
    def __init__(self, width, inner=None):
        super().__init__()
        self.layer, self.inner = nn.Linear(width, width), inner
    class Part:
        pass
def make(width=2): return Net(width)
def _run(*args, **kwargs): raise AssertionError("ran")
@functools.wraps(make)
def posing(**kwargs): _run()
instance = Net(2)
bound = instance.forward
"""
    exec(compile(code, "operators_pkg", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "operators_pkg", module)
    return module


def test_what_the_operator_names_is_built_with_its_nested_parts(operators_module):
    net, make = "operators_pkg.Net", "operators_pkg.make"
    spec = {"_target_": net, "width": 2, "inner": {"_target_": make, "width": 3}}
    built = build_trusted(spec, allowed=[net, make])
    assert type(built) is operators_module.Net
    assert built.inner.layer.in_features == 3
    with pytest.raises(UntrustedInputError, match=r"operators_pkg\.make"):
        build_trusted(spec, allowed=[net])


def test_partial_gives_a_callable_that_builds_later(operators_module):
    later = build_trusted(
        {"_target_": "operators_pkg.Net", "_partial_": True, "width": 4}, allowed={"operators_pkg.Net"}
    )
    assert isinstance(later, functools.partial)
    assert later().layer.in_features == 4


@pytest.mark.parametrize(
    "name",
    ["posing", "instance", "bound", "nn.Linear", "subprocess.run", "functools.partial", "Net.forward.__globals__"],
)
def test_what_only_looks_like_the_operators_own_is_refused(operators_module, name):
    target = f"operators_pkg.{name}"
    with pytest.raises(UntrustedInputError, match="is not built"):
        build_trusted({"_target_": target}, allowed={target})


def test_a_name_that_cannot_be_imported_or_built_is_a_config_error(operators_module):
    for spec in ({"_target_": "no_such_pkg.Net"}, {"_target_": "operators_pkg.Net", "depth": 2}):
        with pytest.raises(ConfigError, match=spec["_target_"]):
            build_trusted(spec, allowed={spec["_target_"]})


def test_declared_models_make_modules_and_nothing_else():
    import lightning_opt.models as models

    declared = declared_models()
    assert CONVNET in declared
    assert "lightning_opt.models.causal_lm" in declared
    assert not declared & {"lightning_opt.models.load_weights", "lightning_opt.models.LoadedWeights"}
    for name in declared:
        found = getattr(models, name.removeprefix("lightning_opt.models."))
        assert isinstance(found, types.FunctionType) or issubclass(found, nn.Module)


def test_recipes_of_an_artifact_cannot_name_code(tmp_path):
    from lightning_opt.export.manifest import write_manifest

    folder = save_artifact(tmp_path, nn.Linear(1, 1), architecture=SPEC, recipe=Recipe())
    (folder / "recipe.json").write_text('[{"op": "os.system", "version": 1, "command": "true"}]')
    write_manifest(folder, ["model.safetensors", "recipe.json", "architecture.json"])
    with pytest.raises(UntrustedInputError, match=r"os\.system"):
        load(folder)
