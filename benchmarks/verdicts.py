"""How often a study calls a difference resolved: falsely, where no arm differs, and rightly.

    python benchmarks/verdicts.py            the whole table → benchmarks/verdicts.json, 25 minutes

A network answers an image rightly where the sum of three normal numbers is above a threshold: how
easy the patient is, how good this training is (its standard deviation is given in points of
accuracy), and chance of patient and network together. Arms share patients; every other number is
their own. Each study goes through `compare.difference` and `compare.judged`, the code of the page.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff.classification.compare import GAIN, HARM, Primary, difference, judged  # noqa: E402

RIGHT = 0.8  # share of images that a network answers rightly
FALSE = [dict(seeds=seeds, seed_sd=sd, pairs=pairs, patients=patients)
         for seeds in (3, 5, 10) for sd in (0.0, 0.02, 0.05) for pairs in (1, 4, 12)
         for patients in (60, 300)]
TRUE = [dict(seeds=seeds, generators=g, generator_sd=sd, gain=0.06, seed_sd=0.02, patients=patients)
        for patients in (100, 200, 300) for seeds, g in ((3, 1), (5, 1), (15, 3), (15, 5))
        for sd in (0.0, 0.02)]


def right(rng: np.random.Generator, patient: np.ndarray, seeds: int, *, seed_sd: float,
          generators: int = 1, generator_sd: float = 0.0, gain: float = 0.0) -> np.ndarray:
    """Which images (seeds, patients) the networks of one arm answer rightly, as 0 and 1."""
    level = norm.ppf(RIGHT) * math.sqrt(2)
    slope = norm.pdf(norm.ppf(RIGHT)) / math.sqrt(2)  # share of right answers by a unit
    quality = level + (gain + seed_sd * rng.standard_normal(seeds)
                       + (generator_sd * rng.standard_normal(generators))[
                           np.arange(seeds) % generators]) / slope
    return (quality[:, None] + patient + rng.standard_normal((seeds, len(patient))) > 0) * 1.0


def study(rng: np.random.Generator, *, seeds: int, patients: int, seed_sd: float, pairs: int = 1,
          generators: int = 1, generator_sd: float = 0.0, gain: float = 0.0,
          primary: bool = False) -> list[dict]:
    """The judged rows of arms against one control."""
    patient = rng.standard_normal(patients)
    control = right(rng, patient, seeds, seed_sd=seed_sd)
    rows = [{"arm": f"arm{k}", "against": "control", "metric": "accuracy", "seeds": seeds,
             "patients": patients,
             **difference(right(rng, patient, seeds, seed_sd=seed_sd, generators=generators,
                                generator_sd=generator_sd, gain=gain) - control,
                          [s % generators for s in range(seeds)])} for k in range(pairs)]
    first = Primary("arm0", "control", "test", "accuracy") if primary else None
    return judged({"test": rows}, first)["test"]


def resolved(n: int, seed: int = 0, **design) -> float:
    """The share of n studies in which anything is resolved: harm counts where there is no gain."""
    rng = np.random.default_rng(seed)
    wanted = (GAIN,) if design.get("gain") else (GAIN, HARM)
    return sum(any(row["answer"] in wanted for row in study(rng, **design))
               for _ in range(n)) / n


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=2000, help="studies a design")
    a = p.parse_args()
    found = [{**design, "n": a.n, "resolved": resolved(a.n, **design)}
             for design in tqdm(FALSE + TRUE, unit="design")]
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    for row in found:
        print({**row})


if __name__ == "__main__":
    main()
