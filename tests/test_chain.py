"""The chain from a report down to its data: whole where nothing has changed, and each planted fault
named where it is.
"""

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import evaluate
import minidiff
import sample
from minidiff import config, runs
from minidiff.classification.predictor import Predictor
from minidiff.data import images, phantom
from minidiff.diffusion import store
from minidiff.errors import InputError
from minidiff.evaluation import verify as chain
from minidiff.evaluation.matrix.run import MatrixConfig, run_matrix
from minidiff.evaluation.verify import DIFFERS, MATCHES, VerifyConfig, verify, walk
from minidiff.sampling.again import make_again
from minidiff.variables import Category


@pytest.fixture(scope="module")
def whole(tiny, once):
    """runs/x with data, vae, diffusion, samples and report, every path relative to its root."""
    return once("whole-chain", lambda root: make_whole(tiny, root))


def make_whole(tiny, root):
    shutil.copytree(tiny, root / "runs/x", ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("vae", "diffusion"):
        file = root / "runs/x" / name / "config.json"
        file.write_text(file.read_text().replace(str(tiny), "runs/x"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        sample.sample(sample.SampleConfig(run="runs/x/diffusion", out="runs/x/samples", per_label=8,
                                          steps=2, batch=24))
        Predictor([Category("label", ("covid", "normal", "pneumonia"))], width=8,
                  size=32).save("runs/x/judged/judge")
        evaluate.run_report(evaluate.Config(
            data=("runs/x/data",), samples="runs/x/samples", classifier="runs/x/judged",
            vae="runs/x/vae", diffusion="runs/x/diffusion", out="runs/x/report", repeats=10))


@pytest.fixture
def tree(whole, tmp_path, monkeypatch):
    """A copy, elsewhere than where it was made, to be spoilt."""
    shutil.copytree(whole / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs/x")


def links_of(folder, remake=make_again, **more):
    return list(walk(VerifyConfig(folder=str(folder), **more), remake))


def faults(folder, remake=make_again, **more):
    return [link for link in links_of(folder, remake, **more) if link.state != MATCHES]


def told(links) -> str:
    return "\n".join(f"{link.state} {link.what}: {link.text}" for link in links)


def test_an_untouched_chain_is_whole(tree):
    links = links_of(tree / "report", k=4)
    assert all(link.state == MATCHES for link in links), told(links)
    text = told(links)
    for part in ("report: train now", "report: heldout now", "report: synthetic now",
                 "report.json: distances: as it was", "samples: files: as it was",
                 "images made again: 24, largest difference 0", "the model of runs/x/samples",
                 "the data of runs/x/diffusion", "the data of runs/x/vae", "the autoencoder of"):
        assert part in text, part
    assert len({link.what for link in links}) > 15


def test_it_verifies_from_elsewhere_and_writes_nothing(tree, monkeypatch, tmp_path):
    before = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    (tmp_path.parent / (tmp_path.name + "-away")).mkdir()
    monkeypatch.chdir(tmp_path.parent / (tmp_path.name + "-away"))
    assert faults(tmp_path / "runs/x/report") == []
    assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_judge_that_is_gone_is_missing(tree, monkeypatch):
    facts = chain.run_facts(tree / "report")
    assert facts.pop("judge")
    now = runs.read_json(tree / "report/report.json"), facts
    monkeypatch.setattr(chain, "run_again", lambda *_: now)
    assert "missing runs/x/report: judge now: not there" in told(faults(tree / "report"))


def test_a_command_that_dies_without_a_word_is_a_fault(tree, monkeypatch):
    dead = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(chain.subprocess, "run", lambda *_, **__: dead)
    assert "with status -9: it ended without a message" in told(faults(tree / "report"))


def edit_json(path, change):
    value = runs.read_json(path)
    change(value)
    runs.write_json(path, value)


def spoil_pixel(path):
    pixels = images.read(path).copy()
    pixels[0, 3, 3] ^= 1
    images.write(path, pixels)


def spoil_weights(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def first(folder, n=0):
    return sorted(folder.rglob("*.png"))[n]


def spoil_numbers(report):
    for row in report["distances"]:
        if row["set"] == "synthetic" and row.get("KD"):
            row["KD"] *= 1.01


def relabel(path):
    path.write_text(path.read_text().replace("covid,1", "normal,1", 1))


FAULTS = {  # name: (from where, what is done, parts of what must be said)
    "a sample": ("samples", lambda x: spoil_pixel(first(x / "samples/images")),
                 ("samples: files: 1 changed: images/covid/000000.png",)),
    "a sample is gone": ("samples", lambda x: first(x / "samples/images").unlink(),
                         ("samples: files: 1 changed: images/covid/000000.png", "None now",
                          "row(s) without a file")),
    "a sample more": ("samples", lambda x: shutil.copy(first(x / "samples/images"),
                                                       x / "samples/images/covid/more.png"),
                      ("samples: files: 1 changed: images/covid/more.png None then",)),
    "a cell of metadata.csv": ("samples", lambda x: relabel(x / "samples/metadata.csv"),
                               ("1 changed: metadata.csv",)),
    "the model": ("samples", lambda x: spoil_weights(x / "diffusion/model.safetensors"),
                  ("diffusion/model.safetensors, the model of runs/x/samples: 1 changed",
                   "missing runs/x/samples: images made again: not tried")),
    "the model is gone": ("samples", lambda x: shutil.rmtree(x / "diffusion"),
                          ("missing runs/x/diffusion/model.safetensors, the model of",
                           "missing runs/x/diffusion: no such folder")),
    "the manifest's model": (
        "samples", lambda x: edit_json(x / "samples/manifest.json",
                                       lambda m: m.update(model="0" * 64)),
        ("samples: model in manifest.json: 1 changed", "the model of runs/x/samples: 1 changed")),
    "a training image": ("diffusion", lambda x: spoil_pixel(first(x / "data", 5)),
                         ("the data of runs/x/diffusion, runs/x/data: 1 changed",
                          "the data of runs/x/vae, runs/x/data: 1 changed")),
    "the data are gone": ("report", lambda x: shutil.rmtree(x / "data"),
                          ("missing the data of runs/x/diffusion, runs/x/data: not there",
                           "report: its command fails now", "runs/x/data: no such folder")),
    "the autoencoder": ("diffusion", lambda x: spoil_weights(x / "diffusion/vae.safetensors"),
                        ("diffusion/vae.safetensors, the autoencoder of runs/x/diffusion: 1",)),
    "a sample and the report": ("report", lambda x: spoil_pixel(first(x / "samples/images")),
                                ("report: synthetic now: 1 changed", "samples: files: 1 changed")),
    "a number of the report": (
        "report", lambda x: edit_json(x / "report/report.json", spoil_numbers),
        ("report.json: distances: ", ".KD ")),
    "a fingerprint of the report": (
        "report", lambda x: edit_json(x / "report/report.json",
                                      lambda r: r["samples"].update(fingerprint="0" * 64)),
        ("report.json: samples: 1 changed: samples.fingerprint 000000000000 then",)),
    "a setting": ("report", lambda x: edit_json(x / "samples/config.json",
                                                lambda c: c.update(guidance=3.0)),
                  ("runs/x/samples: config: 1 changed: guidance 1.5 then, 3 now",)),
    "a key": ("diffusion", lambda x: edit_json(x / "diffusion/run.json",
                                               lambda r: r["facts"].pop("data")),
              ("differs runs/x/diffusion: its JSON files lack what they should hold: 'data'",)),
    "half a file": ("samples",
                    lambda x: (x / "samples/manifest.json").write_text('{"model": '),
                    ("manifest.json is damaged",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(tree, name):
    folder, spoil, parts = FAULTS[name]
    spoil(tree)
    text = told(faults(tree / folder, k=60))
    for part in parts:
        assert part in text, f"{part}\n---\n{text}"


@pytest.mark.parametrize("name", ["report", "matrix"])
def test_what_another_version_wrote_is_refused_by_its_name(tree, name, monkeypatch):
    (tree / "matrix").mkdir()
    runs.write_json(tree / "matrix/matrix.json", {"provenance": runs.provenance()})
    monkeypatch.setattr(chain, "run_again", lambda *_: pytest.fail("it began all the same"))
    path = tree / name / f"{name}.json"
    for made, said in (({"minidiff": "0.0.9"}, "0.0.9"), ({"minidiff": "7.1.0"}, "7.1.0"),
                       ({}, "of an unknown version")):
        runs.write_json(path, {**runs.read_json(path), "provenance": made})
        for folder in (tree / name, tree):
            with pytest.raises(InputError, match=f"{name}.json was written by minidiff {said}, and "
                                                 "this is .*, which names things otherwise"):
                links_of(folder)
    edit_json(path, lambda r: r.update(provenance={"minidiff": f"{minidiff.__version__}1"}))
    chain.refuse_older(path.parent)    # a version that mends faults names things alike


def test_images_that_come_out_otherwise_are_counted(tree):
    def off_by(n):
        def remake(folder, cfg):
            found = make_again(folder, cfg)
            return found._replace(apart={name: apart + n for name, apart in found.apart.items()})
        return remake

    assert faults(tree / "samples", off_by(1), k=3) == []    # rounding elsewhere
    (link,) = faults(tree / "samples", off_by(2), k=3)
    assert link.state == DIFFERS
    assert "24 changed" in link.text and "2 levels now" in link.text


def test_the_stages_before_are_followed(tree):
    """A second stage that began with the first: its weights by their hash, and then the first
    stage's own data.
    """
    shutil.copytree(tree / "diffusion", tree / "second")
    edit_json(tree / "second/config.json",
              lambda c: c.update(out="runs/x/second", init="runs/x/diffusion"))
    init = {"run": "runs/x/diffusion", **store.identity(tree / "diffusion")}
    edit_json(tree / "second/run.json", lambda r: r["facts"].update(init=init))
    links = links_of(tree / "second")
    assert all(link.state == MATCHES for link in links), told(links)
    assert "what runs/x/second began with" in told(
        links) and "the data of runs/x/diffusion" in told(links)
    spoil_weights(tree / "diffusion/model.safetensors")
    assert "model.safetensors, what runs/x/second began with: 1 changed" in told(
        faults(tree / "second"))
    (tree / "public.safetensors").write_bytes(b"weights")
    files = [{"path": "runs/x/public.safetensors",
              "sha256": runs.sha256(tree / "public.safetensors")}]
    edit_json(tree / "second/run.json", lambda r: r["facts"].update(init={"files": files}))
    assert faults(tree / "second") == []
    (tree / "public.safetensors").write_bytes(b"other weights")
    assert "public.safetensors, what runs/x/second began with: 1 changed" in told(
        faults(tree / "second"))


def test_the_command_ends_with_a_status(tree, capsys):
    verbs = {"verify": (VerifyConfig, lambda cfg: verify(cfg, make_again))}

    def status(*argv):
        try:
            config.main(verbs, default="verify", doc="", argv=["verify", *argv])
        except SystemExit as stop:
            return stop.code
        return 0

    # all that lies in the folder
    assert status("--folder", str(tree), "--k", "2") == 0
    assert "0 differs, 0 missing" in capsys.readouterr().out
    spoil_pixel(first(tree / "samples/images"))
    assert status("--folder", str(tree / "samples")) == 1
    out = capsys.readouterr().out.splitlines()
    assert "1 differs" in out[-2] and "1 changed: images/covid/000000.png" in out[-1]
    assert status("--folder", "nowhere") == 2 and "nothing to verify" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is nothing to verify"):
        links_of(tree / "data")


@pytest.mark.slow
def test_a_matrix_is_followed_like_a_report(tree):
    sample.sample(sample.SampleConfig(run="runs/x/diffusion", out="runs/x/many", per_label=24,
                                      steps=2, batch=24))
    phantom.write("runs/x/wide", n=220, size=32, seed=3)
    made = MatrixConfig(data=("runs/x/wide",), samples=("runs/x/many",), external=(),
                        classifier="runs/x/judged",
                        out="runs/x/matrix", permutations=100, resamples=100, repeats=10)
    # its judge knows nothing: invalid, but written
    with suppress(SystemExit):
        run_matrix(made)
    links = links_of(tree / "matrix", k=6)
    assert all(link.state == MATCHES for link in links), told(links)
    assert sum(" × " in link.what for link in links) == 6
    edit_json(tree / "matrix/matrix.json",
              lambda m: [c.update(KD=c["KD"] + 1) for c in m["cells"] if c.get("KD")])
    assert sum(" × " in link.what for link in faults(tree / "matrix", k=6)) == 6
    spoil_pixel(first(tree / "wide", 5))
    assert "runs/x/matrix: real now: 1 changed" in told(faults(tree / "matrix", k=1))
