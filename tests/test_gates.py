"""The gates of the reference matrix: when they say yes, no and nothing."""

import pytest

from minidiff.evaluation.matrix import gates


def ratios(*within):
    base = {"KD": 1.0, "KD_low": 0.5, "KD_high": 2.0, "n": 50, "n_r": 50, "yardstick_KD": 2.0,
            "yardstick_low": 1.0, "yardstick_high": 3.0, "yardstick_n": 40, "resolved": True,
            "rho": 0.5, "rho_low": 0.2, "rho_high": 0.9}
    return {f"space {i}": {**base, "within": w} for i, w in enumerate(within)}


@pytest.mark.parametrize("within, answer", [((True, True), "yes"), ((True, None), "not resolved"),
                                            ((None, None), "not resolved"), ((True, False), "no"),
                                            ((None, False), "no")])
def test_fidelity_needs_every_space(within, answer):
    found = gates.fidelity(ratios(*within), another_source=True)
    assert found["answer"] == answer and "another source (n = 50, 40, held-out 50" in found["text"]


def test_coverage_counts_content_and_not_texture():
    def cell(low, high, null=0.95):
        return {"coverage": (low + high) / 2, "coverage_low": low, "coverage_high": high,
                "coverage_null": null, "n": 50}
    assert gates.coverage({"pixels": cell(0.86, 0.99)})["answer"] == "yes"
    assert gates.coverage({"pixels": cell(0.80, 0.99)})["answer"] == "not resolved"
    assert gates.coverage({"pixels": cell(0.86, 0.99),
                           "classifier": cell(0.1, 0.3)})["answer"] == "no"
    assert gates.coverage({"pixels": cell(0.86, 0.99),
                           "spectrum": cell(0.0, 0.1)})["answer"] == "yes"


def test_label_is_held_against_real_images():
    def said(right, real, of_real=range(100)):
        return gates.label([True] * right + [False] * (100 - right),
                           [True] * real + [False] * (100 - real), range(100), of_real)

    found = said(95, 90)
    assert found["answer"] == "yes" and found["difference"][0] > -0.1
    assert said(50, 90)["answer"] == "no" and said(82, 90)["answer"] == "not resolved"
    # the real share is uncertain, too, and more so where patients have many images
    assert said(89, 90)["answer"] == "not resolved"
    assert said(90, 90)["answer"] == "yes"
    assert said(90, 90, [i // 10 for i in range(100)])["answer"] == "not resolved"


def near(suspected, p, **more):
    space = {"space": "pixels", "near_p": p, "near_share": 0.1, "closest_train": 20, "closest": 20,
             "closest_expected": 12.0,
             "n": 50, "train": 90, "heldout": 60, "copying_z": 0.3, "auth_excess": 1.0, **more}
    return {"verdict": "no sign of copying", "suspected": suspected, "spaces": [space]}


def test_novelty_says_no_where_two_tests_agree_and_yes_where_all_are_calm():
    assert gates.novelty(near(True, 1e-6))["answer"] == "no"
    assert gates.novelty(near(False, 0.4))["answer"] == "yes"
    # smooth images lie near as well
    assert gates.novelty(near(False, 1e-6))["answer"] == "not resolved"
    assert gates.novelty(near(False, 0.4, copying_z=-3.0))["answer"] == "not resolved"
    unshuffled = gates.novelty(near(False, 0.4) | {"random_split": False})
    assert unshuffled["answer"] == "not resolved" and "may not be random" in unshuffled["text"]
    given = near(None, 1e-6) | {"verdict": "but the split came with the data"}
    assert gates.novelty(given)["text"].startswith("But the split came with the data.")
    named = {"found": 0, "at_most": 0.02, "seen": 0.01}
    assert "At most 2.0 %" in gates.novelty(near(False, 0.4) | {"named": named})["text"]
    blind = gates.novelty(near(False, 0.4) | {"named": {"found": 0, "probes": 64, "seen": None}})
    assert blind["answer"] == "not resolved" and "None of 64 probes" in blind["text"]
    assert gates.novelty({"verdict": "too few", "suspected": None,
                          "spaces": []})["answer"] == "not resolved"


def test_what_a_filter_decided_is_not_tested_and_a_no_stands():
    v = {"LABEL": {"answer": "yes", "text": "t"}, "NOVELTY": {"answer": "yes", "text": "t"},
         "FIDELITY": {"answer": "yes", "text": "t",
                      "spaces": {"pixels": "yes", "classifier": "yes"}},
         "COVERAGE": {"answer": "no", "text": "t",
                      "spaces": {"pixels": "yes", "classifier": "no"}}}

    def said(filters):
        return [gates.of_selected(v, filters)[name]["answer"] for name in v]

    assert said({}) == ["yes", "yes", "yes", "no"]
    assert said({"label": {}, "classifier": {}}) == ["not tested", "yes", "yes", "no"]
    assert said({"copies": {}}) == ["yes", "not tested", "yes", "no"]
    alone = {"FIDELITY": {"answer": "yes", "text": "t", "spaces": {"classifier": "yes"}}}
    found = gates.of_selected(alone, {"classifier": {}})["FIDELITY"]
    assert found["answer"] == "not tested" and found["text"].startswith("t A filter selected")


def verdict(part, label="a", too_few="", **answers):
    said = {name: {"answer": answers.get(name, "yes"), "text": "t", "resolved": True}
            for name in gates.VERDICTS}
    return {"kind": "control", "part": part, "label": label, "too_few": too_few, **said}


def all_caught():
    return [verdict(name, **{control.verdict: "no"}) for name, control in gates.CONTROLS.items()]


@pytest.mark.parametrize("name", list(gates.CONTROLS))
def test_a_control_that_is_not_caught_makes_the_matrix_invalid(name):
    assert gates.status(gates.caught(all_caught())) == ("VALID", [])
    for answer in ("yes", "not resolved"):
        rows = [v if v["part"] != name
                else verdict(name, **{gates.CONTROLS[name].verdict: answer}) for v in all_caught()]
        state, faults = gates.status(gates.caught(rows))
        assert state == "INVALID" and len(faults) == 1 and faults[0].startswith(
            f"{name} (a) was not caught by")
    # never tested, which is allowed for one alone
    rows = [v for v in all_caught() if v["part"] != name]
    assert gates.status(gates.caught(rows))[0] == ("VALID" if name in gates.OPTIONAL else "INVALID")


def test_what_cannot_be_asked_is_no_fault_and_a_control_that_needs_it_is_not_tested():
    unasked = {"FIDELITY": gates.fidelity({}, False), "LABEL": gates.no_label()}
    assert {v["answer"] for v in unasked.values()} == {"not tested"}
    assert "no other real images" in unasked["FIDELITY"]["text"]
    rows = gates.caught([v | unasked for v in all_caught() if v["part"] != "wrong class"])
    assert [r["control"] for r in rows if r["caught"] is None] == ["blur", "noise", "wrong source"]
    assert gates.status(rows, unasked) == ("VALID", [])
    assert gates.status(rows)[0] == gates.status(rows, ["LABEL"])[0] == "INVALID"


def test_controls_that_are_too_few_are_not_tested():
    few = verdict("blur", label="b", too_few="3 images; 20 are needed")
    rows = gates.caught([*all_caught(), few])
    assert [r["caught"] for r in rows
            if r["label"] == "b"] == [None] and gates.status(rows)[0] == "VALID"
