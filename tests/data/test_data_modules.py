import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.data import (
    ArrayFiles,
    Digits,
    Mnist1d,
    RandomNoise,
    RandomShift,
    SyntheticImages,
    SyntheticTokens,
    TextFiles,
)
from lightning_opt.data.vision import _installed_digits
from lightning_opt.errors import ConfigError

needs_digits = pytest.mark.skipif(_installed_digits() is None, reason="scikit-learn's digits are not installed")


@pytest.fixture
def make(request, tmp_path):
    def text(**kwargs):
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(
                "to be, or not to be: that is the question\n" * (20 if name == "a" else 3)
            )
        return TextFiles(train=[str(tmp_path / "a.txt")], val=[str(tmp_path / "b.txt")], context_length=8, **kwargs)

    def arrays(**kwargs):
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "data.npz", x=rng.random((120, 5)), y=np.arange(120) % 3)
        return ArrayFiles(path=tmp_path / "data.npz", **kwargs)

    makers = {
        "digits": Digits,
        "mnist1d": lambda **kwargs: Mnist1d(num_samples=300, **kwargs),
        "images": SyntheticImages,
        "tokens": SyntheticTokens,
        "text": text,
        "arrays": arrays,
    }
    return makers[request.param]


ALL = [pytest.param("digits", marks=needs_digits), "mnist1d", "images", "tokens", "text", "arrays"]
every = pytest.mark.parametrize("make", ALL, indirect=True)
augmentable = pytest.mark.parametrize("make", [ALL[0], "mnist1d", "images", "arrays"], indirect=True)


def flat(batch):
    return batch if isinstance(batch, dict) else dict(zip(("x", "labels", "index"), batch, strict=True))


@every
def test_loaders_give_every_sample_once(make):
    module = make(batch_size=8, eval_batch_size=10)
    module.prepare_data()
    module.setup()
    loaders = {"val": module.val_dataloader(), "test": module.test_dataloader()}
    for name, loader in loaders.items():
        index = torch.cat([flat(batch)["index"] for batch in loader])
        assert index.tolist() == list(range(len(getattr(module.splits, name))))
    index = torch.cat([flat(batch)["index"] for batch in module.train_dataloader()])
    assert len(index) == len(index.unique()) == len(module.splits.train) // 8 * 8


@every
def test_inputs_are_batches_without_labels_and_index(make):
    module = make(batch_size=4)
    module.setup()
    first = flat(module.splits.train.__getitems__([0, 1, 2]))
    example = module.example_inputs(batch_size=3)
    if isinstance(example, dict):
        assert set(example) == set(first) - {"labels", "index"}
        assert all(torch.equal(example[name], first[name]) for name in example)
    else:
        assert torch.equal(example, first["x"])
    rows = [len(next(iter(b.values())) if isinstance(b, dict) else b) for b in module.calibration_batches(3)]
    assert rows == [4, 4, 4]


@every
def test_labels_fit_the_number_of_outputs(make):
    module = make()
    labels = flat(next(iter(module.val_dataloader())))["labels"]
    labels = labels[labels != -100]
    assert labels.min() >= 0
    assert labels.max() < module.num_outputs


@every
def test_what_is_known_before_the_data_is_true(make):
    module = make()
    shape = getattr(module, "input_shape", None)
    example = module.example_inputs()
    if shape is not None:
        assert tuple(example.shape) == (1, *shape)
    if isinstance(example, dict):
        assert example["input_ids"].shape[1] <= module.sequence_length
        assert example["input_ids"].max() < module.vocab_size


@every
def test_fingerprints_ignore_how_samples_are_grouped(make):
    base = make().fingerprint()
    assert len(bytes.fromhex(base)) == 32
    assert make(batch_size=16, eval_batch_size=7, num_workers=1, seed=5).fingerprint() == base


@augmentable
def test_fingerprints_change_with_what_is_done_to_the_samples(make):
    found = [
        make(),
        make(augment=RandomNoise(0.1)),
        make(augment=RandomNoise(0.2)),
        make(augment=RandomNoise(0.1), variants=3),
        make(augment=RandomNoise(0.1), seed=1),
    ]
    assert len({module.fingerprint() for module in found}) == len(found)
    assert found[1].fingerprint() == make(augment=RandomNoise(0.1)).fingerprint()


