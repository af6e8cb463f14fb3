"""minidiff from Python: three lines to images, the same as those of sample.py."""

import subprocess
import sys

import numpy as np
import pytest

import minidiff
import sample
from minidiff.data import images
from minidiff.data.table import read_table
from minidiff.errors import InputError


@pytest.fixture(scope="module")
def model(tiny):
    return minidiff.load(tiny)


def test_the_images_are_those_of_the_script(tiny, model, tmp_path):
    sample.sample(sample.SampleConfig(run=str(tiny / "diffusion"), out=str(tmp_path / "s"),
                                      label=("covid",), per_label=3,
                                      given=("sex=F", "age=70"), seed=5))
    rows = read_table(tmp_path / "s", split=False).rows
    wanted = np.concatenate([images.read(row["file"])
                             for row in sorted(rows, key=lambda row: int(row["seed"]))])
    made = model.sample(label="covid", sex="F", age=70, n=3, seed=5)
    assert made.dtype == np.uint8 and made.shape == (3, 32, 32) and (made == wanted).all()


def test_labels_take_turns_where_none_is_given(model):
    assert model.sample(n=4).shape == (4, 32, 32)
    assert (model.sample(n=1, label="covid", seed=3) != model.sample(n=1, label="covid",
                                                                     seed=4)).any()
    assert model.conditions["label"] == ("covid", "normal", "pneumonia") and "age" in repr(model)


def test_female_is_f_and_none_is_unknown(model):
    same = [model.sample(label="covid", sex=sex, age=50, view="PA") for sex in ("F", "female", "f")]
    assert (same[0] == same[1]).all() and (same[0] == same[2]).all()
    assert (model.sample(label="covid", sex=None, age=50, view="PA") != same[0]).any()


@pytest.mark.parametrize("knobs, said", [
    ({"n": 0}, "1 or more"), ({"label": "flu"}, "'flu' is not one of"),
    ({"weight": 3}, "no such condition"), ({"sampler": "magic"}, "sampler 'magic'")])
def test_what_the_model_does_not_know_is_refused(model, knobs, said):
    with pytest.raises(InputError, match=said):
        model.sample(**knobs)


def test_a_root_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="has to finish first"):
        minidiff.load(tmp_path)


def test_the_three_are_shown_and_the_package_stays_cheap():
    assert {"load", "fid", "kid"} <= set(dir(minidiff))
    with pytest.raises(AttributeError):
        minidiff.magic  # noqa: B018
    code = "import sys, minidiff; dir(minidiff); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
