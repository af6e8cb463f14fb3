"""The figures of `explain` where the truth is known: an exact denoiser; and the page of a tiny run.
"""

import html
import re
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minidiff import config, runs
from minidiff.diffusion import store, unet
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Recipe
from minidiff.diffusion.model import Model, from_scratch
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError
from minidiff.sampling import figures
from minidiff.sampling.explain import ExplainConfig, plain, run, source
from minidiff.variables import NULL, Category, Findings, Number

VARIANCE, SHIFT = 0.5, 2.0   # of Gaussian latents; how far the mean of the second label is from 0
ROOT = Path(__file__).parents[1]


def gaussian(prediction: str = "x0", **knobs) -> figures.Subject:
    """The exact denoiser of latents N(μ, VARIANCE), μ = 0 but for label b, of 8 × 8 cells."""
    schedule = Schedule.scaled_linear()

    def net(c_in_x, t, labels):
        sigma = schedule.sigma(t)[:, None, None, None].float()
        x, label = c_in_x * (1 + sigma**2).sqrt(), labels["label"][:, None, None, None]
        mean = torch.where(label == 1, SHIFT, 0.0)
        D = mean + VARIANCE / (VARIANCE + sigma**2) * (x - mean)
        return D if prediction == "x0" else (x - D) / sigma  # else eps

    label = Category("label", ("a", "b"))
    conditioner = Conditioner([label], torch.randn(5, 8, generator=torch.Generator()),
                              torch.Generator())
    vae = SimpleNamespace(decode=lambda z: z[:, :3] / 10)
    g = torch.Generator().manual_seed(0)
    return figures.Subject(**{
        "pipeline": SimpleNamespace(denoiser=Denoiser(net, schedule, prediction), vae=vae, size=8,
                                    conditioner=conditioner),
        "grey": False, "recipe": Recipe(steps=10, guidance=1.0), "names": ["a", "b"],
        "labels": {"label": torch.tensor([0, 1])}, "noise": torch.randn(2, 4, 8, 8, generator=g),
        "z": VARIANCE**0.5 * torch.randn(256, 4, 8, 8, generator=g),
        "own": {"label": torch.full((256,), NULL)}, "trained": {"times": "uniform", "min_snr": 5.0},
        "logged": [], "shown": 3, "level": 1.0, "reference": 200, **knobs})


def test_the_schedule_is_the_models_and_the_ladder_lies_on_it():
    found, _ = figures.schedule(m := gaussian())
    assert found["rungs"]["sigma"].equal(m.D.schedule.ladder(10, "logsigma"))
    assert m.D.schedule.sigma(found["rungs"]["t"]).allclose(found["rungs"]["sigma"])
    assert torch.isclose(found["alpha_bar"][0], m.D.schedule.alphas_cumprod[0])
    assert found["trained"].allclose(torch.full((50,), 0.02).double())
    late, _ = figures.schedule(gaussian(trained={"times": "logit-normal", "min_snr": 0}))
    assert abs(late["trained"].sum() - 1) < 1e-9 and late["trained"].argmax() not in (0, 49)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("min_snr", [5.0, 0.0])
def test_the_error_of_an_exact_denoiser_is_the_posterior_variance(prediction, min_snr):
    m = gaussian(prediction, trained={"times": "uniform", "min_snr": min_snr})
    found, _ = figures.loss(m)
    sigma = found["sigma"]
    assert torch.allclose(found["error"], VARIANCE * sigma**2 / (VARIANCE + sigma**2), rtol=0.02)
    assert torch.allclose(found["linear"], found["error"], rtol=0.02)
    z, noise, labels = (torch.cat(parts) if torch.is_tensor(parts[0]) else m.own
                        for parts in zip(*m.batches()))
    for s, own in list(zip(sigma, found["trained"]))[2::5]:  # what training itself would say
        t = m.D.schedule.t(s).expand(len(z))
        assert m.D.loss(z, t, noise, labels, min_snr).mean().item() == pytest.approx(
            own.item(), rel=1e-3)


def test_the_estimate_nears_the_end_and_each_rung_has_its_pictures():
    found, strips = figures.ladder(gaussian())
    assert (found["left"].diff(dim=1) < 0).all() and found["left"].shape == (2, 10)
    assert found["sigma"][0] == found["shown"][0] and len(found["shown"]) == 3
    assert [title for title, _ in strips] == ["a", "b"]
    assert all(shots.shape == (3, 3, 8, 8) and shots.dtype == torch.uint8
               for _, rows in strips for shots in rows.values())


