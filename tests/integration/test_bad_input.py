"""Bad weights, bad teachers, bad files and bad intentions: one clear error, the right exit code, nothing lost."""

import io
import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from warm import Started, wait_for, warm

from lightning_opt.checkpointing.files import write_durably
from lightning_opt.checkpointing.io import DurableCheckpointIO, verify
from lightning_opt.data.packages import MNIST_5K_CSV
from lightning_opt.export.manifest import read_manifest, write_manifest
from lightning_opt.reporting import read_record

MLP = ["data=synthetic_images", "data.num_train=64", "data.num_eval=16", "data.size=8", "data.batch_size=8"]
MLP += ["model=mlp", "model.input_shape=[3,8,8]", "model.hidden=[8]"]
QUICK = ["trainer.max_epochs=4", "benchmark=false", "export=false"]
FRAIL = '''
import torch


class Frail(torch.nn.Module):
    """Answers NaN from its 20th training step on; large enough for a checkpoint to be cut off."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 256), torch.nn.Linear(256, 10))
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        return self.layers(x) * (float("nan") if self.training and self.steps > 19 else 1.0)
'''
FRAIL_RUN = [*MLP, "~model.input_shape", "~model.hidden", "model._target_=frail.Frail", *QUICK]


def assert_ended(out, code, *says):
    assert out.returncode == code, out.stderr
    assert "Traceback" not in out.stderr
    error = out.stderr[out.stderr.index("lightning-opt: ") :].strip().splitlines()
    assert len(error) <= 3, out.stderr
    for text in says:
        assert text in "\n".join(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "frail.py").write_text(FRAIL)
    return folder


@pytest.fixture(scope="module")
def frail(place, cache):
    """A run that met NaN in its third epoch, and how it ended."""
    out = warm(*FRAIL_RUN, f"run_dir={place / 'frail'}", cwd=place, cache=cache)
    return place / "frail", out


