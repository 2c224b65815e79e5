"""An artifact gives back the same model bit for bit, and notices every byte that changed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import lightning_opt
from lightning_opt.errors import ConfigError, StorageError, UntrustedInputError
from lightning_opt.export import add_to_manifest, load, save_artifact, verify_artifact
from lightning_opt.surgery import DropLayers, Recipe, Shrink, recipe_of, record, replay

FILES = ("architecture.json", "manifest.json", "model.safetensors", "recipe.json")


class Stack(nn.Module):
    """Everything that a state can hold: tied weights, running statistics, other dtypes, a part that is not kept."""

    def __init__(self, depth=4, dim=4, tied=True):
        super().__init__()
        self.table = nn.Embedding(10, dim)
        self.blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.norm = nn.BatchNorm1d(dim)
        self.out = nn.Linear(dim, 10, bias=False)
        if tied:
            self.out.weight = self.table.weight
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.shift = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))

    def forward(self, ids):
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = torch.relu(block(hidden))
        return self.out(self.norm(hidden.mean(1))) + self.shift.float().sum() + self.counts.sum()


NAME = f"{__name__}.Stack"
ARCHITECTURE = {"_target_": NAME, "depth": 4}


@pytest.fixture
def model():
    sys.modules.setdefault(__name__, sys.modules[Stack.__module__])
    torch.manual_seed(0)
    made = Stack()
    made(torch.randint(0, 10, (8, 5)))  # moves the running statistics
    made.counts += 5
    return made


def same_state(one, other):
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_the_round_trip_is_bit_equal(tmp_path, model):
    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    loaded = load(tmp_path, trusted_targets=[NAME])
    ids = torch.randint(0, 10, (3, 5))
    assert same_state(loaded, model)
    assert not loaded.training
    assert loaded.out.weight is loaded.table.weight
    assert torch.equal(loaded(ids), model.eval()(ids))


def test_a_recipe_is_replayed_before_the_weights_are_loaded(tmp_path, model):
    recipe = Recipe([DropLayers(path="blocks", kept=(0, 3))])
    replay(model, recipe)
    for given in (recipe, None):  # the model carries it
        save_artifact(tmp_path, model, architecture=ARCHITECTURE, recipe=given)
        loaded = load(tmp_path, trusted_targets=[NAME])
        assert len(loaded.blocks) == 2
        assert same_state(loaded, model)
        assert recipe_of(loaded) == recipe
    save_artifact(tmp_path, model, architecture=ARCHITECTURE, recipe=Recipe())
    with pytest.raises(StorageError, match=r"blocks\.2"):  # without the recipe the weights do not fit
        load(tmp_path, trusted_targets=[NAME])


class Holder(nn.Module):
    """Has the network as a child that was changed by itself."""

    def __init__(self):
        super().__init__()
        self.net = Stack()

    def forward(self, ids):
        return self.net(ids)


def test_what_was_done_to_a_child_comes_back_too(tmp_path):
    torch.manual_seed(0)
    holder = Holder()
    first, second = DropLayers(path="blocks", kept=(1, 2)), Shrink({"counts": {0: [0, 2]}})
    for edit in (first, second):
        edit.apply(holder.net)
        record(holder.net, edit)
    name = f"{__name__}.Holder"
    save_artifact(tmp_path, holder, architecture={"_target_": name})
    loaded = load(tmp_path, trusted_targets=[name])
    assert same_state(loaded, holder)
    edits = json.loads((tmp_path / "recipe.json").read_text())
    assert [edit.get("path", list(edit.get("kept", []))) for edit in edits] == ["net.blocks", ["net.counts"]]


FRESH = """
import sys, torch, lightning_opt
loaded = lightning_opt.load(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
answer = loaded(**inputs) if isinstance(inputs, dict) else loaded(inputs)
torch.save(answer.detach(), sys.argv[3])
"""


def answer_of_a_fresh_process(folder, inputs):
    torch.save(inputs, folder / "inputs.pt")
    command = [sys.executable, "-c", FRESH, str(folder), str(folder / "inputs.pt"), str(folder / "answer.pt")]
    subprocess.run(command, check=True, timeout=120)
    return torch.load(folder / "answer.pt", weights_only=True)


def test_a_shrunk_network_is_loaded_by_a_fresh_process(tmp_path):
    from lightning_opt.models import ConvNet
    from lightning_opt.pruning.structured import shrink

    torch.manual_seed(0)
    arguments = {"num_outputs": 3, "in_channels": 1, "widths": [8, 8], "convs_per_width": 1}
    net = ConvNet(**arguments)
    before, x = sum(p.numel() for p in net.parameters()), torch.randn(2, 1, 8, 8)
    net(x)  # moves the running statistics
    shrink(net, x, ratio=0.5)
    assert sum(p.numel() for p in net.parameters()) < 0.5 * before
    save_artifact(tmp_path, net, architecture={"_target_": "lightning_opt.models.ConvNet", **arguments})
    assert torch.equal(answer_of_a_fresh_process(tmp_path, x), net.eval()(x))


def test_a_shrunk_hugging_face_model_needs_neither_its_source_nor_its_new_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    from lightning_opt.models import encoder_classifier
    from lightning_opt.pruning.depth import keep_layers
    from lightning_opt.pruning.hugging_face import update_config
    from lightning_opt.pruning.structured import shrink

    settings = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
    )
    transformers.AutoModel.from_config(settings).save_pretrained(tmp_path / "source")
    arguments = {"source": str(tmp_path / "source"), "num_outputs": 2, "config": None}
    net = encoder_classifier(**arguments)
    ids = {"input_ids": torch.randint(0, 20, (2, 6))}
    shrink(net, ids, ratio=0.5, kinds=["hidden"])
    replay(net, keep_layers(net, [0, 2]))
    assert update_config(net)
    assert (net.backbone.config.num_hidden_layers, net.backbone.config.intermediate_size) == (2, 4)
    target = {"_target_": "lightning_opt.models.encoder_classifier"}
    save_artifact(tmp_path / "a", net, architecture={**target, **arguments})
    shutil.rmtree(tmp_path / "source")
    assert torch.equal(answer_of_a_fresh_process(tmp_path / "a", ids), net.eval()(**ids))


def test_a_model_of_another_dtype_comes_back_in_it(tmp_path, model):
    model.bfloat16()
    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    loaded = load(tmp_path, trusted_targets=[NAME])
    assert loaded.blocks[0].weight.dtype == torch.bfloat16
    assert same_state(loaded, model)


def test_tied_weights_are_written_once(tmp_path, model):
    from safetensors import safe_open

    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len({"out.weight", "table.weight"} & set(file.keys())) == 1
        assert "passing" not in file.keys()  # noqa: SIM118 - it is no dict


def test_weights_that_were_untied_do_not_fit_a_model_that_ties_them(tmp_path, model):
    model.out.weight = nn.Parameter(torch.randn(10, 4))
    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    with pytest.raises(StorageError, match="fit"):
        load(tmp_path, trusted_targets=[NAME])
    save_artifact(tmp_path, model, architecture={**ARCHITECTURE, "tied": False})
    assert same_state(load(tmp_path, trusted_targets=[NAME]), model)


def test_a_run_folder_and_the_package_level_name_work(tmp_path):
    from lightning_opt.models import ConvNet

    arguments = {"num_outputs": 3, "in_channels": 1, "widths": [4], "convs_per_width": 1}
    net = ConvNet(**arguments)
    save_artifact(
        tmp_path / "run" / "artifact", net, architecture={"_target_": "lightning_opt.models.ConvNet", **arguments}
    )
    before = torch.get_rng_state()
    for path in (tmp_path / "run", str(tmp_path / "run" / "artifact")):
        assert same_state(lightning_opt.load(path), net)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_that_nobody_trusts_is_not_built(tmp_path, model):
    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    with pytest.raises(UntrustedInputError, match="trusted_targets="):
        load(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, model, name):
    folder = save_artifact(tmp_path / "good", model, architecture=ARCHITECTURE, meta={"note": "fine"})
    content = (folder / name).read_bytes()
    for place in sorted({0, 1, len(content) // 3, len(content) // 2, len(content) - 2}):
        bad = shutil.copytree(folder, tmp_path / f"{name}-{place}")
        changed = bytearray(content)
        changed[place] ^= 1
        (bad / name).write_bytes(bytes(changed))
        if name == "manifest.json" and _says_the_same(content, bytes(changed)):
            continue
        with pytest.raises((StorageError, UntrustedInputError), match=name.replace(".", r"\.")):
            load(bad, trusted_targets=[NAME])


def _says_the_same(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_the_message_names_the_file_and_both_sums(tmp_path, model):
    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    file = tmp_path / "model.safetensors"
    good = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    bad = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(StorageError) as caught:
        load(tmp_path, trusted_targets=[NAME])
    for part in ("model.safetensors", good, bad):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_sentence(tmp_path, model, name):
    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    (tmp_path / name).unlink()
    with pytest.raises((ConfigError, StorageError), match=name.replace(".", r"\.")) as caught:
        load(tmp_path, trusted_targets=[NAME])
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_artifact_is_a_config_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="holds no artifact"):
            load(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\\..\\b", ".hidden", "x\n"])
def test_hostile_file_names_in_a_manifest_are_refused(tmp_path, model, name):
    from lightning_opt.export import manifest

    save_artifact(tmp_path / "a", model, architecture=ARCHITECTURE)
    said = json.loads((tmp_path / "a" / "manifest.json").read_text())
    said["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
    manifest._write(tmp_path / "a", said)
    with pytest.raises(UntrustedInputError, match="plain file"):
        load(tmp_path / "a", trusted_targets=[NAME])
    with pytest.raises(ValueError, match="plain file name"):
        add_to_manifest(save_artifact(tmp_path / "b", model, architecture=ARCHITECTURE), [name])


def test_links_and_pipes_are_refused(tmp_path, model):
    folder = save_artifact(tmp_path / "a", model, architecture=ARCHITECTURE)
    (folder / "recipe.json").rename(tmp_path / "elsewhere.json")
    (folder / "recipe.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UntrustedInputError, match="link"):
        load(folder, trusted_targets=[NAME])
    (folder / "recipe.json").unlink()
    os.mkfifo(folder / "recipe.json")
    with pytest.raises(UntrustedInputError, match="regular"):
        load(folder, trusted_targets=[NAME])


def test_other_files_are_left_alone_and_can_be_added(tmp_path, model):
    tmp_path.joinpath("model.onnx").write_bytes(b"graph")
    save_artifact(tmp_path, model, architecture=ARCHITECTURE, meta={"acc": 0.5})
    assert tmp_path.joinpath("model.onnx").read_bytes() == b"graph"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "model.onnx"])
    add_to_manifest(tmp_path, ["model.onnx"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"]["model.onnx"] == {"sha256": hashlib.sha256(b"graph").hexdigest(), "size_bytes": 5}
    assert manifest["meta"] == {"acc": 0.5}
    assert manifest["schema_version"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(verify_artifact(tmp_path)) == {*FILES, "model.onnx"} - {"manifest.json"}
    load(tmp_path, trusted_targets=[NAME])
    tmp_path.joinpath("model.onnx").write_bytes(b"other")
    with pytest.raises(StorageError, match=r"model\.onnx"):
        load(tmp_path, trusted_targets=[NAME])
    tmp_path.joinpath("model.onnx").unlink()  # removed to save space
    load(tmp_path, trusted_targets=[NAME])


def test_a_disk_that_fills_up_leaves_no_manifest_that_vouches_for_a_mixture(tmp_path, model, monkeypatch):
    from lightning_opt.export import files

    save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    nn.init.ones_(model.shift)
    real = os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2].startswith(".recipe.json"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_artifact(tmp_path, model, architecture=ARCHITECTURE)
    monkeypatch.undo()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(ConfigError, match="no artifact"):
        load(tmp_path, trusted_targets=[NAME])


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"_target_": 3},
        {"_target_": NAME, "depth": torch.ones(1)},
        {"_target_": NAME, "_args_": [1]},
        {"x": object()},
    ],
)
def test_an_architecture_that_could_not_be_loaded_again_is_refused_before_anything_is_written(
    tmp_path, model, architecture
):
    with pytest.raises(ValueError, match="architecture"):
        save_artifact(tmp_path / "new", model, architecture=architecture)
    assert not (tmp_path / "new").exists()


def test_pretrained_and_hub_sources_are_not_read_again(tmp_path):
    transformers = pytest.importorskip("transformers")
    from lightning_opt.models import encoder_classifier

    config = {
        "model_type": "bert",
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    settings = transformers.AutoConfig.for_model(**config)
    transformers.AutoModel.from_config(settings).save_pretrained(tmp_path / "source")
    arguments = {"source": str(tmp_path / "source"), "num_outputs": 2, "config": None, "num_layers": 2}
    net = encoder_classifier(**arguments)
    target = {"_target_": "lightning_opt.models.encoder_classifier"}
    save_artifact(tmp_path / "a", net, architecture={**target, **arguments})
    shutil.rmtree(tmp_path / "source")
    loaded = load(tmp_path / "a")
    assert same_state(loaded, net)
    assert loaded.backbone.config.num_hidden_layers == 2

    save_artifact(tmp_path / "b", net, architecture={"_target_": NAME, "pretrained": True})
    assert json.loads((tmp_path / "b" / "architecture.json").read_text())["pretrained"] is False


def test_the_room_is_light():
    heavy = ("lightning", "hydra", "torchmetrics", "onnx", "openvino", "transformers")
    code = f"import sys, lightning_opt.export; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"