def test_the_arrow_of_guidance_and_its_scales_are_those_of_the_formula():
    m = gaussian()
    found, strips = figures.arrows(m)
    sigma = torch.tensor(found["sigma"], dtype=torch.float64)
    length = SHIFT * sigma**2 / (VARIANCE + sigma**2)     # a's mean is that of null
    assert torch.allclose(found["length"], torch.stack([0 * length, length]), rtol=1e-3, atol=1e-5)
    assert strips[0][1]["D(y) − D(∅)"].unique().tolist() == [128]    # no difference: grey
    assert strips[1][1]["D(y) − D(∅)"].max() == 255
    for row in figures.scales(m)[0]["rows"]:
        expected = abs(row["scale"] - 1) * length / 2 if row["scale"] else 0 * length
        assert torch.allclose(torch.tensor(row["moved"]).double(), expected, rtol=1e-3, atol=1e-4)


def test_the_error_of_euler_is_the_closed_form_and_higher_orders_fall_faster():
    found, _ = figures.errors(m := gaussian(labels={"label": torch.tensor([0, 0])}))
    assert {row["sampler"] for row in found["rows"]} == {"euler", "heun", "dpmpp_2m", "unipc"}
    for calls in figures.CALLS:
        sigmas = m.D.schedule.ladder(calls, "logsigma")
        ratio = ((VARIANCE + sigmas[-1] ** 2) / (VARIANCE + sigmas[0] ** 2)).sqrt()
        steps = 1 + sigmas.diff() * sigmas[:-1] / (VARIANCE + sigmas[:-1] ** 2)  # dx = (x − D)/σ·dσ
        start = figures.rms(m.noise).mean() * (1 + sigmas[0] ** 2).sqrt()
        off = start * (steps.prod() - ratio).abs() / (1 + sigmas[-1] ** 2).sqrt()
        own = next(row["rms"] for row in found["rows"]
                   if (row["sampler"], row["calls"]) == ("euler", calls))
        assert own.item() == pytest.approx(off.item(), rel=0.01)
    for name in ("euler", "heun", "dpmpp_2m", "unipc"):
        few, *_, many = (row["rms"] for row in found["rows"]
                         if row["sampler"] == name and row["calls"] >= 16)
        assert many < few / (3 if name == "euler" else 8)


def test_channels_have_the_moments_of_the_latents_and_come_one_by_one():
    m = gaussian()
    m.z[:, 2] += 1.5
    found, strips = figures.latents(m)
    assert torch.allclose(found["mean"], m.z.double().mean((0, 2, 3)))
    assert torch.allclose(found["std"], m.z.double().std((0, 2, 3), correction=0))
    width = found["edges"].diff()[0]
    assert torch.allclose((found["density"] * width).sum(1), torch.ones(4).double(), atol=1e-3)
    (_, rows), = strips
    assert all(len(shots) == 5 for shots in rows.values())
    # the fourth channel is none that this decoder looks at: without it, the image is whole
    assert rows["left out"][4].equal(rows["left out"][0])
    assert not rows["alone"][1].equal(rows["alone"][0])


def test_what_conditions_add_sums_up_to_the_context():
    variables = [Category("label", ("a", "b")), Number("age", 50.0, 10.0, 20.0, 80.0),
                 Findings("seen", ("edema", "nodule"))]
    g = torch.Generator().manual_seed(1)
    c = Conditioner(variables, torch.randn(5, 8, generator=g), g)
    with torch.no_grad():
        for projection in c.projections:
            projection.weight.normal_(generator=g)
        m = gaussian()
        m = replace(m, pipeline=SimpleNamespace(**{**vars(m.pipeline), "conditioner": c}))
        found, _ = figures.conditions(m)
        values = {(row["variable"], row["value"]): k for k, row in enumerate(found["values"])}
        assert [*values][:4] == [("label", "a"), ("label", "b"), ("label", "unknown"),
                                 ("age", "20")]
        asked = {"label": torch.tensor([1]), "age": torch.tensor([80.0]), "seen": torch.tensor([2])}
        total = (c(asked) - c.null_context)[0]
    picked = [values["label", "b"], values["age", "80"], values["seen", "nodule"]]
    norms = torch.stack([found["values"][k]["norm"] for k in picked])
    gram = found["cosine"][picked][:, picked] * norms[:, None] * norms   # |Σ v|² = Σ v·v'
    assert gram.sum().sqrt().item() == pytest.approx(total[-1].norm().item(), rel=1e-4)
    assert total[0].abs().max() == 0 and torch.isclose(total[1], total[-1]).all()
    assert torch.allclose(found["cosine"].diagonal(), torch.ones(len(values)).double())