@pytest.fixture
def again(frail, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(frail[0], folder)
    return folder


@pytest.fixture(scope="module")
def three(place, cache):
    """A finished run with three classes."""
    words = [*MLP, "data.num_classes=3", "task.num_outputs=3", *QUICK, f"run_dir={place / 'three'}"]
    out = warm(*words, cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    return place / "three"


def test_nan_ends_the_run_and_is_in_no_checkpoint(frail):
    folder, out = frail
    assert_ended(out, 5, "step 19", "loss")
    assert read_record(folder)["status"] == "failed"
    for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
        checkpoint = DurableCheckpointIO().load_checkpoint(folder / "checkpoints" / name)
        assert 0 < checkpoint["global_step"] <= 16
        assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_learning_rate_that_explodes_is_stopped(place, cache, tmp_path):
    out = warm(*MLP, *QUICK, "optimizer.lr=1e30", f"run_dir={tmp_path / 'run'}", cwd=tmp_path, cache=cache)
    assert_ended(out, 5, "is not finite")
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        state = DurableCheckpointIO().load_checkpoint(path)["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())


def test_nan_can_be_skipped(place, cache, tmp_path):
    """`callbacks.non_finite.policy=skip` leaves the steps out until its limit."""
    words = [*FRAIL_RUN, "callbacks.non_finite.policy=skip", "callbacks.non_finite.limit=3"]
    out = warm(*words, f"run_dir={tmp_path / 'run'}", cwd=place, cache=cache)
    assert_ended(out, 5, "after 3 times skip")
    assert out.stderr.count("the step is left out") == 3


def test_full_disk_keeps_what_was_there(again, place, cache):
    """Files may not grow beyond 100 kB: the next checkpoint cannot be written, the ones before it stay good."""
    before = (again / "checkpoints" / "last.ckpt").read_bytes()
    assert len(before) > 200_000
    limits = {resource.RLIMIT_FSIZE: 100_000}
    out = warm(*FRAIL_RUN, f"run_dir={again}", cwd=place, cache=cache, limits=limits)
    assert_ended(out, 4, ".ckpt", "bytes needed")
    assert (again / "checkpoints" / "last.ckpt").read_bytes() == before
    for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
        verify(again / "checkpoints" / name)
    assert not list((again / "checkpoints").glob(".*"))


def test_damaged_data_file_is_named(place, tmp_path):
    archive = tmp_path / "cache" / "packages" / MNIST_5K_CSV.package.filename
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"\x00" * 1000)
    words = ["+experiment=supervised", "model=cnn_small", f"run_dir={tmp_path / 'run'}"]
    out = warm(*words, cwd=tmp_path, cache=tmp_path / "cache")
    assert_ended(out, 4, archive.name, "sha256")
    assert archive.read_bytes() == b"\x00" * 1000


def test_teacher_of_other_classes_is_refused_before_anything_is_trained(three, place, cache):
    words = [*MLP, *QUICK, "teacher=run", f"teacher.run_dir={three}", "loss=kd", "baseline=true"]
    out = warm(*words, f"run_dir={place / 'classes'}", cwd=place, cache=cache)
    assert_ended(out, 2, "(2, 3)", "(2, 10)", "teacher")
    assert not (place / "classes" / "baseline").exists()


def test_teacher_of_other_tokens_is_refused_before_anything_is_trained(place, cache):
    text = ["data=synthetic_tokens", "data.num_train=64", "data.num_eval=16", "task.num_outputs=2", *QUICK]
    text += ["model=bag_of_embeddings", "model.dim=4"]
    narrow = [*text, "model.vocab_size=50", "data.vocab_size=50", f"run_dir={place / 'narrow'}"]
    out = warm(*narrow, cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    words = [*text, "model.vocab_size=1000", "teacher=run", f"teacher.run_dir={place / 'narrow'}", "loss=kd"]
    out = warm(*words, "baseline=true", f"run_dir={place / 'tokens'}", cwd=place, cache=cache)
    assert_ended(out, 2, "50 tokens", "1000", "teacher")
    assert not (place / "tokens" / "baseline").exists()


def test_tap_that_matches_nothing_is_refused_before_anything_is_trained(three, place, cache):
    words = [*MLP, "data.num_classes=3", "task.num_outputs=3", *QUICK, "baseline=true"]
    words += ["teacher=run", f"teacher.run_dir={three}", "loss=fitnets", "~loss.terms.fitnets.loss.layers"]
    words += ["+loss.terms.fitnets.loss.layers={layer.0: layers.0}", f"run_dir={place / 'taps'}"]
    out = warm(*words, cwd=place, cache=cache)
    assert_ended(out, 2, "layer.0", "layers.0")
    assert not (place / "taps" / "baseline").exists()


def test_student_larger_than_its_teacher_is_a_warning(three, place, cache):
    words = [*MLP, "data.num_classes=3", "task.num_outputs=3", *QUICK, "model.hidden=[32]"]
    words += ["teacher=run", f"teacher.run_dir={three}", "loss=kd", f"run_dir={place / 'larger'}"]
    out = warm(*words, cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("is larger than its teacher") == 1


def test_folder_in_use_is_refused(place, cache, tmp_path):
    words = [*MLP, *QUICK, "trainer.max_epochs=500", f"run_dir={tmp_path / 'run'}"]
    first = Started(words, cwd=tmp_path, cache=cache)
    try:
        wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").exists, process=first)
        assert_ended(warm(*words, cwd=tmp_path, cache=cache), 2, "run_dir", "in use")
        assert first.is_running
    finally:
        first.process.kill()
        first.end()


class Touch:
    """Makes a file when it is unpickled: what an attacker would do, harmless here."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _zip(evil, honest):
    file = io.BytesIO()
    torch.save(evil, file)
    return file.getvalue()


def _legacy(evil, honest):
    file = io.BytesIO()
    torch.save(evil, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _nested(evil, honest):
    file = io.BytesIO()
    torch.save({**honest, "callbacks": {**honest["callbacks"], "more": [{"deep": evil}]}}, file)
    return file.getvalue()


def _plain_pickle(evil, honest):
    return pickle.dumps(evil, protocol=2)


@pytest.mark.parametrize("make", [_zip, _legacy, _nested, _plain_pickle])
@pytest.mark.parametrize("vouched", [True, False], ids=["manifest_fits", "manifest_does_not"])
def test_malicious_checkpoint_runs_nothing(make, vouched, again, place, cache, tmp_path):
    """With a manifest that vouches for it it is refused for what it is; without, it is a damaged file."""
    sentinel, folder = tmp_path / "sentinel", again / "checkpoints"
    last = folder / "last.ckpt"
    content = make(Touch(sentinel), torch.load(last, weights_only=True))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(content), weights_only=True)
    for path in folder.glob("*.ckpt"):
        if vouched:
            write_durably(path, lambda sink: sink.write(content), step=16, epoch=2)
        else:
            path.write_bytes(content)
    out = warm(*FRAIL_RUN, f"run_dir={again}", cwd=place, cache=cache)
    assert_ended(out, 8 if vouched else 3, "ckpt")
    assert not sentinel.exists()


def test_sentinel_would_appear_if_the_code_were_run(tmp_path):
    """The attack of the test above is a real one."""
    pickle.loads(pickle.dumps(Touch(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("where", ["task", "data", "architecture"])
def test_malicious_run_folder_is_not_built(where, three, cache, tmp_path):
    folder, sentinel = tmp_path / "run", tmp_path / "sentinel"
    shutil.copytree(three, folder)
    evil = {"_target_": "os.system", "command": f"touch {sentinel}"}
    if where == "architecture":
        artifact = folder / "artifact"
        (artifact / "architecture.json").write_text(json.dumps(evil))
        manifest = read_manifest(artifact)
        write_manifest(artifact, list(manifest["files"]), meta=manifest["meta"])
    else:
        path = folder / ".hydra" / "resolved.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), where: evil}))
    out = warm("evaluate", f"run_dir={folder}", cwd=tmp_path, cache=cache)
    assert_ended(out, 8, "os.system", "trusted_targets")
    assert not sentinel.exists()
