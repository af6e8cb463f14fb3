"""A study whose pictures are made alike: its classifiers, its judge and its answers about new
images all see them so; and what cannot be asked for is refused before anything is read.
"""

import csv
import json
import sys
from pathlib import Path

import pytest
from study_data import TINY, write_world

from minidiff.classification.lungs import LungNet
from minidiff.classification.predict import PredictConfig, predict
from minidiff.classification.predictor import Predictor
from minidiff.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))  # classify.py is a script, beside the package
import classify


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("alike")
    LungNet(1).save(root / "lungs")
    return root, dict(write_world(root), condition=("label",), device="cpu", arms=("real",),
                      seeds=1, positive="light", lungs=str(root / "lungs"), **TINY)


@pytest.mark.slow
def test_new_images_are_made_alike_as_the_study_s_were(world, capsys):
    root, knobs = world
    classify.run_study(classify.Config(**knobs, out=str(root / "run"), invariant="view",
                                       standardise=("lungs", "equalise", "local")))
    said = capsys.readouterr().out
    assert "plausible lungs were found in " in said and " of 54 images of train" in said
    for folder in ("arms/real/0", "judge"):
        net = Predictor.load(root / "run" / folder)
        assert net.standardise == ("lungs", "equalise", "local") and net.lungs
    new = str(root / "clinic")
    predict(PredictConfig(model=str(root / "run"), data=new, out=str(root / "new.csv"),
                          device="cpu"))
    assert f"of 8 images of {new}; the others are kept whole" in capsys.readouterr().out
    logits = json.loads((root / "run/arms/real/0/result.json").read_text())["logits"]["clinic"]
    with (root / "new.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    best = [max(("dark", "light", "striped"), key=lambda k: float(row[f"p_{k}"])) for row in rows]
    assert best == [("dark", "light", "striped")[max(range(3), key=z.__getitem__)] for z in logits]


@pytest.mark.parametrize("knobs, said", [
    ({"standardise": ("blur",)}, "--standardise blur; allowed are equalise, local"),
    ({"standardise": ("local", "masked")}, "lungs or masked first"),
    ({"standardise": ("lungs",), "lungs": "nowhere"}, "nowhere has no lungs .*classify.py lungs"),
    ({"invariant": "scanner"}, "--invariant scanner: no label of the training images has two")])
def test_what_cannot_be_asked_for_is_refused_by_name(world, knobs, said, tmp_path):
    with pytest.raises(InputError, match=said):
        classify.run_study(classify.Config(**{**world[1], **knobs}, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
