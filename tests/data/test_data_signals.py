import numpy as np
import pytest

from lightning_opt.data.signals import Mnist1d, generate_mnist1d


def test_it_is_the_published_set():
    """The package's own generator, seeded as published, sample by sample."""
    data = pytest.importorskip("mnist1d.data")
    state = np.random.get_state()
    try:
        args = data.get_dataset_args()
        args.num_samples = 1000
        theirs = data.make_dataset(args)
    finally:
        np.random.set_state(state)
    signals, classes = generate_mnist1d(1000, seed=42)
    assert np.array_equal(classes, np.concatenate([theirs["y"], theirs["y_test"]]))
    np.testing.assert_allclose(signals, np.concatenate([theirs["x"], theirs["x_test"]]), atol=1e-9)


def test_it_needs_and_changes_no_global_generator():
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    generate_mnist1d(100)
    assert np.random.rand() == expected


def test_sizes_classes_and_scale():
    module = Mnist1d()
    sizes = [len(part) for part in (module.splits.train, module.splits.val, module.splits.test)]
    assert sum(sizes[:2]) == 4000
    assert sizes[2] == 1000
    assert abs(sizes[1] - 500) <= 5
    signals, classes = generate_mnist1d(500)
    assert np.bincount(classes).tolist() == [50] * 10
    assert abs(signals.mean()) < 1e-12
    assert abs(signals.std() - 1) < 1e-12


def test_another_generator_seed_gives_other_signals():
    assert not np.allclose(generate_mnist1d(100, seed=1)[0], generate_mnist1d(100, seed=2)[0])


@pytest.mark.parametrize(
    ("argument", "value"), [("num_samples", 55), ("num_samples", 0), ("generator_seed", -1), ("val_fraction", 1.0)]
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        Mnist1d(**{argument: value})
