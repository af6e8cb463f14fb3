"""Random numbers without state: each is a function of (seed, slot, purpose).

Slot s = step·batch + place in the global batch. What a slot draws depends neither on the number of
processes nor on interruptions: a resumed run equals an unbroken one bit for bit, and no generator
is saved.
"""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# Purposes: two draws of one slot for different purposes are independent.
ORDER, AUGMENT, NOISE, TIME, DROP, VIEW, VALIDATE, ROWS, DROPOUT, OFFSET = range(10)


def seeded(*key: int) -> torch.Generator:
    """A CPU generator that is a function of these integers.

    They are hashed, for torch's CPU generator (mt19937) uses only the low 32 bits of its seed.
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
    """`batch` times in [0, 1): one in each of equal strata, all with one random offset.

    Kingma et al. 2021, I.1.
    """
    offset = torch.rand((), generator=seeded(seed, step, TIME), dtype=torch.float64)
    return (torch.arange(batch, dtype=torch.float64) / batch + offset) % 1


def drops(seed: int, slots: Sequence[int], n: int, together: float, alone: float) -> Tensor:
    """Which of a slot's n cells are dropped, (slots, n), by the probabilities of dropping all
    together and each alone."""
    u = uniform(seed, slots, DROP, 1 + n)
    return (u[:, :1] < together) | (u[:, 1:] < alone)


def dropout(generators: Sequence[torch.Generator], n: int, share: float) -> Tensor:
    """What each of n features is multiplied by, a row for each generator: 0 for this share of them,
    1/(1−share) for the others (Srivastava et al. 2014)."""
    return (torch.stack([torch.rand(n, generator=g) for g in generators]) >= share) / (1 - share)


def order(n: int, seed: int, slots: Sequence[int]) -> list[int]:
    """Which of n images fills each slot: place s % n in the permutation of epoch s // n."""
    return [_permutation(n, seed, slot // n)[slot % n] for slot in slots]


def order_of_groups(groups: Sequence[Sequence[int]], shares: Sequence[int], seed: int,
                    slots: Sequence[int]) -> list[int]:
    """Which image fills each slot if group g fills shares[g] of every Σ shares slots.

    The images of a group take turns, so that each is used equally often.
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
