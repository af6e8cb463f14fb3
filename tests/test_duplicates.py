import io

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import pixels
from minidiff.data import duplicates, phantom
from minidiff.data.dataset import load_pixels
from minidiff.data.duplicates import by_patient, exact_duplicates, near_duplicates
from minidiff.data.table import read_table

SIZE = 64


def phantoms(n, size=SIZE):
    """One image a patient: two images of one phantom patient are one drawing, moved."""
    found, seen, k = [], set(), 0
    while len(found) < n:
        p = phantom.phantom(4, k, size)
        k += 1
        if p.row["patient"] not in seen:
            seen.add(p.row["patient"])
            found.append(torch.from_numpy(p.image))
    return torch.stack(found)[:, None].expand(-1, 3, -1, -1)


def each(change):
    def images(x, seed=0):
        rng = np.random.default_rng(seed)
        return torch.stack([torch.from_numpy(np.array(change(Image.fromarray(one.numpy()), rng)))
                            for one in x[:, 0]])[:, None].expand(-1, 3, -1, -1)
    return images


def compressed(image, rng):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return Image.open(file)


def cropped(image, rng):
    side = image.width
    kept = round(0.95 * side)
    left, top = rng.integers(0, side - kept + 1, 2)
    return image.resize((side, side), Image.Resampling.BICUBIC,
                        (left, top, left + kept, top + kept))


COPIES = {
    "flipped": lambda x: x.flip(-1),
    "compressed": each(compressed),
    "cropped": each(cropped),
    "brightened": each(lambda image, rng: image.point(lambda v: min(255, 1.1 * v + 10))),
}


def found(x, copies):
    """(share of copies found, share of reported pairs that are true): pair i, i + n."""
    pairs = near_duplicates(torch.cat([x, copies]))
    true = {(i, j) for i, j, _ in pairs if j == i + len(x)}
    return len(true) / len(x), len(true) / max(1, len(pairs))


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_phantoms_are_found(kind):
    x = phantoms(40, 96)
    recall, precision = found(x, COPIES[kind](x))
    assert recall >= 0.95 and precision >= 0.99


def test_distances_and_order():
    x = phantoms(40)
    made = near_duplicates(torch.cat([x, x[3:4], COPIES["cropped"](x[5:6])]))
    assert [(i, j) for i, j, _ in made] == [(3, 40),
                                            (5, 41)] and made[0][2] < 1e-6 < made[1][2] < 0.04
    assert near_duplicates(x) == [] == near_duplicates(x[:0]) == near_duplicates(x[:1])
    assert near_duplicates(x[:2].flip(0).repeat(2, 1, 1, 1))[0][:2] == (0, 2)


def test_the_answer_does_not_depend_on_the_order_of_the_images():
    x = torch.cat([phantoms(30), COPIES["cropped"](phantoms(30))[:10]])
    turn = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    pairs = {(i, j) for i, j, _ in near_duplicates(x)}
    assert {tuple(sorted((int(turn[i]), int(turn[j]))))
            for i, j, _ in near_duplicates(x[turn])} == pairs
    assert len(pairs) == 10


def test_exact_copies():
    x = torch.cat([phantoms(4), phantoms(4)[1:3], phantoms(4)[1:2],
                   torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)])
    assert exact_duplicates(x) == [(1, 4, 0.0), (2, 5, 0.0), (1, 6, 0.0), (7, 8, 0.0)]
    x = x.clone()
    x[4, 0, 0, 0] += 1
    assert exact_duplicates(x) == [(2, 5, 0.0), (1, 6, 0.0), (7, 8, 0.0)]
    # of one grey: there is no detail to compare
    assert (7, 8) not in {(i, j) for i, j, _ in near_duplicates(x)}


