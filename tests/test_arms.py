"""arms: each holds what its name says, duplicates match in count, and subsets are whole patients,
one inside the other.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from study_data import toy

from minidiff.classification.arms import (
    comparisons,
    even_weights,
    parse,
    training_set,
    validation_set,
)
from minidiff.classification.assess import facts
from minidiff.data.subset import first_patients
from minidiff.errors import InputError

NAMES = ("real", "real-plain", "real+duplicates", "real+2xduplicates", "real+synthetic",
         "real+.5xsynthetic",
         "synthetic", "synthetic-then-real", "real@2+1xsynthetic", "real-strong-even@3",
         "real-then-real", "real-then-real-strong@2")


def made(name, real, synthetic, **knobs):
    knobs = {"positive": "light", "seed": 0, **knobs}
    return training_set(parse(name, ["synthetic"]), real, {"synthetic": synthetic}, **knobs)


def test_arms_hold_what_their_names_say():
    real, synthetic = toy((10, 4, 6), 1), toy((9, 9, 9), 2)
    sizes = {name: [stage.labels.bincount(minlength=3).tolist()
                    for stage in made(name, real, synthetic)] for name in NAMES}
    assert sizes == {"real": [[10, 4, 6]], "real-plain": [[10, 4, 6]],
                     "real+duplicates": [[19, 13, 15]], "real+2xduplicates": [[18, 12, 14]],
                     "real+synthetic": [[19, 13, 15]], "real+.5xsynthetic": [[12, 6, 8]],
                     "synthetic": [[9, 9, 9]], "synthetic-then-real": [[9, 9, 9], [10, 4, 6]],
                     "real@2+1xsynthetic": [[12, 4, 8]], "real-strong-even@3": [[10, 3, 6]],
                     "real-then-real": [[10, 4, 6]] * 2,
                     "real-then-real-strong@2": [[10, 2, 6]] * 2}


def test_duplicates_are_real_ones_under_their_own_labels_in_rounds():
    real, synthetic = toy((10, 4, 6), 1), toy((3, 9, 6), 2)
    (duplicates,), (added,) = (made(name, real, synthetic)
                               for name in ("real+duplicates", "real+synthetic"))
    # label by label, not only in all
    assert torch.equal(duplicates.labels.bincount(), added.labels.bincount())
    assert torch.equal(duplicates.pixels[:20], real.pixels)
    assert {x.numpy().tobytes() for x in added.pixels[20:]} == {x.numpy().tobytes()
                                                                for x in synthetic.pixels}
    own = {x.numpy().tobytes(): int(y) for x, y in zip(real.pixels, real.labels)}
    repeats = [x.numpy().tobytes() for x in duplicates.pixels[20:]]
    assert [own[x] for x in repeats] == duplicates.labels[20:].tolist()
    light = [x for x in repeats if own[x] == 1]
    assert sorted(light.count(x) for x in set(light)) == [2, 2, 2, 3]          # 9 of 4
    again, other = (made("real+duplicates", real, synthetic, seed=s)[0] for s in (0, 1))
    assert torch.equal(duplicates.pixels[:], again.pixels[:]) and not torch.equal(
        duplicates.pixels[:], other.pixels[:])


def test_subsets_are_whole_patients_and_one_inside_the_other():
    labels, patients = ["covid"] * 40 + ["normal"] * 10, [f"p{i // 3}" for i in range(40)] + [
        f"n{i}" for i in range(10)]
    kept = {n: first_patients(labels, patients, {"covid": n}, seed=1) for n in (5, 12, 25, 40)}
    for n, rows in kept.items():
        covid = [i for i in rows if labels[i] == "covid"]
        assert n - 3 < len(covid) <= n and set(range(40, 50)) <= set(rows)
        assert all((i in rows) == (j in rows) for i in range(40) for j in range(40)
                   if patients[i] == patients[j])
    assert set(kept[5]) < set(kept[12]) < set(kept[25]) < set(kept[40]) == set(range(50))
    assert first_patients(labels, patients, {"covid": 25}, seed=2) != kept[25]


def test_a_label_of_interest_counts_wherever_it_is_one_of_several_findings():
    """light|odd is an image of light: `real@3` leaves three of both kinds together."""
    real, synthetic = toy((10, 8, 6), 1), toy((20, 20, 20), 2)
    rows = [{**row, "label": "light|odd"} if row["label"] == "light" and i % 2
            else row for i, row in enumerate(real.rows)]
    (kept,) = made("real@3", replace(real, rows=rows), synthetic)
    cells = [row["label"] for row in kept.rows]
    assert len(cells) == 19 and sum("light" in cell for cell in cells) == 3


def validation(most, train, val, seed=0):
    own = validation_set(parse(f"real@{most}", []), train, val, positive="light", seed=seed)
    return own.patients, own.labels.bincount(minlength=3).tolist()


def test_few_images_to_train_with_are_few_to_choose_with():
    """The share of training's, by whole patients, one inside the other; the other labels stay."""
    train, val = toy((50, 40, 30), 1, per_patient=2), toy((12, 20, 9), 2, per_patient=2)
    kept = {most: validation(most, train, val) for most in (1, 4, 10, 20, 39, 40, 99)}
    assert [counts for _, counts in kept.values()] == [
        [12, n, 9] for n in (2, 2, 4, 10, 20, 20, 20)]  # half of 5 images is 2 patients of 2
    for fewer, more in zip(kept, list(kept)[1:]):
        assert set(kept[fewer][0]) <= set(kept[more][0]) <= set(val.patients)
    assert validation(10, train, val, seed=1)[0] != kept[10][0]
    whole = validation_set(parse("real-even", []), train, val, positive="light", seed=0)
    assert whole is val


