"""data.dataset: pixels in memory, augmentation image by image, and order by counting."""

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff.counted import order, seeded
from minidiff.data import images
from minidiff.data.augmentation import augment
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.pixels import to_float, to_uint8

CXR = Path(os.environ.get("MINIDIFF_CXR", Path(__file__).parents[2] / "shared" / "cxr"))


@pytest.fixture
def folder(tmp_path):
    """Eight grey images of 20 x 16, a gradient each, in metadata.csv rows 2 to 9."""
    for k in range(8):
        images.write(tmp_path / f"{k}.png",
                     np.linspace(k, 255 - k, 320).reshape(20, 16).astype(np.uint8))
    write_table(tmp_path / "metadata.csv",
                [{"file_name": f"{k}.png", "label": "ab"[k % 2]} for k in range(8)])
    return tmp_path


def generators(n: int) -> list[torch.Generator]:
    return [seeded(7, k) for k in range(n)]


# --- reading


def test_grey_is_kept_once_and_seen_thrice(folder):
    table, pixels = load_pixels(read_table(folder, split=False), 16)
    assert len(table) == 8 and pixels.shape == (8, 3, 16, 16) and pixels.dtype == torch.uint8
    assert pixels.untyped_storage().nbytes() == 8 * 16 * 16
    for k, row in enumerate(table.rows):
        assert np.array_equal(pixels[k].numpy(),
                              np.repeat(images.square(images.read(row["file"]), 16), 3, 0))


def test_one_colour_image_does_not_change_the_grey_ones(folder):
    _, grey = load_pixels(read_table(folder, split=False), 16)
    colour = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    images.write(folder / "3.png", colour)
    _, pixels = load_pixels(read_table(folder, split=False), 16)
    assert np.array_equal(pixels[3].numpy(), colour)
    assert torch.equal(pixels[[0, 1, 2, 4, 5, 6, 7]], grey[[0, 1, 2, 4, 5, 6, 7]])


def test_bad_images_are_named_with_their_rows(folder):
    (folder / "2.png").write_bytes(b"")
    (folder / "5.png").write_bytes((folder / "4.png").read_bytes()[:50])
    table = read_table(folder, split=False)
    with pytest.raises(InputError) as error:
        load_pixels(table, 16)
    message = str(error.value)
    assert message.startswith("2 of 8 images cannot be read (--skip-bad drops "
                              "them)") and "\n" not in message
    assert all(part in message
               for part in ("metadata.csv:4", "2.png", "0 bytes", "metadata.csv:7", "5.png"))


def test_skip_bad_drops_lists_and_counts_and_replaces_none(folder):
    (folder / "2.png").write_bytes(b"")
    table = read_table(folder, split=False)
    kept, pixels = load_pixels(table, 16, skip_bad=True)
    assert [row["file_name"] for row in kept.rows] == [f"{k}.png" for k in (0, 1, 3, 4, 5, 6, 7)]
    assert len(pixels) == 7 and (pixels.flatten(1).max(1).values > 200).all()
    assert "1 of 8 images could not be read and were dropped" in kept.notes[
        -1] and "2.png" in kept.notes[-1]
    assert len(table) == 8 and len(table.notes) == len(
        kept.notes) - 1 and kept.fingerprint != table.fingerprint


def test_skip_bad_says_so_on_stderr(folder, capsys):
    for k in (1, 2, 4, 6):
        (folder / f"{k}.png").write_bytes(b"x%d" % k)
    load_pixels(read_table(folder, split=False), 16, skip_bad=True)
    lines = capsys.readouterr().err.splitlines()
    named = ", ".join(str(folder / f"{k}.png") for k in (1, 2, 4))
    assert lines == [f"4 of 8 images cannot be read and are left out: {named} and 1 more"]


def test_skip_bad_with_nothing_left_is_refused(folder):
    for k in range(8):
        (folder / f"{k}.png").write_bytes(b"x%d" % k)
    with pytest.raises(InputError, match="8 of 8 images"):
        load_pixels(read_table(folder, split=False), 16, skip_bad=True)


