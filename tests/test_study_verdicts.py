"""The words of a study: yes only where the design allows it, and why a question stays open."""

import copy

import pytest
from study_figures import SENTENCE, make, with_shortcut

from minidiff.evaluation.study_verdicts import answers, open_because, primary_answer


@pytest.fixture(scope="module")
def study():
    return make()


def answer(summary, **change):
    """The answer about synthetic images on the internal set by AUROC, after a change of one pair,
    arm or else.
    """
    summary = copy.deepcopy(summary)
    rows = summary["differences"]["test"] = [
        {**d, "difference": 0.02, "interval": [-0.01, 0.05], "p_holm": 0.3, "resolved": False,
         "patients_needed": 1234} for d in summary["differences"]["test"]]
    for d in rows:
        if (d["arm"], d["against"]) in change.get("pairs", {}):
            d |= {"difference": (gain := change["pairs"][d["arm"], d["against"]]),
                  "interval": [gain - 0.01, gain + 0.01], "p_holm": 0.01, "resolved": True}
    for row in summary["arms"]:
        row |= change.get("arms", {}).get(row["arm"], {})
    if "keep" in change:
        summary["differences"]["test"] = [d for d in rows if d["against"] in change["keep"]]
    if change.get("shortcut"):
        summary = with_shortcut(summary)
    return next(row for row in answers(summary) if "Internal test set, AUROC" in row.question)


ONE, TWO = (("real+1xsynthetic", "real+1xduplicates"), ("real+2xsynthetic", "real+2xduplicates"))


def test_the_answer_is_yes_only_over_as_many_duplicates_with_a_generator_that_saw_no_more(study):
    summary = study[0]
    kind, said, _, text = answer(summary, pairs={ONE: 0.04})
    assert (kind, said) == ("yes", "yes")
    assert "Better: real+1xsynthetic +0.040 (+0.030 to +0.050)." in text
    assert ("Not resolved with 37 patients: real+2xsynthetic +0.020 (−0.010 to +0.050), about "
            "1,200 patients") in text
    # without real images it is another question
    assert "synthetic +0" not in text.replace("xsynthetic +0", "")
    assert answer(summary)[:2] == ("open", "not resolved")
    assert answer(summary, pairs={("real+1xsynthetic", "real"): 0.04})[:2] == ("open",
                                                                               "not resolved")
    for extra in (54, None):
        kind, said, _, text = answer(summary, pairs={ONE: 0.04}, arms={
            "real+1xsynthetic": {"generator_extra": extra, "remark": "generator saw some more"}})
        assert (kind, said) == ("open", "not shown") and "[generator saw some more]" in text
    kind, said, _, text = answer(summary, pairs={ONE: 0.04},
                              arms={"real+1xduplicates": {"n_train": 400}})
    assert (kind, said) == ("open", "not shown")
    assert "[not count-matched: 537 images, real+1xduplicates has 400]" in text


def test_harm_is_said_where_every_ratio_is_resolved(study):
    assert answer(study[0], pairs={ONE: -0.04, TWO: -0.05})[:2] == ("no", "no, harmed")
    kind, said, _, text = answer(study[0], pairs={ONE: -0.04})
    assert (kind, said) == ("open", "not resolved") and "Worse: real+1xsynthetic −0.040" in text


def test_without_duplicates_it_is_not_tested(study):
    kind, said, _, text = answer(study[0], keep=("real",))
    assert (kind, said) == ("open", "not tested") and "real+1xsynthetic minus real: +0.020" in text


def test_why_a_difference_is_open():
    d = {"difference": 0.02, "interval": [-0.01, 0.05], "p_holm": 0.3, "seeds": 3, "seeds_agree": 3,
         "patients_needed": 640}
    assert open_because(d) == "about 640 patients would be needed"
    assert open_because({**d,
                         "patients_needed": 3_210_000}) == "over a million patients would be needed"
    assert open_because({**d, "interval": [0.0, 0.0],
                         "patients_needed": None}) == "no difference at all"
    assert open_because({**d, "interval": [0.01, 0.05]}) == "p is 0.300 after Holm’s correction"
    assert open_because({**d, "interval": [0.01, 0.05], "p_holm": 0.01,
                         "seeds_agree": 2}).startswith("only 2 of 3 seeds")
    for nothing in ({"difference": None}, {"interval": [None, None]}):
        assert open_because({**d, **nothing}) == "cannot be measured here"


def test_a_shortcut_is_said_and_casts_doubt_on_a_gain(study):
    summary = with_shortcut(study[0])
    kind, said, question, text = answers(summary)[0]
    assert (kind, said) == ("no", "SHORTCUT") and text.startswith(SENTENCE)
    assert "external set clinic with AUROC" in text
    assert answers(study[0])[0][:2] == ("yes", "none found")
    assert answer(study[0], pairs={ONE: 0.04}, shortcut=True)[:2] == ("open", "yes, by SHORTCUT?")


@pytest.mark.parametrize("word,found", [("gain", ("yes", "yes")), ("harm", ("no", "no")),
                                        ("not resolved", ("open", "not resolved"))])
def test_gain_and_harm_become_yes_and_no(word, found):
    primary = {"arm": "a", "against": "b", "test_set": "test", "metric": "auroc", "answer": word,
               "difference": 0.02, "interval": [0.01, 0.03], "seeds": 1, "patients": 300,
               "sees": 0.03, "times": 1.0}
    said = primary_answer(primary, "covid")
    assert said[:2] == found
    assert "is a better than b? By AUROC, covid, on the internal test set." in said.question
    assert said.text.startswith("+2.0 points (+1.0 to +3.0); ") and "1 seed of" in said.text


def test_an_external_set_is_held_against_chance(study):
    summary = copy.deepcopy(study[0])
    for low, high, found in ((0.6, 0.9, ("yes", "above chance")), (0.4, 0.9, ("open",
                             "not resolved")), (0.1, 0.4, ("no", "below chance"))):
        for row in summary["arms"]:
            row["ensemble"]["auroc_interval_patients"]["covid"] = [low, high]
        said = answers(summary)[1]
        assert said[:2] == found and "covid recognised on the external set clinic" in said.question
        assert said.text.startswith("AUROC of real: ")
        assert said.text.endswith("on the internal test set.")
