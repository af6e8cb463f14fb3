"""Model card and datasheet: every filled line stands in the file it names, and what no file says
stays blank.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minidiff.data import phantom
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation.cards import BLANK, CardConfig, Files, run_card


@pytest.fixture
def project(tmp_path, monkeypatch):
    """What the stages leave behind, in little."""
    monkeypatch.chdir(tmp_path)
    phantom.write("data", n=60, size=32)
    fingerprint = read_table("data").fingerprint
    session = {"command": "train.py", "torch": "2.13", "machine": "a CPU | of two", "commit": "abc",
               "started": "today"}
    shares = {"near_share": 0.1, "near_low": 0.05, "near_high": 0.2, "n": 40,
              "near_heldout_share": 0.05, "closest": 20,
              "closest_train": 9, "closest_expected": 12.0, "space": "pixels"}
    value = {"accuracy": 0.75, "low": 0.5, "high": 0.9, "n": 12, "value": "F"}
    written = {
        "x/vae/config.json": {"kind": "vae", "data": ["data"], "size": 32, "seed": 0, "lr": 0.002},
        "x/vae/vae.json": {"psnr": 27.25, "n_held_out": 18},
        "x/diffusion/config.json": {"kind": "diffusion", "data": ["data"], "seed": 0,
                                    "architecture": "TINY", "steps": 77}, "x/diffusion/run.json":
        {"facts": {"data": fingerprint, "n_train": 41, "notes": ["3 images could not be read"]},
         "sessions": [session, session]}, "x/diffusion/model.json":
        {"variables": [{"name": "sex", "values": ["F", "M"]},
                       {"name": "age", "low": 20.0, "high": 90.0, "mean": 51.5}]},
        "x/samples/config.json": {"kind": "samples"}, "x/samples/manifest.json":
        {"model": "0" * 64, "recipe": {"sampler": "ddim", "steps": 13}, "trained_on": ["a", "b"]},
        "x/classifier/config.json": {"kind": "classifier", "data": ["data"], "seeds": 2},
        "x/classifier/summary.json": {
            "arms": [{"test_set": "test", "arm": "real", "seeds": 2, "n_train": 41,
                      "balanced_accuracy": 0.625, "balanced_accuracy_sd": 0.02}], "differences":
            {"test": [{"metric": "accuracy", "arm": "a", "against": "b", "difference": -0.0125,
                       "interval": [-0.1, 0.08], "seeds": 2, "answer": "not resolved"}]}},
        "x/report/config.json": {"kind": "report"}, "x/report/report.json": {
            "verdict": [{"question": "Is it new?", "answer": "yes", "text": "KD 0.152."}],
            "data": {"patients_assumed": True}, "samples": {"n": 40, "labels": {"covid": 40}},
            "distances": [{"set": "real", "extractor": "e", "label": "covid", "KD": 9.0, "n": 1,
                           "m": 1}, {"set": "synthetic", "extractor": "e", "label": "covid",
                                     "KD": 0.1525, "KD_low": 0.01, "KD_high": 0.4, "n": 18, "m": 40,
                                     "KD_floor": {"median": -0.004, "low": -0.04, "high": 0.05}}],
            "agreement": [{"variable": "sex", "set": "synthetic", "kind": "category", **value,
                           "by_value": [value]},
                          {"variable": "age", "set": "synthetic", "kind": "number", "n": 30,
                           "r": 0.875, "low": 0.7, "high": 0.95, "mae": 4.5},
                          {"variable": "view", "set": "synthetic", "kind": "category", "n": 0}],
            "neighbours": {"verdict": "no sign of copying", "spaces": [shares]}},
    }
    for name, content in written.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)},
              tmp_path / "x/diffusion/model.safetensors")
    lines = {"step": 10, "loss": 9}, {"step": 77, "loss": 0.0247, "val_loss": 0.03}
    (tmp_path / "x/diffusion/log.jsonl").write_text("".join(json.dumps(line) + "\n"
                                                            for line in lines))
    return tmp_path / "x"


def cards(**knobs):
    run_card(CardConfig(runs=("x",), out="card", **knobs))
    read = json.loads(Path("card/card.json").read_text())
    return {(i["document"], i["name"]): i for i in read["items"]}


def change(path, *keys, to):
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(content))


def test_every_line_names_a_place_that_exists(project):
    items = cards()
    for item in items.values():
        for source in item["sources"]:
            name, _, keys = source.partition(": ")
            if name.startswith("minidiff/"):
                continue
            if not name.endswith(".json"):
                assert (project.parent / name).exists(), source
                continue
            value = json.loads((project.parent / name).read_text())
            for key in filter(None, keys.split(".")):
                value = value[int(key)] if isinstance(value, list) else value[key]
        assert item["sources"] or not item["value"] or "run `evaluate.py" in item["value"], item
        assert item["asked_by"]
    assert len({(i["document"], i["section"], i["name"]) for i in items.values()}) == len(items)


def test_the_numbers_are_those_of_the_files(project):
    told = {name: item["value"] for (document, name), item in cards().items()
            if document == "model card"}
    assert told["KD, e, covid"] == ("0.152 (0.01 to 0.4; n = 18 held-out, 40 synthetic); "
                                    "floor −0.004 (−0.04 to 0.05)")
    assert told["diffusion model, numbers in the file of weights"] == "17"
    assert told["conditions, each of which may be "
                "unknown"] == "sex (F, M); age (20 to 90, mean 51.5)"
    assert told["test: real"] == "balanced_accuracy 0.625 ± 0.02 (over 2 seeds; trained on 41)"
    assert told["test: accuracy, a less b"] == "−0.0125 (−0.1 to 0.08; 2 seeds), not resolved"
    assert told["near-copies, pixels"].startswith("10.0 % (5.0 % to 20.0 %; n = 40); of held-out "
                                                  "images 5.0 %")
    assert told["sex, synthetic: F"] == "75.0 % (50.0 % to 90.0 %; n = 12, **n too small**)"
    assert told["age, synthetic"] == "r = 0.875 (0.7 to 0.95; n = 30), mean error 4.5"
    assert "view, synthetic" not in told
    assert told["diffusion: end of the log"] == "step 77, loss 0.0247, val_loss 0.03"
    assert told["exclusions and remarks"] == "3 images could not be read"
    assert "steps 77" in told["diffusion: settings and seed"]
    assert told["autoencoder, PSNR of held-out images"] == "27.2 dB (n = 18)" and "patients" in told
    assert "drawn by a program" in told["these are no patients"]

    change(project / "report/report.json", "distances", 1, "KD", to=0.77)
    assert cards()["model card", "KD, e, covid"]["value"].startswith("0.77 ")


def test_patients_are_counted_anew_and_the_data_recognised(project):
    items, table = cards(), read_table("data")
    for split in ("train", "val", "test"):
        told = dict(re.findall(r"(\w+) (\d+ \(\d+\))",
                               items["datasheet", f"{split}, images (patients)"]["value"]))
        for label in table.labels:
            part = table.select(split=split, label=label)
            assert told[label] == f"{len(part)} ({len(set(part.column('patient')))})"
    apart = "no patient and no file in two splits"
    assert "these are the data trained on" in items["model card", apart]["value"]
    text = (project.parent / "data/metadata.csv").read_text()
    (project.parent / "data/metadata.csv").write_text(text.replace(",train,", ",val,", 1))
    assert "not the data trained on" in cards()["model card", apart]["value"]
    rows = [{k: v for k, v in row.items() if k != "split"}
            for row in read_table("data", split=False).rows]
    write_table("data/metadata.csv", rows)
    (project / "split-of-others.csv").write_text("patient,split\n")
    assert "not the data trained on" in cards()["model card", apart]["value"]
    # a card splits nothing anew
    assert [p.name for p in project.glob("split-*")] == ["split-of-others.csv"]
    (project.parent / "data").rename(project.parent / "gone")
    assert ("model card", apart) not in cards()  # what cannot be checked is not claimed


def test_what_a_person_must_say_is_marked_asked_for_and_kept(project):
    items = cards()
    blank = [key for key, item in items.items() if not item["value"]]
    assert len(blank) > 20 and all(items[key]["by"] == "nobody yet" for key in blank)
    assert ("model card", "ethical approval and consent") in blank and ("datasheet",
                                                                        "funding") in blank
    page = (project.parent / "card/model_card.md").read_text()
    assert page.count(f"| {BLANK} |") == sum(key[0] == "model card" for key in blank)
    assert "not for diagnosis" in page.lower() and "a CPU \\| of two" in page
    answers = json.loads((project.parent / "card/answers.json").read_text())
    assert set(answers) == {f"{document}: {name}"
                            for document, name in blank} and not any(answers.values())

    change(project.parent / "card/answers.json", "model card: funding", to="None was had.")
    item = cards()["model card", "funding"]
    assert (item["value"], item["by"]) == ("None was had.",
                                           "person") and "answers.json" in item["sources"][0]
    assert json.loads((
        project.parent / "card/answers.json").read_text())["model card: funding"] == "None was had."
    assert cards()["model card", "funding"]["value"] == "None was had."  # and again

    # no answer where a file speaks
    change(project.parent / "card/answers.json", "model card: KD, e, covid", to="0.0")
    with pytest.raises(InputError, match="KD, e, covid', which is not asked"):
        cards()


def test_what_was_not_measured_is_called_so(project):
    items = cards()
    item = items["model card", "shortcuts"]
    assert "not measured" in item["value"] and item["by"] == "nobody yet"
    (project / "audit").mkdir()
    (project / "audit/config.json").write_text('{"kind": "audit"}')
    (project / "audit/audit.json").write_text(json.dumps(
        {"images": 60, "readable": 59, "patients": 50,
         "findings": [{"kind": "shortcut", "level": "warning", "text": "SHORTCUT: 0.99"},
                      {"kind": "name", "level": "info", "text": "odd"}], "tables":
         {"sex": {"": {"covid": 3}}, "all at once": {}}, "missing": {"sex": {"covid": 0.25}}}))
    items = cards()
    assert (
        "model card",
        "shortcuts") not in items and items["model card", "shortcut"]["value"] == "SHORTCUT: 0.99"
    assert ("model card",
            "name") not in items and items["datasheet", "name (info)"]["value"] == "odd"
    assert items["datasheet", "images by sex"]["value"] == "unknown: covid 3"
    assert items["datasheet", "empty cells of sex"]["value"] == "covid 25.0 %"
    change(project / "report/report.json", "neighbours", to=None)
    assert "not measured" in cards()["model card", "verdict"]["value"]


def test_the_data_of_a_classifier_or_an_audit_alone(project):
    apart = "model card", "no patient and no file in two splits"
    for kind in ("vae", "diffusion"):
        (project / kind / "config.json").unlink()
    table = read_table("data")
    parts = {split: table.select(split=split).fingerprint for split in ("train", "val", "test")}
    (project / "classifier/run.json").write_text(
        json.dumps({"facts": {"data": parts}, "sessions": []}))
    items = cards()
    assert "these are the data trained on" in items[apart]["value"]
    told = items["model card", "fingerprint of the data"]["value"]
    assert f"train {parts['train']}, val" in told
    (project / "classifier/config.json").unlink()
    (project / "audit").mkdir()
    (project / "audit/config.json").write_text('{"kind": "audit", "data": ["data"]}')
    (project / "audit/run.json").write_text('{"facts": {"data": "0"}, "sessions": []}')
    assert cards()[apart]["value"] == "checked when this card was made, over all rows"


def test_a_matrix_of_an_older_version_is_read(project):
    (project / "matrix").mkdir()
    (project / "matrix/config.json").write_text('{"kind": "matrix"}')
    (project / "matrix/matrix.json").write_text(json.dumps({
        "verdicts": [{"name": "covid · x", "grey": "3 images"}],
        "shortcuts": [{"label": "covid", "fact": "size", "auroc": 0.9, "low": 0.8, "high": 1.0,
                       "n": 30, "n_rest": 40}]}))
    items = cards()
    assert items["model card", "matrix: covid · x"]["value"] == "3 images"
    assert items["model card", "covid by size"]["value"].startswith("AUROC 0.9 ")


def test_bad_input_is_named(project):
    with pytest.raises(InputError, match="nowhere: no such run folder"):
        Files(["nowhere"])
    with pytest.raises(InputError, match="no run folder"):
        Files(["data"])
    (project / "vae-2").mkdir()
    (project / "vae-2/config.json").write_text('{"kind": "vae"}')
    with pytest.raises(InputError, match=r"2 runs of kind vae: x/vae, x/vae-2"):
        Files(["x"])
    assert Files(["x/vae", "x/diffusion"]).folders.keys() == {"vae", "diffusion"}
    (project / "diffusion/model.safetensors").write_bytes(b"12345678abc")
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        run_card(CardConfig(runs=("x/diffusion",), out="card2"))


@pytest.mark.slow
def test_the_card_of_the_demo(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(demo.parents[1])
    run_card(CardConfig(runs=("runs/demo",), out=str(tmp_path / "card")))
    page = (tmp_path / "card/model_card.md").read_text()
    report = json.loads((demo / "report/report.json").read_text())
    assert report["neighbours"]["verdict"] in page and "these are the data trained on" in page
