"""So many images that a matrix of their distances to all training images fits into memory: where
there are more, a random draw, and a note that says so."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from minidiff.evaluation.metrics.distances import draw

CELLS = 2**27   # of a matrix of distances in float64: 1 GiB

Sides = Mapping[str, Tensor]


def few(fake: Sides, heldout: Sides, train: int, named: Sequence[tuple | None],
        seed: int) -> tuple[Sides, Sides, list, list[np.ndarray]]:
    """Synthetic and held-out images of every space, and names of (training, held-out) images, with
    no more on a side than CELLS allow; and which of each side they are."""
    kept = []
    for k, side in enumerate((fake, heldout)):
        n = len(next(iter(side.values())))
        kept.append(draw(np.arange(n), max(1, CELLS // max(train, 1)), seed + k))
    fake, heldout = ({name: x if len(x) == len(own) else x[own] for name, x in side.items()}
                     for side, own in zip((fake, heldout), kept))
    named = [side and (side[0], [side[1][i] for i in kept[1]]) for side in named]
    return fake, heldout, named, kept


def of_all(found: dict, kept: Sequence[np.ndarray], sizes: Sequence[int]) -> dict:
    """What `memorisation` found in the draws: the images by their numbers before, and the note."""
    for row in [*found["closest"], *(found["named"] or {}).get("images", ())]:
        row |= {side: int(own[row[side]]) for side, own in zip(("fake", "heldout"), kept)
                if side in row}
    drawn = [f"{len(own)} of {n} {side} images" for side, own, n in
             zip(("synthetic", "held-out"), kept, sizes) if len(own) < n]
    return found | {"verdict": f"{found['verdict']} (seen in a random draw of "
                               f"{' and '.join(drawn)})"} if drawn else found
