"""How often images are used where each label, or each finding, is to be as frequent as the others.

Label l has n_l images, finding f is in a share p_f of them. At balance b, from 0 (as in the data)
to 1 (all equally):

    labels     share ∝ n_l^(1−b)
    findings   share = p_f^(1−b)·Σp / Σp^(1−b): an image has as many findings on average as before

Findings stand together, so what one needs moves the others. The weights of images with f and of
those without are scaled to f's share, finding after finding, until every share is there: iterative
proportional fitting (Deming & Stephan 1940). Of all weights that give these shares they are nearest
to the data's own in relative entropy (Csiszár 1975), so findings that go together still do. Where
no weights give them (a finding that every image has cannot become rarer) that is refused.
"""

from collections.abc import Mapping

import numpy as np

from minidiff.errors import InputError
from minidiff.variables import present

SWEEPS, CLOSE = 1000, 0.005  # at most so many; shares so near to those wanted are reached
FINE = 10                    # turns of a round for each image: weights are rounded to tenths


def turns(counts: Mapping[str, int], balance: float, several: bool) -> dict[str, int]:
    """Label cell → how many turns its images have in a round; counts: cell → its images.

    several: cells are such as Edema|Effusion. InputError if a balance cannot be reached.
    """
    if not several:
        most = max(counts.values())
        return {cell: round(n ** (1 - balance) * most**balance) for cell, n in counts.items()}
    sets = [present("label", cell) for cell in counts]
    names = sorted(frozenset().union(*sets))
    there = np.array([[name in own for name in names] for own in sets])
    n = np.array([*counts.values()], float)
    w = fitted(n / n.sum(), there, names, balance)
    return {cell: max(1, round(FINE * share * n.sum())) for cell, share in zip(counts, w)}


def fitted(w: np.ndarray, there: np.ndarray, names: list[str], balance: float) -> np.ndarray:
    """Shares w (c,) of combinations of findings, there (c, k) bool, at a balance: (c,), sum 1."""
    before = w @ there
    wanted = before ** (1 - balance)
    wanted *= before.sum() / wanted.sum()
    for _ in range(SWEEPS):
        for own, share in zip(there.T, np.clip(wanted, 0, 1)):
            now = w @ own
            w = w * np.where(own, share / now, (1 - share) / max(1 - now, 1e-300))
        off = w / w.sum() @ there - wanted
        if abs(off).max() < CLOSE:
            return w / w.sum()
    k = int(abs(off).argmax())
    raise InputError(f"--balance {balance:g}: no weights of these images make {names[k]} as "
                     f"frequent as wanted, in {wanted[k]:.1%} of them (it is in {before[k]:.1%}; "
                     f"reached: {off[k] + wanted[k]:.1%}); a lower --balance may be reached")
