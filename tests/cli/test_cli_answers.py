"""Stored answers: about the student's samples, or about versions of them that only the teacher sees."""

import pytest
import torch

from lightning_opt.cli import answers
from lightning_opt.cli.answers import find_cache
from lightning_opt.cli.teachers import find_teachers
from lightning_opt.config.build import build_task
from lightning_opt.config.build_fit import build_data
from lightning_opt.errors import ConfigError


def test_stored_answers_are_found_again_and_replace_the_teacher(distill):
    values = distill("teacher.cache.average_versions=null")
    found = find_teachers(values)
    task, data = build_task(values), build_data(values)
    cache = find_cache(values, found.teachers, data, task)
    batch = next(iter(data.train_dataloader()))
    want = found.teachers[0](batch[0]).logits
    torch.testing.assert_close(cache.read(batch[2], epoch=0), want, atol=1e-2, rtol=1e-2)
    assert find_cache(values, found.teachers, build_data(values), task).folder == cache.folder


def test_stored_answers_give_way_to_losses_that_read_features(distill, caplog, monkeypatch):
    """The distill experiment stores answers; another loss of the user's must not need to know that."""
    monkeypatch.setattr(answers.log, "propagate", True)
    values = distill("loss=[kd,similarity_preserving]")
    found = find_teachers(values)
    assert find_cache(values, found.teachers, build_data(values), build_task(values)) is None
    assert "similarity_preserving reads the teacher's features" in caplog.text


def test_unseeded_augmentation_is_refused_by_the_cache(distill):
    values = distill("teacher.cache.average_versions=null")
    found = find_teachers(values)
    data = build_data(values)
    loader = data.train_dataloader()
    original = type(loader.dataset).__getitems__

    class Noisy(type(loader.dataset)):
        def __getitems__(self, keys):
            x, *rest = original(self, keys)
            return (x + torch.rand_like(x), *rest)

    data.splits.train.__class__ = Noisy
    with pytest.raises(ConfigError, match="not seeded"):
        find_cache(values, found.teachers, data, build_task(values))


def test_the_mean_answer_over_versions_that_the_student_never_sees(distill):
    values = distill("teacher.cache.average_versions=3")
    found, task, data = find_teachers(values), build_task(values), build_data(values)
    cache = find_cache(values, found.teachers, data, task)
    assert cache.versions == 1
    x, _, index = next(iter(data.train_dataloader()))
    assert torch.equal(x, data.splits.train.plain().__getitems__(index.tolist())[0])
    seen = build_data(
        {**values, "data": {**values["data"], **values["teacher"]["train"]["data"], "variants": 3, "seed": 0}}
    )
    shown = [seen.splits.train.__getitems__([(version, int(i)) for i in index])[0] for version in range(3)]
    assert not torch.equal(shown[0], shown[1])
    want = torch.stack([found.teachers[0](each).logits for each in shown]).mean(0)
    torch.testing.assert_close(cache.read(index, epoch=5), want, atol=1e-2, rtol=1e-2)
    plainly = find_cache(distill("teacher.cache.average_versions=null"), found.teachers, build_data(values), task)
    assert plainly.folder != cache.folder


@pytest.mark.parametrize(
    ("words", "what", "versions"),
    [
        (["data.augment={_target_: lightning_opt.data.RandomShift, pixels: 1}"], "the student's own samples change", 8),
        (["teacher.cache.data={augment: null}"], "the teacher's data have no versions", 1),
    ],
)
def test_without_versions_to_average_each_sample_has_its_answer(distill, words, what, versions, caplog, monkeypatch):
    monkeypatch.setattr(answers.log, "propagate", True)
    values = distill("teacher.cache.average_versions=2", *words)
    found, data = find_teachers(values), build_data(values)
    cache = find_cache(values, found.teachers, data, build_task(values))
    assert what in caplog.text
    assert cache.versions == versions
    batch = next(iter(data.train_dataloader()))
    want = found.teachers[0](batch[0]).logits
    torch.testing.assert_close(cache.read(batch[2], epoch=0), want, atol=1e-2, rtol=1e-2)


def test_versions_of_other_samples_are_refused(distill):
    other = "{val_fraction: 0.3, augment: {_target_: lightning_opt.data.RandomNoise, std: 1}}"
    values = distill("teacher.cache.average_versions=2", f"teacher.cache.data={other}")
    found = find_teachers(values)
    with pytest.raises(ConfigError, match="training samples"):
        find_cache(values, found.teachers, build_data(values), build_task(values))
