import numpy as np
import pytest
import torch

from lightning_opt.data.augment import (
    Compose,
    Normalize,
    RandomAffine,
    RandomErasing,
    RandomFlip,
    RandomNoise,
    RandomScale,
    RandomShift,
)
from lightning_opt.data.randomness import Draws

IMAGES = torch.rand(64, 3, 12, 10, generator=torch.Generator().manual_seed(0)) + 0.1
SIGNALS = torch.rand(64, 1, 20, generator=torch.Generator().manual_seed(1)) + 0.1

ALL = [
    RandomShift(2),
    RandomFlip(),
    RandomNoise(0.1),
    RandomScale(0.2),
    RandomErasing(),
    RandomAffine(),
    Compose([RandomShift(1), RandomNoise(0.1), RandomFlip()]),
]


def draws(batch, variant=0):
    return Draws.of(seed=0, variants=np.full(len(batch), variant), indices=np.arange(len(batch)))


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("data", [IMAGES, SIGNALS], ids=["images", "signals"])
def test_a_row_depends_on_itself_and_its_draws_only(transform, data):
    if isinstance(transform, RandomAffine) and data is SIGNALS:
        pytest.skip("images only")
    whole = transform(data, draws(data))
    assert whole.shape == data.shape
    assert not torch.equal(whole, data)
    for row in (0, 7, 63):
        alone = transform(data[[row]], Draws(draws(data).states[[row]]))
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=0)
    assert torch.equal(whole, transform(data, draws(data)))
    assert not torch.equal(whole, transform(data, draws(data, variant=1)))


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
def test_its_text_tells_it_apart(transform):
    assert " at 0x" not in repr(transform)
    assert len({repr(one) for one in [*ALL, RandomShift(3), RandomNoise(0.2)]}) == len(ALL) + 2


@pytest.mark.parametrize("data", [IMAGES, SIGNALS], ids=["images", "signals"])
def test_shift_moves_by_every_step_and_fills_with_zeros(data):
    seen = set()
    for row, shifted in zip(data, RandomShift(2)(data, draws(data)), strict=True):
        matches = [move for move in moves(data.ndim - 2) if torch.equal(moved(row, move), shifted)]
        assert len(matches) == 1
        seen.add(matches[0])
    if data.ndim == 3:
        assert seen == set(moves(1))
    else:
        assert {move[0] for move in seen} == {move[1] for move in seen} == set(range(-2, 3))


def moves(axes):
    steps = range(-2, 3)
    return [(a,) for a in steps] if axes == 1 else [(a, b) for a in steps for b in steps]


def moved(row, move):
    result = row.numpy()
    for axis, step in enumerate(move, start=1):
        result = np.roll(result, step, axis=axis)
        if step:
            edge = [slice(None)] * result.ndim
            edge[axis] = slice(0, step) if step > 0 else slice(step, None)
            result[tuple(edge)] = 0
    return torch.from_numpy(result)


def test_flip_mirrors_its_share():
    flipped = RandomFlip(0.25)(IMAGES, draws(IMAGES))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, IMAGES, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 5 <= sum(mirrored) <= 28  # 16 expected of 64; six deviations either way are 37


def test_noise_and_scale_have_the_stated_size():
    noise = RandomNoise(0.3)(IMAGES, draws(IMAGES)) - IMAGES
    assert abs(noise.std().item() - 0.3) < 0.01
    assert abs(noise.mean().item()) < 0.01
    factors = (RandomScale(0.2)(IMAGES, draws(IMAGES)) / IMAGES).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert 0.8 <= factors.min() < 0.85
    assert 1.15 < factors.max() <= 1.2


def test_erasing_sets_one_box_to_zero():
    erased = RandomErasing(size=0.5, probability=1.0)(IMAGES, draws(IMAGES)) == 0
    assert (erased.sum(dim=(1, 2, 3)) == 3 * 6 * 5).all()
    for mask in erased[:, 0]:
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        assert (len(rows), len(columns)) == (6, 5)
        assert rows[-1] - rows[0] == 5
        assert columns[-1] - columns[0] == 4
    share = (RandomErasing(size=0.5, probability=0.5)(IMAGES, draws(IMAGES)) == 0).flatten(1).any(dim=1)
    assert 12 <= share.sum() <= 52


class Fixed(Draws):
    """Draws that are all one number."""

    def __init__(self, value, rows):
        super().__init__(np.zeros(rows, dtype=np.uint64))
        object.__setattr__(self, "value", value)

    def uniform(self, count=1):
        return torch.full((len(self), count), self.value)


@pytest.mark.parametrize(("value", "turns"), [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_affine_turns_about_the_centre(value, turns):
    square = torch.rand(4, 2, 9, 9, generator=torch.Generator().manual_seed(2))
    turned = RandomAffine(degrees=90.0, scale=0.0)(square, Fixed(value, 4))
    choices = {k: torch.rot90(square, k, dims=(2, 3)) for k in (-1, 0, 1)}
    torch.testing.assert_close(turned, choices[turns], rtol=1e-4, atol=1e-5)


def test_affine_keeps_shapes_in_images_that_are_not_square():
    from scipy import ndimage

    image = torch.zeros(1, 1, 21, 41)
    image[0, 0, 6:15, 16:25] = 1.0
    image[0, 0, 8:11, 25:29] = 0.5
    turned = RandomAffine(degrees=45.0, scale=0.0)(image, Fixed(1.0, 1))
    expected = ndimage.rotate(image[0, 0].numpy(), 45.0, reshape=False, order=1)
    assert np.abs(turned[0, 0].numpy() - expected).max() < 1e-3


def test_affine_zooms():
    image = torch.zeros(1, 1, 40, 40)
    image[..., 15:25, 15:25] = 1.0
    assert RandomAffine(degrees=0.0, scale=0.5)(image, Fixed(1.0, 1)).sum().item() == pytest.approx(225, rel=0.1)
    assert RandomAffine(degrees=0.0, scale=0.5)(image, Fixed(0.0, 1)).sum().item() == pytest.approx(25, rel=0.1)


def test_normalize_is_the_usual_formula():
    torch.testing.assert_close(Normalize(0.5, 0.25)(IMAGES), (IMAGES - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RandomShift(0), "pixels"),
        (lambda: RandomFlip(1.5), "probability"),
        (lambda: RandomNoise(0.0), "std"),
        (lambda: RandomScale(0.0), "amount"),
        (lambda: RandomErasing(size=2.0), "size"),
        (lambda: RandomAffine(degrees=-1.0), "degrees"),
        (lambda: RandomAffine(scale=1.0), "scale"),
        (lambda: Normalize(0.0, 0.0), "std"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()
