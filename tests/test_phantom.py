"""The phantom: the same index is the same picture, and each factor moves the picture as the
docstring's table says.
"""

import csv
import os
import shutil
from collections import Counter

import numpy as np
import pytest

from minidiff.data import images
from minidiff.data.baselines import out_of_fold
from minidiff.data.phantom import FINDINGS, LABELS, phantom, write
from minidiff.errors import InputError
from minidiff.statistics import auroc

PATIENTS = range(8)


def pairs(**change):
    """Images of PATIENTS without noise, before and after a change {factor: (before, after)}; all
    else is equal.
    """
    still = {"sex": "M", "age": 50, "view": "PA", "label": "normal"}
    before, after = ({**still, **{name: ends[i] for name, ends in change.items()}} for i in (0, 1))
    return [(phantom(5, 10 * i, noise=0, **before), phantom(5, 10 * i, noise=0, **after))
            for i in PATIENTS]


def mean(p, rows=slice(None), columns=slice(None)):
    return p.image[rows, columns].astype(float).mean()


def heart_width(p):
    """Pixels between the lungs, at the level of the heart, above the diaphragm."""
    rows = p.lungs[28:36]
    left, right = rows[:, :32], rows[:, 32:]
    return np.mean([32 - np.flatnonzero(a).max() + np.flatnonzero(b).min()
                    for a, b in zip(left, right, strict=True)])


def test_same_seed_and_index_same_picture():
    a, b = phantom(0, 7), phantom(0, 7)
    assert np.array_equal(a.image, b.image) and a.row == b.row and a.factors == b.factors
    assert a.image.dtype == np.uint8 and a.image.shape == a.lungs.shape == a.opacity.shape == (64,
                                                                                               64)
    assert not np.array_equal(a.image, phantom(0, 8).image) and not np.array_equal(
        a.image, phantom(1, 7).image)


@pytest.mark.parametrize("size", [32, 128, 256])
def test_same_index_looks_alike_at_every_size(size):
    big, small = phantom(0, 11, max(size, 64), noise=0), phantom(0, 11, min(size, 64), noise=0)
    k = len(big.image) // len(small.image)
    shrunk = big.image.astype(float).reshape(len(small.image), k, len(small.image), k).mean((1, 3))
    assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.99
    assert big.lungs.mean() == pytest.approx(small.lungs.mean(), abs=0.02) and big.row == small.row


def test_noise_is_of_the_asked_size():
    difference = phantom(0, 3, 128, noise=0.02).image.astype(float) - phantom(0, 3, 128,
                                                                              noise=0).image
    inner = difference[40:90, 20:108]  # away from black, where the range cuts the noise
    assert inner.std() / 255 == pytest.approx(0.02, rel=0.05) and abs(inner.mean()) < 0.5


def test_lungs_are_dark_and_inside_the_frame():
    for i in range(20):
        p = phantom(0, i, noise=0, label="normal")
        assert 0.10 < p.lungs.mean() < 0.35
        assert not (p.lungs[0].any() or p.lungs[-1].any() or p.lungs[:, 0].any()
                    or p.lungs[:, -1].any())
        assert p.image[p.lungs].mean() < p.image[~p.lungs & (p.image > 40)].mean() - 40
        # the heart takes from the patient's left lung
        assert p.lungs[:, :32].sum() > p.lungs[:, 32:].sum()


def test_opacity_follows_the_label():
    for i in range(0, 60, 10):
        assert not phantom(2, i, label="normal").opacity.any()
        one, two = phantom(2, i, label="pneumonia"), phantom(2, i, label="covid")
        halves = one.opacity[:, :32].sum(), one.opacity[:, 32:].sum()
        assert min(halves) <= 0.1 * max(halves) and (halves[0] > halves[1]) == (
            one.factors["side"] == "right")
        assert min(two.opacity[:, :32].sum(), two.opacity[:, 32:].sum()) > 10
        rows = np.flatnonzero(two.opacity.any(1))
        assert rows.mean() > np.flatnonzero(two.lungs.any(1)).mean()  # lower zones first
        for p in (one, two):
            assert not (p.opacity & ~p.lungs).any()
            clear = phantom(2, i, label="normal", noise=0).image.astype(float)
            drawn = phantom(2, i, label=p.row["label"], noise=0).image
            assert (drawn
                    - clear)[p.opacity].mean() > 0 and abs((drawn - clear)[~p.lungs]).mean() < 2
            assert (drawn - clear)[p.opacity].std() > 4  # a texture, seen beside noise of 5


@pytest.mark.parametrize("label", FINDINGS)
def test_severity_adds_extent_and_density(label):
    for mild, severe in pairs(label=(label, label), severity=(0.3, 1.0)):
        assert severe.opacity.sum() > 1.2 * mild.opacity.sum()
        index, still = int(mild.row["patient"][-6:]), {"sex": "M", "age": 50, "view": "PA"}
        clear = phantom(5, index, label="normal", noise=0, **still).image.astype(float)
        change = [abs(p.image - clear)[p.lungs].sum() for p in (mild, severe)]
        assert change[1] > 1.3 * change[0] > 0
        assert (mild.row["severity"], severe.row["severity"]) == ("0.3", "1")


