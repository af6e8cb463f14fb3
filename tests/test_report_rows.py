"""Growth with n, conditions, variety, and the choice of pictures."""

import numpy as np
import pytest
import torch

from minidiff.data.table import Table
from minidiff.evaluation.metrics import by_condition, report_rows
from minidiff.evaluation.metrics.distances import fid, kid
from minidiff.evaluation.metrics.report_rows import Side
from minidiff.evaluation.pages import pictures


def side(seed, n=80, shift=0.0, labels=("a", "b"), d=6):
    x = np.random.default_rng(seed).normal(size=(n, d)) + shift
    return Side(x, np.array([labels[i % len(labels)] for i in range(n)]),
                np.array([f"{seed}-{i}" for i in range(n)]))


def test_growth_parts_the_number_from_the_distance():
    """Of one kind, FD falls with n along its floor and KD stays about 0; what is shifted stays
    above both.
    """
    held, train = side(0, 160), side(1, 320)
    same = report_rows.growth("x", synthetic=side(2, 160), train=train, heldout=held)
    far = report_rows.growth("x", synthetic=side(3, 160, shift=1.0), train=train, heldout=held)
    assert [r["n"] for r in same] == [r["n"]
                                      for r in far] and same[0]["n"] == 10 and same[-1]["n"] == 80
    assert same[0]["FD"]["median"] > 3 * same[-1]["FD"]["median"]
    assert same[-1]["FD_floor"]["low"] * 0.5 < same[-1]["FD"]["median"] < same[-1]["FD_floor"][
        "high"] * 2
    assert far[-1]["FD"]["median"] > 2 * far[-1]["FD_floor"]["high"] and far[-1]["KD"]["low"] > far[
        -1]["KD_floor"]["high"]
    assert report_rows.growth("x", synthetic=side(2, 12), train=train, heldout=held) == []


def test_the_band_of_the_curve_is_that_of_new_images_up_to_its_end():
    """At its largest n, too, draws differ, and as widely as the scores of new images."""
    held, train, made = side(0, 160), side(1, 320), side(2, 160)
    (*_, last) = report_rows.growth("x", synthetic=made, train=train, heldout=held, repeats=60)
    for k, name in enumerate(("KD", "FD")):
        metric = (kid, fid)[k]
        fresh = [metric(real=side(100 + i, 80).features, fake=side(500 + i, 80).features)
                 for i in range(100)]
        width = np.ptp(np.quantile(fresh, [0.05, 0.95]))
        assert 0.6 < (last[name]["high"] - last[name]["low"]) / width < 1.7


def volumes(seed, n, slices=6, d=6) -> Side:
    """n volumes of a few slices each, which differ far less within a volume than between them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 1, d)) + 0.1 * rng.normal(size=(n, slices, d))
    return Side(x.reshape(-1, d), np.array(["a"] * n * slices),
                np.repeat([f"{seed}-{k}" for k in range(n)], slices))


def test_floors_of_slices_are_those_of_new_volumes():
    """Patient = volume: the floor is what two sets of other volumes score. Were each slice a
    patient, a volume would stand on both sides, and the floor would be far too low.
    """
    train, held, made = volumes(0, 40), volumes(1, 10), volumes(2, 10)
    row, = report_rows.by_label("x", synthetic=made, train=train, heldout=held, labels=["a"],
                                repeats=40)[:1]
    strangers = [(volumes(100 + k, 10), volumes(200 + k, 10)) for k in range(40)]
    truth = np.median([fid(real=a.features, fake=b.features) for a, b in strangers])
    equal = [report_rows._at_equal_n(a, b, 0, floor=True) for a, b in strangers]
    assert 0.7 < row["FD_floor"]["median"] / truth < 1.4
    reach = np.median([found["coverage"] for found in equal])
    assert abs(row["coverage_floor"]["median"] - reach) < 0.15
    singly = report_rows.joined(train, held)
    singly = singly._replace(patients=np.arange(singly.n).astype(str))
    naive = report_rows._floors(singly, 60, 60, 40, 0)
    assert naive["FD_floor"]["median"] < 0.5 * truth
    assert naive["coverage_floor"]["median"] > reach + 0.3


def test_what_cannot_be_broken_down_is_a_grey_row_with_its_reason():
    """A cell that training's kind does not know, and images that are all of one patient."""
    ages = [str(k) for k in range(20, 80)]
    known = {"label": "a", "patient": ages, "sex": "FM"}
    tables = {"train": table(60, **known, age=ages), "heldout": table(60, **known, age=["60+"]),
              "synthetic": table(40, label="a", sex="FM", age=["30", "75"])}
    found, why = by_condition.groups(tables)
    sides = {"synthetic": side(0, 40), "train": side(1, 60), "heldout": side(2, 60)}
    row, *others = report_rows.conditions("x", found, why, **sides)
    assert row["condition"] == "age" and row["too_few"] and "'60+' is not a number" in row["why"]
    assert [(r["condition"], r["value"]) for r in others] == [("sex", "F"), ("sex", "M")]
    alone = sides["heldout"]._replace(patients=np.array(["one"] * 60))
    grey = torch.randint(0, 255, (60, 3, 32, 32), dtype=torch.uint8)
    rows = report_rows.variety({"x": {**sides, "heldout": alone}}, {
        "synthetic": grey[:40], "train": grey, "heldout": grey}, ["a"], repeats=4)
    (row,) = (r for r in rows if r["measure"] == "MS-SSIM")
    assert row["too_few"] and "a pair of images of different patients" in row["why"]
    assert all("range" in r for r in rows if r is not row)


