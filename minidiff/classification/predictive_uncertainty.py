"""When should an answer not be trusted?

    members' p (m,n,k) ─ mean ─▶ entropy, mutual information ─▶ selective curve: leave the least
    certain to a person
                          └────▶ Conformal: the labels that are not ruled out; each true label in
                          its set 9 times in 10
    features (n,d) ─ FeatureDistance ─▶ distance from the training images ─▶ conformal p

Members are the seeds of an ensemble (Lakshminarayanan et al. 2017) or passes with dropout. What is
promised of the sets holds for images like those of validation; on another hospital's, `realised`
says what became of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from minidiff.classification.scores import finite, pair
from minidiff.statistics import NONE, Interval, auroc, auroc_interval, wilson

# shares of the images of a selective curve: a tenth to all of them
KEPT = tuple(i / 20 for i in range(2, 21))


def entropy(p: np.ndarray, exclusive: bool = True) -> np.ndarray:
    """Probabilities (…,k) → nats (…); of findings the sum of each one's entropy.

    From 0 to ln k; of findings to k ln 2.
    """
    p = np.asarray(p, float)
    h = scipy.special.entr(p)
    return (h if exclusive else h + scipy.special.entr(1 - p)).sum(-1)


def mutual_information(members: np.ndarray, exclusive: bool = True) -> np.ndarray:
    """p (m,n,k) → nats (n,): what the members disagree about.

    The entropy of the mean minus the mean of the entropies. Little where all say 50 %, much where
    half say 0 and half 1: not the image is unclear, but training has not settled it (Houlsby et al.
    2011).
    """
    return np.maximum(entropy(np.mean(members, 0), exclusive) - entropy(members, exclusive).mean(0),
                      0.0)


@dataclass(frozen=True)
class Conformal:
    """Label k is in the set where p_k ≥ thresholds[k]: then a true k is missed with probability ≤
    alpha, whatever its share.

    Split conformal sets with a threshold for each label (Vovk 2012, Mondrian; Sadinle et al. 2019):
    of all labels together, the promise could be kept on the common ones alone. Of findings that go
    together it is on those that are there. A set may have no label, which says that none is likely.
    It asks that the calibration images play no other part; where they chose the epoch and the
    temperature, too, `realised` on a test set is the judge.
    """

    alpha: float
    thresholds: tuple[float, ...]   # −inf: too few calibration images to rule the label out, ever
    n: tuple[int, ...]              # calibration images of each label

    @classmethod
    def fit(cls, p: np.ndarray, truth: np.ndarray, alpha: float = 0.1) -> "Conformal":
        """Thresholds from validation p (n,k) and truth (n,k) bool: the ⌊α(n_k+1)⌋-th lowest p_k
        among the n_k true k."""
        counts = truth.sum(0).tolist()
        lowest = [np.sort(p[truth[:, k], k])[: missable(c, alpha)] for k, c in enumerate(counts)]
        return cls(alpha, tuple(float(low[-1]) if len(low) else -math.inf for low in lowest),
                   tuple(counts))

    def sets(self, p: np.ndarray) -> np.ndarray:
        """p (n,k) → bool (n,k): the labels of each image's set."""
        return np.asarray(p, float) >= np.array(self.thresholds)

    def remarks(self, labels: Sequence[str]) -> list[str]:
        """A sentence for each label that is in every set for want of calibration images."""
        need = math.ceil(1 / self.alpha - 1 - 1e-9)
        return [f"{name} is in every set: {n} calibration images have it, and to rule it out with "
                f"{1 - self.alpha:.0%} certainty takes "
                f"{need}" for name, n, t in zip(labels, self.n, self.thresholds) if t == -math.inf]

    def to_json(self) -> dict:
        return {"alpha": self.alpha, "thresholds": [t if math.isfinite(t) else None
                                                    for t in self.thresholds], "n": list(self.n)}

    @classmethod
    def from_json(cls, form: Mapping) -> "Conformal":
        """What `to_json` gave."""
        return cls(form["alpha"], tuple(-math.inf if t is None else float(t)
                                        for t in form["thresholds"]), tuple(form["n"]))


def missable(n: int, alpha: float) -> int:
    """⌊α(n+1)⌋: how many of n + 1 true labels may be missed.

    The 1e-9 is for products such as 0.1 · 30 = 3.0000…4.
    """
    return math.floor(alpha * (n + 1) + 1e-9)


