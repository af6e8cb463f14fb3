"""From the logits of all arms and seeds to the figures of a study.

Everything that is tuned (epoch, threshold, temperature, conformal quantile) is tuned on validation;
the test sets are used once, here. Figures of arms and their differences are means over seeds of
single networks; those of the mean of their probabilities (deep ensemble) stand beside them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from minidiff.classification import arms as kinds
from minidiff.classification import fairness
from minidiff.classification.arms import Arm
from minidiff.classification.calibration import calibration, nll, pooled, probabilities, temperature
from minidiff.classification.compare import (
    BENEFIT,
    Declared,
    Primary,
    compare,
    figures,
    judged,
    mean_figure,
    summarise,
)
from minidiff.classification.inputs import Inputs
from minidiff.classification.predictive_uncertainty import Conformal, FeatureDistance, summary
from minidiff.classification.predictor import Predictor
from minidiff.classification.scores import (
    Benefit,
    finite,
    score,
    thresholds_at_specificity,
)
from minidiff.classification.study import Recipe, as_given_to, folder_of
from minidiff.runs import write_atomic, write_json

ALPHA = 0.1                                  # of conformal sets: one truth in ten may be outside
PARTS = "calibration", "uncertainty", "fairness", "roc"


def assess(data: Inputs, arms: Sequence[Arm], trained: Mapping[str, Sequence[dict]], recipe: Recipe,
           out: Path, declared: Declared) -> tuple[list[dict], dict]:
    """results.json, and summary.json without audit and judge; writes what `predict` needs."""
    labels, exclusive, benefit = data.labels, data.exclusive, declared.benefit
    truth, place = _truth(data), labels.index(recipe.positive)
    gaps = len(arms) * sum(fairness.pairs(truth[name][:, place], images.rows)
                           for name, images in data.tests.items())
    # logits (seeds, n, k)
    members = {arm: {name: np.array([found["logits"][name] for found in seeds])
                     for name in seeds[0]["logits"]} for arm, seeds in trained.items()}
    p = {arm: {name: probabilities(z, exclusive=exclusive) for name, z in sets.items()}
         for arm, sets in members.items()}
    results, rows, notes, parts = [], [], [], {name: {} for name in data.tests}
    nets: dict[str, dict[str, np.ndarray]] = {}
    for arm in tqdm(arms, "assessing", unit="arm", disable=len(arms) < 2):
        found, sets, given = trained[arm.name], p[arm.name], as_given_to(arm, data, recipe)
        kept = tuned(given, arm.name, pooled(members[arm.name]["val"], exclusive),
                     [one["seed"] for one in found], out)
        unsure = when_unsure(given, arm.name, sets, kept["conformal"], recipe, out,
                             tests=len(arms) * len(labels) * len(data.tests))
        notes += [*given.notes, *kept["remarks"]]
        nets[arm.name] = net = net_benefit(benefit, sets, given, place) if benefit else {}
        for name, images in data.tests.items():
            by_seed = [{"arm": arm.name, "seed": one["seed"], "test_set": name,
                        "positive": recipe.positive, "n_train": one["n_train"],
                        "best_step": one["best_step"],
                        **score(q, truth[name], images.patients, labels, exclusive=exclusive,
                                n_boot=0)} for one, q in zip(found, sets[name])]
            for row, own in zip(by_seed, net.get(name, ())):
                row[BENEFIT] = finite(own.sum())
            results += by_seed
            own = sets[name].mean(0)
            ensemble = score(own, truth[name], images.patients, labels, exclusive=exclusive,
                             thresholds=kept["thresholds"])
            rows.append({**summarise(by_seed)[0], "ensemble": ensemble,
                         **facts(data, arm, recipe, [one["seed"] for one in found])})
            of_positive = own[:, place], truth[name][:, place]
            parts[name][arm.name] = {
                "calibration": calibration(pooled(members[arm.name][name], exclusive),
                                           truth[name], kept["temperature"], exclusive),
                "uncertainty": unsure[name], "roc": roc(*of_positive),
                "fairness": fairness.gaps(*of_positive, images.rows, images.patients, tests=gaps,
                                          threshold=kept["thresholds"][recipe.positive])}
    used = sorted({arm.source for arm in arms if arm.source} - data.others)
    return results, {
        "labels": labels, "positive": recipe.positive, "exclusive": exclusive,
        **of_data(data, used), "notes": list(dict.fromkeys(notes)),
        "arms": rows, "worth": declared.worth,
        "benefit": benefit and {**vars(benefit), "of_all": benefit.of_all},
        "differences": judged(differences(data, arms, p, recipe, declared.primary, nets),
                              declared.primary, declared.worth / 100),
        "learning": learning_curves(data, arms, p, recipe.positive),
        **{kind: {name: {arm: found[kind] for arm, found in by_arm.items()}
                  for name, by_arm in parts.items()} for kind in PARTS},
        "attributes": {name: fairness.attributes(data.sets["train"].rows, data.rows(name),
                                                 sources=len(used)) for name in used},
        "curves": {arm: _curve(seeds) for arm, seeds in trained.items()},
    }


def of_data(data: Inputs, sources: Sequence[str]) -> dict:
    """What the sets and the generators are made of."""
    return {"images": {name: Counter(row["label"] for row in data.rows(name))
                       for name in (*data.sets, *data.sources)},
            "patients": {name: len(set(own.patients)) for name, own in data.sets.items()},
            "patients_assumed": any(data.tables[name].patients_assumed for name in data.sets),
            "generators": {name: {"generators": data.generators[name],
                                  "n_images": len(data.rows(name)),
                                  "saw": len(data.saw[name] or ()),
                                  "known": data.saw[name] is not None} for name in sources}}


def net_benefit(benefit: Benefit, sets: Mapping[str, np.ndarray], given: Inputs,
                place: int) -> dict[str, np.ndarray]:
    """Of each test set what each image adds to it (seeds, n), at each network's own threshold."""
    truth = {name: own[:, place] for name, own in _truth(given).items()}
    cuts = np.array([benefit.threshold(p, truth["val"]) for p in sets["val"][:, :, place]])
    return {name: benefit.parts(sets[name][:, :, place] >= cuts[:, None], truth[name])
            for name in given.tests}


