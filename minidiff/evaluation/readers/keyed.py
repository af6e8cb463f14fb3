"""Random names, draws and orders that only the holder of the secret can repeat.

With a public seed anybody could draw the same images and orders again and learn which are real; so
they could from the state of a generator, which its outputs reveal. Here every purpose has its own
generator, keyed by HMAC-SHA256.
"""

import hmac
from collections.abc import Sequence

import numpy as np

TRIES = 200


def name(secret: bytes, purpose: str) -> str:
    """128 bits in hexadecimal."""
    return hmac.digest(secret, purpose.encode(), "sha256").hex()[:32]


def generator(secret: bytes, purpose: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hmac.digest(secret, purpose.encode(), "sha256"),
                                                "big"))


def spaced_order(n: int, pairs: Sequence[tuple[int, int]], gap: int,
                 rng: np.random.Generator) -> tuple[list[int], int]:
    """(order, gap): 0 … n − 1 in random order, the two of each pair at least a gap apart.

    Pairs are placed first, each on two free places drawn at random. If that fails `TRIES` times, as
    it must in a short list, the gap shrinks by one.
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
