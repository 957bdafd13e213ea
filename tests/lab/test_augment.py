import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resect.lab.augment import apply, augment, draw


def reference(images, shift, rows, columns, flipped):
    """One image, one pixel at a time."""
    count, _, height, width = images.shape
    out = torch.zeros_like(images)
    for n in range(count):
        for y in range(height):
            for x in range(width):
                source_y = y + int(rows[n]) - shift
                source_x = (width - 1 - x if flipped[n] else x) + int(columns[n]) - shift
                if 0 <= source_y < height and 0 <= source_x < width:
                    out[n, :, y, x] = images[n, :, source_y, source_x]
    return out


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 4),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    shift=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference_pixel_by_pixel(count, channels, height, width, shift, flip, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (count, channels, height, width), generator=generator).to(torch.uint8)
    choices = draw(count, shift, flip, generator)
    result = apply(images, shift, *choices)
    assert result.dtype == torch.uint8
    assert torch.equal(result, reference(images, shift, *choices))


def test_draws_are_uniform_independent_and_repeatable():
    rows, columns, flipped = draw(6000, 1, True, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows * 6 + columns * 2 + flipped, minlength=18)
    assert ((counts - 6000 / 18).abs() < 100).all()  # standard deviation 18
    images = torch.randint(0, 256, (50, 1, 8, 8)).to(torch.uint8)
    once, again, other = (
        augment(images, shift=2, flip=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_off_is_the_batch_itself():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert augment(images, generator=torch.Generator()) is images