def test_by_patient():
    pairs = [(0, 1, 0.0), (1, 2, 0.01), (0, 2, 0.02), (4, 5, 0.0)]
    assert by_patient(pairs, ["a", "a", "b", "c", "d", "d"]) == {
        "pairs": 4, "surplus": 3, "across_patients": [(1, 2, 0.01), (0, 2, 0.02)]}
    assert by_patient([], ["a"]) == {"pairs": 0, "surplus": 0, "across_patients": []}


def test_what_is_there_twice_among_real_x_rays(cxr):
    """Four pairs, each looked at: the same picture. Other pictures of one patient are not reported,
    however alike.
    """
    read = [load_pixels(read_table(folder, check=False), 128) for folder in (cxr, cxr / "external")]
    names = [row["file_name"].split("/")[-1] for table, _ in read for row in table.rows]
    pairs = near_duplicates(torch.cat([pixels for _, pixels in read]))
    assert {frozenset((names[i].split(".")[0][:12], names[j].split(".")[0][:12]))
            for i, j, _ in pairs} == {frozenset(pair) for pair in (
                ("00002658_001", "00002658_002"), ("COVID-00033", "COVID-00037"),
                ("9C34AF49-E58", "COVID-00022"), ("E63574A7-418", "F4341CE7-73C"))}


def test_the_bound_of_many_images_loses_no_pair_and_spares_most_products(monkeypatch):
    """With the bound from the first image on: the same pairs and distances, the same candidates."""
    x = phantoms(220, 96)
    x = torch.cat([x, *(change(x)[:20] for change in COPIES.values())])[:, :1].contiguous()
    whole, pairs = near_duplicates(x), [p for _, p, _ in duplicates._candidates(x)]
    monkeypatch.setattr(duplicates, "FILTERED", 0)
    assert near_duplicates(x) == whole and len(whole) >= 80
    assert torch.equal(torch.cat([p for _, p, _ in duplicates._candidates(x)]), torch.cat(pairs))
    hashes = duplicates._hash(duplicates._waves(96) @ x[:, 0].float() @ duplicates._waves(96).T)
    hashes = duplicates._special(hashes)(hashes)
    leading = duplicates._leading(hashes)
    bound, true = leading @ leading.T, hashes @ hashes.T
    assert (bound > true - 1e-5).all() and (bound > duplicates.ALIKE).float().mean() < 0.1


def test_versions_are_hashes_of_moved_images():
    x, starts = phantoms(3, 96)[:, :1].float(), duplicates._starts()[:19]
    waves = duplicates._waves(96)
    slow = torch.stack([duplicates._hash(waves @ duplicates._warp(
        x, start.expand(3, 2, 3))[:, 0] @ waves.T) for start in starts])
    torch.testing.assert_close(duplicates._versions(x, starts), slow, atol=1e-5, rtol=0)


def test_many_images_are_bytes_and_lie_in_a_file(monkeypatch):
    x = phantoms(30, 128)
    x = torch.cat([x, COPIES["cropped"](x)[:10]])
    whole = [(i, j) for i, j, _ in near_duplicates(x)]
    monkeypatch.setattr(duplicates, "FILTERED", 0)
    monkeypatch.setattr(pixels, "SCRATCH", 0)
    assert isinstance(pixels.scratch((1, 2)), np.memmap)
    squares = duplicates._squares(x)
    assert squares.dtype == torch.uint8 and squares.shape == (40, 1, 96, 96)
    assert sorted((i, j) for i, j, _ in near_duplicates(x)) == sorted(whole) and len(whole) == 10
    assert duplicates._squares(squares) is squares                  # no second copy


def test_squares_are_kept_in_place():
    x = np.arange(6)[:, None] * np.ones(4, np.uint8)
    kept = duplicates.only(x, [1, 4, 5])
    assert kept[:, 0].tolist() == [1, 4, 5] and np.shares_memory(kept, x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_real_x_rays_are_found(kind, cxr):
    _, x = load_pixels(read_table(cxr, check=False), 128)
    x = x[::4]
    recall, precision = found(x, COPIES[kind](x))
    assert recall >= 0.95 and precision >= 0.99
