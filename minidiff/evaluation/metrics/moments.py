"""Fréchet distance from streamed moments: 50,000 × 2,048 features need not be held.

A set is kept as its count, mean and scatter matrix in float64. While batches come in there are the
batch and two d × d matrices in memory: 67 MB at d = 2,048.
"""

import numpy as np
import torch

from minidiff.errors import InputError
from minidiff.evaluation.metrics.pairwise import check_finite

ROWS = 2048  # of one call to `add` at a time: their float64 copy stays small


class Moments:
    """Count, mean (d,) and scatter Σ(x − mean)(x − mean)ᵀ (d,d) of the features added so far."""

    def __init__(self, d: int):
        self.count, self.mean, self.scatter = 0, np.zeros(d), np.zeros((d, d))

    def add(self, features: np.ndarray) -> "Moments":
        """Take in a batch (n,d) of any float type; returns self. InputError for NaN and infinity.

        Each part is centred on its own mean before it is squared, since E[x²] − E[x]² loses all
        digits where the mean is large beside the spread (Chan, Golub & LeVeque 1983, eq. 1.5); the
        shift of the mean is one more row.
        """
        features = np.asarray(features)
        assert features.shape[1:] == self.mean.shape, (features.shape, self.mean.shape)
        check_finite("", features)
        for start in range(0, len(features), ROWS):
            x = features[start:start + ROWS].astype(np.float64)
            mean, total = x.mean(0), self.count + len(x)
            x -= mean
            shift = mean - self.mean
            row = shift[None] * np.sqrt(self.count * len(x) / total)
            self.scatter += x.T @ x
            self.scatter += row.T @ row
            self.mean, self.count = self.mean + shift * (len(x) / total), total
        return self

    @property
    def covariance(self) -> np.ndarray:
        """(d,d), with 1/(n−1)."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images; there are {self.count}")
        return self.scatter / (self.count - 1)


def fid_of(a: Moments, b: Moments) -> float:
    """`distances.fid` of two sets that are known by their moments."""
    s, t = a.covariance, b.covariance
    return frechet(a.mean - b.mean, np.trace(s) + np.trace(t), root_trace(s, t))


def frechet(shift: np.ndarray, traces: float, cross: float) -> float:
    """|μ₁−μ₂|² + (tr Σ₁ + tr Σ₂) − 2 tr (Σ₁Σ₂)^½, from its three parts (Dowson & Landau 1982)."""
    return float(shift @ shift + traces - 2 * cross)


def root_trace(s: np.ndarray, t: np.ndarray) -> float:
    """tr (ST)^½ of two covariances (d,d).

    Any root S = LLᵀ will do: ST has the eigenvalues of LᵀTL, which is symmetric, so that they are
    real and, but for rounding, not negative. Cholesky's L costs a seventh of the root by eigh,
    which remains where neither S nor T has full rank.
    """
    for first, other in ((s, t), (t, s)):
        try:
            root = np.linalg.cholesky(first)
        except np.linalg.LinAlgError:   # a singular matrix
            continue
        return _root_sum(root, other)
    values, vectors = np.linalg.eigh(s)
    return _root_sum(vectors * np.sqrt(values.clip(0)), t)


def _root_sum(root: np.ndarray, t: np.ndarray) -> float:
    # PyTorch brings a LAPACK that takes half of NumPy's time
    product = torch.from_numpy(root.T @ t @ root)
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum().item()
