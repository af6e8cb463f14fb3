"""How often answers of a judge, a shortcut, an external set and readers are wrong, by simulation;
the rates that docs/metrics.md states.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from readers_data import key_of, reading
from scipy import stats
from test_verdicts import at_most

from minidiff.classification.judge_agreement import judge_agreement
from minidiff.classification.scores import score
from minidiff.data.baselines import is_shortcut
from minidiff.evaluation import verdicts
from minidiff.evaluation.format import jsonable
from minidiff.evaluation.metrics.agreement import within_label
from minidiff.evaluation.readers import score as readers
from minidiff.statistics import auroc_by_patient
from minidiff.variables import Category, Number

pytestmark = pytest.mark.slow
AGE, SEX = Number("age", 50.0, 15.0, 20.0, 90.0), Category("sex", ("F", "M"))


def attributes(rng, n):
    """The answers on age and sex, by a judge that sees nothing of them within a label.

    Age and the share of men go with the label; the judge is as often right of sex as who guesses.
    """
    group = rng.integers(0, 3, n)
    sex = (rng.random(n) < np.array([0.3, 0.5, 0.8])[group]).astype(int)
    most = np.array([0.7, 0.5, 0.8])[group]
    read = np.where(rng.random(n) < most, sex, 1 - sex)
    age = 40 + 10 * group + rng.normal(0, 8, (2, n))
    asked = {"age": torch.tensor(age[0], dtype=torch.float32), "sex": torch.tensor(sex)}
    seen = {"age": torch.tensor(age[1], dtype=torch.float32),
            "sex": F.one_hot(torch.tensor(read), 2).float()}
    judge = SimpleNamespace(variables=[AGE, SEX], predict=lambda _: seen)
    within = within_label([AGE, SEX], seen, asked, group.astype(str).tolist())
    rows = [{**row, **within[row["variable"]]} for which in ("held-out real", "synthetic")
            for row in judge_agreement(judge, torch.zeros(n), asked, which)]
    found = verdicts.verdicts({"distances": [], "agreement": rows})
    return {v["about"]: v["answer"] for v in found}


@pytest.mark.parametrize("n", [60, 300])
def test_an_attribute_that_is_not_shown_gets_a_yes_in_one_of_forty(n):
    rng, runs = np.random.default_rng(n), 400
    found = [attributes(rng, n) for _ in range(runs)]
    for about in ("number", "category"):
        assert at_most(sum(v[about] == "yes" for v in found) / runs, 0.025, runs), about


def patients_of(rng, n):
    """Patients of one to three images each, n images in all."""
    return np.repeat(np.arange(n), rng.integers(1, 4, n))[:n]


def noise(rng, patients):
    """Scores that tell nothing, alike among images of a patient."""
    return 0.8 * rng.normal(size=patients.max() + 1)[patients] + 0.6 * rng.normal(
        size=len(patients))


def sides(rng, n, m):
    """Which images are positive, and their patients."""
    of_n, of_m = patients_of(rng, n), patients_of(rng, m)
    return np.arange(n + m) < n, np.r_[of_n, of_n.max() + 1 + of_m]


@pytest.mark.parametrize("n,m", [(36, 237), (100, 200)])
def test_an_audit_without_a_shortcut_calls_one_in_one_of_twenty(n, m):
    """Four kinds of features, three labels; none tells anything."""
    rng, runs, called = np.random.default_rng(n), 60, 0
    for _ in range(runs):
        positive, patients = sides(rng, n, m)
        called += any(is_shortcut("header", area, ends[0]) for area, ends in (
            auroc_by_patient(noise(rng, patients), positive, patients)
            for _ in range(12)))
    assert at_most(called / runs, 0.05, runs)


@pytest.mark.parametrize("n,m", [(36, 237), (100, 200)])
def test_external_recognition_at_chance_gets_a_yes_in_one_of_forty(n, m):
    rng, runs, above = np.random.default_rng(n), 400, 0
    for _ in range(runs):
        positive, patients = sides(rng, n, m)
        p = stats.norm.cdf(noise(rng, patients))
        found = score(np.c_[p, 1 - p], np.c_[positive, ~positive], patients.astype(str).tolist(),
                      ["ill", "well"], n_boot=200)
        above += found["auroc_interval_patients"]["ill"][0] > 0.5
    assert at_most(above / runs, 0.025, runs)


@pytest.mark.parametrize("n,m", [(60, 3), (200, 3), (200, 5)])
def test_readers_answers_err_in_one_of_forty(n, m):
    """Readers call Good 15 points fewer synthetic images than real ones, and cannot tell them; they
    differ in how strict they are, and images in how good they look."""
    rng, runs, wrong = np.random.default_rng(n + m), 400, np.zeros(2, int)
    key = key_of(n, m)
    for _ in range(runs):
        image = rng.normal(size=2 * n)
        given = []
        for k in range(m):
            strict = rng.normal(0, 0.3)
            cut = np.r_[np.full(n, 0.82 - key.design["margin"]), np.full(n, 0.82)]
            good = (image + rng.normal(size=2 * n)) / np.sqrt(2) + strict < stats.norm.ppf(
                cut) * np.sqrt(1 + 0.09)
            origin = rng.random(2 * n) < 0.5
            given.append(reading(k + 1, good.astype(int), origin.astype(int)))
        found = jsonable({**readers.summary(key, given), "design": key.design})
        said = {v["about"]: v["answer"] for v in verdicts.of_readers(found)}
        wrong += [said["readers"] == "yes", said["origin"] == "yes"]
    assert all(at_most(k / runs, 0.025, runs) for k in wrong), wrong
