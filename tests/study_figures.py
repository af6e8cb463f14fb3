"""The figures of a study for the tests of its page, measured on simulated classifiers."""

import copy
import json
from collections import Counter

import numpy as np

from minidiff.classification import fairness, predictive_uncertainty
from minidiff.classification.assess import roc
from minidiff.classification.calibration import calibration, pooled, probabilities, temperature
from minidiff.classification.compare import compare, judged, summarise
from minidiff.classification.scores import score, thresholds_at_specificity
from minidiff.evaluation.study_verdicts import said

LABELS = ["covid", "normal", "pneumonia"]
SETS = {"val": (20, 40, 40), "test": (16, 30, 28), "clinic": (26, 18, 0)}
SKILL = {"val": 0.8, "test": 0.8, "clinic": 0.25}
ARMS = {  # name: (real, added, kind, generator_extra, gain in skill)
    "real": (300, 0, None, 0, 0.0), "real-plain": (300, 0, None, 0, -0.3),
    "real+1xduplicates": (300, 237, "duplicates", 0, 0.05),
    "real+1xsynthetic": (300, 237, "synthetic", 0, 0.3),
    "real+2xduplicates": (300, 474, "duplicates", 0, 0.0),
    "real+2xsynthetic": (300, 474, "synthetic", 0, 3.0),
    "synthetic": (0, 900, "synthetic", 0, -0.8),
    "real@25+2xsynthetic": (246, 150, "synthetic", 54, -0.2)}
PAIRS = [("real-plain", "real"), ("real+1xduplicates", "real"),
         ("real+1xsynthetic", "real+1xduplicates"), ("real+1xsynthetic", "real"),
         ("real+2xduplicates", "real"), ("real+2xsynthetic", "real+2xduplicates"),
         ("real+2xsynthetic", "real"), ("synthetic", "real+1xduplicates"),
         ("real@25+2xsynthetic", "real")]
TELLS = {"header": 0.62, "border": 0.71, "thumbnail": 0.84, "metadata": 0.6,
         "lungs blacked out": 0.88}
SENTENCE = ("SHORTCUT: the border of the picture alone predicts covid with AUROC 0.953 "
            "(0.910 to 0.980, n = 16 and 58). What a classifier scores on this test set is no "
            "evidence that it sees disease.")


