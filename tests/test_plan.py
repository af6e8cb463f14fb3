"""The plan of a set: conditions as in the training rows of the label, or independent of it."""

import re
from collections import Counter

import pytest

from minidiff import variables as var
from minidiff.diffusion import store
from minidiff.errors import InputError
from minidiff.sampling.plan import encode, plan, plan_rows, spelled


def test_conditions_come_from_training_rows_of_the_label(tiny):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    rows = plan(pipeline.conditioner.variables, facts["rows"], per_label=200)
    known = {tuple(row.values()) for row in facts["rows"]}
    assert all((r["label"], r["sex"], r["age"], r["view"]) in known for r in rows)
    for name in ("normal", "covid"):
        of_label = [row for row in rows if row["label"] == name]
        pool = [row for row in facts["rows"] if row["label"] == name]
        for column in ("sex", "view"):
            # the shares are those of the real rows, to within one place
            for value in ("F", "M", "", "AP", "PA"):
                real, made = (sum(r[column] == value for r in some) / len(some)
                              for some in (pool, of_label))
                assert abs(real - made) <= 0.02, (name, column, value, real, made)
    assert [r["set"] for r in rows] == [str(i // 100 + 1) for i in range(600)]
    fixed = plan(pipeline.conditioner.variables, facts["rows"], labels=("covid",),
                 given=("sex=F", "age="))
    assert {(r["label"], r["sex"], r["age"])
            for r in fixed} == {("covid", "F", "")} and len({r["view"] for r in fixed}) == 2


def test_sets_hold_all_labels_and_ranges_are_spread(tiny):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    variables = pipeline.conditioner.variables
    rows = plan(variables, facts["rows"], sets=2, given=("age=60:80", "sex=null"))
    assert len(rows) == 200 and [r["set"] for r in rows] == ["1"] * 100 + ["2"] * 100
    for number in ("1", "2"):
        counts = Counter(r["label"] for r in rows if r["set"] == number)
        assert max(counts.values()) - min(counts.values()) <= 1
    ages = sorted(float(r["age"]) for r in rows if r["label"] == "covid")
    assert 60 < ages[0] < 61 and 79 < ages[-1] < 80 and max(b - a
                                                            for a, b in zip(ages, ages[1:])) < 0.4
    assert (encode(variables, rows)["sex"] == var.NULL).all()


SICK = [var.Category("label", ("covid", "normal")), var.Category("source", ("A", "B")),
        var.Number("age", 50, 20, 0, 99), var.Category("view", ("AP", "PA"))]


def confounded() -> list[dict]:
    """40 of covid, 3 in 4 from hospital A, where patients are old; 160 normal, 1 in 4 from A; covid
    is AP, mostly.
    """
    rows = []
    for label, n, from_a, ap in (("covid", 40, 30, 36), ("normal", 160, 40, 16)):
        for k in range(n):
            source = "A" if k < from_a else "B"
            rows.append({"label": label, "source": source,
                         "age": str((60 if source == "A" else 20) + k % 10),
                         "view": "AP" if k * 7 % n < ap else "PA"})
    return rows


@pytest.mark.parametrize("how, n", [({"per_label": 48}, 48), ({"sets": 2}, 100),
                                    ({"per_label": 48, "seed": 5}, 48)])
def test_independent_conditions_are_the_same_list_for_every_label(how, n):
    known = confounded()
    rows = plan(SICK, known, independent=("source", "age"), **how)
    alike = {label: [(r["source"], r["age"]) for r in rows if r["label"] == label]
             for label in ("covid", "normal")}
    assert alike["covid"] == alike["normal"] and len(alike["covid"]) == n
    # jointly: no young patient of A
    assert set(alike["covid"]) <= {(r["source"], r["age"]) for r in known}
    a = sum(source == "A" for source, _ in alike["covid"])
    # each label weighs the same
    assert abs(a / n - (30 / 40 + 40 / 160) / 2) <= 1 / n
    # the rest is as in its own rows
    for label, share in (("covid", 36 / 40), ("normal", 16 / 160)):
        ap = sum(r["view"] == "AP" for r in rows if r["label"] == label)
        # one place in each hospital
        assert abs(ap / n - share) <= 2 / n
    # and so in each set alone
    for number in {r["set"] for r in rows} if "sets" in how else ():
        pairs = Counter((r["label"], r["source"], r["age"]) for r in rows if r["set"] == number)
        assert all(pairs["covid", source, age] == pairs["normal", source, age]
                   for _, source, age in pairs)


def test_independent_draws_depend_on_their_number_and_seed_only():
    known, how = confounded(), {"independent": ("source",), "per_label": 20}
    both, alone = plan(SICK, known, **how), plan(SICK, known, labels=("normal",), **how)
    assert [r["source"] for r in both if r["label"] == "normal"] == [r["source"] for r in alone]
    assert plan(SICK, known, **how) == both != plan(SICK, known, seed=1, **how)
    given = plan(SICK, known, given=("view=PA",), **how)
    assert {r["view"] for r in given} == {"PA"} and [r["source"] for r in given] == [r["source"]
                                                                                     for r in both]
    plain = plan(SICK, known, per_label=20)
    # without it, the label tells
    assert Counter(r["source"] for r in plain if r["label"] == "covid") == {"A": 15, "B": 5}
    three = [var.Category("label", ("covid", "normal", "other")), *SICK[1:]]
    uneven = plan(three, known + [{**r, "label": "other"} for r in known[:7]], sets=1,
                  independent=("source",))
    by_label = [[r["source"] for r in uneven if r["label"] == label] for label in three[0].values]
    assert [len(some)
            for some in by_label] == [34, 33, 33] and by_label[0][:33] == by_label[1] == by_label[2]


def test_a_csv_asks_for_rows_one_by_one(tiny, tmp_path):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    variables = pipeline.conditioner.variables
    wanted = tmp_path / "wanted.csv"
    wanted.write_text("label,age,n\ncovid,60,2\nnull,,1\n,null,1\n")
    rows = plan_rows(str(wanted), variables, facts["rows"])
    # a folder of samples cannot be read with an empty label, which training never saw either
    assert [r["label"] for r in rows] == ["covid", "covid", "any",
                                          "any"] and [r["seed"] for r in rows] == list("0123")
    labels = encode(variables, rows)
    assert labels["label"].tolist() == [0, 0, var.NULL,
                                        var.NULL] and labels["age"][:2].tolist() == [60, 60]
    for text, said in (("label,label\na,b\n", "two columns label"),
                       ("label,colour\na,b\n", "no such condition: colour"), ("label\n", "no rows"),
                       ("label,age\ncovid\n", ":2: 1 cells where the header has 2"),
                       ("label\ncovit\n", "line 2: label 'covit' is not one of"),
                       ("label,n\ncovid,0\n", "n '0'")):
        wanted.write_text(text)
        with pytest.raises(InputError, match=re.escape(said)):
            plan_rows(str(wanted), variables, facts["rows"])


def test_every_set_holds_all_labels_as_evenly_as_they_go(tiny):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    for how in ({"per_label": 100}, {"sets": 3}):
        rows = plan(pipeline.conditioner.variables, facts["rows"], **how)
        for number in ("1", "2", "3"):
            counts = Counter(row["label"] for row in rows if row["set"] == number)
            assert len(rows) == 300 and sorted(counts.values()) == [33, 33, 34], how


def test_conditions_are_written_as_the_model_spells_them(tiny):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    rows = plan(pipeline.conditioner.variables, facts["rows"], labels=("Covid",), per_label=2,
                given=("sex=female",))
    assert {(r["label"], r["sex"])
            for r in rows} == {("covid", "F")} and rows[0]["file_name"] == "images/covid/000000.png"


def test_cells_are_written_as_the_model_spells_them():
    seen = var.Findings("seen", ("Edema", "Effusion"))
    _, source, age, view = SICK
    for variable, cell, written in (
            (age, "060Y", "60"), (age, "6M", "0.5"), (age, "55.0", "55.0"),
            (age, "6M:060Y", "0.5:60"), (age, "", ""), (age, "null", "null"),
            (view, "antero-posterior", "AP"), (source, "b", "B"),
            (seen, "edema; effusion", "Edema|Effusion"), (seen, "none", "none"),
            (seen, "Edema, Effusion", "Edema|Effusion")):
        assert spelled(variable, cell) == written
