"""The reference matrix: its cells and ρ against what is known, its gates, its own faults, and the way from folders to
page."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_report import Page

from minidiff import config as settings
from minidiff.classification.predictor import Predictor, fit
from minidiff.data import images, phantom
from minidiff.data.dataset import load_pixels
from minidiff.data.table import Table, read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation.matrix import cells, gates
from minidiff.evaluation.matrix import run as matrix
from minidiff.evaluation.matrix.header import header_shortcuts
from minidiff.evaluation.matrix.run import MatrixConfig, run_matrix
from minidiff.evaluation.matrix.subsets import Subset, real_subsets
from minidiff.variables import Category, encode

LABELS = ("covid", "normal")


def made(features, label="a", sources=("x",), kind="real", part="held-out", patients=None):
    """A subset of which only the features matter."""
    n = len(features)
    names = [f"{label}{part}{features.sum()}{i}" for i in range(n)] if patients is None else patients
    return Subset(kind, label, part, sources, torch.zeros(n, 3, 1, 1, dtype=torch.uint8), np.array(names), "0" * 64,
                  features={"s": features})


def normal(seed, n=60, shift=0.0, d=8):
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def none(n):
    """No real against real."""
    return {}


# --- cells and ρ


def test_a_cell_says_what_its_parts_say():
    row, column = made(normal(0)), made(normal(1, 45), part="train")
    found, draws = cells.cell(row, column, "s", cells.real_against_real([row, column], "s", repeats=10), permutations=100,
                              resamples=100)
    assert (found["n_r"], found["n_s"], found["n"]) == (60, 45, 45) and len(draws) == 100
    assert found["KD"] == pytest.approx(cells.kid(real=row.features["s"], fake=column.features["s"]))
    assert found["FD"] == pytest.approx(cells.fid(real=row.features["s"][:45], fake=column.features["s"]))
    assert found["KD_low"] < 0 < found["KD_high"] and 0 < found["KD_p"] <= 1 and found["null_n"] == 45
    assert found["FD_null_low"] < found["FD_null"] < found["FD_null_high"]
    assert found["data"] == ["0" * 12] * 2 and "grey" not in found


@pytest.mark.parametrize("row, column, why", [
    (made(normal(0, 19)), made(normal(1)), "19 images; 20 are needed"),
    (made(normal(0)), made(normal(1, 5)), "5 images; 20 are needed"),
    (made(normal(0), patients=["p"] * 60), made(normal(1)), "all images of one patient"),
    (made(normal(0)), made(normal(0)), "0 images of other patients; 20 are needed"),   # the very same images
])
def test_cells_with_too_little_are_grey_and_say_why(row, column, why):
    found, draws = cells.cell(row, column, "s", none)
    assert found["grey"] == why and draws is None and "KD" not in found


def test_images_of_patients_in_the_row_are_left_out():
    row = made(normal(0), patients=[f"p{i}" for i in range(60)])
    column = made(normal(1), label="b", patients=[f"p{i}" for i in range(30)] + [f"q{i}" for i in range(30)])
    found, _ = cells.cell(row, column, "s", none, permutations=100, resamples=100)
    assert found["n_s"] == 30


def test_cells_are_confounded_where_label_and_source_differ_both():
    row = made(normal(0), "a", ("x",))
    for label, sources, expected in (("a", "y", False), ("b", "x", False), ("b", "y", True), ("b", ("x", "y"), False)):
        assert cells.confounded(row, made(normal(1), label, tuple(sources))) is expected
    assert cells.confounded(row, replace(made(normal(1), "a", ("y",)), truth="b")) is True  # under a false name


def scored(seed, shift, far=1.0, n=60):
    """ρ of a set shifted by `shift` from held-out images, the yardstick shifted by `far`."""
    held = made(normal((seed, 0), n))
    both = [cells.cell(held, made(normal((seed, k), n, s), part=p), "s", none, permutations=100, resamples=300)
            for k, s, p in ((1, shift, "s"), (2, far, "o"))]
    return cells.rho(*both)


def test_rho_of_the_yardstick_itself_is_one():
    held, far = made(normal(0)), made(normal(1, shift=0.7), part="o")
    value = cells.cell(held, far, "s", none, permutations=100, resamples=200)
    found = cells.rho(value, value)
    assert found["rho"] == found["rho_low"] == found["rho_high"] == 1 and found["within"] is False and found["resolved"]


def test_rho_of_another_sample_of_the_same_hospital_covers_zero():
    found = [scored(seed, 0.0) for seed in range(60)]
    assert all(f["resolved"] for f in found) and sum(f["rho_low"] <= 0 <= f["rho_high"] for f in found) >= 52
    assert sum(f["within"] is True for f in found) >= 57 and not any(f["within"] is False for f in found)


def test_rho_covers_its_true_value():
    big = {s: normal((9, k), 2000, s) for k, s in enumerate((0.0, 0.6, 1.0))}
    truth = cells.kid(real=big[0.0], fake=big[0.6]) / cells.kid(real=big[0.0], fake=big[1.0])
    found = [scored(100 + seed, 0.6) for seed in range(60)]
    assert sum(f["rho_low"] <= truth <= f["rho_high"] for f in found) >= 51, truth


def test_without_a_resolved_yardstick_there_is_no_rho_but_what_is_far_is_far():
    found = [scored(seed, 0.0, far=0.0) for seed in range(20)]
    open_ = [f for f in found if not f["resolved"]]
    assert len(open_) >= 17 and all("rho" not in f and f["within"] is None for f in open_)
    far = [scored(seed, 2.0, far=0.0) for seed in range(5)]
    assert all(f["within"] is False for f in far)


def test_p_of_real_against_real_is_uniform():
    values = []
    for seed in range(200):
        column = made(normal((seed, 1), 40), part="train")
        values.append(cells.cell(made(normal((seed, 0), 40)), column, "s", none, permutations=200, resamples=100)[0]["KD_p"])
    assert stats.kstest(values, "uniform").pvalue > 0.01


# --- gates


def ratios(*within):
    base = {"KD": 1.0, "KD_low": 0.5, "KD_high": 2.0, "n": 50, "n_r": 50, "yardstick_KD": 2.0, "yardstick_low": 1.0,
            "yardstick_high": 3.0, "yardstick_n": 40, "resolved": True, "rho": 0.5, "rho_low": 0.2, "rho_high": 0.9}
    return {f"space {i}": {**base, "within": w} for i, w in enumerate(within)}


@pytest.mark.parametrize("within, answer", [
    ((True, True), "yes"), ((True, None), "not resolved"), ((None, None), "not resolved"), ((True, False), "no"),
    ((None, False), "no")])
def test_fidelity_needs_every_space(within, answer):
    found = gates.fidelity(ratios(*within), another_source=True)
    assert found["answer"] == answer and "another source (n = 50, 40, held-out 50" in found["text"]


def test_coverage_counts_content_and_not_texture():
    def cell(low, high, null=0.95):
        return {"coverage": (low + high) / 2, "coverage_low": low, "coverage_high": high, "coverage_null": null, "n": 50}
    assert gates.coverage({"pixels": cell(0.86, 0.99)})["answer"] == "yes"
    assert gates.coverage({"pixels": cell(0.80, 0.99)})["answer"] == "not resolved"
    assert gates.coverage({"pixels": cell(0.86, 0.99), "classifier": cell(0.1, 0.3)})["answer"] == "no"
    assert gates.coverage({"pixels": cell(0.86, 0.99), "spectrum": cell(0.0, 0.1)})["answer"] == "yes"


def test_label_is_held_against_real_images():
    assert gates.label([True] * 95 + [False] * 5, [True] * 90 + [False] * 10)["answer"] == "yes"
    assert gates.label([True] * 50 + [False] * 50, [True] * 90 + [False] * 10)["answer"] == "no"
    assert gates.label([True] * 82 + [False] * 18, [True] * 90 + [False] * 10)["answer"] == "not resolved"


def near(suspected, p, **more):
    space = {"space": "pixels", "near_p": p, "near_share": 0.1, "closest_train": 20, "closest": 20, "closest_expected": 12.0,
             "n": 50, "train": 90, "heldout": 60, "copying_z": 0.3, "auth_excess": 1.0, **more}
    return {"verdict": "no sign of copying", "suspected": suspected, "spaces": [space]}


def test_novelty_says_no_where_two_tests_agree_and_yes_where_all_are_calm():
    assert gates.novelty(near(True, 1e-6))["answer"] == "no"
    assert gates.novelty(near(False, 0.4))["answer"] == "yes"
    assert gates.novelty(near(False, 1e-6))["answer"] == "not resolved"                  # smooth images lie near as well
    assert gates.novelty(near(False, 0.4, copying_z=-3.0))["answer"] == "not resolved"
    assert gates.novelty({"verdict": "too few", "suspected": None, "spaces": []})["answer"] == "not resolved"


def verdict(part, label="a", grey="", **answers):
    said = {name: {"answer": answers.get(name, "yes"), "text": "t", "resolved": True} for name in gates.VERDICTS}
    return {"kind": "control", "part": part, "label": label, "grey": grey, **said}


def all_caught():
    return [verdict(name, **{control.verdict: "no"}) for name, control in gates.CONTROLS.items()]


@pytest.mark.parametrize("name", list(gates.CONTROLS))
def test_a_control_that_is_not_caught_makes_the_matrix_invalid(name):
    assert gates.status(gates.caught(all_caught())) == ("VALID", [])
    for answer in ("yes", "not resolved"):
        rows = [v if v["part"] != name else verdict(name, **{gates.CONTROLS[name].verdict: answer}) for v in all_caught()]
        state, faults = gates.status(gates.caught(rows))
        assert state == "INVALID" and len(faults) == 1 and faults[0].startswith(f"{name} (a) was not caught by")
    rows = [v for v in all_caught() if v["part"] != name]                    # never tested, which is allowed for one alone
    assert gates.status(gates.caught(rows))[0] == ("VALID" if name in gates.OPTIONAL else "INVALID")


def test_controls_that_are_too_few_are_not_tested():
    rows = gates.caught([*all_caught(), verdict("blur", label="b", grey="3 images; 20 are needed")])
    assert [r["caught"] for r in rows if r["label"] == "b"] == [None] and gates.status(rows)[0] == "VALID"


# --- from folders to page


def draw(folder, seed, n, split=None, noise=0.02, **more):
    """Phantoms of 32 px of two labels, as a data set or as samples."""
    rows = []
    for i in range(n):
        p = phantom.phantom(seed, i, 32, label=LABELS[i % 2], noise=noise)
        name = f"images/{p.row['label']}/{i:06d}.png"
        images.write(folder / name, p.image)
        rows.append({"file_name": name, "label": p.row["label"], "patient": p.row["patient"], **more,
                     **({"split": split(i)} if split else {})})
    write_table(folder / "metadata.csv", rows)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real phantoms, phantoms of a noisier hospital, others as samples, and a judge trained on the first."""
    root = tmp_path_factory.mktemp("matrix")
    draw(root / "real", 0, 192, split=lambda i: "train" if i < 112 else "test")
    draw(root / "hospital", 1, 168, noise=0.05)
    shutil.copytree(draw(root / "few", 3, 12), root / "few2")
    draw(root / "samples", 2, 60, set="1")
    table, pixels = load_pixels(read_table(root / "real").select(split="train"), 32)
    variables = [Category("label", LABELS)]
    judge = Predictor(variables, width=4, size=32)
    fit(judge, pixels, encode(variables, table.rows), steps=60, batch=32, lr=4e-3)
    judge.save(root / "cls" / "judge")
    return root


