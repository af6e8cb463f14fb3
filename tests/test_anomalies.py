"""Anomaly maps and scores where the truth is known: a phantom's healthy counterfactual is the same
phantom without its disease.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import runs
from minidiff.data import images, phantom
from minidiff.data.table import read_table
from minidiff.errors import InputError
from minidiff.evaluation.anomalies import maps, truth
from minidiff.evaluation.anomalies import run as anomalies
from minidiff.evaluation.anomalies.run import AnomaliesConfig
from minidiff.statistics import auroc, weighted_precision

SIDE, N = 32, 120


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return phantom.write(tmp_path_factory.mktemp("anomalies") / "data", n=N, size=SIDE, masks=True)


class Known:
    """A model that knows the truth: SDEdit gives the phantom without its disease, or, if `blind`,
    the image itself; the autoencoder gives the image with some noise."""

    def __init__(self, data, blind=False):
        table = read_table(data)
        trained = table.select(split="train", label="normal")
        self.facts = {"size": SIDE, "grey": True, "sha256": "0" * 64, "rows": [{"label": "normal"}],
                      "trained_on": [table.hashes[row["file"]] for row in trained.rows]}
        self.blind, self.batches = blind, 0

    def __call__(self, x, rows, normal_label, seeds):
        assert normal_label == "normal" and len(x) == len(rows) == len(seeds)
        self.batches += 1
        index = [int(row["file_name"][-10:-4]) for row in rows]
        well = x[:, :1] if self.blind else torch.stack([torch.from_numpy(
            phantom.phantom(0, i, SIDE, label="normal").image)[None] for i in index])
        noise = torch.stack([torch.randint(-9, 10, x[:, :1].shape[1:],
                                           generator=torch.Generator().manual_seed(s))
                             for s in seeds])
        made = {"VAE": (x[:, :1] + noise).clamp(0, 255).to(torch.uint8), "SDEdit 0.5": well,
                "SDEdit 0.6": well.clone()}
        features = {maps.FEATURE + name: (x[:, 0].float() - c[:, 0].float()).square() / 1e4
                    for name, c in made.items()}
        noisy = (x[:, 0].float().diff(dim=2)).abs().mean((1, 2))
        return made | features | {"error": noisy, "bits": -noisy,
                                  maps.BLURRED + "error": noisy / 2, maps.BLURRED + "bits": -noisy}


def config(data, out, **knobs):
    return AnomaliesConfig(**{"data": (str(data),), "run": "runs/none", "out": str(out),
                              "masks": str(data / "masks/opacity"), "shown": 2, "batch": 16,
                              **knobs})


@pytest.fixture(scope="module")
def known(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("known") / "out"
    return anomalies.run(config(data, out), lambda cfg: Known(data)), out


def test_the_true_counterfactual_finds_the_disease(known):
    result, _ = known
    pixels = {row["method"]: row for row in result["pixels"]}
    best, guess = pixels[maps.PRIMARY], result["data"]["abnormal_pixels"]
    assert 0.005 < guess < 0.1
    assert best["auroc"]["value"] > 0.97 and best["auprc"]["value"] > 10 * guess
    assert {row["answer"] for row in result["pixels_against"]} == {"better"}
    assert [row["baseline"] for row in result["pixels_against"]] == list(maps.BASELINES)
    for row in pixels.values():
        assert row["dice"]["value"] <= row["best_dice"] + 1e-9
        low, high = row["auprc"]["interval"]
        assert low <= row["auprc"]["value"] <= high
    scores = {(row["label"], row["method"]): row for row in result["images"]}
    assert scores["covid", maps.PRIMARY]["auroc"] > 0.95
    assert scores["covid", maps.PRIMARY]["n"] == result["data"]["n"]["covid"]


def test_a_model_that_changes_nothing_finds_nothing(data, tmp_path):
    result = anomalies.run(config(data, tmp_path / "out"), lambda cfg: Known(data, blind=True))
    pixels = {row["method"]: row for row in result["pixels"]}
    assert pixels[maps.PRIMARY]["auroc"]["value"] == 0.5
    assert pixels[maps.PRIMARY]["auprc"]["value"] == pytest.approx(
        result["data"]["abnormal_pixels"], rel=1e-3)
    answers = {row["baseline"]: row["answer"] for row in result["pixels_against"]}
    assert answers.pop("intensity") == "better"   # lungs are dark: its guess is worse than none
    assert "better" not in answers.values()


def test_the_page_shows_the_figures_and_the_control_of_densities(known):
    result, out = known
    text = (out / "anomalies.html").read_text()
    assert text.count("data:image/png") == 3 * 2 * 8  # labels, images, rows of pictures
    assert maps.PRIMARY in text and "Which pixels are abnormal?" in text
    dull = {row["method"]: row["auroc"] for row in result["blurred"]}
    assert dull["denoising error"] < 0.2 and dull["likelihood"] == 0.5
    saved = json.loads((out / "anomalies.json").read_text())
    assert saved["pixels"] == result["pixels"]
    assert len(saved["scores"]) == sum(result["data"]["n"].values())


def test_a_stopped_run_goes_on_and_ends_the_same(known, data, tmp_path):
    whole, first = known

    class Stopped(Known):
        def __call__(self, *args):
            if self.batches == 1:
                raise KeyboardInterrupt
            return super().__call__(*args)

    with pytest.raises(KeyboardInterrupt):
        anomalies.run(config(data, tmp_path / "out"), lambda cfg: Stopped(data))
    maker = Known(data)
    again = anomalies.run(config(data, tmp_path / "out"), lambda cfg: maker)
    n = len(list((first / "parts").iterdir()))
    assert n > 1 and maker.batches == n - 1
    for name in ("pixels", "pixels_against", "images", "images_against", "blurred", "shortcuts"):
        assert again[name] == whole[name]
    maker = Known(data)
    anomalies.run(config(data, tmp_path / "out", shown=1), lambda cfg: maker)
    assert maker.batches == 0


def test_parts_belong_to_their_images_in_their_order_and_to_what_is_known_of_them(data, tmp_path):
    """The same rows in another order, or another age: the kept parts are of other images."""
    moved = Path(shutil.copytree(data, tmp_path / "data"))
    anomalies.run(config(moved, tmp_path / "out"), lambda cfg: Known(data))
    table = (moved / "metadata.csv").read_text()
    head, *rows = table.splitlines()
    for changed in ("\n".join([head, *rows[::-1]]), re.sub(r",(F|M),", ",,", table)):
        assert changed != table
        (moved / "metadata.csv").write_text(changed)
        with pytest.raises(InputError, match="images"):
            anomalies.run(config(moved, tmp_path / "out"), lambda cfg: Known(data))


def test_training_patients_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="the model was trained on .* held-out images"):
        anomalies.run(config(data, tmp_path / "a", split=("train", "test")),
                      lambda cfg: Known(data))


@pytest.mark.parametrize(("knobs", "said"), [
    ({"normal": "healthy"}, "--normal healthy: the data have the labels covid, normal, pneumonia"),
    ({"split": ("exam",)}, "split exam has no"),
    ({"masks": "nowhere"}, "--masks nowhere: .* abnormal images without a mask: nowhere/"),
    ({"within": "hospital"}, "--within hospital: the data have no such column"),
])
def test_bad_input_is_one_sentence(data, tmp_path, knobs, said):
    with pytest.raises(InputError, match=said):
        anomalies.run(config(data, tmp_path / "out", **knobs), lambda cfg: Known(data))


@pytest.mark.parametrize(("knobs", "said"), [
    ({"strengths": (0.5, 0.25)}, "--strengths 0.5 0.25: one or more, rising"),
    ({"strengths": (1.0,)}, "below 1"), ({"batch": 0}, "--batch 0"), ({"images": -1}, "--images -1")
])
def test_bad_knobs(data, tmp_path, knobs, said):
    with pytest.raises(InputError, match=said):
        config(data, tmp_path, **knobs)


def test_a_model_of_several_labels_needs_the_normal_one(data, tmp_path):
    maker = Known(data)
    maker.facts["rows"] = [{"label": "normal"}, {"label": "covid"}]
    with pytest.raises(InputError, match="trained on covid, normal: name .* --normal"):
        anomalies.run(config(data, tmp_path / "out"), lambda cfg: maker)


def random_maps(n=12, side=20, seed=0):
    rng = np.random.default_rng(seed)
    masks = rng.random((n, side, side)) < 0.06
    masks[: n // 3] = False
    return (rng.gamma(2, size=(n, side, side)) * (1 + masks)).astype(np.float32), masks


def test_areas_by_level_are_those_of_the_pixels():
    x, masks = random_maps()
    counts = truth.by_level(x, masks, truth.levels_of(x))
    assert counts.sum((1, 2)).tolist() == [400] * 12
    found = truth.areas(counts, np.ones((1, 12)))
    every = np.ones((1, x.size))
    assert found["auroc"][0] == pytest.approx(auroc(x.ravel(), masks.ravel()), abs=1e-3)
    assert found["auprc"][0] == pytest.approx(
        weighted_precision(x.ravel(), masks.ravel(), every)[0], abs=2e-3)
    # an image of weight 0 is not there
    weights = np.r_[np.ones(9), np.zeros(3)][None]
    assert truth.areas(counts, weights)["auroc"][0] == pytest.approx(
        auroc(x[:9].ravel(), masks[:9].ravel()), abs=1e-3)


def test_dice_is_that_of_a_threshold_chosen_on_other_patients():
    x, masks = random_maps(40, 16, seed=1)
    levels = truth.levels_of(x)
    counts = truth.by_level(x, masks, levels)
    by_hand = [2 * ((x >= t) & masks).sum() / ((x >= t).sum() + masks.sum()) for t in levels]
    figures = truth.pixel_figures(counts, list(range(40)), 0)
    assert figures["best_dice"] == pytest.approx(max(by_hand))
    assert max(by_hand) - 0.05 < figures["dice"]["value"] <= max(by_hand)
    # a map whose scale differs from patient to patient has no common threshold
    scale = 10.0 ** np.arange(40)[:, None, None]
    own = masks * scale + 1e-3 * scale
    one = truth.pixel_figures(truth.by_level(own, masks, truth.levels_of(own)), list(range(40)), 0)
    assert one["best_dice"] < 0.9


def test_copies_of_a_patient_add_no_certainty():
    x, masks = random_maps(10)
    counts = truth.by_level(x, masks, truth.levels_of(x))
    once = truth.pixel_figures(counts, list(range(10)), 0)["auroc"]
    thrice = truth.pixel_figures(np.repeat(counts, 3, 0), np.repeat(range(10), 3).tolist(), 0)
    assert thrice["auroc"]["value"] == pytest.approx(once["value"])
    assert thrice["auroc"]["interval"] == pytest.approx(once["interval"])


def test_an_answer_needs_an_interval_without_zero():
    for low, high, said in ((0.1, 0.3, "better"), (-0.3, -0.1, "worse"),
                            (-0.1, 0.2, "not resolved"), (np.nan, np.nan, "not resolved")):
        assert truth.compared(0.1, np.linspace(low, high, 200))["answer"] == said


def test_within_needs_two_values_and_both_sides():
    rows = [{"label": label, "source": source} for source, n in (("a", 6), ("b", 3))
            for label in ("sick", "well") for _ in range(n)]
    assert [(label, value, len(index)) for label, value, index in
            truth.strata(rows, "well", "source")] == [("sick", "", 18), ("sick", "a", 12)]
    assert len(truth.strata([{**row, "source": "a"} for row in rows], "well", "source")) == 1


def test_masks_are_found_by_the_names_of_the_images(tmp_path):
    white = np.zeros((1, 40, 80), np.uint8)
    white[:, 10:20, 30:50] = 255
    images.write(tmp_path / "m/sick/1.png", white)
    rows = [{"file_name": "images/sick/1.jpg", "label": "sick"},
            {"file_name": "images/well/2.jpg", "label": "well"}]
    masks = truth.read_masks(str(tmp_path / "m"), rows, "well", 40)
    assert masks[0, 10:20, 10:30].all() and masks.sum() == 200  # the central square of a wide one
    with pytest.raises(InputError, match=r"1 abnormal image without a mask: .*sick/3\.jpg"):
        truth.read_masks(str(tmp_path / "m"), [*rows, {"file_name": "sick/3.jpg", "label": "sick"}],
                         "well", 40)
    with pytest.raises(InputError, match="no mask of these images has a white pixel"):
        truth.read_masks(str(tmp_path / "m"), rows[1:], "well", 40)


def test_maps_in_closed_form():
    levels = np.stack([np.full((1, 2, 2), v) for v in (1.0, 2.0, 4.0)])
    assert maps.harmonic(levels) == pytest.approx(3 / (1 + 1 / 2 + 1 / 4), rel=1e-5)
    assert maps.harmonic(np.stack([levels[0] * 0, levels[2]])).max() < 1e-5
    flat = np.full((2, 16, 16), 0.3, np.float32)
    assert maps.blurred(flat, 1 / 16) == pytest.approx(flat)
    one = np.zeros((1, 10, 10))
    one[0, 3, 4] = 5
    assert maps.image_scores(one, 0.05) == pytest.approx([1.0])   # the 5 highest of 100
    h = [torch.nn.functional.normalize(torch.randn(1, 3, 4, 4), dim=1) for _ in range(2)]
    other = [h[0].clone(), h[1]]
    other[0][0, :, 0, 0] *= -1
    found = maps.feature_map(h, other, 4)
    assert found[0, 0, 0] == pytest.approx(2.0) and found.sum() == pytest.approx(2.0)
    grey = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    assert maps.baseline_maps(grey, maps.Normal(grey))[maps.MEAN].max() < 1e-6
    assert set(maps.baseline_maps(grey, None)) == {"intensity", "blur residual"}


def test_principal_components_rebuild_what_lies_in_their_span():
    g = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (9, 1, 8, 8), generator=g).to(torch.uint8).expand(-1, 3, -1, -1)
    normal = maps.Normal(train)
    assert maps.baseline_maps(train, normal)[maps.LINEAR].max() < 1e-5   # 8 axes hold 9 images
    other = train.clone()
    other[:, :, 2, 3] = 255 - other[:, :, 2, 3]
    found = maps.baseline_maps(other, normal)[maps.LINEAR]
    changed = (other != train)[:, 0].flatten(1).any(1).numpy()
    assert (found[changed].reshape(changed.sum(), -1).argmax(1) == 2 * 8 + 3).mean() > 0.8


def test_a_real_model_end_to_end(tiny, tmp_path):
    """A few steps of training show nothing but that all of it runs, twice alike, and that a model
    of labels is guided by them."""
    import evaluate

    cfg = AnomaliesConfig(run=str(tiny / "diffusion"), data=(str(tiny / "data"),), normal="normal",
                          images=2, steps=4, likelihood=2, shown=1, out=str(tmp_path / "a"))
    evaluate.run_anomalies(cfg)
    result = runs.read_json(tmp_path / "a/anomalies.json")
    assert result["pixels"] == [] and result["data"]["n"] == {"covid": 2, "normal": 2,
                                                              "pneumonia": 2}
    evaluate.run_anomalies(replace(cfg, out=str(tmp_path / "b"), guidance=9.0))
    mild, strong = (runs.read_json(tmp_path / f"{name}/anomalies.json")["scores"][0]
                    for name in "ab")
    assert {"likelihood", "denoising error", "inversion, pixel", maps.PRIMARY} <= set(mild)
    alike = {name for name in mild if mild[name] == strong[name]}
    assert {"VAE, pixel", "VAE, feature", "likelihood", "denoising error"} <= alike
    assert not alike & {"inversion, pixel", "SDEdit 0.5, pixel", maps.PRIMARY}


def test_cells_that_the_model_does_not_know_are_unknown(tiny):
    from minidiff.sampling.counterfactuals import Counterfactuals

    maker = Counterfactuals(AnomaliesConfig(run=str(tiny / "diffusion"),
                                            data=(str(tiny / "data"),), normal="normal"))
    labels = maker.labels([{"label": "covid", "sex": "F", "view": "oblique", "age": ""}], "normal")
    values = {v.name: v.values for v in maker.variables}
    assert values["label"][labels["label"]] == "normal" and values["sex"][labels["sex"]] == "F"
    assert labels["view"].item() == -1
