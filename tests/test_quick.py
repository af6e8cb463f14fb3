"""Near-copies stay, new images leave, and a yardstick that is too small is refused; the numbers of
a set stand in test_sample.py.
"""

import pytest
import torch
from test_memorisation import HELDOUT, TRAIN, near_copies, phantoms

from minidiff.data.dataset import Images
from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.evaluation.quick import Quick


def quick(train=TRAIN, held_out=HELDOUT):
    return Quick(*(Images(Table([{"label": "a", "patient": str(i)} for i in range(len(pixels))]),
                          pixels) for pixels in (train, held_out)))


WATCH = quick()


def test_near_copies_stay():
    assert WATCH.near_copies(torch.cat([near_copies(TRAIN[30:50], 1), TRAIN[60:62]])).all()


def test_new_images_leave_but_for_1_percent_and_some_of_the_smooth():
    assert WATCH.near_copies(phantoms(300, 50)).float().mean() < 0.04
    # see the module's docstring
    assert 0.05 < WATCH.near_copies(phantoms(300, 51, noise=0.0)).float().mean() < 0.2


def test_it_judges_an_image_the_same_alone_and_in_a_batch():
    made = torch.cat([phantoms(5, 52), near_copies(TRAIN[:5], 53)])
    single = [WATCH.near_copies(made[k : k + 1]).item() for k in range(10)]
    assert WATCH.near_copies(made).tolist() == single


def test_a_yardstick_that_is_too_small_is_refused():
    for train, held_out in ((200, 99), (50, 120)):
        with pytest.raises(InputError, match=f"with {held_out} held-out and {train} training "
                           f"images: needed are 100 and 51"):
            quick(TRAIN[:train], HELDOUT[:held_out]).near_limit  # noqa: B018


def test_a_floor_of_too_few_patients_is_infinite():
    held_out = Images(Table([{"label": "a", "patient": "1"}] * 40), HELDOUT[:40])
    train = Images(Table([{"label": "a", "patient": str(i)} for i in range(60)]), TRAIN[:60])
    assert Quick(train, held_out).floor(20, 20) == float("inf")


def test_of_many_held_out_images_some_are_looked_at(monkeypatch):
    """Every third where a third are enough; the whole matrix of distances would be held else."""
    monkeypatch.setattr("minidiff.evaluation.quick.ENOUGH", 40)
    watch, every_third = quick(), quick(held_out=HELDOUT[:120:3])
    real = watch.real
    assert len(real.held_out) == len(real.features) == len(watch.labels) == 40
    assert real.usual == every_third.real.usual and watch(TRAIN[:20], ["a"] * 20)["n_real"] == 40