def knobs(folders, out, **more):
    return MatrixConfig(**{"data": (str(folders / "real"),), "samples": (str(folders / "samples"),), "n": 40,
                           "external": (str(folders / "hospital"),), "classifier": str(folders / "cls"), "out": str(out),
                           "extractors": ("pixels", "spectrum"), "permutations": 100, "resamples": 200, "repeats": 10,
                           **more})


@pytest.fixture(scope="module")
def finished(folders):
    run_matrix(knobs(folders, folders / "out"))
    return json.loads((folders / "out/matrix.json").read_text())


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
            assert "no" not in (v["FIDELITY"]["answer"], v["COVERAGE"]["answer"]) and "NOVELTY" not in v


def test_every_cell_names_its_space_and_its_images(finished):
    spaces = {e["name"]: e["identity"] for e in finished["extractors"]}
    contents = {s["content"][:12] for s in (*finished["rows"], *finished["columns"])}
    assert set(spaces) == {"pixels-pca64", "spectrum"} and all(len(i) == 64 for i in spaces.values())
    assert all(c["extractor"] in spaces and set(c["data"]) <= contents for c in finished["cells"])
    assert len(finished["cells"]) == 2 * len(finished["rows"]) * len(finished["columns"])
    assert {s["label"] for s in finished["shortcuts"]} == set(LABELS)


