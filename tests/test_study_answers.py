"""The words of a study: alike for gain and harm, and the same on every page."""

import copy

import pytest
from study_figures import SENTENCE, make, with_shortcut

from minidiff.classification.compare import Primary
from minidiff.evaluation import pages
from minidiff.evaluation.pages.study_answers import answers
from minidiff.evaluation.study_verdicts import of_many, said
from minidiff.evaluation.verdicts import KINDS, verdicts

ONE, TWO = (("real+1xsynthetic", "real+1xduplicates"), ("real+2xsynthetic", "real+2xduplicates"))
SIGNS = pytest.mark.parametrize("word,sign", [("gain", 1), ("harm", -1)])


@pytest.fixture(scope="module")
def study():
    return make()[0]


def changed(summary, pairs=(), arms=None, keep=None, shortcut=False):
    """The summary with these differences of balanced accuracy resolved and no other, said anew."""
    summary = with_shortcut(summary) if shortcut else copy.deepcopy(summary)
    for rows in summary["differences"].values():
        for d in rows:
            d |= {"difference": 0.02, "interval": [-0.01, 0.05], "p": 0.3, "p_holm": 0.3,
                  "answer": "not resolved", "sees": 0.04, "patients_needed": 1234}
            size = dict(pairs).get((d["arm"], d["against"]))
            if size and d["test_set"] == "test" and d["metric"] == "balanced_accuracy":
                d |= {"difference": size, "interval": [size - 0.01, size + 0.01], "p_holm": 0.01,
                      "answer": "gain" if size > 0 else "harm"}
    for row in summary["arms"]:
        row |= (arms or {}).get(row["arm"], {})
    if keep:
        summary["differences"] = {name: [d for d in rows if d["against"] == keep]
                                  for name, rows in summary["differences"].items()}
    return said(summary)


def about(summary, question="Internal test set, balanced accuracy"):
    """(kind, answer, text) of the question that begins so."""
    (found,) = (row for row in answers(summary) if row.question.startswith(question))
    return found.kind, found.answer, found.text


@SIGNS
def test_gain_and_harm_are_said_alike(study, word, sign):
    kind, answer, text = about(changed(study, {ONE: 0.04 * sign}))
    assert (kind, answer) == ({"gain": "yes", "harm": "no"}[word], word)
    ends = "+4.0 points (+3.0 to +5.0)" if sign > 0 else "−4.0 points (−5.0 to −3.0)"
    assert text.splitlines() == [
        f"{word.capitalize()}: real+1xsynthetic {ends}.",
        "Not resolved with 37 patients: real+2xsynthetic +2.0 points (−1.0 to +5.0) [detectable: "
        "4.0 points; needed: about 1,200 patients]."]
    assert about(changed(study))[:2] == ("open", "not resolved")
    # against real images alone, more images may be the reason; and it is another question
    summary = changed(study, {("real+1xsynthetic", "real"): 0.04 * sign})
    assert about(summary)[:2] == ("open", "not resolved")
    (d,) = (d for d in summary["differences"]["test"] if d["doubts"])
    assert (d["answer"], d["doubts"], d["n_train"]) == ("not shown", ["count"], [537, 300])


def test_a_gain_beside_a_harm_is_neither(study):
    assert about(changed(study, {ONE: 0.04, TWO: -0.05}))[:2] == ("open", "gain and harm")
    assert about(changed(study, {ONE: -0.04, TWO: -0.05}))[:2] == ("no", "harm")
    assert [of_many(words) for words in (["not tested"], ["not tested", "not resolved"], [],
                                         ["not shown", "not resolved"], ["not shown", "harm"],
                                         ["no gain of interest", "not tested"])] == [
        "not tested", "not resolved", "not tested", "not shown", "harm", "no gain of interest"]


@SIGNS
def test_other_reasons_than_the_images_are_named_for_either_sign(study, word, sign):
    resolved = {ONE: 0.04 * sign}
    kind, answer, text = about(changed(study, resolved,
                                       arms={"real+1xduplicates": {"n_train": 400}}))
    assert (kind, answer) == ("open", "not shown")
    assert "the arms have 537 and 400 images." in text
    kind, answer, text = about(changed(study, resolved, shortcut=True))
    assert (kind, answer) == ("open", "not shown") and "SHORTCUT: on this set" in text
    # elsewhere the shortcut of the training hospitals is none
    elsewhere = changed(study, resolved, shortcut=True)["differences"]["clinic"]
    assert not any(d["doubts"] for d in elsewhere)
    # in two stages, the same looks and restarts make up for the number of images
    staged = {"real+1xsynthetic": {"stages": 2}, "real+1xduplicates": {"stages": 2, "n_train": 400}}
    assert about(changed(study, resolved, arms=staged))[1] == word


@SIGNS
@pytest.mark.parametrize("extra", [54, None])
def test_a_generator_that_saw_more_casts_doubt_where_its_arm_is_better(study, word, sign, extra):
    """Real images that it alone saw may be the reason of its gain, and never of its harm."""
    saw = {"real+1xsynthetic": {"generator_extra": extra}}
    _, answer, text = about(changed(study, {ONE: 0.04 * sign}, arms=saw))
    assert answer == ("not shown" if word == "gain" else "harm")
    assert ("a generator saw, or may have seen" in text) == (word == "gain")
    # the other way round, it is the better one in a harm
    summary = changed(study, {ONE: 0.04 * sign}, arms={"real+1xduplicates": {
        "generator_extra": extra, "added_kind": "synthetic"}})
    (d,) = (d for d in summary["differences"]["test"] if (d["arm"], d["against"]) == ONE
            and d["metric"] == "balanced_accuracy")
    assert d["answer"] == ("gain" if word == "gain" else "not shown")


