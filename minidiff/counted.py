"""Randomness by counting: every random number is a function of (seed, slot, purpose), and nothing
has a state.

Slot s = step·batch + place in the global batch. Neither the number of processes nor an interruption
changes what a slot draws, so a resumed run equals an unbroken one bit for bit, and no generator has
to be saved.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# Purposes: two draws of one slot for different purposes are independent.
ORDER, AUGMENT, NOISE, TIME, DROP, VIEW, VALIDATE, ROWS, DROPOUT = range(9)


def seeded(*key: int) -> torch.Generator:
    """A CPU generator that is a function of these integers, each in its place.

    torch's CPU generator (mt19937) keeps the low 32 bits of its seed, which is why the key is
    hashed and not packed.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def generators(seed: int, slots: Sequence[int], purpose: int) -> list[torch.Generator]:
    return [seeded(seed, slot, purpose) for slot in slots]


def normal(seed: int, slots: Sequence[int], purpose: int, shape: Sequence[int]) -> Tensor:
    """Standard normal (slots, *shape), float32."""
    return torch.stack([torch.randn(tuple(shape), generator=g)
                        for g in generators(seed, slots, purpose)])


def uniform(seed: int, slots: Sequence[int], purpose: int, n: int) -> Tensor:
    """Uniform in [0, 1), (slots, n), float32."""
    return torch.stack([torch.rand(n, generator=g) for g in generators(seed, slots, purpose)])


def stratified(seed: int, step: int, batch: int) -> Tensor:
    """One low-discrepancy set of `batch` times in [0, 1): equal strata with one shared offset
    (Kingma et al. 2021, I.1).
    """
    offset = torch.rand((), generator=seeded(seed, step, TIME), dtype=torch.float64)
    return (torch.arange(batch, dtype=torch.float64) / batch + offset) % 1


def drops(seed: int, slots: Sequence[int], n: int, together: float, alone: float) -> Tensor:
    """Which of n cells of each slot are dropped, (slots, n): all together, or each alone, with
    these probabilities.
    """
    u = uniform(seed, slots, DROP, 1 + n)
    return (u[:, :1] < together) | (u[:, 1:] < alone)


def order(n: int, seed: int, slots: Sequence[int]) -> list[int]:
    """Which of n images fills each slot: slot s takes place s % n of the permutation of epoch s //
    n.
    """
    return [_permutation(n, seed, slot // n)[slot % n] for slot in slots]


def order_of_groups(groups: Sequence[Sequence[int]], shares: Sequence[int], seed: int,
                    slots: Sequence[int]) -> list[int]:
    """Which image fills each slot when group g is to fill shares[g] of every Σ shares slots,
    whatever its own size.

    Within a group the images take turns, through all epochs, so that each is used as often as any
    other.
    """
    ends = list(accumulate(shares))
    picked = []
    for place, slot in zip(order(ends[-1], seed, slots), slots):
        g = bisect_right(ends, place)
        turn = slot // ends[-1] * shares[g] + place - (ends[g] - shares[g])
        members = groups[g]
        picked.append(members[_permutation(len(members), seed + 1 + g,
                                           turn // len(members))[turn % len(members)]])
    return picked


@lru_cache(maxsize=256)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=seeded(seed, epoch, ORDER)).tolist()
