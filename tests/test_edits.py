"""Edits: what `--change` makes of a row, which originals it leaves out, which mask belongs to which
original; and folders of edited images, which can be made again.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from minidiff import config
from minidiff.data import images, phantom
from minidiff.data.table import read_table
from minidiff.errors import InputError
from minidiff.sampling import edits
from minidiff.variables import Category, Findings, Number

VARIABLES = [Category("label", ("covid", "normal", "a,b")), Category("sex", ("F", "M")),
             Number("age", 50, 20, 20, 90), Findings("finding", ("Edema", "Effusion", "Mass")),
             Category("view", ("AP", "PA", "other"))]
ROW = {"label": "normal", "sex": "F", "age": "45", "finding": "Edema|Mass", "view": "PA",
       "origin": "/x.png"}


def change(*items, **cells):
    return edits.changed(VARIABLES, edits.read_changes(items, VARIABLES), {**ROW, **cells})


@pytest.mark.parametrize("item, name, after", [
    ("label=covid", "label", "covid"), ("label=a,b", "label", "a,b"), ("sex=male", "sex", "M"),
    ("sex=other", "sex", "M"), ("age=+30", "age", "75"), ("age=-2.5", "age", "42.5"),
    ("age=60", "age", "60"), ("age=", "age", ""), ("age=null", "age", "null"),
    ("label=any", "label", "any"), ("view=other", "view", "other"),
    ("finding=+Effusion", "finding", "Edema|Effusion|Mass"), ("finding=-edema", "finding", "Mass"),
    ("finding=+effusion", "finding", "Edema|Effusion|Mass"), ("finding=-Edema", "finding", "Mass"),
    ("finding=-Edema|Mass", "finding", "none"), ("finding=Effusion", "finding", "Effusion"),
])
def test_a_change_and_what_is_kept(item, name, after):
    row, why = change(*item.split(","))  # as the command line splits it
    assert row == {**ROW, name: after, "change": item, f"before_{name}": ROW[name]} and not why
    assert edits.before(row) == {**row, name: ROW[name]}


@pytest.mark.parametrize("items, cells, said", [
    (["sex=F"], {}, "with sex=F already"), (["age=45.0"], {}, "with age=45 already"),
    (["finding=Mass|Edema"], {}, "with finding=Edema|Mass already"),
    (["age=+30"], {"age": ""}, "of unknown age"), (["sex=M"], {"sex": ""}, "of unknown sex"),
    (["label=covid"], {"label": "any"}, "of unknown label"),
    (["age=+90"], {}, "whose age would be 135"), (["age=-50"], {}, "whose age would be -5"),
    (["sex=F", "age=45"], {}, "with sex=F age=45 already"),
])
def test_who_is_left_out(items, cells, said):
    assert change(*items, **cells) == (None, said)


def test_two_changes_of_which_one_is_there_already():
    row, _ = change("sex=F", "age=+30")
    assert (row["sex"], row["age"], row["before_sex"], row["before_age"]) == ("F", "75", "F", "45")
    assert row["change"] == "sex=F age=+30"


@pytest.mark.parametrize("items, said", [
    (["sex"], "--change sex: write name=value, age=.30 or sex=other"),
    (["weight=3"], "--change weight=3: the model has no such condition; it has label, sex, age"),
    (["sex=F", "sex=M"], "--change sex=M: sex is changed twice"),
    (["sex=X"], "--change sex=X: sex 'X' is not one of F, M"),
    *((["age=" + by], "write a number after the sign, e.g. age=.30")
      for by in ("+x", "+nan", "-inf", "++3", "+-3")), (["age=+"], "write how much, age="),
    (["label="], "an image needs a label; allowed are covid, normal, a,b, and null"),
    (["label=other"], "label covid, normal, a,b is no choice of two; name the value"),
    (["finding=+Edma"], "finding 'Edma' is not one of Edema, .*; nearest: Edema"),
])
def test_changes_that_are_refused(items, said):
    with pytest.raises(InputError, match=said):
        edits.read_changes(items, VARIABLES)


@pytest.fixture
def folder(tmp_path):
    """Two originals of one name, with a mask each."""
    for name, wide in (("a/1.png", 30), ("b/1.png", 40)):
        images.write(tmp_path / "data" / name, np.full((30, wide), 99, np.uint8))
        mask = np.zeros((30, wide), np.uint8)
        mask[:, wide // 2:] = 255
        images.write(tmp_path / "masks" / name, mask)
    return tmp_path


def rows_of(folder, *names):
    return [{"origin": str(folder / "data" / name)} for name in names]


def test_masks_lie_as_their_originals_do_and_are_cut_like_them(folder):
    rows = edits.masked(rows_of(folder, "a/1.png", "b/1.png"), str(folder / "masks"), 16)
    assert [row["mask"] for row in rows] == [str(folder / "masks" / x)
                                             for x in ("a/1.png", "b/1.png")]
    assert edits.masked(rows_of(folder, "b/1.png"), str(folder / "masks/b"),
                        16)[0]["mask"] == str(folder / "masks/b/1.png")  # none above: by its name
    for row in rows:
        mask = edits.read_mask(row["mask"], images.read(row["origin"]), 16)
        assert mask.shape == (1, 16, 16) and mask.dtype == torch.bool
        assert not mask[..., :8].any() and mask[..., 8:].all()
    (folder / "data/a/1.png").rename(folder / "data/a/1.jpg")  # a mask may be PNG for all that
    assert edits.masked(rows_of(folder, "a/1.jpg"), str(folder / "masks"), 16)[0]["mask"].endswith(
        "masks/a/1.png")


def test_masks_that_are_refused(folder):
    masks, rows = folder / "masks", rows_of(folder, "a/1.png", "b/1.png")

    def said(match):
        with pytest.raises(InputError, match=match):
            edits.masked(rows, str(masks), 16)

    images.write(masks / "b/1.png", np.full((30, 30), 255, np.uint8))
    said("b/1.png: a mask of 30 x 30 pixels for an image of 40 x 30; both need the same size")
    images.write(masks / "b/1.png", np.full((30, 40), 127, np.uint8))
    said("b/1.png: an empty mask; no pixel")
    images.write(masks / "b/1.png", np.arange(3600, dtype=np.uint16).astype(np.uint8).reshape(
        3, 30, 40))
    said("b/1.png: a mask in colour")
    (masks / "b/1.png").unlink()
    said("no mask of .*data/b/1.png; it would be .*masks/1.png or .*masks/b/1.png")
    (masks / "a/1.png").rename(masks / "1.png")
    said("masks/1.png is the mask of .*a/1.png and of .*b/1.png")


@pytest.fixture(scope="module")
def masked_data(tmp_path_factory):
    return phantom.write(tmp_path_factory.mktemp("edits") / "data", n=24, size=32, masks=True)


def request(tiny, out, data, **knobs):
    return sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), origin=(str(data),),
                               **{"per_label": 3, "steps": 4, "batch": 4, **knobs})


def test_pairs_are_recorded_and_made_again(tiny, tmp_path, masked_data, capsys):
    """Inverted under the conditions of the originals, which the table holds beside the new ones."""
    out = tmp_path / "pairs"
    sample.sample(request(tiny, out, masked_data, change=("label=covid", "age=+30"), invert=True,
                          strength=.75, per_label=4))
    said = capsys.readouterr().err
    assert "--change label=covid age=+30 leaves out" in said and "of unknown age" in said
    before = {row["file"]: row for row in read_table(masked_data, split=False).rows}
    rows = list(csv.DictReader((out / "metadata.csv").open()))
    assert rows and {row["label"] for row in rows} == {"covid"}
    for row in rows:
        original = before[row["origin"]]
        assert row["file_name"].startswith("images/covid/") and row["change"] == (
            "label=covid age=+30")
        assert row["before_label"] == original["label"] and row["before_age"] == original["age"]
        assert float(row["age"]) == float(original["age"]) + 30 and row["view"] == original["view"]
    assert (out / "sheets/pairs_0001.png").exists()
    sample.verify(sample.VerifyConfig(out=str(out), k=100))
    assert "made again in whole batches, largest difference 0" in capsys.readouterr().out


def test_masked_images_keep_every_other_pixel_and_are_made_again(tiny, tmp_path, masked_data,
                                                                 capsys):
    out = tmp_path / "anew"
    sample.sample(request(tiny, out, masked_data, label=("covid",), change=("label=normal",),
                          mask=str(masked_data / "masks/opacity"), resample=2, strength=1.0))
    rows = list(csv.DictReader((out / "metadata.csv").open()))
    assert len(rows) == 3 and {row["label"] for row in rows} == {"normal"}
    for row in rows:
        made, was, mask = (images.read(path) for path in (out / row["file_name"], row["origin"],
                                                          row["mask"]))
        assert Path(row["mask"]).parts[-2:] == Path(row["origin"]).parts[-2:]
        away = mask < 128
        assert np.array_equal(made[away], was[away]) and (made != was)[~away].mean() > 0.8
    sample.verify(sample.VerifyConfig(out=str(out), k=3))
    assert "largest difference 0" in capsys.readouterr().out


@pytest.mark.parametrize("argv, said", [
    (["--change", "sex=F"], "--change needs --origin DATA"), (["--invert"], "--invert needs"),
    (["--mask", "x"], "--mask needs --origin"), (["--resample", "2"], "--resample needs --origin"),
    (["--origin", "DATA", "--resample", "2"], "--resample 2 needs --mask DIR"),
    (["--origin", "DATA", "--given", "sex=F"], "leave out --given, and name what becomes another"),
    (["--origin", "DATA", "--invert", "--sampler", "ddpm"], "invert: ddpm draws fresh noise"),
    (["--origin", "DATA", "--label", "normal", "--change", "label=normal"],
     "--change label=normal: no image of --origin has anything to change: 8 with label=normal"),
    (["--origin", "DATA", "--mask", "DATA/masks/opacity"], "an empty mask; no pixel"),
    (["--origin", "DATA", "--mask", "DATA/masks"], "no mask of"),
])
def test_bad_requests_are_one_sentence(tiny, tmp_path, masked_data, capsys, argv, said):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        config.main(sample.VERBS, default="sample", doc="", argv=[
            "--run", str(tiny / "diffusion"), "--out", str(out),
            *(word.replace("DATA", str(masked_data)) for word in argv)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and not out.exists(), err
