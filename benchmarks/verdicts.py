"""How often a study's answers are wrong where no arm differs, and right where one does.

    python benchmarks/verdicts.py            all tables → benchmarks/verdicts.json, 20 minutes

A network reads an image rightly where the sum of three normal numbers is above a threshold: how
easy the patient is, how good this training is (its standard deviation is given in points of the
figure), and chance of patient and network together; likewise its score by which an area is
measured. Arms share patients; every other number is their own. Each study goes through
`compare.difference` and `compare.judged`, the code of the page.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff.classification.compare import (  # noqa: E402
    EXCLUDED,
    GAIN,
    HARM,
    Primary,
    difference,
    judged,
)
from minidiff.statistics import delong_parts  # noqa: E402

LEVEL = 0.8  # of the figure, in the middle of both arms
GENERATORS = {"seeds": 15, "generators": 3, "generator_sd": 0.02}


def grid(**axes) -> list[dict]:
    """All combinations; an axis is a list of values, or of dicts of several."""
    rows = []
    for values in itertools.product(*axes.values()):
        row = {}
        for name, value in zip(axes, values):
            row |= value if isinstance(value, dict) else {name: value}
        rows.append(row)
    return rows


SEEDS, SPREAD, N = (3, 5, 10), (0.0, 0.02, 0.05), (60, 300)
DESIGNS = {
    # nothing differs: how often is anything called gain or harm?
    "false": [
        *grid(seeds=SEEDS, seed_sd=SPREAD, pairs=(1, 4, 12), patients=N),
        *grid(seeds=SEEDS, seed_sd=(0.0, 0.05), pairs=(4, 12), patients=N, primary=[True]),
        *grid(seeds=SEEDS, seed_sd=(0.0, 0.05), pairs=(4,), patients=N, metric=["auroc"]),
        *grid(design=[GENERATORS], seed_sd=(0.0, 0.02), pairs=(1, 4), patients=N),
        *grid(seeds=[2], seed_sd=[0.05], pairs=[12], patients=N)],
    # the arm is better by six points: how often is it called a gain?
    "true": grid(design=[{"seeds": 3}, {"seeds": 5}, {"seeds": 10},
                         *({"seeds": 15, "generators": g, "generator_sd": sd}
                           for g in (3, 5) for sd in (0.0, 0.02))],
                 seed_sd=[0.02], patients=(100, 200, 300), gain=[0.06]),
    # its gain is what the median of such studies says that they see: is it called one in 4 of 5?
    "sees": grid(design=[*({"seeds": s} for s in SEEDS), GENERATORS], seed_sd=(0.0, 0.02),
                 patients=(150, 600)),
    # its gain is the smallest one of interest: how often is that excluded?
    "worth": grid(seeds=SEEDS, seed_sd=(0.0, 0.02), patients=N, gain=[0.04])}


def network(rng: np.random.Generator, patient: np.ndarray, seeds: int, *, seed_sd: float,
            metric: str = "accuracy", generators: int = 1, generator_sd: float = 0.0,
            gain: float = 0.0) -> np.ndarray:
    """What patients (seeds, patients) add to the figure of the networks of one arm."""
    spread = 2 if metric == "auroc" else math.sqrt(2)  # of what is compared with the threshold
    slope = norm.pdf(norm.ppf(LEVEL)) / spread         # of the figure by the quality of a network
    of = np.arange(seeds) % generators
    quality = spread * norm.ppf(LEVEL + gain) + (
        seed_sd * rng.standard_normal(seeds)
        + (generator_sd * rng.standard_normal(generators))[of]) / slope
    chance = patient + rng.standard_normal((seeds, len(patient)))
    if metric == "auroc":
        ill = np.arange(len(patient)) % 3 == 0
        return np.array([delong_parts(q * ill + x, ill) for q, x in zip(quality, chance)]
                        ) * len(patient)
    return (quality[:, None] + chance > 0) * 1.0


def study(rng: np.random.Generator, *, seeds: int, patients: int, seed_sd: float, pairs: int = 1,
          gain: float = 0.0, primary: bool = False, worth: float = 0.0, metric: str = "accuracy",
          **generators) -> list[dict]:
    """The judged rows of arms against one control; the arms are better by the gain."""
    patient = rng.standard_normal(patients)
    control = network(rng, patient, seeds, seed_sd=seed_sd, metric=metric, gain=-gain / 2)
    of = np.arange(seeds) % generators.get("generators", 1)
    rows = []
    for k in range(pairs):
        arm = network(rng, patient, seeds, seed_sd=seed_sd, metric=metric,
                      gain=gain / 2, **generators)
        rows.append({"arm": f"arm{k}", "against": "control", "metric": metric, "seeds": seeds,
                     "patients": patients, **difference(arm - control, of)})
    first = Primary("arm0", "control", "test", metric) if primary else None
    return judged({"test": rows}, first, worth)["test"]


def share(n: int, words: tuple[str, ...], **design) -> float:
    """The share of n studies in which any comparison has one of these answers."""
    rng = np.random.default_rng(0)
    return sum(any(row["answer"] in words for row in study(rng, **design)) for _ in range(n)) / n


def measure(table: str, design: dict, n: int) -> dict:
    """The design with n, the words that are counted, and their rate."""
    words = {"false": (GAIN, HARM), "worth": (EXCLUDED,)}.get(table, (GAIN,))
    if table != "false":
        design = {**design, "primary": True}
    if table == "sees":
        rng = np.random.default_rng(1)
        design["gain"] = float(np.median([study(rng, **design)[0]["sees"] for _ in range(n // 4)]))
    worth = {"worth": design["gain"]} if table == "worth" else {}
    return {**design, "n": n, "words": words, "rate": share(n, words, **design, **worth)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=2000, help="studies a design")
    a = p.parse_args()
    found = {table: [measure(table, design, a.n) for design in tqdm(designs, table)]
             for table, designs in DESIGNS.items()}
    lines = (f'"{table}": [\n' + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]"
             for table, rows in found.items())
    Path(__file__).with_suffix(".json").write_text("{" + ",\n".join(lines) + "}\n")
    for table, rows in found.items():
        for row in rows:
            print(table, row)


if __name__ == "__main__":
    main()
