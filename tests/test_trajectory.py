"""What attention looks at, checked against what it gives; and one image's way, drawn twice
alike.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from minidiff import config
from minidiff.diffusion import store, unet
from minidiff.diffusion.generate import Recipe
from minidiff.errors import InputError
from minidiff.pixels import to_grey
from minidiff.sampling import plan
from minidiff.sampling import trajectory as room
from minidiff.sampling.finished_run import open_pipeline
from minidiff.sampling.trajectory import (
    Step,
    TrajectoryConfig,
    attention_maps,
    evenly,
    follow,
    trajectory,
)

ONE_HEAD = unet.UNetConfig((16, 32), (True, True), 16, heads=1, blocks=1, groups=8)
SD2 = unet.UNetConfig((16, 32), (False, True), 16, head_dim=8, linear_projection=True,
                      float32_attention=True, blocks=1, groups=8)


def build(c: unet.UNetConfig, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    net = unet.UNet(c).eval().to(dtype)
    inputs = torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([20.0, 700.0]), torch.randn(
        2, 5, c.context_dim, dtype=dtype)
    return net, inputs


def watch(net: unet.UNet) -> dict[str, dict[str, torch.Tensor]]:
    """Every attention layer's q, k, v and the mixed values before its output, as its own linear
    layers see them.
    """
    held = {}
    for name, layer in net.named_modules():
        if isinstance(layer, unet.Attention):
            own = held[name.replace(".transformer_blocks.0", "")] = {"heads": layer.heads}
            for part in ("to_q", "to_k", "to_v"):
                getattr(layer, part).register_forward_hook(lambda m, i, out, own=own,
                                                           part=part: own.update({part: out}))
            layer.to_out[0].register_forward_hook(lambda m, i, out, own=own: own.update(mixed=i[0]))
    return held


@pytest.mark.parametrize("c", [ONE_HEAD, unet.TINY, unet.SMALL, SD2])
def test_maps_have_every_layer_and_change_nothing(c):
    net, inputs = build(c)
    with torch.no_grad():
        plain = net(*inputs)
        with attention_maps(net) as maps:
            mapped = net(*inputs)
        assert torch.equal(plain, mapped) and not any(m._forward_hooks for m in net.modules())
    places = [
        f"{way}_blocks.{level if way == 'down' else len(c.channels) - 1 - level}.attentions.{i}"
        for way, blocks in (("down", c.blocks), ("up", c.blocks + 1))
        for level, has in enumerate(c.attention) if has for i in range(blocks)]
    assert set(maps) == {f"{place}.{attn}" for place in [*places, "mid_block.attentions.0"]
                         for attn in ("attn1", "attn2")}
    for name, p in maps.items():
        cells = p.shape[1]
        assert p.shape == (2, cells, cells if name.endswith("attn1")
                           else 5) and math.isqrt(cells) ** 2 == cells
        assert p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad and (
            p >= 0).all()
        assert torch.allclose(p.sum(-1), torch.ones(2, cells), atol=1e-5)
    assert max(p.shape[1] for p in maps.values()) == 64 // 4 ** c.attention.index(True)


def test_probabilities_times_values_are_what_attention_gives():
    net, inputs = build(ONE_HEAD)
    held = watch(net)
    with torch.no_grad(), attention_maps(net) as maps:
        net(*inputs)
    assert set(held) == set(maps) and len(maps) == 14
    for name, own in held.items():
        assert own["mixed"].std() > 0.05
        assert torch.allclose(maps[name] @ own["to_v"], own["mixed"], atol=1e-5), name


@pytest.mark.parametrize("c", [unet.TINY, SD2])
def test_several_heads_are_averaged(c):
    """The fused kernel gives its probabilities away if every value is a unit vector."""
    net, inputs = build(c)
    held = watch(net)
    with torch.no_grad(), attention_maps(net) as maps:
        net(*inputs)
    for name, own in held.items():
        q, k = (own[part].unflatten(-1, (own["heads"], -1)).transpose(1, 2)
                for part in ("to_q", "to_k"))
        tokens = k.shape[2]
        each = F.scaled_dot_product_attention(q, k, torch.eye(tokens).expand(*k.shape[:2], tokens,
                                                                             tokens))
        assert each.shape[1] == own["heads"] > 1 and torch.allclose(maps[name], each.mean(1),
                                                                    atol=1e-5), name


def test_outside_nothing_is_computed(monkeypatch):
    net, inputs = build(unet.TINY)
    monkeypatch.setattr(room, "probabilities", lambda *_: pytest.fail("computed"))
    with attention_maps(net):
        pass
    net(*inputs)


def test_low_precision_and_the_way_back_leave_float32_maps():
    net, inputs = build(unet.TINY)
    with torch.autocast("cpu", torch.bfloat16), attention_maps(net) as maps:
        net(*inputs).square().mean().backward()
    assert all(p.dtype == torch.float32 and (p.sum(-1) - 1).abs().max() < 1e-5
               for p in maps.values())


@pytest.fixture(scope="module")
def pipeline(tiny):
    return store.load_pipeline(tiny / "diffusion")[0]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "unipc", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_way_is_that_of_sampling_and_has_an_arrow_where_there_is_guidance(pipeline, sampler,
                                                                              guidance):
    labels = plan.encode(pipeline.conditioner.variables, [{"label": "covid", "sex": "F"}])
    recipe = Recipe(sampler, "karras", 4, guidance)
    *steps, end = follow(pipeline, labels, 17, recipe, [0, 3])
    *estimates, z = pipeline.latents(labels, [17], recipe)
    assert all(isinstance(step, Step) for step in steps)
    assert [step.maps is not None for step in steps] == [True, False, False, True]
    sigmas = pipeline.denoiser.schedule.ladder(4, "karras").tolist()
    assert [step.sigma for step in steps] == sigmas[:4] and torch.allclose(end, z, atol=1e-6)
    assert all(torch.allclose(step.denoised, estimate, atol=1e-6)
               for step, estimate in zip(steps, estimates))
    assert all((step.arrow == 0) if guidance == 1 else (step.arrow > 0) for step in steps)
    maps = steps[0].maps
    assert maps.layer == "up_blocks.0.attentions.1" and maps.uniform == 1 - 1 / 8
    assert maps.share.shape == maps.centre.shape and maps.centre.sum().item() == pytest.approx(
        1, abs=1e-5)
    assert maps.share.min() > 0 and maps.share.max() < 1


def test_the_estimate_is_what_the_network_makes_of_what_is_shown(pipeline):
    """c_in·x is what the first row decodes: D of it, put together by hand, is the second row."""
    labels = plan.encode(pipeline.conditioner.variables, [{"label": "normal"}])
    step, *_ = follow(pipeline, labels, 3, Recipe(steps=5, guidance=1.0), [])
    with torch.no_grad():
        again = pipeline.denoiser(step.seen * math.sqrt(1 + step.sigma**2), step.sigma, labels)
    assert torch.allclose(again, step.denoised, atol=1e-4)


def test_the_sheet_is_drawn_twice_alike(tiny, tmp_path, capsys):
    cfg = {"run": str(tiny / "diffusion"), "seed": 17, "label": "covid",
           "given": ("sex=F", "age=", "view=null"), "steps": 5, "shown": 3}
    for name in ("a.png", "b.png"):
        trajectory(TrajectoryConfig(**cfg, out=str(tmp_path / name)))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    said = capsys.readouterr().out
    assert "label covid, sex F, age unknown, view dropped; 3 of 5 steps shown" in said
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > 1000 and len(
            set(sheet.convert("L").tobytes())) > 100
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.png", "b.png"]
    trajectory(TrajectoryConfig(**{**cfg, "guidance": 1.0, "shown": 1, "sampler": "heun"},
                                out=str(tmp_path / "a.png")))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    trajectory(TrajectoryConfig(**{**cfg, "guidance": 0.0}, out=str(tmp_path / "a.png")))
    assert "no conditions (guidance 0)" in capsys.readouterr().out


def test_it_ends_at_the_image_that_sample_makes(tiny, tmp_path, monkeypatch):
    """The same label and seed → the same drawn conditions and the same pixels."""
    ends, draw = [], room.sheet
    monkeypatch.setattr(room, "sheet", lambda title, film, image,
                        *rest: ends.append((title, image)) or draw(title, film, image, *rest))
    trajectory(TrajectoryConfig(run=str(tiny / "diffusion"), out=str(tmp_path / "a.png"), seed=17,
                                label="covid", steps=4, shown=2))
    cfg = sample.SampleConfig(run=str(tiny / "diffusion"), label=("covid",), per_label=1, seed=17,
                              steps=4, device="cpu")
    pipeline, facts = open_pipeline(cfg.run, cfg.device)
    rows = sample.plan(cfg, pipeline.conditioner.variables, facts, pipeline.size)
    pixels, _ = sample.make(cfg, pipeline, rows, [int(row["seed"]) for row in rows])
    (title, image), = ends
    assert f"sex {rows[0]['sex'] or 'unknown'}, age {rows[0]['age'] or 'unknown'}" in title
    assert torch.equal(image, to_grey(pixels)[0, 0])


@pytest.mark.parametrize("knobs, said", [
    ({"label": "covvid"}, "--label: label 'covvid' is not one of covid, normal, pneumonia; "
     "nearest: covid"), ({"given": ("sx=F",)}, "--given sx=F: the model has no such condition; it "
                         "has label, sex, age, view"),
    ({"steps": 2000}, "--steps 2000 is more than the 1000 levels of the schedule"),
    ({"shown": 40}, "--shown 40: 16 images side by side at the most"),
    ({"device": "abacus"}, "device 'abacus' is not here; CUDA devices found"),
    ({"out": "sheet.jpg"}, "--out sheet.jpg: name a file that ends in .png"),
    ({"run": "nowhere"}, "nowhere/model.json is missing: the diffusion stage"),
])
def test_bad_input_is_one_sentence(tiny, tmp_path, knobs, said):
    with pytest.raises(InputError, match=re.escape(said)) as error:
        trajectory(TrajectoryConfig(**{"run": str(tiny / "diffusion"),
                                       "out": str(tmp_path / "a.png"), **knobs}))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_knobs_have_reasons_and_the_sampling_ones_are_those_of_sample():
    theirs = config.typing.get_type_hints(sample.SampleConfig)
    hints = config.typing.get_type_hints(TrajectoryConfig)
    assert hints["sampler"] == theirs["sampler"] and hints["ladder"] == theirs["ladder"]
    for knob in ("sampler", "ladder", "steps", "guidance", "seed", "run"):
        assert getattr(TrajectoryConfig(), knob) == getattr(sample.SampleConfig(), knob)
    assert set(config.reasons(TrajectoryConfig)) == set(hints)


@pytest.mark.parametrize("n, k, picked", [(16, 8, [0, 2, 4, 6, 9, 11, 13, 15]), (3, 8, [0, 1, 2]),
                                          (1, 3, [0]), (5, 1, [4])])
def test_evenly(n, k, picked):
    assert evenly(n, k) == picked
