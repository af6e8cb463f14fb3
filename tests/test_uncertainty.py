"""Uncertainty of single images: closed forms, an honest rank correlation, and a table that stays
what it was.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import drawn
from scipy import stats

from minidiff import runs
from minidiff.data import images, phantom
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation import uncertainty as module
from minidiff.evaluation.monitor import checkpoints
from minidiff.evaluation.uncertainty import (
    UncertaintyConfig,
    check_written,
    spearman,
    uncertainty,
    write_column,
)


def test_closed_forms():
    rng = np.random.default_rng(0)
    real = rng.normal(3, 2, (4000, 6))
    # every checkpoint the same
    assert (uncertainty(np.repeat(rng.normal(0, 1, (1, 9, 6)), 5, 0), real) < 1e-25).all()
    # as different as two patients
    apart = uncertainty(rng.normal(3, 2, (400, 9, 6)), real)
    assert np.abs(apart - 1).max() < 0.15
    x = rng.normal(0, 1, (2, 3, 6))
    assert np.allclose(uncertainty(x, real),
                       ((x[0] - x[1]) ** 2).sum(1) / 2 / real.var(0, ddof=1).sum())
    turn, _ = np.linalg.qr(rng.normal(0, 1, (6, 6)))
    assert np.allclose(uncertainty(7 * x @ turn + 1, 7 * real @ turn + 1), uncertainty(x, real))


def test_bad_features_are_refused():
    x = np.zeros((5, 3, 4))
    with pytest.raises(InputError, match="no unit"):
        uncertainty(x, np.ones((9, 4)))
    x[2, 1, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        uncertainty(x, np.eye(9)[:, :4])


def test_spearman_is_that_of_scipy_and_knows_its_ends():
    rng = np.random.default_rng(1)
    # many ties
    x, y = rng.integers(0, 6, 40), rng.integers(0, 6, 40)
    r, low, high = spearman(x, y)
    assert r == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12) and low < r < high
    assert spearman(range(9), np.exp(range(9)))[0] == pytest.approx(1)
    assert spearman(range(9), range(9, 0, -1))[0] == pytest.approx(-1)
    assert np.isnan(spearman([1, 2, 3], [1, 2, 3])).all() and np.isnan(spearman([1] * 9,
                                                                                range(9))).all()


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_its_interval_covers(rho):
    """Of bivariate normals the rank correlation is 6/π·asin(ρ/2): 95 % intervals hold it in 93 to
    97 % of 1,000 samples.
    """
    rng, truth, hits = np.random.default_rng(2), 6 / np.pi * np.arcsin(rho / 2), 0
    for _ in range(1000):
        x = rng.normal(0, 1, 60)
        _, low, high = spearman(x, rho * x + np.sqrt(1 - rho**2) * rng.normal(0, 1, 60))
        hits += low <= truth <= high
    assert 0.93 <= hits / 1000 <= 0.97, hits


@pytest.fixture
def made(tmp_path):
    """Phantoms in the place of samples, with a manifest; and a run of six models, the last of which
    made them.
    """
    phantom.write(tmp_path / "data", n=120, size=32, seed=0)
    rows = [{"file_name": row["file_name"], "label": row["label"], "seed": str(i),
             "note": 'a "b", c' if i == 3 else ""}
            for i, row in enumerate(drawn(tmp_path / "samples", seed=5, n=24))]
    run, folder = tmp_path / "diffusion", tmp_path / "samples"
    for step in (10, 20, 30, 40, 50, 60):
        where = run if step == 60 else run / "snapshots" / f"step_{step:08d}"
        where.mkdir(parents=True, exist_ok=True)
        runs.write_json(where / "model.json",
                        {"size": 32, **({} if step == 60 else {"step": step})})
        (where / "model.safetensors").write_text(str(step))
    runs.write_json(run / "config.json", {"steps": 60, "data": [str(tmp_path / "data")], "seed": 0})
    runs.write_json(folder / "config.json", {"run": str(run)})
    write_table(folder / "metadata.csv", rows)
    hashes = {name: runs.sha256(folder / name)
              for name in ("metadata.csv", *(row["file_name"] for row in rows))}
    model = runs.sha256(run / "model.safetensors")
    runs.write_json(folder / "manifest.json", {"model": model, "sha256": hashes, "yield": 1.0})
    return tmp_path, rows


def wavering(folder: Path, rows) -> torch.Tensor:
    """The sample itself, with noise that is the larger the higher its seed is and differs from
    model to model.
    """
    out = []
    for row in rows:
        image = torch.tensor(images.read(row["file"])).float()
        own = torch.Generator().manual_seed(int((folder / "model.safetensors").read_text()))
        noise = torch.randn(image.shape, generator=own)
        out.append(
            (image + int(row["seed"]) * 3 * noise).clamp(0, 255).to(torch.uint8).expand(3, -1, -1))
    return torch.stack(out)


def config(root, **more) -> UncertaintyConfig:
    return UncertaintyConfig(**{"samples": str(root / "samples"), "classifier": str(root / "none"),
                                **more})


def read_csv(root) -> list[dict]:
    with open(root / "samples" / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_gains_the_column_and_nothing_else(made, capsys):
    root, rows = made
    result = module.run(config(root), wavering)
    now = read_csv(root)
    assert [{k: v for k, v in row.items() if k != "uncertainty"} for row in now] == rows
    values = [float(row["uncertainty"]) for row in now]
    assert spearman(values, range(24))[0] > 0.95 and values[0] == 0
    manifest = json.loads((root / "samples/manifest.json").read_text())
    assert manifest["sha256"]["metadata.csv"] == runs.sha256(
        root / "samples/metadata.csv") and manifest["yield"] == 1.0
    assert [c["step"] for c in result["checkpoints"]] == [20, 30, 40, 50, 60] and result["k"] == 5
    saved = json.loads((root / "samples/uncertainty.json").read_text())
    assert {c["with"] for c in saved["correlations"]} == {
        "distance to the nearest training image", "distance to the held-out mean of its label"}
    assert images.read(root / "samples/sheets/uncertainty.png").shape[1] == 5 * 34 - 2
    assert "column uncertainty is of pixels-pca64" in capsys.readouterr().out
    before = (root / "samples/metadata.csv").read_bytes()
    # again: the same
    module.run(config(root), wavering)
    assert (root / "samples/metadata.csv").read_bytes() == before
    assert len(read_table(root / "samples", split=False)) == 24


@pytest.mark.parametrize("had_one", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_crash_between_the_two_files_heals(made, monkeypatch, at, had_one):
    root, rows = made
    folder = root / "samples"
    values = dict.fromkeys((row["file_name"] for row in rows), "0.5")
    if had_one:
        write_column(folder, dict.fromkeys(values, "0.25"), check_written(folder))
    real, seen = runs.write_atomic, []

    def failing(path, *args, **more):
        if Path(path).parent == folder:
            if len(seen) == at:
                raise OSError(28, "No space left on device")
            seen.append(path)
        real(path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_atomic", failing)
        patch.setattr("minidiff.data.table.write_atomic", failing)
        with pytest.raises(OSError):
            write_column(folder, values, check_written(folder))
    write_column(folder, values, check_written(folder))
    assert {row["uncertainty"] for row in read_csv(root)} == {"0.5"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"]["metadata.csv"] == runs.sha256(folder / "metadata.csv")


def test_what_does_not_belong_together_is_refused(made, tmp_path):
    root, rows = made
    with pytest.raises(InputError, match="models kept by .*: 6, --k 4; 5 or more"):
        module.run(config(root, k=4), wavering)
    with pytest.raises(InputError, match="holds no model that made"):
        (root / "diffusion" / "model.safetensors").write_text("another")
        module.run(config(root), wavering)
    text = (root / "samples" / "metadata.csv").read_text()
    (root / "samples" / "metadata.csv").write_text(text.replace("covid,", "normal,", 1))
    with pytest.raises(InputError, match=r"metadata\.csv is not as it was written"):
        module.run(config(root), wavering)
    (root / "samples" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        module.run(config(root), wavering)


def test_every_checkpoint_is_asked_for_the_same_rows(made):
    root, rows = made
    asked = []

    def sample(folder, rows):
        asked.append((folder, rows))
        return wavering(folder, rows)

    module.run(config(root), sample)
    points = checkpoints(root / "diffusion")[-5:]
    assert [folder for folder, _ in asked] == [p.folder for p in points]
    assert all(own == asked[0][1] and len(own) == len(rows) for _, own in asked)
