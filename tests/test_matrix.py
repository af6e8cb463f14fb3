"""The reference matrix from folders to page: its controls, its sets, its own faults."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from test_report import Page, bare

from benchmarks.memory import Held
from minidiff import config as settings
from minidiff.classification.predictor import Predictor, fit
from minidiff.data import images, phantom
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.table import Table, read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation.format import percent
from minidiff.evaluation.matrix import gates
from minidiff.evaluation.matrix import run as matrix
from minidiff.evaluation.matrix.cells import real_subsets
from minidiff.evaluation.matrix.run import MatrixConfig, run_matrix
from minidiff.evaluation.pages import report
from minidiff.variables import Category, encode

LABELS = ("covid", "normal")


def draw(folder, seed, n, split=None, noise=0.02, **more):
    """Phantoms of 32 px of two labels, one with a haze, as a data set or as samples."""
    rows = []
    for i in range(n):
        p = phantom.phantom(seed, i, 32, label=LABELS[i % 2], noise=noise)
        name = f"images/{p.row['label']}/{i:06d}.png"
        image = p.image.copy()
        # plain to see, however faint the phantom's own disease may be
        if p.row["label"] == "covid":
            image[10:22, 6:26] += ((255 - image[10:22, 6:26]) * 0.4).astype(np.uint8)
        images.write(folder / name, image)
        rows.append({"file_name": name, "label": p.row["label"], "patient": p.row["patient"],
                     **more, **({"split": split(i)} if split else {})})
    write_table(folder / "metadata.csv", rows)
    return folder


@pytest.fixture(scope="module")
def folders(once):
    """Real phantoms, those of a noisier hospital, others as samples, and a judge trained on the
    first: to be read only.
    """
    def make(root):
        draw(root / "real", 0, 192, split=lambda i: "train" if i < 112 else "test")
        draw(root / "hospital", 1, 168, noise=0.05)
        draw(root / "few", 3, 12)
        draw(root / "samples", 2, 60, set="1")
        table, pixels = load_pixels(read_table(root / "real").select(split="train"), 32)
        variables = [Category("label", LABELS)]
        judge = Predictor(variables, width=8, size=32)
        fit(judge, pixels, encode(variables, table.rows), steps=60, batch=32, lr=4e-3)
        judge.save(root / "cls" / "judge")
    return once("matrix", make)


def knobs(folders, out, **more):
    return MatrixConfig(**{"data": (str(folders / "real"),), "samples": (str(folders / "samples"),),
                           "n": 40, "external": (str(folders / "hospital"),),
                           "classifier": str(folders / "cls"), "out": str(out),
                           "extractors": ("pixels", "spectrum"), "permutations": 100,
                           "resamples": 100, "repeats": 10, **more})


@pytest.fixture(scope="module")
def written(folders, once):
    """The folder of a finished matrix of them."""
    return once("matrix-written", lambda root: run_matrix(knobs(folders, root / "out"))) / "out"


@pytest.fixture(scope="module")
def finished(written):
    return json.loads((written / "matrix.json").read_text())


def test_every_control_is_caught_on_phantoms(finished):
    assert finished["status"] == "VALID" and not finished["faults"]
    assert {(c["control"], c["label"]) for c in finished["controls"] if c["caught"]} == {
        (name, label) for name in gates.CONTROLS for label in LABELS}


def test_the_copycat_passes_every_gate_but_novelty(finished):
    for label in LABELS:
        v = next(v for v in finished["verdicts"] if v["name"] == f"{label} · copycat")
        assert v["NOVELTY"]["answer"] == "no"
        assert "no" not in [v[name]["answer"] for name in gates.VERDICTS if name != "NOVELTY"]


def test_other_phantoms_pass_for_samples_and_training_images_raise_no_alarm(finished):
    for v in finished["verdicts"]:
        if v["kind"] == "synthetic":
            assert [v[name]["answer"] for name in gates.VERDICTS].count("no") == 0, v
            assert v["rho"]["spectrum"]["rho_high"] < 0.5 and v["yardstick"].endswith("hospital")
        if v["kind"] == "real":
            assert "no" not in (v["FIDELITY"]["answer"],
                                v["COVERAGE"]["answer"]) and "NOVELTY" not in v


def test_every_cell_names_its_space_and_its_images(finished):
    spaces = {e["name"]: e["identity"] for e in finished["extractors"]}
    contents = {s["content"][:12] for s in (*finished["rows"], *finished["columns"])}
    assert set(spaces) == {"pixels-pca64",
                           "spectrum"} and all(len(i) == 64 for i in spaces.values())
    assert all(c["extractor"] in spaces and set(c["data"]) <= contents for c in finished["cells"])
    assert len(finished["cells"]) == 2 * len(finished["rows"]) * len(finished["columns"])
    (shortcut,) = finished["shortcuts"]    # of two labels, both are told by the same numbers
    assert shortcut["label"] == LABELS[0] and shortcut["features"] == "header"


def test_the_page_holds_all_sections_and_verdicts_and_asks_for_nothing(written):
    text = (written / "matrix.html").read_text()
    page = Page(text)
    assert page.ids == ["matrix", "verdicts", "controls", "rho", "copies", "numbers", "shortcuts",
                        "provenance"]
    assert "VALID." in page.text and "FIDELITY" in page.text
    assert "http" not in re.sub('base64,[^"]*', "", text)


def test_neither_the_order_of_images_nor_their_packing_reaches_a_set(folders, tmp_path):
    for name in ("real", "samples"):
        shutil.copytree(folders / name, tmp_path / name)
        write_table(tmp_path / name / "metadata.csv",
                    read_table(tmp_path / name, split=False).rows[::-1])
        for path in (tmp_path / name).rglob("*.png"):
            images.write(path, images.read(path), text={"packed": "anew"})
    found = []
    for root in (folders, tmp_path):
        cfg = knobs(folders, tmp_path / "out", data=(str(root / "real"),),
                    samples=(str(root / "samples"),))
        sets = matrix.read(cfg)
        _, standards, columns = matrix.arrange(cfg, sets)
        found.append((sets["real"].table.fingerprint, sets["real"].part("train").pixels[:], columns,
                      [j.yardstick for j in standards]))
    (before, train, columns, far), (after, train2, columns2, far2) = found
    # other files, the same images
    assert before != after and torch.equal(train, train2)
    for a, b in zip([*columns, *far], [*columns2, *far2], strict=True):
        assert (a.name, a.content, a.patients.tolist()) == (b.name, b.content, b.patients.tolist())
        assert torch.equal(a.pixels, b.pixels)


def test_sets_in_their_order_and_their_parts_share_the_pixels():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (90, 1, 32, 32), np.uint8))
    pixels = pixels.expand(-1, 3, -1, -1)
    table = Table([{"file": f"{k}", "label": "ab"[k % 2], "patient": f"{k}",
                    "split": ("train", "val", "test")[k % 3]} for k in range(len(pixels))])
    with Held() as held:
        assert len(pixels[:1]) == 1  # what is there counts as held from now on
        held.peak = before = held.now
        found = matrix.ordered(table, pixels)
        parts = [found.part("train", label="a"), found.part("val", "test", label="b")]
    assert held.peak - before < 0.1 * pixels[:, :1].numel()
    for part in (found, *parts):
        own = [int(row["file"]) for row in part.table.rows]
        assert torch.equal(part.pixels[:], pixels[own]) and len(set(own)) == len(part)
    keys = [hashlib.sha256(image.numpy().tobytes()).digest() for image in found.pixels]
    assert keys == sorted(keys) and [len(part) for part in parts] == [15, 30]


def test_a_gate_that_lets_a_fraud_pass_ends_with_status_1_after_all_is_written(
        folders, finished, tmp_path, monkeypatch, capsys):
    def blind(*_):
        return [{**v, "COVERAGE": {**v["COVERAGE"], "answer": "yes"}} if v["part"] == "collapse"
                else v for v in finished["verdicts"]]
    monkeypatch.setattr(matrix, "measure", lambda *_: (finished["cells"], {}))
    monkeypatch.setattr(matrix, "judge_all", blind)
    with pytest.raises(SystemExit) as ended:
        run_matrix(knobs(folders, tmp_path / "out"))
    assert ended.value.code == 1
    assert "INVALID: collapse (covid) was not caught by COVERAGE" in capsys.readouterr().err
    found = json.loads((tmp_path / "out/matrix.json").read_text())
    assert found["status"] == "INVALID"
    assert "INVALID</span>" in (tmp_path / "out/matrix.html").read_text()


def test_the_demo_alone_gets_another_hospital_of_phantoms():
    assert matrix.with_hospital(MatrixConfig()).external == (matrix.HOSPITAL,)
    for cfg in (MatrixConfig(data=("cxr",), root="runs/x"), MatrixConfig(external=("elsewhere",))):
        assert matrix.with_hospital(cfg) == cfg


def test_without_another_hospital_the_yardstick_is_another_label(folders, tmp_path):
    cfg = knobs(folders, tmp_path / "out", external=())
    _, standards, _ = matrix.arrange(cfg, matrix.read(cfg))
    assert [(j.label, j.yardstick.label, j.another_source)
            for j in standards] == [("covid", "normal", False), ("normal", "covid", False)]
    assert not any(s.part == "wrong source" for j in standards for s in j.candidates)


def test_faults_of_input_are_named(folders, tmp_path):
    def refused(match, **more):
        with pytest.raises(InputError, match=match):
            run_matrix(knobs(folders, tmp_path / "r", **more))
        assert not (tmp_path / "r").exists()
    refused("is the folder of real data", samples=(str(folders / "real"),))
    refused("is the folder of real data", samples=(str(folders / "hospital/images"),))
    refused("--n 19 is not allowed: 20 or more", n=19)
    refused("--permutations 5 is not allowed", permutations=5)
    refused("--size 16 is not allowed", size=16)
    refused("names no folder", samples=())
    refused("at least two are needed", extractors=("pixels",))
    refused("at least two are needed", extractors=("spectrum",))
    refused("no such folder", external=(str(tmp_path / "nowhere"),))
    refused("holds no predictor", classifier=str(tmp_path))
    shutil.copytree(folders / "real", tmp_path / "copy")
    refused("files of the real data", samples=(str(tmp_path / "copy"),))
    shutil.copytree(folders / "samples", tmp_path / "made")
    external = next(iter(read_table(folders / "hospital", split=False).hashes.values()))
    (tmp_path / "made/manifest.json").write_text(json.dumps({"trained_on": [external]}))
    refused("the generator of .*made was trained on 1 of", samples=(str(tmp_path / "made"),))
    # a patient of the other hospital, of whom it saw another image here
    real = read_table(folders / "real")
    seen = real.select(split="train").rows[0]
    (tmp_path / "made/manifest.json").write_text(
        json.dumps({"trained_on": [real.hashes[seen["file"]]]}))
    shutil.copytree(folders / "hospital", tmp_path / "other hospital")
    path = tmp_path / "other hospital" / "metadata.csv"
    other = read_table(folders / "hospital", split=False).rows[0]["patient"]
    path.write_text(path.read_text().replace(other, seen["patient"]))
    refused("made was trained on other images of 1 held-out patients",
            samples=(str(tmp_path / "made"),), external=(str(tmp_path / "other hospital"),))
    Predictor([Category("label", ("covid", "flu"))], width=8,
              size=32).save(tmp_path / "other" / "judge")
    refused("does not read the label normal; it knows covid, flu",
            classifier=str(tmp_path / "other"))
    with pytest.raises(InputError, match="MatrixConfig has no knob sets"):
        settings.from_dict(MatrixConfig, {"sets": 1})
    bad = next((tmp_path / "made/images").rglob("*.png"))
    bad.write_bytes(b"not an image")
    (tmp_path / "made/manifest.json").unlink()
    refused(f"1 of 60 images cannot be read.*{bad.name}", samples=(str(tmp_path / "made"),))


def test_sets_and_several_folders_are_columns_of_their_own(folders, tmp_path):
    table = matrix.ordered(*load_pixels(read_table(folders / "samples", split=False), 32)).table
    shutil.copytree(folders / "samples", tmp_path / "made")
    write_table(tmp_path / "made/metadata.csv",
                [{**r, "set": str(1 + i % 2)} for i, r in enumerate(table.rows)])
    cfg = knobs(folders, tmp_path / "out", samples=(str(tmp_path / "made"), str(folders / "few")),
                by_set=True, external=())
    matrix.check(cfg)
    _, standards, columns = matrix.arrange(cfg, matrix.read(cfg))
    parts = [s.part for s in columns if s.kind == "synthetic" and s.label == "covid"]
    assert parts == [str(tmp_path / "made")] + [f"{tmp_path / 'made'}, set {k}"
                                                for k in "12"] + [str(folders / "few")]
    assert [s.too_few for s in columns
            if s.kind == "synthetic" and "few" in s.part] == ["6 images; 20 are needed"] * 2
    assert [j.label for j in standards] == list(LABELS)


def test_several_sources_of_a_label_are_rows_and_pooled():
    rows = [{"label": "a", "source": s, "split": split, "patient": f"{s}{split}{i}",
             "file": f"{s}{split}{i}"}
            for s in "xy" for split in ("train", "val", "test") for i in range(12)]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (72, 3, 8, 8),
                                                                dtype=np.uint8))
    found = {s.name: len(s) for s in real_subsets(Images(Table(rows), pixels), n=40, seed=0)}
    assert found == {"a · train · x + y": 24, "a · train · x": 12, "a · train · y": 12,
                     "a · held-out · x + y": 40, "a · held-out · x": 24, "a · held-out · y": 24}


def test_a_file_format_that_goes_with_the_label_is_found(tmp_path):
    from PIL import Image
    rows, rng = [], np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / f"{i}.{('png', 'jpg')[i % 2]}"
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
        rows.append({"label": LABELS[i % 2], "file": str(path), "patient": str(i)})
    (found,) = matrix.shortcuts(Table(rows))
    assert found["auroc"] == 1.0 and found["shortcut"] and found["n"] == found["n_rest"] == 20


def test_the_page_names_a_shortcut_once_and_marks_only_what_is_bad(finished):
    row = {**finished["shortcuts"][0], "shortcut": True}
    assert matrix.page(finished).count("SHORTCUT") == 0
    assert matrix.page({**finished, "shortcuts": [row, row]}).count("SHORTCUT") == 1
    no = matrix.page(finished).count('class="answer no"')
    assert no == sum(v[name]["answer"] == "no" for v in finished["verdicts"]
                     if v["kind"] == "synthetic" for name in gates.VERDICTS) * 2
    missed = [{**c, "caught": c["control"] != "blur"} for c in finished["controls"]]
    assert matrix.page({**finished, "controls": missed}).count('class="answer no"') == no + 1


def test_the_page_says_what_was_not_tested_and_how_sure_a_share_of_near_copies_is(finished):
    untested = [{**c, "caught": None if c["control"] == "blur" else c["caught"]}
                for c in finished["controls"]]
    n = len(untested) - len(LABELS)
    for more, said in (({}, f"All {n} control sets that could be tested were caught"),
                       ({"status": "INVALID", "faults": ["blur could not be tested"]},
                        f"{n} of {n} control sets that could be tested were caught")):
        text = " ".join(Page(matrix.page({**finished, "controls": untested, **more})).text.split())
        assert said in text and "Not tested: blur (covid), blur (normal)." in text
        assert "was not caught" not in text
    shown = Page(report.render(bare(), {"matrix": {**finished, "controls": untested}})).text
    assert f"{n} of {n} control sets were caught, 2 not tested" in " ".join(shown.split())
    for v in (v for v in finished["verdicts"] if v["kind"] == "synthetic"):
        s = v["memorisation"]["spaces"][0]
        assert (f"{percent(s['near_share'])} ({percent(s['near_low'])} to "
                f"{percent(s['near_high'])})") in text


@pytest.mark.parametrize("name", ["real", "external"])
def test_samples_that_are_named_like_real_sets_stay_apart(folders, tmp_path, name):
    shutil.copytree(folders / "samples", tmp_path / name)
    cfg = knobs(folders, tmp_path / "out", samples=(str(tmp_path / name),))
    sets = matrix.read(cfg)
    assert {key: len(each) for key, each in sets.items()} == {
        "real": 192, "external": 168, f"{name} (samples)": 60}
    made = [s.part for s in matrix.arrange(cfg, sets)[2] if s.kind == "synthetic"]
    assert made == [f"{name} (samples)"] * 2


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes_from_its_cache(folders, tmp_path):
    cfg = knobs(folders, tmp_path / "out", extractors=("pixels", "classifier", "spectrum"))
    names, written = [tmp_path / "out" / name for name in ("matrix.json", "matrix.html")], []
    for _ in range(2):
        run_matrix(cfg)
        written.append([path.read_bytes() for path in names])
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()}
    assert written[0] == written[1] and len(kept) == 3
    # nothing was computed again
    for path, when in kept.items():
        assert when <= names[0].stat().st_mtime_ns - 1, path


@pytest.mark.slow
def test_every_control_is_caught_on_real_x_rays(cxr, tmp_path):
    """With a judge of 64 px, trained here, and training images of other patients in the place of
    samples.
    """
    import classify
    classify.run_study(classify.Config(data=(str(cxr),), arms=("real",), condition=("label",),
                                       size=64, steps=120, seeds=1, out=str(tmp_path / "cls")))
    rows = read_table(cxr).select(split="train").rows
    made_ = []
    for i, row in enumerate(rows):
        if i % 3 == 0:
            name = f"images/{row['label']}/{i:06d}.png"
            images.write(tmp_path / "made" / name, images.square(images.read(row["file"]), 64))
            made_.append({"file_name": name, "label": row["label"], "patient": row["patient"],
                          "set": "1"})
    write_table(tmp_path / "made/metadata.csv", made_)
    run_matrix(MatrixConfig(data=(str(cxr),), samples=(str(tmp_path / "made"),),
                            external=(str(cxr / "external"), str(cxr / "hannover")),
                            classifier=str(tmp_path / "cls"), out=str(tmp_path / "m"), n=80,
                            permutations=100, resamples=300, repeats=10))
    found = json.loads((tmp_path / "m/matrix.json").read_text())
    assert found["status"] == "VALID"
    assert {c["control"] for c in found["controls"] if c["caught"]} == set(gates.CONTROLS)
    covid = next(v for v in found["verdicts"] if v["kind"] == "synthetic" and v["label"] == "covid")
    assert covid["label_confounded"] and covid["NOVELTY"]["answer"] == "no"
