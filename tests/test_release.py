import pytest
import torch
from test_memorisation import HELDOUT, TRAIN, near_copies, phantoms

from minidiff.errors import InputError
from minidiff.evaluation.metrics.pairwise import equalised, pixel_spaces
from minidiff.evaluation.metrics.release import ReleaseFilter


def spaces(images):
    return {"pixels": equalised(images)}


FILTER = ReleaseFilter(spaces(TRAIN), spaces(HELDOUT))


def test_near_copies_stay_and_their_original_is_named():
    release = FILTER(spaces(torch.cat([near_copies(TRAIN[30:50], 1), TRAIN[60:62]])))
    assert not release.keep.any() and release.nearest.tolist() == [*range(30, 50), 60, 61]
    assert release.reasons[0].startswith("a near-copy of training image 30 (pixels: 0.")
    assert release.relative[-1] < 1e-6 and (release.relative < 1).all()


def test_new_images_leave_but_for_1_percent_and_some_of_the_smooth():
    release = FILTER(spaces(phantoms(300, 50)))
    assert release.keep.float().mean() > 0.96
    assert [bool(reason) for reason in release.reasons] == (~release.keep).tolist()
    # see the module's docstring
    assert 0.8 < FILTER(spaces(phantoms(300, 51, noise=0.0))).keep.float().mean() < 0.95


def test_it_judges_an_image_the_same_alone_and_in_a_batch():
    made = torch.cat([phantoms(5, 52), near_copies(TRAIN[:5], 53)])
    whole, single = FILTER(spaces(made)), [FILTER(spaces(made[k : k + 1])) for k in range(10)]
    assert whole.keep.tolist() == [s.keep.item() for s in single] and whole.reasons == [
        s.reasons[0] for s in single]


def test_a_mirrored_copy_is_found_in_the_second_space_and_named():
    names = [f"patient-{k}.png" for k in range(60)]
    both = ReleaseFilter(pixel_spaces(TRAIN[:60]), pixel_spaces(HELDOUT[:100]), names)
    release = both(pixel_spaces(torch.cat([TRAIN[7:10].flip(-1), phantoms(3, 54)])))
    assert not release.keep[:3].any() and release.nearest[:3].tolist() == [7, 8, 9]
    assert release.reasons[0].startswith("a near-copy of patient-7.png (pixels, moved: ")
    assert both(spaces(TRAIN[:1])).keep.tolist() == [False]              # asked in one space alone


def test_a_yardstick_that_is_too_small_is_refused():
    for train, held_out in ((200, 99), (50, 120)):
        with pytest.raises(InputError, match=f"with {held_out} held-out and {train} training "
                           f"images: needed are 100 and 51"):
            ReleaseFilter(spaces(TRAIN[:train]), spaces(HELDOUT[:held_out]))
