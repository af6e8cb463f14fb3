"""benchmarks/ablation.py: an error that makes rows comparable, its table, a part made again."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import ablation
from benchmarks.rare import draw, pixels
from minidiff.data import phantom
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.schedule import Schedule
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.metrics.distances import kid

ROOT = Path(__file__).parents[1]
KEPT = json.loads((ROOT / "benchmarks/ablation.json").read_text())


def exact(prediction: str, schedule: Schedule) -> Denoiser:
    """The best denoiser of standard normal data, D = x/(1+σ²), as a network of this prediction."""
    def net(x_in, t, labels):
        s = (t.double() / (len(schedule) - t.double()) if prediction == "flow" else
             schedule.sigma(t.double()))[:, None, None, None]
        row = Denoiser(net, schedule, prediction).row
        x = x_in.double() * row.over(s)
        return (x / (1 + s**2) - row.c_skip(s) * x) / row.c_out(s)
    return Denoiser(net, schedule, prediction)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_the_best_denoiser_of_a_gaussian_has_an_error_of_one_at_all_levels(prediction):
    z = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = ablation.errors(SimpleNamespace(denoiser=exact(prediction, Schedule.scaled_linear())),
                            z, {"label": torch.zeros(64, dtype=torch.long)})
    assert list(found) == [f"error_t{q}" for q in range(4)]
    assert all(x == pytest.approx(1, abs=0.03) for x in found.values())


def test_quarters_above_the_rows_own_levels_have_no_error():
    z = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = SimpleNamespace(denoiser=exact("v", Schedule.scaled_linear().shifted(0.25)))
    found = ablation.errors(pipeline, z, {"label": torch.zeros(8, dtype=torch.long)})
    assert [x is None for x in found.values()] == [False, False, True, True]


def test_all_rows_have_their_seeds_and_the_page_has_their_table():
    assert set(KEPT) == {"facts", *ablation.ROWS, *(f"EMA {w:g}" for w in ablation.WIDTHS)}
    assert all(sorted(r["seed"] for r in row) == [0, 1, 2] and all(r["n"] == 300 for r in row)
               for name, row in KEPT.items() if name != "facts")
    assert ablation.table(KEPT) in (ROOT / "docs/ablation.md").read_text()


def test_differences_are_taken_seed_by_seed():
    row = [{"seed": k, "KD": [x, 0, 9], "pixels": [1, 0, 2], "recognised": [.5, .4, .6],
            "error_t0": .1, "error_t1": .1, "error_t2": None, "error_t3": .1}
           for k, x in enumerate((1., 2., 3.))]
    other = [{**r, "KD": [r["KD"][0] + d, 0, 9]} for r, d in zip(row, (.1, .2, .3))]
    cells = ablation.table({"facts": {}, "default": row, "other": other[::-1]}).splitlines()[-1]
    # t of 2 degrees of freedom, 4.303 · .1/√3
    assert cells.split(" | ")[1:3] == ["2.20", "+.20 (−.05 to +.45)"]
    assert cells.split(" | ")[8] == "–"


@pytest.mark.slow
def test_the_floor_in_pixels_comes_again(tmp_path):
    phantom.write(tmp_path / "data", scarce=phantom.SCARCE)
    _, train = load_pixels(read_table(str(tmp_path / "data")).select(split="train"), 64)
    features = PixelPCA().fit(train[:])
    one, two = (features(pixels(draw(tmp_path / f"{k}", k, dict.fromkeys(
        phantom.LABELS, range(ablation.EACH))))).double().numpy() for k in ablation.FRESH)
    assert np.isclose(kid(real=one, fake=two), KEPT["facts"]["apart"]["pixels"], rtol=1e-3)
