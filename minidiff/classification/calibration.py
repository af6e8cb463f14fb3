"""Does a probability of 80 % come true 8 times in 10? Calibration, and its one temperature.

    z (n,k) logits ─ z / T ─ softmax, or sigmoid where findings go together ─▶ p (n,k) ─▶ confidence
    (n,), right (n,)

Confidence is the largest probability and `right` whether that label is true; of findings that go
together, each is asked on its own: its probability, and whether it is there. T divides all logits
alike, so that no answer changes, only how sure it is (Guo et al. 2017). It cannot mend a wrong
share of labels: a classifier that was trained with every label weighing the same keeps giving the
rare one too much. Images count as independent throughout.
"""

from collections.abc import Sequence

import numpy as np
import scipy

from minidiff.statistics import wilson

COLDEST, HOTTEST = 1e-3, 1e3   # of T: beyond, all probabilities are 0 or 1, or all alike


def probabilities(logits: np.ndarray, T: float = 1.0, exclusive: bool = True) -> np.ndarray:
    """Logits (…,k) → probabilities at temperature T: softmax, or a sigmoid for each finding."""
    z = np.asarray(logits, float) / T
    return scipy.special.softmax(z, axis=-1) if exclusive else scipy.special.expit(z)


def pooled(members: np.ndarray, exclusive: bool = True) -> np.ndarray:
    """Logits (m,n,k) of m members → logits (n,k) of the mean of their probabilities.

    So the ensemble has a temperature of its own: pool first, then scale (Rahaman & Thiery 2021).
    Computed in logarithms, for a mean of probabilities that round to 1 would have no logit.
    """
    z = np.asarray(members, float)
    if exclusive:   # the logarithm of the sum: of that of the mean, a softmax makes the same
        return scipy.special.logsumexp(scipy.special.log_softmax(z, axis=-1), axis=0)
    yes, no = (scipy.special.logsumexp(scipy.special.log_expit(sign * z), axis=0)
               for sign in (1, -1))
    return yes - no


def nll(logits: np.ndarray, truth: np.ndarray, T: float = 1.0, exclusive: bool = True) -> float:
    """Mean negative log-likelihood in nats; logits (n,k), truth (n,k) bool.

    Of findings that go together, the mean over them.
    """
    z = np.asarray(logits, float) / T
    if exclusive:
        return float(-scipy.special.log_softmax(z, axis=1)[truth].mean())
    return float(-scipy.special.log_expit(np.where(truth, z, -z)).mean())


def temperature(logits: np.ndarray, truth: np.ndarray, exclusive: bool = True) -> float:
    """The T that makes the truth likeliest; over 1 where the classifier is too sure.

    Fitted on validation (Guo et al. 2017). The likelihood is concave in 1/T, so its slope has one
    root. Where there is none, it is 1 if every answer is right, by which the likelihood would grow
    for ever as T → 0 though nothing was learned of errors to come; and `HOTTEST` if the logits are
    no better than none at all.
    """
    z, cold, hot = np.asarray(logits, float), np.log(COLDEST), np.log(HOTTEST)

    # of the log-likelihood in 1/T: what the true labels have more than is expected
    def slope(log_t: float) -> float:
        return float((z * (truth - probabilities(z, np.exp(log_t), exclusive))).sum() / len(z))

    if slope(hot) <= 0:
        return HOTTEST if (z != 0).any() else 1.0
    if slope(cold) >= 0:
        return 1.0
    return float(np.exp(scipy.optimize.brentq(slope, cold, hot, xtol=1e-12)))