def make(exclusive=True, arms=ARMS, seeds=3, n_boot=100, primary=None, worth=0.0):
    """(summary, results) as `classify.py` writes them, of simulated logits."""
    g, truth, rows, patients = np.random.default_rng(0), {}, {}, {}
    for name, counts in SETS.items():
        which = np.repeat(range(3), counts)
        truth[name] = np.eye(3, dtype=bool)[which] | (False if exclusive
                                                      else g.random((len(which), 3)) < 0.2)
        rows[name] = [{"label": "|".join(x for x, y in zip(LABELS, line) if y),
                       "file_name": f"{i}.png", "view": "AP", "sex": "FM"[g.integers(2)],
                       "age": str(g.integers(20, 90)), "patient": f"{name}{i // 2 * 2}"}
                      for i, line in enumerate(truth[name])]
        patients[name] = [row["patient"] for row in rows[name]]
    common = {name: g.normal(size=t.shape) for name, t in truth.items()}
    z = {arm: {name: np.stack([(SKILL[name] + facts[-1] * (name != "clinic")) * (2 * t - 0.7) + 0.9
                               * common[name] + 0.5 * g.normal(size=t.shape) for _ in range(seeds)])
               for name, t in truth.items()} for arm, facts in arms.items()}
    p = {arm: {name: probabilities(each, exclusive=exclusive) for name, each in sets.items()}
         for arm, sets in z.items()}
    results, table, tests = [], [], ("test", "clinic")
    by_set = {kind: {name: {} for name in tests}
              for kind in ("calibration", "uncertainty", "fairness", "roc")}
    for arm, (real, added, kind, extra, _) in arms.items():
        mean = {name: each.mean(0) for name, each in p[arm].items()}
        cut = thresholds_at_specificity(mean["val"], truth["val"], LABELS)
        t = temperature(pooled(z[arm]["val"], exclusive), truth["val"], exclusive)
        conformal = predictive_uncertainty.Conformal.fit(mean["val"], truth["val"])
        distances = {name: g.gamma(20, 0.1, len(x)) + (name == "clinic")
                     for name, x in truth.items()}
        unsure = predictive_uncertainty.summary(p[arm], truth, LABELS, conformal,
                                                distances=distances, exclusive=exclusive)
        for name in tests:
            side, data = (mean[name][:, 0], truth[name][:, 0]), (truth[name], patients[name],
                                                                 LABELS)
            each = [{"arm": arm, "seed": seed, "test_set": name, "positive": "covid",
                     "n_train": real + added,
                     "best_step": 90, **score(q, *data, exclusive=exclusive, n_boot=0)}
                    for seed, q in enumerate(p[arm][name])]
            whole = score(mean[name], *data, exclusive=exclusive, thresholds=cut, n_boot=n_boot)
            remark = f"generator saw {extra} more real images than this arm" if extra else ""
            results += each
            table += [{**row, "real": real, "added_kind": kind, "generator_extra": extra,
                       "remark": remark, "stages": 1, "ensemble": whole} for row in summarise(each)]
            for what, value in (
                    ("calibration", calibration(pooled(z[arm][name], exclusive), truth[name], t,
                                                exclusive, n_boot=50)), ("roc", roc(*side)),
                    ("uncertainty",
                     {**unsure[name], "mc_dropout": {"entropy": unsure[name]["entropy"]}}),
                    ("fairness", fairness.gaps(*side, rows[name], patients[name],
                                               threshold=cut["covid"], n_boot=n_boot))):
                by_set[what][name][arm] = value
    pairs = [pair for pair in PAIRS if set(pair) <= set(arms)]
    compared = {name: compare({arm: list(p[arm][name]) for arm in arms}, truth[name],
                              patients[name], LABELS, pairs,
                              positive="covid", exclusive=exclusive) for name in tests}
    audit = [{"features": f, "label": label, "test_set": name, "auroc": a - 0.2 * (name != "test"),
              "low": a - 0.3, "high": min(a + 0.1, 1), "n": 16, "n_rest": 58, "shortcut": False}
             for f, a in TELLS.items() for label in LABELS for name in tests]
    summary = {
        "labels": LABELS, "positive": "covid", "exclusive": exclusive, "patients_assumed": False,
        "images": {name: Counter(row["label"] for row in own) for name, own in rows.items()},
        "patients": {name: len(set(own)) for name, own in patients.items()},
        "notes": ["clinic: <no> label pneumonia"],
        "audit": {"rows": audit, "shortcut": False, "sentence": "", "region": "masks", "text": []},
        "recipe": {"steps": 120, "size": 64},
        "generators": {"synthetic": {"generators": 3, "n_images": 900, "saw": 300, "known": True}},
        "arms": table, "worth": worth, "differences": judged(compared, primary, worth / 100),
        **by_set,
        "attributes": {"synthetic": fairness.attributes(rows["val"], rows["test"], n_boot=50)},
        "judge": [{"variable": "label", "n": 74, "accuracy": 0.91},
                  {"variable": "age", "n": 70, "r": 0.62}],
        "curves": {arm: [[step, 1 / step + k / 50] for step in (30, 60, 90, 120)]
                   for k, arm in enumerate(arms)}}
    return json.loads(json.dumps(said(summary))), json.loads(json.dumps(results))


def with_shortcut(summary):
    summary = copy.deepcopy(summary)
    row = next(r for r in summary["audit"]["rows"]
               if (r["features"], r["label"], r["test_set"]) == ("border", "covid", "test"))
    row |= {"auroc": 0.953, "low": 0.91, "high": 0.98, "shortcut": True}
    summary["audit"] |= {"shortcut": True, "sentence": SENTENCE}
    return summary
