"""Chance that only the holder of the key can repeat: names, draws and orders from one secret.

A public seed would let anybody draw the same images and orders again and read the truth off them;
so would the state of one generator, which its outputs give away. Here every purpose has a generator
of its own, keyed by HMAC-SHA256.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import numpy as np

TRIES = 200  # placements of the pairs before the gap is narrowed by one


def name(secret: bytes, purpose: str) -> str:
    """128 bits in hexadecimal."""
    return hmac.digest(secret, purpose.encode(), "sha256").hex()[:32]


def generator(secret: bytes, purpose: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hmac.digest(secret, purpose.encode(), "sha256"),
                                                "big"))


def spaced_order(n: int, pairs: Sequence[tuple[int, int]], gap: int,
                 rng: np.random.Generator) -> tuple[list[int], int]:
    """0 … n − 1 in random order, the two of each pair at least `gap` places apart: (order, gap
    kept).

    The pairs are placed first, each on two free places drawn at random, anew where one finds none;
    the gap shrinks only where that fails too often, as it must in a short list.
    """
    for kept in range(min(gap, n - len(pairs)), -1, -1):
        for _ in range(TRIES if pairs else 1):
            order = np.full(n, -1)
            for k in rng.permutation(len(pairs)):
                free = np.flatnonzero(order < 0)
                first = rng.choice(free)
                far = free[(abs(free - first) >= kept) & (free != first)]
                if not len(far):
                    break
                order[first], order[rng.choice(far)] = rng.permutation(pairs[k])
            else:
                rest = np.setdiff1d(np.arange(n), order)
                order[order < 0] = rng.permutation(rest)
                return order.tolist(), kept
    raise AssertionError("a gap of 0 is always possible")
