import numpy as np
import pytest
import torch

from benchmarks import memorisation as bench
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table
from minidiff.evaluation.metrics.copying import memorisation
from minidiff.evaluation.metrics.named import limit, named, probes, shares
from minidiff.evaluation.metrics.pairwise import distances, pixel_spaces, small
from minidiff.statistics import wilson


@pytest.fixture(scope="module")
def sides():
    """Small phantoms (N,1,64,64), no patient on two sides: training, held-out, fresh."""
    pixels, patients = bench.phantoms(200)
    return [small(pixels[index], 64)
            for index in bench.draw(patients, (100, 60, 30), np.random.default_rng(0))]


def of(fake, sides):
    return named(distances(fake, sides[0]), distances(sides[1], sides[0]), sides[0])


def test_exact_moved_and_mirrored_copies_are_named_and_no_other_image_is(sides):
    train, heldout, fresh = sides
    fake = torch.cat([fresh, train[3:5], train[5:7].flip(-1), train[7:9].roll((1, -1), (2, 3))])
    found = of(fake, sides)
    assert {(i["fake"], i["train"]) for i in found["images"]} == {(30 + k, 3 + k)
                                                                  for k in range(6)}
    assert found["heldout"] == 0 and found["n"] == 36 and found["found"] == 6
    assert [i["distance"] for i in found["images"]] == sorted(i["distance"]
                                                              for i in found["images"])
    assert of(fresh, sides)["images"] == [] == of(heldout.flip(-1), sides)["images"]


def test_one_exact_copy_is_enough_with_any_split_and_any_number_of_images(sides):
    """All images together could not tell: 1 of 10, and 60 held-out images beside 100."""
    pixels, _ = bench.phantoms(40)
    spaces = [pixel_spaces(x) for x in (pixels[:20], pixels[20:30], torch.cat([pixels[30:39],
                                                                              pixels[4:5]]))]
    found = memorisation(train=spaces[0], heldout=spaces[1], fake=spaces[2], random_split=False)
    assert found["suspected"] is True and found["verdict"] == (
        "1 of 10 synthetic images is a copy of a training image")
    assert [(i["fake"], i["train"]) for i in found["named"]["images"]] == [(9, 4)]
    none = memorisation(train=spaces[0], heldout=spaces[1],
                        fake={name: x[:9] for name, x in spaces[2].items()})
    assert none["suspected"] is None and "too few images" in none["verdict"]
    assert none["named"]["images"] == []


def test_the_limit_follows_how_alike_different_patients_are():
    far = torch.linspace(0.5, 1, 101)[:, None]
    assert limit(far) == 0.09
    assert limit(far / 10) == pytest.approx(0.6 * (0.05 + 0.05 * 0.05))


def test_exact_copies_are_named_where_one_picture_is_on_both_sides(sides):
    train, heldout, fresh = sides
    leaked = torch.cat([heldout[:45], train[:15]])
    found = of(torch.cat([fresh, train[3:5]]), (train, leaked, fresh))
    assert [i["train"] for i in found["images"]] == [3, 4] and found["heldout"] == 15


def test_what_none_being_named_says():
    one = shares(300, 64, 64)
    assert (1 - one["seen"]) ** 300 == pytest.approx(0.2)
    sure = wilson(64, 64)[0]   # of the share of probes that are named: .943
    assert (1 - sure * one["at_most"]) ** 300 == pytest.approx(0.05)   # the rule of three: 1 %
    assert 0.01 < one["at_most"] < 0.011
    assert shares(300, 32, 64)["seen"] == pytest.approx(2 * one["seen"])
    assert shares(1, 6, 64) == {"seen": 1.0, "at_most": 1.0}
    assert shares(300, 0, 64) == {"seen": None, "at_most": None}


def test_the_share_that_is_left_possible_covers():
    """Of runs in which no image was named, at most 5 % have more copies than at_most says."""
    rng, n, runs, worse = np.random.default_rng(0), 100, 4000, 0
    for _ in range(runs):
        truth = 0.9
        found = rng.binomial(64, truth)
        at_most = shares(n, found, 64)["at_most"]
        worse += rng.random() < (1 - truth * (at_most + 1e-9)) ** n
    assert worse / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)


def test_probes_are_counted_and_the_share_of_them_that_is_named_is_that_of_new_ones(sides):
    train = sides[0]
    assert torch.equal(probes(train, 1), probes(train, 1)) and not torch.equal(probes(train, 1),
                                                                               probes(train, 2))
    found = of(sides[2], sides)
    again = (distances(probes(train, 5), train).amin(1) < found["limit"]).double().mean()
    share = found["probes_found"] / found["probes"]
    assert found["probes"] == 64 and 0.3 < share <= 1
    assert abs(share - float(again)) < 0.2      # 64 and 100 draws


@pytest.mark.slow
def test_at_most_one_of_1000_other_patients_is_named_mirrored_and_moved_ones_among_them(cxr):
    table, pixels = load_pixels(read_table(cxr), 64)
    patients = np.unique(table.column("patient"), return_inverse=True)[1]
    train, heldout, fresh = bench.draw(patients, (500, 150, 400), np.random.default_rng(1))
    x, y = small(pixels[train], 64), small(pixels[heldout], 64)
    between = distances(y, x)
    for kind in ("exact", "mirrored", "moved"):
        others = bench.copies(pixels[fresh], kind)
        assert named(distances(small(others, 64), x), between, x)["images"] == []
    copies = small(bench.copies(pixels[train][:100], "all"), 64)
    found = named(distances(copies, x), between, x)
    assert len(found["images"]) >= 80                            # noisy and moved: .89
    assert {i["fake"] == i["train"] for i in found["images"]} == {True}


@pytest.mark.slow
def test_a_few_copies_among_many_images_are_named_and_no_other():
    """And a draw sees the copies that are in it: docs/memorisation.md has 20 of 20,000."""
    named, every, half, quarter = bench.many(200)
    assert set(named["named"].values()) == {4} and named["others_named"] == 0
    assert named["nearest_other"] > named["limit"]
    assert every["copies"] == 20 and 20 > half["copies"] > quarter["copies"] > 0
    assert all(row["copies"] >= row["copies_among_nearest"] > 0 for row in (every, half, quarter))
