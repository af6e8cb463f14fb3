"""How wrong a figure or an answer is about what it has chosen.

    python benchmarks/selection.py           both tables → benchmarks/selection.json, 10 minutes

Checkpoints: k of them, equally good, are compared by their KD to validation images, and one is
taken by the rule of `evaluate.py monitor`. Its KD there is compared with the true one, and so is
that of new images to test images.

Filters: two small networks learn, each from images of its own, in which of three places a spot
lies. Images, with a spot, or without one and labelled by chance, are kept where the first network
reads them as labelled (`sample.py --keep recognised`), and the report answers about them.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff.classification.judge_agreement import judge_agreement  # noqa: E402
from minidiff.classification.predictor import Predictor, fit  # noqa: E402
from minidiff.evaluation.metrics.distances import kd_with_interval  # noqa: E402
from minidiff.evaluation.monitor import choose  # noqa: E402
from minidiff.evaluation.verdicts import verdicts  # noqa: E402
from minidiff.variables import Category  # noqa: E402

D, SHIFT = 8, 0.3            # dimensions; by how much every checkpoint misses, in each of them
K, N, M = 8, 60, 90          # checkpoints; validation (and test) images; images of a checkpoint
PLACES, SIDE = ((4, 4), (4, 11), (11, 8)), 16
SPOT = Category("label", ("left", "right", "below"))


def true_kd(d: int = D, shift: float = SHIFT) -> float:
    """KD between N(0, I) and N(shift, I) in d dimensions: the moments of x·y up to the third."""
    q = d * shift**2
    return (q**3 + 6 * q**2 + 3 * (d + 2) * q) / d**3 + 3 * q**2 / d**2 + 3 * q / d


def choice(seed: int) -> list[dict]:
    """KD with its interval of the checkpoint taken, on val and on test."""
    rng = np.random.default_rng([seed, 17])
    val, test = rng.normal(0, 1, (2, N, D))

    def measured(real: np.ndarray) -> tuple[dict, np.ndarray]:
        fake = rng.normal(SHIFT, 1, (M, D))
        return kd_with_interval(real=real, fake=fake, n_boot=200)

    found, draws = zip(*(measured(val) for _ in range(K)))
    points = [{"step": i, "KD": {"x": {"value": kd["KD"]}}, "copying": {"suspected": False}}
              for i, kd in enumerate(found)]
    return [found[choose(points, {"x": draws})["step"]], measured(test)[0]]


def choices(n: int) -> dict:
    """Over n choices, on val and on test: the mean of KD, its standard error, and the share of
    95 % intervals that lie below the true KD, and above."""
    rows = [choice(seed) for seed in tqdm(range(n), "choices", leave=False)]
    table = {"n": n, "true KD": true_kd()}
    for name, own in zip(("val", "test"), zip(*rows)):
        kd, low, high = (np.array([r[key] for r in own]) for key in ("KD", "KD_low", "KD_high"))
        table[name] = {"KD": kd.mean(), "se": kd.std(ddof=1) / n**0.5,
                       "below": (high < true_kd()).mean(), "above": (low > true_kd()).mean()}
    return table


def spots(seed: int, n: int, strength: float = 60.0) -> tuple[Tensor, Tensor]:
    """uint8 (n,1,16,16) of noise with a spot in the place of its label, and the labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(PLACES), (n,), generator=g)
    y, x = torch.meshgrid(*[torch.arange(float(SIDE))] * 2, indexing="ij")
    shapes = torch.stack([(-((y - r)**2 + (x - c)**2) / 8).exp() for r, c in PLACES])
    noise = 128 + 40 * torch.randn(n, SIDE, SIDE, generator=g)
    return (noise + strength * shapes[labels]).clamp(0, 255).to(torch.uint8)[:, None], labels


def filtered(pair: int, sets: int = 100, n: int = 100) -> list[dict]:
    """Of `sets` sets of n images that one judge has filtered: the answers to whether they show the
    label, and what both judges see in them and in real images, on average.

    A row for images without a spot, whose labels are chance, and one for those of a good generator.
    """
    judges, real = [], spots(1000 + pair, 300)
    for k in (2 * pair, 2 * pair + 1):
        judge = Predictor([SPOT], width=8, size=SIDE, seed=k)
        images, labels = spots(k, 300)
        fit(judge, images, {"label": labels}, steps=60, lr=2e-3, batch=32, seed=k, augment="plain")
        judges.append(judge)
    rows = []
    for strength in (0.0, 60.0):
        images, labels = spots(2000 + pair, 9 * n, strength)
        kept = judges[0].predict(images)["label"].argmax(1) == labels
        rows.append({"pair": pair, "strength": strength, "sets": sets, "n": n,
                     "yield": kept.double().mean().item(),
                     **asked(judges, real, images[kept], labels[kept], sets, n)})
    return rows


def asked(judges: list[Predictor], real: tuple[Tensor, Tensor], images: Tensor, labels: Tensor,
          sets: int, n: int) -> dict:
    """The shares of answers that each judge gives to sets of n of these images."""
    own, by = {"judge": "own", "sha256": "x"}, [{"by": "recognised", "judge": "x", "rejects": 1}]
    cases = {"own, filter unknown": ([], "own"), "own": (by, "own"),
             "independent": (by, "independent")}
    said, seen = {name: Counter() for name in cases}, []
    truth, made = {}, {}
    for which, judge in zip(("own", "independent"), judges):
        (truth[which],) = judge_agreement(judge, real[0], {"label": real[1]}, "held-out real")
    for s in range(sets):
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(s))[:n]
        for which, judge in zip(truth, judges):
            (made[which],) = judge_agreement(judge, images[some], {"label": labels[some]},
                                             "synthetic")
        seen.append([row["accuracy"] for row in made.values()])
        for name, (filters, which) in cases.items():
            (v,) = verdicts({"distances": [], "judges": [own], "samples": {"filters": filters},
                             "agreement": [{**row, "judge": which}
                                           for row in (truth[which], made[which])]})
            said[name][v["answer"]] += 1
    return {"real": [row["accuracy"] for row in truth.values()], "seen": np.mean(seen, 0).tolist(),
            "answers": {name: {answer: k / sets for answer, k in sorted(counts.items())}
                        for name, counts in said.items()}}


if __name__ == "__main__":
    result = {"first choices": choices(40), "choices": choices(1000),
              "filtered": sum(map(filtered, tqdm(range(8), "pairs of judges")), [])}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