def test_the_page_holds_all_sections_and_verdicts_and_asks_for_nothing(folders, finished):
    text = (folders / "out/matrix.html").read_text()
    page = Page(text)
    assert page.ids == ["verdicts", "rho", "matrix", "controls", "copies", "numbers", "shortcuts", "provenance"]
    assert "VALID." in page.text and "FIDELITY" in page.text and "http" not in text.replace("http-equiv", "")


def test_neither_the_order_of_images_nor_their_packing_reaches_a_set(folders, tmp_path):
    for name in ("real", "samples"):
        shutil.copytree(folders / name, tmp_path / name)
        write_table(tmp_path / name / "metadata.csv", read_table(tmp_path / name, split=False).rows[::-1])
        for path in (tmp_path / name).rglob("*.png"):
            images.write(path, images.read(path), text={"packed": "anew"})
    found = []
    for root in (folders, tmp_path):
        cfg = knobs(folders, tmp_path / "out", data=(str(root / "real"),), samples=(str(root / "samples"),))
        tables, pixels = matrix.read(cfg)
        _, standards, columns = matrix.arrange(cfg, tables, pixels)
        found.append((tables["real"].fingerprint, matrix.of(tables["real"], pixels["real"], split=("train",)), columns,
                      [j.yardstick for j in standards]))
    (before, train, columns, far), (after, train2, columns2, far2) = found
    assert before != after and torch.equal(train, train2)                    # other files, the same images
    for a, b in zip([*columns, *far], [*columns2, *far2], strict=True):
        assert (a.name, a.content, a.patients.tolist()) == (b.name, b.content, b.patients.tolist())
        assert torch.equal(a.pixels, b.pixels)