def coverage_interval(n: int, alpha: float, n_test: int | None = None,
                      confidence: float = 0.95) -> Interval:
    """Where the coverage of sets from n calibration images should lie (Vovk 2012).

    Beta(n + 1 − l, l) with l = `missable`. That is over an endless test set; the share of n_test
    images is beta-binomial, and wider. (1, 1) if none is missable.
    """
    missed, tails = missable(n, alpha), [(1 - confidence) / 2, (1 + confidence) / 2]
    if missed == 0:
        return 1.0, 1.0
    ends = (scipy.stats.beta.ppf(tails, n + 1 - missed, missed) if n_test is None
            else scipy.stats.betabinom.ppf(tails, n_test, n + 1 - missed, missed) / n_test)
    return float(ends[0]), float(ends[1])


def realised(sets: np.ndarray, truth: np.ndarray, labels: Sequence[str],
             conformal: Conformal, tests: int = 1) -> dict:
    """What became of the promise on a test set: sets (n,k) and truth (n,k), bool.

    Of each label: n true ones, the share in whose set it is ("coverage", Wilson's "low" and
    "high"), "in_others" the share of the rest in whose set it is as well, and where it should lie
    after n_cal calibration images: "beta" over endless tests, "expected" over tests of n. "kept":
    it is not below that by more than chance does in one of `tests` such figures (Bonferroni). None
    where the test set has no such image.
    """
    classes = {}
    for k, name in enumerate(labels):
        with_it, n = sets[truth[:, k], k], int(truth[:, k].sum())
        low, high = wilson(int(with_it.sum()), n)
        expected, least = (coverage_interval(conformal.n[k], conformal.alpha, n, 1 - 0.05 / share)
                           if n else NONE for share in (1, tests))
        classes[name] = {"n": n, "coverage": _mean(with_it), "low": finite(low),
                         "high": finite(high),
                         "in_others": _mean(sets[~truth[:, k], k]), "n_cal": conformal.n[k],
                         "beta": list(coverage_interval(conformal.n[k], conformal.alpha)),
                         "expected": pair(expected),
                         "always": conformal.thresholds[k] == -math.inf,
                         "kept": bool(with_it.mean() >= least[0]) if n else None}
    size = sets.sum(1)
    return {"n": len(sets), "target": 1 - conformal.alpha, "mean_size": float(size.mean()),
            "empty": _mean(size == 0), "single": _mean(size == 1), "classes": classes}


def selective(unsure: Sequence[float], right: Sequence[bool]) -> dict:
    """Accuracy of the most certain images, from the surest tenth to all.

    Returns {"curve", "area", "area_random", "area_best"}. A row of the curve keeps a share of the
    images and all that are as certain as its last one; Wilson intervals. "area" is the mean
    accuracy of the most certain i over i = 1 … n: one less the AURC of Geifman & El-Yaniv 2017,
    equal uncertainties in the mean of their orders. Beside it, that of a random order and of all
    errors last.
    """
    u, right = np.asarray(unsure, float), np.asarray(right, bool)
    ordered, curve = np.sort(u), []
    for share in KEPT:
        keep = u <= ordered[math.ceil(share * len(u) - 1e-9) - 1]
        n, k = int(keep.sum()), int(right[keep].sum())
        if not curve or n > curve[-1]["n"]:
            low, high = wilson(k, n)
            curve.append({"kept": n / len(u), "accuracy": k / n, "low": low, "high": high, "n": n})
    _, tie, counts = np.unique(u, return_inverse=True, return_counts=True)
    # of a tie, all the same
    shared = (np.bincount(tie, right) / counts)[tie][np.argsort(u, kind="stable")]
    return {"curve": curve, "area": _area(shared), "area_random": float(right.mean()),
            "area_best": _area(np.sort(right)[::-1])}


def _area(right: np.ndarray) -> float:
    return float((np.cumsum(right) / np.arange(1, len(right) + 1)).mean())