@augmentable
def test_augmentation_changes_training_samples_only(make):
    plain, noisy = make(), make(augment=RandomNoise(0.1), variants=4)
    assert (plain.variants, noisy.variants) == (0, 4)
    assert not torch.equal(plain.splits.train[0][0], noisy.splits.train[0][0])
    for part in ("val", "test"):
        pairs = zip(getattr(plain, f"{part}_dataloader")(), getattr(noisy, f"{part}_dataloader")(), strict=True)
        assert all(torch.equal(one[0], other[0]) for one, other in pairs)
    torch.testing.assert_close(noisy.example_inputs(4), plain.example_inputs(4))
    torch.testing.assert_close(noisy.calibration_batches(1)[0], plain.calibration_batches(1)[0])


@augmentable
def test_the_split_does_not_depend_on_the_seed(make):
    one, other = make(seed=0), make(seed=1)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(one.splits, part).inputs, getattr(other.splits, part).inputs)
    order = [next(iter(module.train_dataloader()))[2].tolist() for module in (one, other)]
    assert order[0] != order[1]


@needs_digits
def test_digits_are_split_cleanly_and_normalised():
    module = Digits()
    parts = [module.splits.train, module.splits.val, module.splits.test]
    assert sum(len(part) for part in parts) == 1797
    images = [{x.numpy().tobytes() for x in part.inputs} for part in parts]
    assert len(set.union(*images)) == sum(len(some) for some in images)
    for part in parts:
        counts = torch.bincount(part.targets, minlength=10)
        assert counts.max() - counts.min() <= 0.06 * len(part) / 10 + 3
    pixels = torch.cat([part.inputs for part in parts])
    assert abs(pixels.mean().item()) < 0.01
    assert abs(pixels.std().item() - 1) < 0.01


@needs_digits
def test_digits_are_those_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    images, classes = Digits().images()
    assert np.array_equal(images.numpy()[:, 0] * 16, theirs.images.astype(np.float32))
    assert np.array_equal(classes.numpy(), theirs.target)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -3),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("eval_batch_size", 0),
        ("num_workers", -1),
        ("seed", -1),
        ("variants", 0),
        ("val_fraction", 1.5),
        ("split_seed", -1),
    ],
)
def test_bad_arguments_are_named_with_their_value(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*{value}"):
        Digits(**{argument: value})


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ConfigError, match=r"data\.batch_size=1000.*256 training samples"):
        SyntheticImages(batch_size=1000).train_dataloader()


def test_a_synthetic_class_can_be_learnt():
    """A nearest-centre rule on the training images tells the test images apart."""
    module = SyntheticImages(num_classes=4, channels=1, size=4)
    train, test = module.splits.train, module.splits.test
    centres = torch.stack([train.inputs[train.targets == c].mean(dim=0) for c in range(4)])
    nearest = torch.cdist(test.inputs.flatten(1), centres.flatten(1)).argmin(dim=1)
    assert (nearest == test.targets).float().mean() > 0.9


def test_shards_of_a_trainer_cover_the_data(tmp_path):
    class Seen(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(192, 10)
            self.batches = []

        def training_step(self, batch, _):
            self.batches.append(batch[2].tolist())
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Seen()
    data = SyntheticImages(num_train=24, num_eval=8, size=8, batch_size=8, augment=RandomShift(1))
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert len(module.batches) == 6
    for epoch in (module.batches[:3], module.batches[3:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(24))


def test_names_are_listed_and_fetching_needs_no_torch():
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    code = (
        "import json, sys, lightning_opt.data.fetch; print(json.dumps(sorted({'torch', 'lightning'} & {*sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    import lightning_opt.data as room

    assert all(getattr(room, name) is not None for name in room.__all__)
    assert set(room.__all__) == set(room._MODULE_OF)
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = room.Nonsense
