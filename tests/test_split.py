"""data.split: groups, repaired splits, pictures in two places, and what a model has seen."""

import numpy as np
import pytest
import torch
from data_sets import data_set, rows_of

from minidiff.data import phantom
from minidiff.data.pixel_map import content
from minidiff.data.split import check_pictures, check_unseen, connected, repair_split, trained_on
from minidiff.data.table import read_table
from minidiff.errors import InputError


def rows(*cells):
    keys = ("file", "patient", "split", "label")
    return [dict(zip(keys, c)) for c in cells]


def test_a_repaired_split_keeps_what_belongs_together_in_one_place():
    crossing = rows(("0", "a", "train", "x"), ("1", "a", "test", "x"), ("2", "b", "val", "x"),
                    ("3", "c", "external", "x"), ("4", "d", "train", "x"), ("5", "e", "test", "x"),
                    ("6", "f", "train", "y"), ("7", "g", "test", "y"))
    splits = [row["split"] for row in repair_split(crossing, [(3, 4), (5, 6)])]
    assert splits == ["train", "train", "val", "external", "left-out", "left-out", "left-out",
                      "test"]
    sound = rows(("0", "a", "train", "x"), ("1", "b", "test", "x"))
    assert repair_split(sound, []) == sound


def test_groups_are_connected_components():
    assert list(connected(5, [(0, 3), (3, 4)])) == [0, 1, 2, 0, 0]
    assert list(connected(2, [])) == [0, 1]


def test_the_fast_form_sees_one_picture_in_two_files():
    x = torch.from_numpy(np.stack([phantom.phantom(0, i, 32).image
                                   for i in range(3)]))[:, None].expand(-1, 3, -1, -1)
    grey = torch.full((1, 32, 32), 7, dtype=torch.uint8).expand(3, -1, -1)

    def placed(*cells):
        return rows(*((f"{k}.png", "p", *cell) for k, cell in enumerate(cells)))

    def check(rows, pictures):
        check_pictures(rows, (content(x.numpy()) for x in pictures))

    check(placed(*[("train", "a")] * 3), x)
    check(placed(("train", "a"), ("train", "a")), [x[0], x[0]])
    # one grey is no picture
    check(placed(("train", "a"), ("test", "b")), [grey, grey])
    with pytest.raises(InputError, match="crosses splits: 0.png is train, 1.png is test"):
        check(placed(("train", "a"), ("test", "a")), [x[0], x[0].clone()])
    with pytest.raises(InputError, match="two labels"):
        check(placed(("train", "a"), ("train", "b")), [x[0], x[0]])


# --- what a model has seen


def test_trained_on_is_what_the_manifest_says(tmp_path):
    assert trained_on(tmp_path) is None
    for text, says in (('{"n": 3}', None), ('{"trained_on": []}', None),
                       ('{"trained_on": ["a", "b", "a"]}', {"a", "b"})):
        (tmp_path / "manifest.json").write_text(text)
        assert trained_on(tmp_path) == says
    (tmp_path / "manifest.json").write_text('{"trained_on": ["a"')
    with pytest.raises(InputError, match="manifest.json is damaged"):
        trained_on(tmp_path)


def test_a_held_out_image_that_was_trained_on_is_refused(tmp_path):
    table = read_table(data_set(tmp_path / "d", rows_of(5)), split=False)
    digests = [table.hashes[file] for file in table.column("file")]
    check_unseen(table.rows, table.hashes, set(), "the judge")
    check_unseen(table.rows[:3], table.hashes, set(digests[3:]), "the judge")
    with pytest.raises(InputError,
                       match="the judge was trained on 2 of 4 held-out images, e.g. .*003.png"):
        check_unseen(table.rows[1:], table.hashes, {digests[0], *digests[3:]}, "the judge")
    same = dict.fromkeys(table.column("file")[:2], "P7")
    table.rows[0]["patient"] = "P7"
    with pytest.raises(InputError, match="the judge was trained on other images of 1 held-out pati"
                                         "ents, e.g. P7"):
        check_unseen(table.rows[:1], table.hashes, set(digests[1:]), "the judge", same)
    check_unseen(table.rows[:1], table.hashes, set(digests[2:]), "the judge", same)