@dataclass(frozen=True, eq=False)
class FeatureDistance:
    """Mahalanobis distance of an image's features from the centre of the nearest label.

    In standard deviations of the training images. Mahalanobis distance with one covariance for all
    labels (Lee et al. 2018). 25 images say little of the covariance of 128 features, so it is
    shrunk towards a multiple of the identity by the share that Ledoit & Wolf (2004) find best.
    """

    centres: np.ndarray   # (c,d), float64
    whiten: np.ndarray    # (d,d): whiten · whitenᵀ is the inverse covariance

    @classmethod
    def fit(cls, features: np.ndarray, truth: np.ndarray) -> "FeatureDistance":
        """Features (n,d) of training images, truth (n,k) bool: a centre for each label that has
        images, where labels exclude each other; else one for all images, for findings that go
        together divide into too many groups."""
        x, alone = np.asarray(features, float), (truth.sum(1) == 1).all()
        present = truth[:, truth.any(0)] if alone else np.ones((len(x), 1), bool)
        centres = np.stack([x[own].mean(0) for own in present.T])
        covariance = shrunk(x - centres[present.argmax(1)])
        if not np.trace(covariance) > 0:  # a network that learned nothing; no image is far
            return cls(centres, np.zeros_like(covariance))
        lower = scipy.linalg.cholesky(covariance, lower=True)
        whiten = scipy.linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).T
        return cls(centres, np.ascontiguousarray(whiten))

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Features (n,d) → (n,)."""
        x, centres = np.asarray(features, float) @ self.whiten, self.centres @ self.whiten
        return np.min([np.linalg.norm(x - c, axis=1) for c in centres], axis=0)


def shrunk(x: np.ndarray) -> np.ndarray:
    """Covariance (d,d) of centred x (n,d), shrunk (Ledoit & Wolf 2004, section 3.2).

    (1 − s) S + s μ I with μ the mean variance.
    """
    n, d = x.shape
    covariance = x.T @ x / n
    mu = np.trace(covariance) / d
    # d · δ²: S from μI
    spread = (covariance ** 2).sum() - d * mu ** 2
    # d · β²: S from the truth, estimated
    noise = ((x ** 2).sum(1) ** 2).sum() / n ** 2 - (covariance ** 2).sum() / n
    # both 0 of one feature
    share = min(max(noise, 0.0) / spread, 1.0) if spread > 0 else 0.0
    return (1 - share) * covariance + share * mu * np.eye(d)


def conformal_p(distance: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(n,) → (1 + how many of the reference are as far or farther) / (1 + all).

    A valid p of "it is like these". The reference is the distances of validation images: those of
    training images are too short (Bates et al. 2023).
    """
    reference = np.sort(reference)
    return (1 + len(reference) - np.searchsorted(reference, distance)) / (1 + len(reference))


def right_answers(p: np.ndarray, truth: np.ndarray, exclusive: bool = True) -> np.ndarray:
    """p (n,k), truth (n,k) bool → (n,): is the answer true, of findings every one?

    The likeliest label, or every finding on its side of one half.
    """
    if exclusive:
        return np.take_along_axis(truth, p.argmax(1)[:, None], 1)[:, 0]
    return ((p >= 0.5) == truth).all(1)


def summary(members: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray],
            labels: Sequence[str], conformal: Conformal, *,
            distances: Mapping[str, np.ndarray] | None = None, exclusive: bool = True,
            tests: int = 1) -> dict:
    """Each set but "val" → its figures, from the members' p (m,n,k) and truth (n,k) bool.

    `distances` are those of `FeatureDistance`, (n,). {"n", "members", "accuracy", "conformal":
    `realised`, and under each of "entropy", "mutual_information" (with two members or more) and
    "distance" (if given): "mean", "mean_right", "mean_wrong", "wrong": AUROC for being wrong,
    "ood": AUROC for not being of the set "test", "selective"; of the distance also "atypical", the
    share farther off than 95 % of "val"}. The accuracy is that of `right_answers` by the members'
    mean.
    """
    mean, scores, found = {name: p.mean(0) for name, p in members.items()}, {}, {}
    for name, p in members.items():
        scores[name] = {"entropy": entropy(mean[name], exclusive)}
        if len(p) > 1:
            scores[name]["mutual_information"] = mutual_information(p, exclusive)
        if distances:
            scores[name]["distance"] = distances[name]
    for name in [name for name in members if name != "val"]:
        right = right_answers(mean[name], truth[name], exclusive)
        found[name] = {"n": len(right), "members": len(members[name]),
                       "accuracy": float(right.mean()),
                       "conformal": realised(conformal.sets(mean[name]), truth[name], labels,
                                             conformal, tests)}
        for kind, u in scores[name].items():
            both = np.concatenate([u, scores["test"][kind]])
            found[name][kind] = {
                "mean": float(u.mean()), "mean_right": _mean(u[right]),
                "mean_wrong": _mean(u[~right]), "wrong": _area_under(u, ~right),
                "selective": selective(u, right),
                "ood": _area_under(both, np.arange(len(both)) < len(u)) if name != "test" else None}
        if distances:
            off = conformal_p(distances[name], distances["val"]) <= 0.05
            low, high = wilson(int(off.sum()), len(off))
            found[name]["distance"]["atypical"] = {"share": float(off.mean()), "low": low,
                                                   "high": high}
    return found


def _area_under(scores: np.ndarray, positive: np.ndarray) -> dict:
    low, high = auroc_interval(scores, positive)
    return {"auroc": finite(auroc(scores, positive)), "low": finite(low), "high": finite(high),
            "n": int(positive.sum()), "n_rest": int((~positive).sum())}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