def differences(data: Inputs, arms: Sequence[Arm], p: Mapping[str, Mapping[str, np.ndarray]],
                recipe: Recipe, primary: Primary | None,
                nets: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[dict]]:
    """Of each test set the rows of `compare`: the primary comparison, and the usual ones."""
    first = [(primary.arm, primary.against)] if primary else []
    pairs = first + [pair for pair in kinds.comparisons(arms, data.others)
                     if set(pair) not in map(set, first)]
    pools = {arm.name: data.generators.get(arm.source, 1) for arm in arms}
    return {name: compare({arm: list(sets[name]) for arm, sets in p.items()},
                          data.truth(name).numpy(), images.patients, data.labels, pairs,
                          positive=recipe.positive, exclusive=data.exclusive, generators=pools,
                          benefit={arm: own[name] for arm, own in nets.items() if own})
            for name, images in data.tests.items()}


def learning_curves(data: Inputs, arms: Sequence[Arm], p: Mapping[str, Mapping[str, np.ndarray]],
                    positive: str) -> list[dict]:
    """The figures of arms that have shares of the real images, and of those with all of them.

    A row for each test set, arm and figure. Each network had a share of its own, so intervals are
    over other patients to test on, other trainings and other patients to train on.
    """
    starts = {arm.start for arm in arms if arm.share}
    return [{"test_set": name, "arm": arm.name, "start": arm.start, "share": arm.share or 1.0,
             "metric": metric,
             **mean_figure(metric, p[arm.name][name], data.truth(name).numpy(), images.patients,
                           data.labels.index(positive), data.generators.get(arm.source, 1))}
            for name, images in data.tests.items() for metric in figures(data.exclusive, False)
            for arm in arms if arm.start in starts and arm.most is None]


