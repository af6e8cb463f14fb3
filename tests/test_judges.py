"""Who may judge beside the own judge: neither the filter nor one that saw the images."""

from types import SimpleNamespace

import pytest

from minidiff.classification.predictor import Predictor
from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.evaluation import judges, selection
from minidiff.runs import write_json
from minidiff.variables import Category

TABLES = {name: Table([{"label": "a", "file": f"{name}.png"}], hashes={f"{name}.png": name})
          for name in ("heldout", "synthetic")}


def trained(folder, seed, seen):
    Predictor([Category("label", ("a", "b"))], width=8, size=32, seed=seed).save(folder)
    if seen is not None:
        write_json(folder / "trained_on.json", seen)
    return folder


@pytest.fixture
def cfg(tmp_path):
    trained(tmp_path / "own" / "judge", 0, ["x", "y"])
    trained(tmp_path / "other" / "judge", 1, ["y", "z"])
    return SimpleNamespace(classifier=str(tmp_path / "own"), judge=str(tmp_path / "other"),
                           samples=str(tmp_path / "samples"), device="cpu")


def test_both_judges_with_what_they_were_trained_on(cfg, tmp_path):
    found = judges.of(cfg, TABLES)
    assert [(name, j.facts["trained_on"], j.facts["shared"]) for name, j in found.items()] == [
        ("own", 2, 2), ("independent", 2, 1)]
    # the folder itself, and without an own judge
    cfg.judge, cfg.classifier = str(tmp_path / "other" / "judge"), str(tmp_path / "none")
    (other,) = judges.of(cfg, TABLES).values()
    assert other.facts["sha256"] == found["independent"].facts["sha256"]
    assert other.facts["shared"] is None
    cfg.judge = ""
    assert judges.of(cfg, TABLES) == {}


@pytest.mark.parametrize("seed,seen,filtered,why", [
    (0, ["z"], [], "is the judge of --classifier"),
    (1, None, [], "does not say what it was trained on"),
    (1, ["z", "synthetic"], [], "was trained on 1 of the synthetic images"),
    (1, ["z"], ["this"], "filtered the images of .*samples"),
    (1, ["z"], [None], "may have filtered the images")])
def test_a_judge_that_is_not_independent_is_refused(cfg, tmp_path, seed, seen, filtered, why):
    folder = trained(tmp_path / "second", seed, seen)
    cfg.judge = str(folder)
    by = {"this": selection.fingerprint(folder), None: None}
    write_json(tmp_path / "samples" / "manifest.json", {
        "filters": [{"by": "recognised", "judge": by[who], "rejects": 0} for who in filtered]})
    with pytest.raises(InputError, match=f"--judge .*second {why}.*an independent judge is needed"):
        judges.of(cfg, TABLES)
