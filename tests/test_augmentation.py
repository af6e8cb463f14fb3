"""augmentation: strong augmentation that depends on the image's own numbers alone, and stays within
the range.
"""

import pytest
import torch

from minidiff.counted import AUGMENT, generators
from minidiff.data.augmentation import vary


@pytest.fixture
def batch():
    pictures = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(pictures, (48, 48), mode="bilinear") * 2 - 1


def test_an_image_depends_on_its_own_generator_alone(batch):
    whole = vary(batch, generators(3, range(12), AUGMENT))
    assert torch.equal(whole, vary(batch, generators(3, range(12), AUGMENT)))
    for k in (0, 5, 11):
        assert torch.allclose(vary(batch[k : k + 1], generators(3, [k], AUGMENT))[0], whole[k],
                              atol=1e-6), k
    other = vary(batch, generators(4, range(12), AUGMENT))
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(whole, other))


def test_it_stays_in_the_range_and_is_strong(batch):
    black_and_white = torch.where(batch > 0, 1.0, -1.0)
    for x in (batch, black_and_white):
        y = vary(x, generators(0, range(12), AUGMENT))
        assert y.shape == x.shape and y.min() >= -1 and y.max() <= 1 and y.isfinite().all()
    assert all((a - b).abs().mean() > 0.02
               for a, b in zip(batch, vary(batch, generators(0, range(12), AUGMENT))))


def test_strength_nought_changes_nothing_and_little_changes_little(batch):
    assert torch.equal(vary(batch, generators(0, range(12), AUGMENT), strength=0), batch)
    little, much = ((vary(batch, generators(0, range(12), AUGMENT),
                          strength=s) - batch).abs().mean() for s in (0.1, 1.0))
    assert 0 < 3 * little < much
    assert vary(batch[:0], []).shape == (0, 1, 48, 48)
