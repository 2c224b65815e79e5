"""Stored answers are the teacher's answers, and data that cannot be replayed is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.losses import FixedWeights
from lightning_opt.losses.teachers import mix_probabilities
from lightning_opt.modules import Teacher, TeacherCache
from lightning_opt.modules.teacher_cache import cache_key, store
from lightning_opt.tasks import Example

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def teacher(seed=0, outputs=6):
    torch.manual_seed(seed)
    # batch norm counts its batches in a tensor without axes
    return Teacher(nn.Sequential(nn.Linear(4, outputs), nn.BatchNorm1d(outputs)))


def shifted(version, rows, versions=3):
    """Samples with three replayable versions."""
    return Example(inputs=X[list(rows)] + float(version % versions), labels=torch.zeros(len(rows), dtype=torch.long))


def made(folder, fetch=shifted, versions=3, teachers=None, **options):
    return store(
        folder,
        teachers or [teacher()],
        fetch=fetch,
        num_samples=20,
        versions=versions,
        weighting=FixedWeights(),
        mix=mix_probabilities,
        batch_size=8,
        **options,
    )


def test_full_answers_come_back_by_sample_and_version(tmp_path):
    cache = made(tmp_path / "c")
    index = torch.tensor([7, 0, 19])
    for epoch in range(5):
        want = teacher()(X[index] + epoch % 3).logits
        torch.testing.assert_close(cache.read(index, epoch=epoch), want, atol=5e-3, rtol=1e-3)
    again = TeacherCache(tmp_path / "c")
    assert torch.equal(again.read(index, epoch=1), cache.read(index, epoch=1))


def test_top_k_keeps_the_kept_and_the_mass_of_the_rest(tmp_path):
    cache = made(tmp_path / "c", outputs="top_k", k=2)
    index = torch.arange(20)
    want = teacher()(X).logits.softmax(-1)
    got = cache.read(index, epoch=0).exp()
    kept = want.topk(2, -1).indices
    torch.testing.assert_close(got.gather(-1, kept), want.gather(-1, kept), atol=2e-3, rtol=5e-3)
    torch.testing.assert_close(got.sum(-1), torch.ones(20), atol=5e-3, rtol=0)
    assert np.load(tmp_path / "c" / "indices.npy").dtype == np.uint16


def test_several_teachers_are_stored_as_one(tmp_path):
    both = [teacher(0), teacher(1)]
    cache = made(tmp_path / "c", teachers=both)
    want = (both[0](X).logits.softmax(-1) + both[1](X).logits.softmax(-1)) / 2
    torch.testing.assert_close(cache.read(torch.arange(20), epoch=0).softmax(-1), want, atol=2e-3, rtol=5e-3)


def test_unseeded_augmentation_is_refused(tmp_path):
    def random(version, rows):
        return Example(inputs=X[list(rows)] + torch.rand(1))

    with pytest.raises(ConfigError, match="not seeded"):
        made(tmp_path / "c", fetch=random)
    assert not (tmp_path / "c").exists()


def test_more_versions_than_stored_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.variants"):
        made(tmp_path / "c", fetch=lambda version, rows: shifted(version, rows, versions=100))


def test_key_changes_with_whatever_the_answers_depend_on():
    base = {"data_fingerprint": "a", "versions": 1, "spec": {"outputs": "full"}, "weighting": FixedWeights()}
    keys = {
        cache_key([teacher()], **base),
        cache_key([teacher(1)], **base),
        cache_key([teacher()], **{**base, "data_fingerprint": "b"}),
        cache_key([teacher()], **{**base, "versions": 2}),
        cache_key([teacher()], **{**base, "weighting": FixedWeights([1.0])}),
        cache_key([Teacher(teacher().model, dtype="bfloat16")], **base),
        cache_key([Teacher(teacher().model, channels_last=True)], **base),
    }
    assert len(keys) == 7
    assert cache_key([teacher()], **base) == cache_key([teacher()], **base)


def test_a_folder_that_is_no_cache_is_named(tmp_path):
    with pytest.raises(StorageError, match="not a teacher cache"):
        TeacherCache(tmp_path)


def test_an_unfinished_store_leaves_nothing_under_its_name(tmp_path):
    def breaks(version, rows):
        if version == 1:
            raise RuntimeError("killed")
        return shifted(version, rows)

    with pytest.raises(RuntimeError, match="killed"):
        made(tmp_path / "c", fetch=breaks)
    assert not (tmp_path / "c").exists()