def test_constant_image_is_noted(folder):
    images.write(folder / "6.png", np.full((9, 9), 3, np.uint8))
    table, _ = load_pixels(read_table(folder, split=False), 16)
    assert "1 image of one grey" in table.notes[-1] and "6.png" in table.notes[-1]


def test_no_rows_make_no_pixels(folder):
    _, pixels = load_pixels(read_table(folder, split=False).select(label="none"), 16)
    assert pixels.shape == (0, 3, 16, 16)


# --- ranges


def test_uint8_to_float_and_back_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


# --- augmentation


def blob(n: int = 64, x: float = 0.3, y: float = -0.2) -> torch.Tensor:
    """A smooth blob on grey, (1,1,n,n) in [-1,1], its centre at (x,y) in [-1,1]."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1
    return (1.4 * torch.exp(-((axis[None] - x) ** 2 + (axis[:, None] - y) ** 2) / 0.02)
            - 0.7)[None, None].float()


def test_an_image_depends_on_its_own_generator_alone():
    batch = torch.rand(6, 1, 32, 32, generator=seeded(1)) * 2 - 1
    whole = augment(batch, generators(6))
    for k in range(6):
        assert torch.equal(augment(batch[k : k + 1], [seeded(7, k)]), whole[k : k + 1])
    turned = augment(batch.flip(0), generators(6)[::-1])
    assert torch.equal(turned.flip(0), whole)


def test_augmentation_changes_neither_its_argument_nor_shape_and_range():
    batch = torch.rand(6, 3, 32, 32, generator=seeded(1)) * 2 - 1
    before = batch.clone()
    out = augment(batch, generators(6))
    assert torch.equal(batch, before) and out.shape == batch.shape and out.dtype == torch.float32
    assert out.abs().max() <= 1 and (out - batch).abs().mean() > 0.05


def test_strength_nought_is_the_identity_and_weaker_is_nearer():
    batch = blob().repeat(20, 1, 1, 1)
    moved = [(augment(batch, generators(20), s) - batch).abs().mean().item()
             for s in (0.0, 1e-6, 0.3, 1.0)]
    assert moved[0] == 0 and moved[1] < 1e-5 and moved[1] < moved[2] < moved[3]


def test_rotation_and_scale_keep_the_shape():
    """On the image (x, y) the result shows the map itself: a gain times a scaled rotation, never
    sheared.
    """
    axis = ((torch.arange(64) + 0.5) / 32 - 1) * 0.5
    image = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    out = augment(image.repeat(50, 1, 1, 1), generators(50))[:, :, 20:44, 20:44] * 64
    right, down = out.diff(dim=3).mean((2, 3)), out.diff(dim=2).mean((2, 3))
    assert torch.allclose(right[:, 0], down[:, 1],
                          atol=1e-3) and torch.allclose(right[:, 1], -down[:, 0], atol=1e-3)
    degrees = torch.rad2deg(torch.atan2(right[:, 1], right[:, 0])).abs()
    assert 4 < degrees.max() <= 5.01


def test_the_blob_moves_as_the_limits_allow_and_reaches_them():
    n = 400
    out = augment(blob().repeat(n, 1, 1, 1), generators(n))[:, 0].double()
    axis = (torch.arange(64, dtype=torch.float64) + 0.5) / 32 - 1
    mass = (out - out.flatten(1).min(1).values[:, None, None]).clamp(min=0) ** 2
    total = mass.sum((1, 2))
    x, y = (mass * axis).sum((1, 2)) / total - 0.3, (mass * axis[:, None]).sum((1, 2)) / total + 0.2
    # shift .04 of the side is .08 here; 5 degrees and 6 % move the centre at radius .36 by up to
    # .031 and .023
    reach = torch.stack([x, y]).abs().max(1).values
    assert (reach < 0.08 + 0.031 + 0.023).all() and (reach > 0.07).all()
    assert x.mean().abs() < 0.01 and y.mean().abs() < 0.01


def test_grey_level_moves_as_the_limits_allow_and_reaches_them():
    n = 400
    level = torch.full((n, 1, 8, 8), 0.5)
    out = augment(level, generators(n))[:, 0, 4, 4]
    assert out.min() >= 0.5 * 0.9 - 0.1 and out.max() <= 0.5 * 1.1 + 0.1
    assert out.min() < 0.37 and out.max() > 0.63


def test_never_flipped():
    """The heart stays on its side: the blob at the right of the picture stays at the right."""
    out = augment(blob(x=0.5).repeat(50, 1, 1, 1), generators(50))
    assert (out[..., 32:].amax((1, 2, 3)) > out[..., :32].amax((1, 2, 3)) + 0.5).all()


# --- counting


@pytest.mark.parametrize("n", [1, 7, 64])
def test_every_epoch_holds_each_index_once_in_another_order(n):
    epochs = [order(n, 3, range(e * n, e * n + n)) for e in range(6)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 5 or len(set(map(tuple, epochs))) == 6


def test_order_is_random_access_and_seeded():
    whole = order(50, 0, range(500))
    slots = np.random.default_rng(0).permutation(500).tolist()
    assert order(50, 0, slots) == [whole[s] for s in slots]
    assert order(50, 1, range(50)) != whole[:50] and order(51, 0, range(50)) != whole[:50]


def test_seeded_is_a_function_of_all_its_integers():
    keys = [(), (0,), (0, 0), (1, 0), (0, 1), (-1,), (2**40,), (2**40 + 2**33,), (1, 2, 3),
            (3, 2, 1)]
    draws = [tuple(torch.rand(4, generator=seeded(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.rand(4, generator=seeded(*key)).tolist()) for key in keys]


def test_seeded_is_the_same_on_every_machine():
    assert seeded(1, 2, 3).initial_seed() == 6520558355739401531


def test_seeded_neighbours_are_unrelated():
    draws = torch.tensor([torch.rand(1, generator=seeded(0, step)).item() for step in range(4000)])
    assert abs(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]) < 0.06
    counts = Counter((draws * 10).long().tolist())
    # five standard deviations of a binomial
    assert max(abs(n - 400) for n in counts.values()) < 5 * 19


def test_seeded_leaves_the_global_state_alone_and_is_cheap():
    state = torch.get_rng_state()
    start = time.process_time()  # others may be at work here
    for k in range(1000):
        seeded(0, k, 1, 2)
    assert (time.process_time() - start) / 1000 < 1e-4 and torch.equal(torch.get_rng_state(), state)


# --- real chest X-rays


@pytest.mark.skipif(not CXR.is_dir(), reason=f"no real chest X-rays at {CXR}; set MINIDIFF_CXR")
def test_cxr_becomes_grey_squares():
    table, pixels = load_pixels(read_table(CXR), 64)
    assert pixels.shape == (1124, 3, 64, 64) and pixels.untyped_storage().nbytes() == 1124 * 64 * 64
    assert (pixels[:, 0].flatten(1).float().std(1) > 10).all()


@pytest.mark.parametrize("n, grey, coloured", [(2, "auto", False), (20, "auto", True),
                                               (2, "no", True), (20, "yes", False)])
def test_a_few_colour_files_do_not_colour_all(tmp_path, n, grey, coloured):
    rng = np.random.default_rng(0)
    for k in range(40):
        images.write(tmp_path / "a" / f"{k:02d}.png",
                     rng.integers(0, 255, (3 if k < n else 1, 16, 16), dtype=np.uint8))
    table, pixels = load_pixels(read_table(tmp_path, split=False), 16, grey=grey)
    assert (pixels.stride(1) != 0) is coloured
    (note,) = [note for note in table.notes if "in colour" in note]
    assert note.startswith(f"{n} of 40 images are in colour") and ("left so" if coloured
                                                                   else "made grey") in note