def confidence_and_right(p: np.ndarray, truth: np.ndarray,
                         exclusive: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """p (n,k), truth (n,k) bool → confidence and right, (n,) each; of findings (n·k,)."""
    if not exclusive:
        return p.ravel(), truth.ravel()
    return p.max(1), np.take_along_axis(truth, p.argmax(1)[:, None], 1)[:, 0]


def equal_mass(confidence: np.ndarray, bins: int) -> list[np.ndarray]:
    """Indices of the images of each bin of n/bins images, the least confident first.

    Equal confidences are in one bin.
    """
    # counted from those below, so that the order of the images plays no part
    of = np.searchsorted(np.sort(confidence), confidence) * bins // len(confidence)
    return [np.flatnonzero(of == b) for b in np.unique(of)]


def ece(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean of |share right − mean confidence| of a bin.

    A share of few images is off by chance, and its distance from the confidence is never negative,
    so the error comes out too high. What chance would add to the distances that were found, were
    they the true ones, is taken off: 2|d| − E|d + σε| with ε normal, σ² = Σ c(1 − c) / n² of the
    bin, and 0 where the sum is negative (the bootstrap correction of Kumar et al. 2019 in closed
    form; they take σ from the share, which is 0 where all are right). It takes off nearly half of a
    calibrated classifier's error and little of a large one: see `ece_null` for what is left.
    """
    parts = equal_mass(confidence, bins)
    return float(_ece(np.array([right[i].mean() for i in parts]), confidence, parts))


def ece_null(confidence: np.ndarray, bins: int = 15, n_boot: int = 1000,
             seed: int = 0) -> dict[str, float]:
    """`ece` of a calibrated classifier of the same confidences: median and 95th percentile.

    Of n_boot simulated sets. An error above "high" is more than the number of images explains, at 5
    %.
    """
    rng, parts = np.random.default_rng(seed), equal_mass(confidence, bins)
    shares = [(rng.random((n_boot, len(i))) < confidence[i]).mean(1) for i in parts]
    found = _ece(np.stack(shares, 1), confidence, parts)
    return {"median": float(np.median(found)), "high": float(np.quantile(found, 0.95))}


def _ece(shares: np.ndarray, confidence: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Shares right (…,b) of the b bins → the error (…)."""
    weight = np.array([len(i) for i in parts]) / len(confidence)
    distance = np.abs(shares - [confidence[i].mean() for i in parts])
    sigma = np.array([np.sqrt((confidence[i] * (1 - confidence[i])).sum()) / len(i) for i in parts])
    z = distance / np.maximum(sigma, 1e-12)   # a bin of certainties has none
    folded = (sigma * np.sqrt(2 / np.pi) * np.exp(-z * z / 2)
              + distance * scipy.special.erf(z / np.sqrt(2)))   # E|d + σε|
    return np.maximum((2 * distance - folded) @ weight, 0.0)


def brier(p: np.ndarray, truth: np.ndarray, exclusive: bool = True) -> float:
    """Mean squared error of the probabilities: 0 … 2 (Brier 1950); of findings 0 … 1."""
    squares = (p - truth) ** 2
    return float(squares.sum(1).mean() if exclusive else squares.mean())


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> list[dict]:
    """Of each equal-mass bin its mean confidence, share right, Wilson interval and n."""
    return [{"confidence": float(confidence[i].mean()), "share": float(right[i].mean()),
             **dict(zip(("low", "high"), wilson(int(right[i].sum()), len(i)))), "n": len(i)}
            for i in equal_mass(confidence, bins)]


def calibration(logits: np.ndarray, truth: np.ndarray, T: float, exclusive: bool = True, *,
                n_boot: int = 1000, seed: int = 0) -> dict:
    """All figures on one set, as it is and "scaled" by the T that was fitted on validation."""
    def figures(t: float) -> tuple[dict, list[dict]]:
        p = probabilities(logits, t, exclusive)
        confidence, right = confidence_and_right(p, truth, exclusive)
        null = ece_null(confidence, n_boot=n_boot, seed=seed)
        return {"ece": ece(confidence, right),
                **{f"ece_null_{name}": value for name, value in null.items()},
                "brier": brier(p, truth, exclusive),
                "nll": nll(logits, truth, t, exclusive)}, reliability(confidence, right)

    (plain, bins), (scaled, bins_scaled) = figures(1.0), figures(T)
    return {"n": len(logits), "temperature": T, **plain, "scaled": scaled, "bins": bins,
            "bins_scaled": bins_scaled}
