"""The benchmark of scale: its stages on a few images, its rows kept, and docs/scale.md's table."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: it has a train.py, too
from benchmarks import scale  # noqa: E402

TRAINED = ("vae", "latents", "second", "diffusion", "samples", "resume", "quick", "classifier")


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "MINIDIFF_CACHE"):
        monkeypatch.setenv(name, "")  # restored afterwards
    monkeypatch.setattr(scale, "LOADED", 512)
    monkeypatch.setattr(scale, "STEPS", 2)
    return scale.Place(tmp_path, 120)


def test_every_stage_without_training(place):
    place.draw()
    facts = {}
    for stage in (name for name in scale.STAGES if name not in TRAINED):
        fresh = scale.Place(place.folder.parent, place.n)  # as in a process of its own
        fresh.root.mkdir(exist_ok=True)
        facts[stage] = scale.STAGES[stage][1](fresh)
    assert facts["first"] == facts["again"] == {"pixels": 120 * 64**2}
    assert facts["map"] == {"bytes": 120 * (64**2 + 65)}
    assert min(facts["loader"].values()) > 0 and facts["audit"]["pairs"] < 12
    # normal features of equal n: see docs/metrics.md
    assert abs(facts["kid"]["value"]) < 0.1 and 0.3 < facts["c2st"]["value"] < 0.7


@pytest.mark.slow
def test_the_stages_that_train(place):
    place.draw()
    place.root.mkdir()
    facts = {}
    for stage in TRAINED:
        facts[stage] = scale.STAGES[stage][1](place)
    samples = place.root / "samples"
    assert len(list(samples.glob("images/*/*.png"))) == 120
    assert len(list(samples.glob("sheets/set_*.png"))) == 2
    assert len(json.loads((samples / "manifest.json").read_text())["sha256"]) == 121
    assert facts["latents"]["bytes"] > 0 and facts["quick"]["set_cpu_s"] > 0


def test_a_row_that_is_there_is_not_measured_again(tmp_path, monkeypatch, capsys):
    def run(*stages: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["scale.py", "--n", "30", "--out", str(tmp_path),
                                          "--stages", ",".join(stages)])
        scale.main()
        return json.loads((tmp_path / "scale.json").read_text())["rows"]

    before = run("fid")
    assert run("fid", "mind")[:1] == before and len(run("mind")) == 2
    assert "| FD |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--stages fidd: there are first"):
        run("fidd")


def test_the_page_has_the_table_of_the_record():
    rows = json.loads((ROOT / "benchmarks/scale.json").read_text())["rows"]
    assert {row["n"] for row in rows} == {*scale.SIZES}
    assert scale.table(rows) in (ROOT / "docs/scale.md").read_text()