def test_a_gate_that_lets_a_fraud_pass_ends_with_status_1_after_all_is_written(folders, finished, tmp_path, monkeypatch,
                                                                               capsys):
    def blind(*_):
        return [{**v, "COVERAGE": {**v["COVERAGE"], "answer": "yes"}} if v["part"] == "collapse" else v
                for v in finished["verdicts"]]
    monkeypatch.setattr(matrix, "measure", lambda *_: (finished["cells"], {}))
    monkeypatch.setattr(matrix, "judge_all", blind)
    with pytest.raises(SystemExit) as ended:
        run_matrix(knobs(folders, tmp_path / "out"))
    assert ended.value.code == 1 and "INVALID: collapse (covid) was not caught by COVERAGE" in capsys.readouterr().err
    found = json.loads((tmp_path / "out/matrix.json").read_text())
    assert found["status"] == "INVALID" and "INVALID." in (tmp_path / "out/matrix.html").read_text()


def test_the_demo_alone_gets_another_hospital_of_phantoms():
    assert matrix.with_hospital(MatrixConfig()).external == (matrix.HOSPITAL,)
    for cfg in (MatrixConfig(data=("cxr",)), MatrixConfig(external=("elsewhere",))):
        assert matrix.with_hospital(cfg) == cfg


def test_without_another_hospital_the_yardstick_is_another_label(folders, tmp_path):
    cfg = knobs(folders, tmp_path / "out", external=())
    _, standards, _ = matrix.arrange(cfg, *matrix.read(cfg))
    assert [(j.label, j.yardstick.label, j.another_source) for j in standards] == [("covid", "normal", False),
                                                                                   ("normal", "covid", False)]
    assert not any(s.part == "wrong source" for j in standards for s in j.candidates)


def test_faults_of_input_are_named(folders, tmp_path):
    def refused(match, **more):
        with pytest.raises(InputError, match=match):
            run_matrix(knobs(folders, tmp_path / "r", **more))
        assert not (tmp_path / "r").exists()
    refused("is a folder of real data", samples=(str(folders / "real"),))
    refused("is a folder of real data", samples=(str(folders / "hospital/images"),))
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
    Predictor([Category("label", ("covid", "flu"))], width=4, size=32).save(tmp_path / "other" / "judge")
    refused("does not read the label normal; it knows covid, flu", classifier=str(tmp_path / "other"))
    with pytest.raises(InputError, match="MatrixConfig has no knob sets"):
        settings.from_dict(MatrixConfig, {"sets": 1})
    bad = next((tmp_path / "made/images").rglob("*.png"))
    bad.write_bytes(b"not an image")
    (tmp_path / "made/manifest.json").unlink()
    refused(f"1 of 60 images cannot be read.*{bad.name}", samples=(str(tmp_path / "made"),))