def test_a_value_is_one_group_however_a_side_spells_it():
    known = {"label": "a", "patient": [str(k) for k in range(60)]}
    tables = {"train": table(60, **known, sex=["Female", "Male"]), "heldout": table(
        60, **known, sex=["male", ""]), "synthetic": table(40, label="a", sex="FM")}
    found, _ = by_condition.groups(tables)
    assert {name: set(cells.tolist()) for name, cells in found["sex"].items()} == {
        "train": {"Female", "Male"}, "heldout": {"Male", ""}, "synthetic": {"Female", "Male"}}


def test_growth_compares_equal_mixes_of_labels():
    """Labels far apart, of which the held-out images have another mix: no distance for it."""
    def mixed(seed, a, b):
        x, y = side(seed, a, 0.0, ("a",)), side(seed + 50, b, 4.0, ("b",))
        return Side(*(np.concatenate(columns) for columns in zip(x, y)))

    grown = report_rows.growth("x", synthetic=mixed(0, 60, 60), train=mixed(1, 30, 200),
                             heldout=mixed(2, 60, 300))
    assert grown[-1]["KD"]["median"] < 3 * grown[-1]["KD_floor"]["high"]


def table(n, **columns):
    return Table([{name: values[i % len(values)] for name, values in columns.items()}
                  | {"file": str(i)} for i in range(n)])


def test_conditions_are_the_columns_that_both_have():
    real = {"label": "ab", "patient": ["1", "2", "3"], "sex": ["F", "M", ""],
            "age": [str(k) for k in range(20, 80)], "view": ["PA"], "severity": ["0", "1"]}
    tables = {"train": table(60, **real), "heldout": table(60, **real), "synthetic":
              table(40, label="ab", sex="FFMM", age=["30", "75"], view=["PA"], set=["1"])}
    found, why = by_condition.groups(tables)
    assert why == {}
    # of one view alone there is nothing to tell
    assert set(found) == {"sex", "age"}
    assert by_condition.in_order(found["age"]["train"]) == ["under 39.6667", "39.6667 to 59.3333",
                                                         "59.3333 and over"]
    assert found["sex"]["train"].tolist()[:3] == ["F", "M", ""]
    sides = {"synthetic": side(0, 40), "train": side(1, 60), "heldout": side(2, 60)}
    rows = report_rows.conditions("x", found, why, **sides)
    assert [(r["condition"], r["value"]) for r in rows[:2]] == [("sex", "F"), ("sex", "M")]
    assert (rows[0]["n"], rows[0]["m"], rows[0]["too_few"]) == (20, 20, False)
    assert rows[0]["KD_low"] <= 0 <= rows[0]["KD_high"] and rows[0]["KD_floor"]["low"] < 0
    middle = next(r for r in rows if r["value"] == "39.6667 to 59.3333")
    assert middle["m"] == 0 and middle["too_few"] and "KD" not in middle


