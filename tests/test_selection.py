"""What selected the images is on record, and what it decided is not tested by it."""

import pytest
from test_answers import NORMAL, answers, rows, share

from minidiff.evaluation import selection
from minidiff.evaluation.pages import answers as worded
from minidiff.evaluation.verdicts import in_any, in_every, verdicts
from minidiff.runs import write_json

LABEL = "Do the images show the label that was asked for?"
BY_ANOTHER = "Do the images show the label that was asked for, by an independent judge?"
COPIES = "Are the images new, not copies of training images?"
JUDGE = {"judge": "own", "sha256": "j"}


def read(k, judge):
    return [{**share(n, 100, which), "judge": judge}
            for n, which in ((99, "held-out real"), (k, "synthetic"))]


def report(*filters, **more):
    return {"distances": [], "judges": [JUDGE], "samples": {"filters": filters},
            "agreement": read(100, "own"), **more}


def recognised(judge):
    return {"by": "recognised", "judge": judge, "rejects": 9, "classifier": "c"}


NEW = {"by": "new", "judge": None, "rejects": 4}


def test_a_judge_does_not_test_the_labels_that_it_filtered():
    assert answers(report()) == {LABEL: "yes"}
    assert answers(report(recognised("j"))) == {LABEL: "not tested"}
    # by whom is not written down; by another judge
    assert answers(report(recognised(None))) == {LABEL: "not tested"}
    assert answers(report(recognised("k"))) == {LABEL: "yes"}
    assert answers(report(NEW)) == {LABEL: "yes"}
    # a no stands, and attributes were not looked at
    filtered = report(recognised("j"), agreement=read(50, "own"))
    assert answers(filtered) == {LABEL: "no"}
    sex = [{**share(k, 100, which, "sex"), "judge": "own"}
           for k, which in ((90, "held-out real"), (90, "synthetic"))]
    assert list(answers(report(recognised("j"), agreement=sex)).values()) == ["yes"]


@pytest.mark.parametrize("k,answer", [(98, "yes"), (50, "no")])
def test_an_independent_judge_answers_in_its_place(k, answer):
    both = read(100, "own") + read(k, "independent")
    assert answers(report(agreement=both)) == {LABEL: "yes", BY_ANOTHER: answer}
    assert answers(report(recognised("j"), agreement=both)) == {BY_ANOTHER: answer}
    (row,) = worded(verdicts(report(recognised("j"), agreement=both)))
    assert "(the independent judge) sees" in row["text"]


def test_filtered_near_copies_leave_copies_untested():
    found = {"verdict": "no sign of copying", "suspected": False, "spaces": []}
    for filters, suspected, answer in (((), False, "yes"), ((NEW,), False, "not tested"),
                                       ((NEW,), True, "no"), ((NEW,), None, "not resolved"),
                                       ((recognised("j"),), False, "yes")):
        result = report(*filters, agreement=[], neighbours={**found, "suspected": suspected})
        assert answers(result) == {COPIES: answer}
    (row,) = worded(verdicts(report(NEW, agreement=[], neighbours=found)))
    assert "(--keep new: 4 rejected)" in row["text"]


def test_likeness_is_not_tested_in_the_features_of_the_filter():
    pixels = rows()
    seen = [{**r, "extractor": "classifier"} for r in pixels]
    farther = [{**r, "extractor": "classifier"} for r in rows(4.0)]

    def said(*distances):
        return answers(report(recognised("j"), agreement=[], distances=sum(distances, [])))[NORMAL]

    assert said(seen) == "not tested"
    assert said(pixels, seen) == "yes" and said(farther) == "no" and said(pixels, farther) == "no"


def test_what_is_not_tested_has_no_say():
    assert [rule(said) for rule in (in_any, in_every) for said in (
        ["not tested"], ["not tested", "yes"], ["not tested", "no"],
        ["not tested", "not resolved"])] == 2 * ["not tested", "yes", "no", "not resolved"]


def test_a_checkpoint_that_was_picked_is_judged_on_test_images(tmp_path):
    assert selection.held_out([tmp_path]) == (("val", "test"), [])
    write_json(tmp_path / "manifest.json", {"checkpoint": None})
    assert selection.held_out([tmp_path]) == (("val", "test"), [])
    write_json(tmp_path / "manifest.json", {"checkpoint": 130})
    splits, (note,) = selection.held_out([tmp_path])
    assert splits == ("test",) and "the checkpoint of step 130" in note
    for step, expected in ((None, ("val", "test")), (90, ("test",))):
        write_json(tmp_path / "best" / "model.json", {"step": step} if step else {})
        assert selection.held_out([], tmp_path / "best")[0] == expected
    assert selection.held_out([], tmp_path / "none") == (("val", "test"), [])


def test_an_older_folder_says_only_that_it_was_filtered(tmp_path):
    write_json(tmp_path / "manifest.json", {"yield": 0.5})
    write_json(tmp_path / "config.json", {"keep": ["recognised"]})
    found = selection.of(tmp_path)
    assert found["filters"] == [{"by": "recognised", "judge": None, "rejects": None}]
    assert selection.decided(found["filters"], "any").keys() == {"label", "classifier"}
    assert selection.decided(found["filters"], None) == {}
    assert selection.of(tmp_path / "elsewhere")["filters"] == []