def when_unsure(data: Inputs, arm: str, sets: Mapping[str, np.ndarray], conformal: Conformal,
                recipe: Recipe, out: Path, *, tests: int) -> dict:
    """Of each test set, from the arm's seeds: what `predictive_uncertainty.summary` measures.

    Under mc_dropout the same of one seed's network under 20 draws of dropout.
    """
    first, truth = folder_of(out, arm, recipe.seed), _truth(data)
    predictor = Predictor.load(first).to(recipe.device)
    features = {name: predictor.features(data.sets[name].pixels).double().numpy()
                for name in ("train", *sets)}
    typical = FeatureDistance.fit(features["train"], truth["train"])
    distances = {name: typical.distance(features[name]) for name in sets}
    write_atomic(first.parent / "typical.safetensors", safetensors.numpy.save(vars(typical)))
    write_json(first.parent / "distances.json", distances["val"].tolist())
    dropped = {name: predictor.under_dropout(data.sets[name].pixels)["label"].double().numpy()
               for name in sets}
    found, again = (summary(members, truth, data.labels, conformal, distances=own,
                            exclusive=data.exclusive, tests=tests)
                    for members, own in ((sets, distances), (dropped, None)))
    return {name: {**row, "mc_dropout": {kind: again[name][kind]
                                         for kind in ("accuracy", "entropy", "mutual_information")}}
            for name, row in found.items()}


def facts(data: Inputs, arm: Arm, recipe: Recipe, seeds: Sequence[int]) -> dict:
    """What an arm was trained on, and whether its generator knew more."""
    bases = [kinds.training_set(kinds.parse(arm.base, ()), data.sets["train"], {},
                                positive=recipe.positive, seed=seed, subset_seed=recipe.seed)[0]
             for seed in seeds]
    # real images that its generator saw and it did not; None where what was seen is unknown
    saw = data.saw[arm.source] if arm.source else set()
    extra = None if saw is None else max(len(saw - set(base.hashes)) for base in bases)
    remark = ("trained on other real images, too" if arm.source in data.others else
              "" if extra == 0 else "what its generator saw is unknown" if extra is None else
              f"generator saw {extra} more real images than this arm")
    again = arm.added == kinds.DUPLICATES or arm.first == kinds.REAL
    kind = ("duplicates" if again else "other" if arm.source in data.others else
            "synthetic" if arm.source else None)
    return {"real": len(bases[0]) if arm.real else 0, "added_kind": kind, "generator_extra": extra,
            "remark": remark, "stages": 2 if arm.first else 1}


def tuned(data: Inputs, arm: str, z_val: np.ndarray, seeds: Sequence[int], out: Path) -> dict:
    """What an arm's ensemble takes from validation, kept beside it for `predict`."""
    truth, p_val = data.truth("val").numpy(), probabilities(z_val, exclusive=data.exclusive)
    conformal = Conformal.fit(p_val, truth, alpha=ALPHA)
    found = {"temperature": temperature(z_val, truth, data.exclusive),
             "thresholds": thresholds_at_specificity(p_val, truth, data.labels)}
    write_json(folder_of(out, arm, seeds[0]).parent / "tuned.json",
               {"seeds": list(seeds), **found, "conformal": conformal.to_json(),
                "val_loss": nll(z_val, truth, exclusive=data.exclusive)})
    only = f"{arm}: " if "@" in arm else ""  # other arms have the whole validation set
    return {**found, "conformal": conformal,
            "remarks": [only + remark for remark in conformal.remarks(data.labels)]}


def _truth(data: Inputs) -> dict[str, np.ndarray]:
    return {name: data.truth(name).numpy() for name in data.sets}


def _curve(seeds: Sequence[dict]) -> list[list[float]]:
    """Validation loss at each look, the mean over seeds."""
    looks = [[(line["step"], line["val_loss"]) for line in found["log"] if "val_loss" in line]
             for found in seeds]
    return [[step, float(np.mean([dict(own)[step] for own in looks]))] for step, _ in looks[0]]


def roc(scores: np.ndarray, positive: np.ndarray) -> list[list[float]]:
    """Corners (false positive rate, true positive rate) of the ROC curve, from (0,0) to (1,1)."""
    if positive.all() or not positive.any():
        return []
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(scores[order]) < 0, True])  # of each score, the last image
    hits, n = positive[order].cumsum()[last], last + 1
    return [[0.0, 0.0], *([float((k - h) / (~positive).sum()), float(h / positive.sum())]
                          for k, h in zip(n, hits))]