def test_findings_are_counted_among_others_in_validation_too():
    train, val = toy((9, 12, 9), 1), toy((9, 8, 9), 2)
    rows = [{**row, "label": "light|odd"} if row["label"] == "light" and i % 2 else row
            for i, row in enumerate(val.rows)]
    own = validation_set(parse("real@6", []), train, replace(val, rows=rows), positive="light",
                         seed=0)
    assert sum("light" in row["label"] for row in own.rows) == 4 and len(own) == 22


def test_whole_patients_of_too_many_images_are_refused_rather_than_none_taken():
    with pytest.raises(InputError, match="2 images of 'light' by whole patients: the first "
                       "patient, 1-.*, has 4"):
        made("real@2", toy((8, 8, 8), 1, per_patient=4), toy((3, 3, 3), 2))


@pytest.mark.parametrize("name, words", [
    ("best", "allowed are real"),
    ("real+other", "no folder is named 'other'; there are: synthetic"),
    ("other-then-real", "no folder is named"), ("real-plain-strong", "plain or strong"),
    ("real@0", "above 0"), ("real+0xsynthetic", "above 0"),
    ("synthetic-then-real+duplicates", "before the real ones or beside"),
    ("real-then-real+1xsynthetic", "before the real ones or beside"),
    ("real-strong-then-real", "allowed are"),
    ("real-even-even", "each word once"), ("real+", "allowed are"), ("../real", "allowed are"),
])
def test_names_that_mean_nothing_are_refused(name, words):
    with pytest.raises(InputError, match=words.replace("+", r"\+")):
        parse(name, ["synthetic"])


def test_a_folder_with_too_few_images_is_named():
    with pytest.raises(InputError, match="needs 12 images of 'dark'; synthetic has 3"):
        made("real+3xsynthetic", toy((10, 4, 6), 1), toy((3, 9, 6), 2))
    with pytest.raises(InputError, match="say how many duplicates"):
        training_set(parse("real+duplicates", []), toy((3, 3), 1), {}, positive="light", seed=0)


def test_each_arm_is_held_against_its_control():
    names = ("real", "real-plain", "real+1xduplicates", "real+5xduplicates", "real+1xsynthetic",
             "real+4xsynthetic",
             "synthetic", "synthetic-then-real", "real@25", "real@25+1xsynthetic", "real-even@25")
    pairs = comparisons([parse(name, ["synthetic"]) for name in names])
    against = {name: [b for a, b in pairs if a == name] for name in names}
    assert against["real"] == [] and against["real-plain"] == against["real@25"] == against[
        "real+5xduplicates"] == ["real"]
    assert against["real+1xsynthetic"] == ["real+1xduplicates", "real"]
    # the nearest in number
    assert against["real+4xsynthetic"] == ["real+5xduplicates", "real"]
    assert against["real@25+1xsynthetic"] == against["real-even@25"] == [
        "real@25"] and "real" in against["synthetic"]
    assert against["synthetic-then-real"][-1] == "real"


def test_images_before_the_real_ones_are_held_against_real_ones_before_them():
    """Of the same words and number of real images, and beside the usual base."""
    names = ["real", "real-strong", "real@25", "real-then-real", "real-then-real-strong",
             "real-then-real@25", "synthetic-then-real", "synthetic-then-real-strong",
             "synthetic-then-real@25"]
    pairs = comparisons([parse(name, ["synthetic"]) for name in names])
    for words in ("", "-strong", "@25"):
        assert [b for a, b in pairs if a == f"synthetic-then-real{words}"] == [
            f"real{words}", f"real-then-real{words}"]
        assert [b for a, b in pairs if a == f"real-then-real{words}"] == [f"real{words}"]


def test_even_weights_leave_no_association_of_label_and_view():
    images = toy((40, 9, 20), 3)
    views = ["AP" if (row["label"] == "light") != (i % 7 == 0)
             else "PA" for i, row in enumerate(images.rows)]
    rows = [{**row, "view": view} for row, view in zip(images.rows, views)]
    weights, cells = even_weights(replace(images, rows=rows), ["view"]), {}
    for row, w in zip(rows, weights.tolist()):
        cells[row["label"], row["view"]] = cells.get((row["label"], row["view"]), 0) + w
    assert len(cells) == 6 and all(w == pytest.approx(69 / 6)
                                   for w in cells.values()) and weights.mean() == pytest.approx(1)
    plain = even_weights(images, [])
    assert [plain[images.labels == k].sum().item() for k in range(3)] == pytest.approx([23] * 3)


def test_what_the_generator_saw_and_the_arm_did_not():
    def extra(name, saw):
        data = SimpleNamespace(sets={"train": real}, saw={"synthetic": saw},
                               others=frozenset())
        return facts(data, parse(name, ["synthetic"]), SimpleNamespace(positive="light", seed=0),
                     [0, 1])

    real = toy((5, 3), 1)
    more = extra("real+1xsynthetic", {*real.hashes, "a", "b"})
    assert (more["generator_extra"], more["real"]) == (2, 8)
    assert more["remark"] == "generator saw 2 more real images than this arm"
    assert extra("real+1xsynthetic", set(real.hashes))["generator_extra"] == 0
    fewer = extra("real@2+2xsynthetic", set(real.hashes))
    assert (fewer["generator_extra"], fewer["real"]) == (1, 7)
    assert extra("synthetic", None)["generator_extra"] is None
    assert extra("real", None)["generator_extra"] == 0
    again = extra("real-then-real", None)
    assert (again["generator_extra"], again["added_kind"], again["real"]) == (0, "duplicates", 8)
    assert parse("real@25+2xsynthetic", ["synthetic"]).base == "real@25"
