"""generators: those of one recipe are one source, each classifier learns from one of them, and what
is no other training of the same recipe is refused.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from study_data import SPLITS, TINY, toy, write_generator, write_set

import classify
from minidiff import config
from minidiff.classification import arms as kinds
from minidiff.classification import inputs, study
from minidiff.data.table import read_table
from minidiff.errors import InputError


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> str:
    return write_set(tmp_path_factory.mktemp("generators") / "real", toy((30, 30, 30), 1), SPLITS)


@pytest.fixture(scope="module")
def saw(real) -> list[str]:
    """sha256 of the training files."""
    table = read_table(real)
    return [table.hashes[row["file"]] for row in table.select(split="train").rows]


def read(real, *folders, name="a"):
    return inputs.read((real,), {name: folders}, (), size=32, seed=0, out="x/out")


def test_each_network_learns_from_the_generator_of_its_turn(real, saw, tmp_path):
    folders = [write_generator(tmp_path / f"g{k}", k, saw) for k in range(3)]
    data = read(real, *folders)
    assert data.generators == {"a": 3} and data.saw == {"a": set(saw)}
    assert len(data.rows("a")) == 72 and not any("compared" in note for note in data.notes)
    patients = [row["patient"] for row in data.rows("a")]
    assert len(set(patients)) == 72  # though the files have the same names
    recipe = study.Recipe(**{**TINY, "steps": 1}, positive="light", seed=7)
    for arm in ("a", "a-then-real", "real+.2xa"):
        prints = [study.train_pair(tmp_path / arm / str(seed), kinds.parse(arm, ["a"]), seed, data,
                                   recipe)["trained_on"] for seed in range(7, 12)]
        if arm != "real+.2xa":  # whose order follows from the seed, too
            assert [prints[k][0] for k in range(5)] == [
                study.fingerprint(data.sources["a"][k]) for k in (0, 1, 2, 0, 1)]
    own = kinds.training_set(kinds.parse("real+.2xa", ["a"]), data.sets["train"], data.made_for(4),
                             positive="light", seed=4)[0]
    assert set(own.hashes[54:]) <= set(data.sources["a"][1].hashes) and len(own) == 66


@pytest.mark.parametrize("changes, words", [
    ({"sampling": {"steps": 20}}, r"steps, 20 and 12"),
    ({"sampling": {"guidance": 3.0}}, "guidance, 3.0 and None"),
    ({"training": {"steps": 651}}, "steps, 651 and 650"),
    ({"training": {"init": "runs/sd"}}, "init, True and False"),
    ({"model": {"size": 64}}, "size, 64 and 32"),
    ({"model": {"variables": ["label", "view"]}}, "variables, .*view.* and .'label'."),
    ({"counts": (8, 8, 9)}, "images of each label, .*'striped': 9.* and .*'striped': 8}"),
    ({"saw": 50}, "training images, 50 and 54, of which 50 are the same"),
    ({"saw": 0}, "training images, 0 and 54, of which 0 are the same"),
])
def test_generators_of_two_recipes_are_no_source(real, saw, tmp_path, changes, words):
    seen = saw[:changes.pop("saw", 54)]
    folders = [write_generator(tmp_path / "g0", 0, saw), write_generator(tmp_path / "g1", 1, saw),
               write_generator(tmp_path / "g2", 2, seen, **changes)]
    with pytest.raises(InputError, match=f"g2/samples is of another recipe than .*g0/samples.*: "
                       f"{words}; they may differ in their seeds only"):
        read(real, *folders)


def test_the_size_of_the_files_is_compared(real, saw, tmp_path):
    folders = [write_generator(tmp_path / f"g{k}", k, saw) for k in (0, 1)]
    for file in Path(folders[1]).rglob("*.png"):
        Image.open(file).resize((40, 40)).save(file)
    with pytest.raises(InputError, match="px, 40 and 32"):
        read(real, *folders)


def test_places_and_machines_may_differ(real, saw, tmp_path):
    folders = [write_generator(tmp_path / f"g{k}", k, saw, training={"device": d, "vae": d},
                               sampling={"seed": k, "device": d})
               for k, d in enumerate(("cpu", "cuda"))]
    assert read(real, *folders).generators == {"a": 2}


def test_a_run_from_before_a_knob_was_is_of_one_recipe_with_those_that_leave_it_off(
        real, saw, tmp_path):
    folders = [write_generator(tmp_path / f"g{k}", k, saw, training=knobs)
               for k, knobs in enumerate(({}, {"bands": [], "dropout": 0.0, "offset": 0.1}))]
    with pytest.raises(InputError, match="offset, 0.1 and None"):
        read(real, *folders)
    config = Path(folders[1]).parent / "diffusion/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "offset": 0.0}))
    assert read(real, *folders).generators == {"a": 2}


def test_one_step_of_two_trainings_is_one_recipe(real, saw, tmp_path):
    """Their held-out losses are what came of the seeds; another step is another recipe."""
    def folders(*steps):
        return [write_generator(tmp_path / f"{step}-{k}", k, saw,
                                model={"step": step, "val_loss": 0.1 + k})
                for k, step in enumerate(steps)]

    assert read(real, *folders(25, 25)).generators == {"a": 2}
    with pytest.raises(InputError, match="step, 75 and 50"):
        read(real, *folders(50, 75))


def test_one_generator_twice_is_refused(real, saw, tmp_path):
    """The same samples, other samples of the same weights, and a training repeated elsewhere, whose
    weights differ in their last bits."""
    first = write_generator(tmp_path / "g0", 0, saw)
    again = write_generator(tmp_path / "again", 0, saw, samples=1)
    twin = write_generator(tmp_path / "twin", 0, saw, samples=2, bits="others")
    for second, why in ((first, "24 files of both are identical"),
                        (again, "both have the same weights"),
                        (twin, "both have the same seed and autoencoder")):
        with pytest.raises(InputError, match=f"{second} and {first} are of one generator: {why}; "
                           "pool generators that were trained with different seeds"):
            read(real, first, second)
    other_vae = write_generator(tmp_path / "other", 0, saw, samples=3, vae="w")
    assert read(real, first, other_vae).generators == {"a": 2}


def test_a_run_that_is_gone_is_noted_and_one_that_moved_is_found(real, saw, tmp_path):
    folders = [write_generator(tmp_path / f"g{k}", k, saw) for k in (0, 1)]
    (tmp_path / "g1").rename(tmp_path / "moved")
    moved = str(tmp_path / "moved/samples")
    assert not any("not compared" in note for note in read(real, folders[0], moved).notes)
    shutil.rmtree(tmp_path / "moved/diffusion")
    notes = [note for note in read(real, folders[0], moved).notes if "not compared" in note]
    assert notes == [f"{moved}: the run that made it was not found, so its training was not "
                     "compared with that of the other generators"]


@pytest.mark.parametrize("which", ["val", "test"])
def test_every_generator_is_asked_what_it_saw(real, saw, tmp_path, which):
    """One of three saw a held-out patient: its folder is named."""
    table = read_table(real)
    leaked = table.hashes[table.select(split=which).rows[3]["file"]]
    folders = [write_generator(tmp_path / f"g{k}", k, [*saw, leaked] if k == 1 else saw)
               for k in range(3)]
    with pytest.raises(InputError, match="the generator of .*g1/samples was trained on 1 of 36"):
        read(real, *folders)


def test_a_real_file_among_the_samples_of_any_generator_is_refused(real, saw, tmp_path):
    folders = [write_generator(tmp_path / f"g{k}", k, saw) for k in (0, 1)]
    copy = next(Path(real).rglob("*.png"))
    next(Path(folders[1]).rglob("*.png")).write_bytes(copy.read_bytes())
    with pytest.raises(InputError, match="g1/samples holds 1 file of the real data"):
        read(real, *folders)


@pytest.mark.parametrize("words, folders", [
    ("DIR", {"synthetic": ["DIR"]}), ("x,y,z", {"synthetic": ["x", "y", "z"]}),
    ("a=x,y,z b=u", {"a": ["x", "y", "z"], "b": ["u"]}),
    ("a=x y/1=2 b=u", {"a": ["x", "y/1=2"], "b": ["u"]}),
    ("u a=x,y", {"synthetic": ["u"], "a": ["x", "y"]}),
])
def test_folders_without_a_name_go_with_the_one_before(words, folders):
    argv = ["study", "--root", "r", "--data", "d", "--synthetic", *words.split()]
    ((_, cfg),) = config.parse(classify.VERBS, "study", "", argv)
    assert kinds.sources(cfg.synthetic) == folders


@pytest.mark.parametrize("synthetic, seeds, words", [
    (("a=x", "y", "z"), 4, "--seeds 4: --synthetic pools 3 generators, and each gets equally many "
                           "classifiers; allowed are 3, 6, and so on"),
    (("a=x", "y", "z"), 1, "allowed are 3, 6"),
    (("a=x", "y", "z", "b=u", "v"), 6, "pools 2 and 3 generators; all names that pool several"),
    (("a=x", "y", "a=z"), 2, "two folders are named 'a'"),
    (("real=x", "y"), 2, "a folder cannot be named 'real'"),
])
def test_what_cannot_be_pooled_is_refused_before_reading(tmp_path, synthetic, seeds, words):
    with pytest.raises(InputError, match=re.escape(words)):
        classify.run_study(classify.Config(data=("none",), root=str(tmp_path), arms=("real",),
                                           synthetic=synthetic, seeds=seeds))
    assert not (tmp_path / "classifier").exists()


def test_a_pooled_study_is_resumed_and_grows(real, saw, tmp_path, monkeypatch):
    """Two generators, two classifiers and then two more; what was trained stays as it is."""
    monkeypatch.setattr(classify, "study_page", lambda *_: "")
    folders = [write_generator(tmp_path / f"g{k}", k, saw) for k in (0, 1)]
    knobs = dict(TINY, data=(real,), synthetic=(f"a={folders[0]}", folders[1]), arms=("real", "a"),
                 condition=("label", "view"), positive="light", out=str(tmp_path / "out"),
                 root=str(tmp_path), device="cpu")
    classify.run_study(classify.Config(**knobs, seeds=2))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("result.json")}
    classify.run_study(classify.Config(**knobs, seeds=4))
    assert len(before) == 4 and len(list((tmp_path / "out").rglob("result.json"))) == 8
    assert all(path.read_bytes() == data for path, data in before.items())
    prints = [json.loads((tmp_path / f"out/arms/a/{k}/result.json").read_text())["trained_on"]
              for k in range(4)]
    assert prints[0] == prints[2] != prints[1] == prints[3]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["generators"] == {"a": {"generators": 2, "n_images": 48, "saw": 54,
                                           "known": True}}
    assert summary["images"]["a"] == {"dark": 16, "light": 16, "striped": 16}
    with pytest.raises(InputError, match="synthetic: "):  # in another order
        classify.run_study(classify.Config(**{**knobs, "seeds": 4, "synthetic": (
            f"a={folders[1]}", folders[0])}))