@SIGNS
def test_duplicates_minus_synthetic_images_answers_the_same_question(study, word, sign):
    """As a primary comparison may be declared."""
    straight, turned = changed(study, {ONE: 0.04 * sign}), changed(study, {ONE[::-1]: -0.04 * sign})
    for d in turned["differences"]["test"]:
        if (d["arm"], d["against"]) == ONE:
            d |= {"arm": ONE[1], "against": ONE[0]}
            if d["metric"] == "balanced_accuracy":
                d |= {"difference": -0.04 * sign, "p_holm": 0.01,
                      "interval": [-0.04 * sign - 0.01, -0.04 * sign + 0.01],
                      "answer": "harm" if sign > 0 else "gain"}
    assert about(said(turned)) == about(straight)
    excluded = copy.deepcopy(turned)
    for d in excluded["differences"]["test"]:
        d["answer"] = "no gain of interest"   # of the duplicates
    assert about(said(excluded))[2].startswith("Not resolved with 37 patients: real+1xsynthetic")


def test_without_duplicates_it_is_not_tested(study):
    kind, answer, text = about(changed(study, keep="real"))
    assert (kind, answer) == ("open", "not tested")
    assert "No arm had duplicates" in text and "real+1xsynthetic minus real: +2.0 points" in text


def test_why_a_difference_is_open(study):
    for change, words in (
            ({"p": None}, "[fewer than 3 seeds]"),
            ({"p": None, "generators": 2}, "[fewer than 3 generators]"),
            ({"p": None, "patients": 1}, "Not resolved with 1 patient: real+1xsynthetic +2.0 "
                                         "points (−1.0 to +5.0) [one patient]"),
            ({"p": 1.0, "sees": None}, "[no difference at all]"),
            ({"difference": None, "p": None}, "– [cannot be measured here]"),
            ({"sees": 1.2}, "[detectable: ≥ 100 points; needed: about 1,200 patients]"),
            ({"patients_needed": 3_210_000}, "; needed: over a million patients]")):
        summary = changed(study)
        for d in summary["differences"]["test"]:
            d |= change
        assert words in about(summary)[2], words


@pytest.mark.parametrize("metric,worth,shown", [
    ("balanced_accuracy", 0.0, "gain"), ("auroc", 0.0, "not resolved"),
    ("balanced_accuracy", 40.0, "no gain of interest"), ("auroc", 90.0, "no gain of interest")])
def test_the_primary_comparison_has_one_answer_on_both_pages(metric, worth, shown):
    primary = Primary("real+1xsynthetic", "real+1xduplicates", "test", metric)
    summary, _ = make(primary=primary, worth=worth)
    row = summary["primary"]
    assert row["answer"] == shown and row in summary["differences"]["test"]
    first = answers(summary)[0]
    (told,) = pages.answers(verdicts({"distances": [], "study": summary}))
    assert tuple(told.values()) == (first.question, first.answer, first.text)
    assert first.kind == KINDS[shown]
    assert first.question == "Did synthetic training images help a classifier (test set)?"
    assert "real+1xsynthetic minus real+1xduplicates" in first.text
    assert "37 patients and 3 seeds" in first.text and "for this one generator" in first.text
    assert ("in four of five such studies" in first.text) == (shown == "not resolved")
    excluded = "0.900" if metric == "auroc" else "40.0 points"
    assert (f"A gain of {excluded} is excluded." in first.text) == (shown == "no gain of interest")
    untested = {d["answer"] for rows in summary["differences"].values() for d in rows
                if not d["primary"]}
    if shown == "not resolved":
        assert untested == {"not tested"}
        _, word, text = about(summary)
        assert word == "not tested" and text.startswith(
            "Not tested, because the primary comparison is not resolved: "
            "real+1xsynthetic +10.6 points")
        assert "detectable" not in text


def test_a_primary_comparison_of_other_arms_is_asked_about_them():
    summary, _ = make(primary=Primary("real-plain", "real", "clinic", "auroc"))
    assert answers(summary)[0].question == "Is real-plain better than real (clinic set)?"
    assert "one generator" not in answers(summary)[0].text
    summary, _ = make(primary=Primary("synthetic", "real+1xduplicates"))
    assert answers(summary)[0].question == "Is synthetic better than real+1xduplicates (test set)?"


def test_without_a_primary_comparison_both_pages_say_the_same_of_every_set(study):
    summary = changed(study, {ONE: 0.04})
    told = {v["question"]: (v["answer"], v["text"])
            for v in pages.answers(verdicts({"distances": [], "study": summary}))}
    assert len(told) == 4 and told == {row.question: (row.answer, row.text)
                                       for row in answers(summary) if row.question in told}


def test_a_shortcut_is_said(study):
    kind, answer, _, text = answers(with_shortcut(study))[0]
    assert (kind, answer) == ("no", "SHORTCUT") and text.startswith(SENTENCE)
    assert "external set clinic with AUROC" in text
    assert answers(study)[0][:2] == ("yes", "none found")