def test_attention_without_a_preference_is_uniform_and_large_layers_are_left_out(monkeypatch):
    shape = unet.UNetConfig((16, 32), (True, True), 8, heads=2, blocks=1, groups=8)
    m = gaussian()
    net = from_scratch(shape, [Category("label", ("a", "b"))], 0)
    model = Model(net.unet, net.conditioner).requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, unet.Attention):
            layer.to_q.weight.zero_()
    m = replace(m, pipeline=SimpleNamespace(**{
        **vars(m.pipeline), "denoiser": replace(m.D, net=model, prediction="v")}))
    found, strips = figures.attention(m)
    assert {row["cells"] for row in found["layers"]} == {64, 16}
    for row in found["layers"]:
        assert row["share"].item() == pytest.approx(row["uniform"], abs=1e-5) and row[
            "uniform"] == 1 - 1 / 8
        assert torch.isclose(row["reach"], row["uniform_reach"])
    assert strips[0][1]["from the centre"].unique().tolist() == [255]
    assert found["sigma"] == min(found_rungs(m), key=lambda s: abs(s - 1))
    monkeypatch.setattr(figures, "CELLS", 16)
    assert {row["cells"] for row in figures.attention(m)[0]["layers"]} == {16}
    monkeypatch.setattr(figures, "CELLS", 1)
    assert figures.attention(m) == ({}, [])


def found_rungs(m):
    return [sigma for sigma, *_ in m.way[0]]


QUICK = {"images": 6, "steps": 3, "shown": 2, "labels": 2, "reference": 4}


def test_the_page_needs_nothing_else_shows_its_code_and_is_the_same_again(tiny, tmp_path):
    cfg = ExplainConfig(run=str(tiny / "diffusion"), data=(str(tiny / "data"),),
                        out=str(tmp_path / "out"), **QUICK)
    result, text = run(cfg), (tmp_path / "out/explain.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|src=\"(?!data:)", text)
    assert text.count("data:image/png") == 8 + 2 * (2 + 3 + 1) + 3 + 3   # charts, strips
    assert runs.read_json(tmp_path / "out/explain.json") == result
    assert result["figures"]["loss"]["logged"] and result["figures"]["loss"]["n"] == 6
    shown = [html.unescape(code) for code in re.findall("(?s)<pre>(.*?)</pre>", text)]
    assert shown == [part["text"] for parts in result["code"].values() for part in parts]
    run(cfg)
    assert (tmp_path / "out/explain.html").read_text() == text


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_code_shown_is_that_which_runs_and_short(name):
    own, core = figures.FIGURES[name]
    assert source(own)["name"] == f"minidiff/sampling/figures.py: {own.__name__}"
    assert source(own)["text"].count("\n") < 20
    for part in map(source, (own, *core)):
        file, _, function = part["name"].partition(": ")
        assert textwrap.indent(part["text"], "    " * function.count(".")) in (
            ROOT / file).read_text()
        assert f"def {function.split('.')[-1]}(" in part["text"]


@pytest.mark.slow
@pytest.mark.parametrize("variables", [[], [Findings("label", ("covid", "normal", "pneumonia"))]],
                         ids=["unconditional", "findings"])
def test_runs_of_other_conditions(tiny, tmp_path, variables):
    run_folder = shutil.copytree(tiny / "diffusion", tmp_path / "diffusion")
    pipeline, facts = store.load_pipeline(run_folder)
    rows = [{"label": "covid|normal"}, {"label": "pneumonia"}] if variables else facts["rows"]
    store.save_model(run_folder, from_scratch(unet.TINY, variables, 0), pipeline.denoiser.schedule,
                     "v", **{**facts, "rows": rows})
    result = run(ExplainConfig(run=str(run_folder), data=(str(tiny / "data"),), **QUICK))
    text = (tmp_path / "explain/explain.html").read_text()
    assert text.count("The model has no conditions") == (0 if variables else 3)
    values = result["figures"]["conditions"].get("values", [])
    assert [row["value"] for row in values][-2:] == (["none", "unknown"] if variables else [])


@pytest.mark.parametrize("knobs, message", [
    ({"images": 0}, "--images 0"), ({"level": 0.0}, "--level 0"), ({"reference": 1}, "--reference"),
    ({"steps": 2000}, "--steps 2000 is more than the 1000 levels"),
    ({"run": "nowhere/diffusion"}, "nowhere/diffusion/model.json is missing"),
])
def test_bad_input_is_one_sentence(tiny, tmp_path, knobs, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(ExplainConfig(**{"run": str(tiny / "diffusion"), "data": (str(tiny / "data"),),
                             "out": str(tmp_path / "out"), **QUICK, **knobs}))
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_autoencoder_and_an_empty_root_are_refused(tiny, tmp_path, monkeypatch):
    lone = shutil.copytree(tiny / "diffusion", tmp_path / "diffusion",
                           ignore=lambda *_: ["vae.json", "vae.safetensors"])
    with pytest.raises(InputError, match="vae.json is missing: the VAE stage"):
        run(ExplainConfig(run=str(lone), data=(str(tiny / "data"),)))
    import evaluate
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        config.main(evaluate.VERBS, default="report", doc="",
                    argv=["explain", "--root", "runs/nothing"])


def test_numbers_become_json():
    assert plain({"x": [torch.ones(2), (1, "a")]}) == {"x": [[1.0, 1.0], [1, "a"]]}