def test_a_value_whose_images_share_no_label_is_grey():
    """Their distance would be that of two labels."""
    sides = {"train": side(1), "heldout": side(0), "synthetic": side(2)}
    sex = {name: np.where(own.labels == ("b" if name == "synthetic" else "a"), "F", "M")
           for name, own in sides.items()}
    for row in report_rows.conditions("x", {"sex": sex}, {}, **sides):
        assert row["too_few"] and row["why"] == "no label in common" and "KD" not in row
    plain = sides | {"synthetic": side(2, labels=("",))}   # of a model that knows no label
    assert not any(row["too_few"] for row in report_rows.conditions("x", {"sex": sex}, {}, **plain))


@pytest.mark.parametrize("collapsed", [False, True])
def test_variety_sees_a_collapse(collapsed):
    rng = np.random.default_rng(0)
    real, train = side(0), side(1, 160)
    made = side(2).take(np.arange(80) % 4) if collapsed else side(2)
    made = made._replace(labels=side(2).labels, patients=side(2).patients)
    pixels = {"heldout": rng.integers(0, 255, (80, 3, 24, 24)),
              "train": rng.integers(0, 255, (160, 3, 24, 24)),
              "synthetic": rng.integers(0, 255, (80, 3, 24, 24))}
    pixels["synthetic"] = pixels["synthetic"][np.arange(80)
                                              % 4] if collapsed else pixels["synthetic"]
    pixels = {name: torch.from_numpy(x.astype(np.uint8)) for name, x in pixels.items()}
    rows = report_rows.variety({"x": {"heldout": real, "train": train, "synthetic": made}}, pixels,
                             ["a", "b", "c"])
    found = {(r["label"], r["measure"]): r for r in rows}
    vendi, likeness = found["all labels", "Vendi, x"], found["a", "MS-SSIM"]
    assert (vendi["n"], likeness["n"]) == (80, 40) and found["c", "MS-SSIM"]["too_few"]
    assert vendi["range"]["low"] - 0.5 < vendi["real"] < vendi["range"]["high"] + 0.5
    assert (vendi["synthetic"] < vendi["range"]["low"] - 0.5) == collapsed
    assert (likeness["synthetic"] > likeness["range"]["high"] + 0.1) == collapsed


def test_best_and_worst_are_by_rank_within_their_label():
    made, real = side(0, 12), side(1, 60)
    # label a, far from all
    made.features[4] += 30.0
    p = np.full(12, 0.9)
    # label b, not recognised
    p[7] = 0.1
    order, facts = pictures.ranked(made, real, p)
    last = {label: [i for i in order if made.labels[i] == label][-1] for label in "ab"}
    assert last["a"] == 4 and facts[4]["d"] > 5 > 2 > np.median([f["d"] for f in facts]) and facts[
        7]["p"] == 0.1
    assert order.index(7) > 6
    without, facts = pictures.ranked(made, real, None)
    assert without[-1] == 4 or without[-2] == 4
    assert facts[0]["p"] is None


def test_the_pictures_that_are_shown():
    g = torch.Generator().manual_seed(0)
    pixels = {name: torch.randint(0, 255, (30, 3, 16, 16), generator=g, dtype=torch.uint8)
              for name in ("train", "heldout", "synthetic")}
    pixels["train"][3] = pixels["synthetic"][0]
    tables = {name: table(30, label="ab") for name in pixels}
    groups = {"sex": {name: np.array(["F", "M", ""] * 10) for name in pixels}}
    sides = {"synthetic": side(0, 30), "heldout": side(1, 30)}
    named = [{"fake": k, "train": k, "distance": 0.0} for k in range(20)]
    copies = {"closest": [{"fake": 0, "train": 3, "heldout": 5}], "named": {"images": named}}
    how = {"copies": copies, "groups": groups, "probabilities": None, "shown": 4}
    drawn = pictures.draw(tables, pixels, sides, **how)
    assert set(drawn) == {"labels", "grids", "best", "worst", "beside", "pairs", "named",
                          "collection"}
    assert [c["label"]
            for c in drawn["best"]] == ["a"] * 6 + ["b"] * 6 and len(drawn["worst"]) == 12
    assert len(drawn["named"]) == 12 and {len(p) for p in drawn["named"]} == {2}
    none = pictures.draw(tables, pixels, sides, **how | {"copies": copies | {"named": None}})
    assert none["named"] == []
    made, copied, other = drawn["pairs"][0]
    assert made == copied != other and len(drawn["beside"]) == 8
    assert [(c["value"], c["n"], c["shown"]) for c in drawn["collection"]] == [("F", 10, 6),
                                                                               ("M", 10, 6)]
    assert drawn == pictures.draw(tables, pixels, sides, **how)