@pytest.mark.parametrize("rare", ["nodule", "pneumothorax"])
def test_a_rare_finding_is_in_one_lung_and_is_drawn_beside_others(rare):
    for i in range(0, 80, 10):
        alone, both = phantom(2, i, label=rare, noise=0), phantom(2, i, label=f"covid|{rare}",
                                                                  noise=0)
        halves = alone.opacity[:, :32].sum(), alone.opacity[:, 32:].sum()
        assert max(halves) >= 5 and min(halves) == 0
        assert not (alone.opacity & ~alone.lungs).any()
        covid = phantom(2, i, label="covid", noise=0)
        assert np.array_equal(both.opacity, alone.opacity | covid.opacity)
        assert both.row == {**covid.row, "label": f"covid|{rare}"}
        change = abs(both.image.astype(float) - covid.image)
        assert change[alone.opacity].mean() > 3 and change[~both.lungs].mean() < 1
        other = phantom(2, i, label=f"{rare}|covid", noise=0).image.astype(int)
        assert abs(other - both.image).max() <= 1  # in any order, but for rounding


def test_beyond_a_pneumothorax_there_is_more_air():
    for i in range(0, 80, 10):
        gone, clear = (phantom(2, i, label=label, noise=0, age=25)
                       for label in ("pneumothorax", "normal"))
        inner = gone.opacity & (gone.image < clear.image.astype(int) + 2)
        assert gone.image[inner].mean() < clear.image[inner].mean()


def test_age_widens_heart_and_fades_bones():
    for young, old in pairs(age=(25, 85)):
        assert heart_width(old) > heart_width(young) + 1
        assert old.lungs.any(1).sum() < young.lungs.any(1).sum()  # shorter lungs
        ribs = [np.diff(p.image[:, 14:22].astype(float), axis=0)[14:28].std() for p in (young, old)]
        assert ribs[1] < ribs[0]


def test_sex_narrows_the_thorax_and_adds_breasts():
    for male, female in pairs(sex=("M", "F")):
        assert female.lungs.any(0).sum() < male.lungs.any(0).sum()
        both = male.lungs & female.lungs
        both[:40] = False
        low = [p.image[40:][both[40:]].astype(float).mean() for p in (male, female)]
        assert low[1] > low[0] + 5


def test_ap_widens_heart_lifts_diaphragm_and_brings_scapulae_over_the_lungs():
    for pa, ap in pairs(view=("PA", "AP")):
        assert heart_width(ap) > heart_width(pa) + 1
        assert np.flatnonzero(ap.lungs.any(1)).max() < np.flatnonzero(pa.lungs.any(1)).max()
        both = pa.lungs & ap.lungs
        # scatter
        assert ap.image[both].astype(float).mean() > pa.image[both].astype(float).mean() + 5


def test_a_forced_factor_leaves_the_others():
    a, b = phantom(0, 4), phantom(0, 4, view="AP")
    assert {k: v for k, v in a.factors.items()
            if k != "view"} == {k: v for k, v in b.factors.items() if k != "view"}
    assert phantom(0, 4, age=33).row["age"] == "33"


def test_share_of_unknown_cells_and_truth_of_the_others():
    drawn = [phantom(1, i, 32) for i in range(0, 6000, 10)]
    for name in ("age", "sex"):
        unknown = sum(p.row[name] == "" for p in drawn) / len(drawn)
        assert unknown == pytest.approx(0.15, abs=0.05)  # 3.4 standard errors of 600 patients
        assert all(p.row[name] in ("", str(p.factors[name])) for p in drawn)
    ages = [p.factors["age"] for p in drawn]
    assert 20 <= min(ages) < 25 and 85 < max(ages) <= 90
    # independent
    assert sum(p.row["sex"] == "" and p.row["age"] == "" for p in drawn) / len(drawn) < 0.06


def test_confounding_ties_the_view_to_the_label():
    tied = [phantom(1, i, 32, confounding=1).row for i in range(30)]
    assert all((row["view"] == "AP") == (row["label"] == "covid") for row in tied)
    free = [phantom(1, i, 32).row for i in range(600)]
    for label in LABELS:
        views = [row["view"] == "AP" for row in free if row["label"] == label]
        assert np.mean(views) == pytest.approx(0.5, abs=0.13)  # 3.7 standard errors of 200 images


def test_follow_up_is_the_same_patient_on_another_day():
    first, second = phantom(0, 28), phantom(0, 29)
    same = ("patient", "label", "sex", "age", "view")
    assert [first.row[k] for k in same] == [second.row[k] for k in same]
    assert first.row["severity"] != second.row["severity"] and not np.array_equal(first.image,
                                                                                  second.image)
    alike = np.corrcoef(first.image.ravel(), second.image.ravel())[0, 1]
    other = phantom(0, 27, label=first.row["label"])
    assert alike > np.corrcoef(first.image.ravel(), other.image.ravel())[0, 1]
    assert len({phantom(0, i, 32).row["patient"] for i in range(30)}) == 27