def test_sets_and_several_folders_are_columns_of_their_own(folders, tmp_path):
    table, _ = matrix.ordered(*load_pixels(read_table(folders / "samples", split=False), 32))
    shutil.copytree(folders / "samples", tmp_path / "made")
    write_table(tmp_path / "made/metadata.csv", [{**r, "set": str(1 + i % 2)} for i, r in enumerate(table.rows)])
    cfg = knobs(folders, tmp_path / "out", samples=(str(tmp_path / "made"), str(folders / "few")), by_set=True, external=())
    matrix.check(cfg)
    tables, pixels = matrix.read(cfg)
    _, standards, columns = matrix.arrange(cfg, tables, pixels)
    parts = [s.part for s in columns if s.kind == "synthetic" and s.label == "covid"]
    assert parts == [str(tmp_path / "made")] + [f"{tmp_path / 'made'}, set {k}" for k in "12"] + [str(folders / "few")]
    assert [s.grey for s in columns if s.kind == "synthetic" and "few" in s.part] == ["6 images; 20 are needed"] * 2
    assert [j.label for j in standards] == list(LABELS)


def test_several_sources_of_a_label_are_rows_and_pooled():
    rows = [{"label": "a", "source": s, "split": split, "patient": f"{s}{split}{i}", "file": f"{s}{split}{i}"}
            for s in "xy" for split in ("train", "val", "test") for i in range(12)]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (72, 3, 8, 8), dtype=np.uint8))
    found = {s.name: len(s) for s in real_subsets(Table(rows), pixels, n=40, seed=0)}
    assert found == {"a · train · x + y": 24, "a · train · x": 12, "a · train · y": 12,
                     "a · held-out · x + y": 40, "a · held-out · x": 24, "a · held-out · y": 24}


def test_a_file_format_that_goes_with_the_label_is_found(tmp_path):
    from PIL import Image
    rows, rng = [], np.random.default_rng(0)
    for i in range(40):
        name = f"{i}.{('png', 'jpg')[i % 2]}"
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(tmp_path / name)
        rows.append({"label": LABELS[i % 2], "file": str(tmp_path / name)})
    found = header_shortcuts(Table(rows[:20]), Table(rows[20:]))
    assert [r["auroc"] for r in found] == [1.0, 1.0] and found[0]["n"] == 10


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes_from_its_cache(folders, tmp_path):
    cfg = knobs(folders, tmp_path / "out", extractors=("pixels", "classifier", "spectrum"))
    names, written = [tmp_path / "out" / name for name in ("matrix.json", "matrix.html")], []
    for _ in range(2):
        run_matrix(cfg)
        written.append([path.read_bytes() for path in names])
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()}
    assert written[0] == written[1] and len(kept) == 3
    for path, when in kept.items():                                         # nothing was computed again
        assert when <= names[0].stat().st_mtime_ns - 1, path


@pytest.mark.slow
def test_every_control_is_caught_on_real_x_rays(cxr, tmp_path):
    """With a judge of 64 px, trained here, and training images of other patients in the place of samples."""
    import classify
    classify.run_study(classify.Config(data=(str(cxr),), arms=("real",), condition=("label",), size=64, steps=120, seeds=1,
                                       out=str(tmp_path / "cls")))
    rows = read_table(cxr).select(split="train").rows
    made_ = []
    for i, row in enumerate(rows):
        if i % 3 == 0:
            name = f"images/{row['label']}/{i:06d}.png"
            images.write(tmp_path / "made" / name, images.square(images.read(row["file"]), 64))
            made_.append({"file_name": name, "label": row["label"], "patient": row["patient"], "set": "1"})
    write_table(tmp_path / "made/metadata.csv", made_)
    run_matrix(MatrixConfig(data=(str(cxr),), samples=(str(tmp_path / "made"),), external=(str(cxr / "external"),
                            str(cxr / "hannover")), classifier=str(tmp_path / "cls"), out=str(tmp_path / "m"), n=80,
                            permutations=100, resamples=300, repeats=10))
    found = json.loads((tmp_path / "m/matrix.json").read_text())
    assert found["status"] == "VALID"
    assert {c["control"] for c in found["controls"] if c["caught"]} == set(gates.CONTROLS)
    covid = next(v for v in found["verdicts"] if v["kind"] == "synthetic" and v["label"] == "covid")
    assert covid["label_confounded"] and covid["NOVELTY"]["answer"] == "no"