def test_write_makes_a_balanced_data_set_split_by_patient(tmp_path):
    folder = write(tmp_path / "set", n=120, size=32, masks=True)
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file_name", "label", "split", "patient", "sex", "age", "view",
                             "severity"]
    homes = {(row["patient"], row["split"]) for row in rows}
    assert len(homes) == len({patient for patient, _ in homes}) == 108
    counts = Counter((row["label"], row["split"]) for row in rows)
    for label in LABELS:
        for split, share in (("train", 25), ("val", 5), ("test", 10)):
            assert abs(counts[label, split] - share) <= 1
    assert rows[17]["file_name"] == f"images/{rows[17]['label']}/000017.png"
    assert np.array_equal(images.read(folder / rows[17]["file_name"])[0], phantom(0, 17, 32).image)
    mask = images.read(folder / rows[17]["file_name"].replace("images", "masks/lungs"))[0]
    assert np.array_equal(mask > 0, phantom(0, 17, 32).lungs)


def test_write_is_reproducible_reuses_and_refuses(tmp_path):
    a, b = (write(tmp_path / name, n=12, size=32) for name in "ab")
    files = [path.relative_to(a) for path in a.rglob("*") if path.is_file()]
    assert len(files) == 14 and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    before = (a / "metadata.csv").stat().st_mtime_ns
    assert write(a, n=12, size=32) == a and (a / "metadata.csv").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds something else"):
        write(a, n=12, size=32, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="other"):
        write(tmp_path / "other", n=12, size=32)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_stopped_writer_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(path, image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "write", full_disk)
    with pytest.raises(OSError):
        write(tmp_path / "set", n=12, size=32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [
    {"size": 31}, {"size": 513}, {"label": "flu"}, {"label": "normal|covid"}, {"label": "covid|"},
    {"label": "covid|covid"}, {"sex": "X"}, {"age": 12}, {"view": "lateral"},
    {"noise": -1}, {"severity": 0, "label": "covid"}, {"severity": 0.5, "label": "normal"},
    {"confounding": 1.5}, {"index": -1},
])
def test_bad_input_is_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        phantom(**{"seed": 0, "index": 0, **bad})


@pytest.mark.parametrize("bad",
                         [{"n": 0}, {"splits": {}}, {"splits": {"train": -1.0}}, {"size": 16}])
def test_bad_data_set_is_refused(tmp_path, bad):
    with pytest.raises(InputError):
        write(tmp_path / "set", **bad)
    assert not list(tmp_path.iterdir())


def test_thumbnails_hardly_tell_the_disease():
    """8 × 8 means of the picture: the disease is texture, not a large opacity. The bound is that of
    docs/study.md.
    """
    labels = (*LABELS, "nodule", "pneumothorax")
    drawn = [phantom(3, i, label=labels[(i - (i % 10 == 9)) % 5]) for i in range(2000)]
    small = np.stack([p.image.reshape(8, 8, 8, 8).mean((1, 3)).ravel() for p in drawn])
    fold = np.array([int(p.row["patient"][-6:]) // 10 % 2 for p in drawn])  # whole patients
    for label in labels:
        ours = np.array([p.row["label"] == label for p in drawn])
        assert 0.5 < auroc(out_of_fold(small, ours, fold), ours) <= 0.75, label


def test_a_scarce_label_is_scarce_but_for_the_test_images(tmp_path):
    rows = list(csv.DictReader((write(tmp_path / "few", n=300, size=32,
                                      scarce={"covid": 0.2}) / "metadata.csv").open()))
    counts = Counter((row["label"], row["split"]) for row in rows)
    assert 11 <= counts["covid", "train"] <= 15 and counts["normal", "train"] in (62, 63)
    assert counts["covid", "test"] == counts["normal", "test"]
    assert len({row["patient"] for row in rows}) < len(rows)  # follow-ups stay with their patient
    whole = write(tmp_path / "all", n=300, size=32)
    assert {r["file_name"] for r in rows} < {
        r["file_name"] for r in csv.DictReader((whole / "metadata.csv").open())}


def test_the_folder_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o077)
    try:
        folder = write(tmp_path / "data", n=9, size=32)
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.rglob("*")))


def test_two_that_draw_the_same_at_once_end_well(tmp_path, monkeypatch):
    data, replace = tmp_path / "data", os.replace

    def second(source, target):
        if target == data and not data.exists():
            monkeypatch.setattr(os, "replace", replace)
            shutil.copytree(source, target)  # as if the other were faster
        replace(source, target)

    monkeypatch.setattr(os, "replace", second)
    assert write(data, n=9, size=32) == data
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
