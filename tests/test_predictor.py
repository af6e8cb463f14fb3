"""predictor: learns, repeats bit for bit, ignores unknown cells, and comes back from disk as it
was.
"""

import json
import math

import pytest
import safetensors.torch
import torch

from minidiff.classification.judge_agreement import judge_agreement
from minidiff.classification.lungs import LungNet
from minidiff.classification.predictor import Predictor, balance, begin, fit, loss
from minidiff.errors import InputError, TrainingFault
from minidiff.pixels import to_grey
from minidiff.variables import Category, Findings, Number

SIDE, AGE = Category("side", ("left", "right")), Number("age", 50.0, 20.0, 10.0, 90.0)


def toy(n, seed):
    """Noise with a bright block on one side: the side is a category, the block's brightness a
    number.
    """
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 100, (n, 1, 32, 32), generator=g, dtype=torch.uint8)
    side, level = torch.randint(0, 2, (n,), generator=g), torch.rand(n, generator=g)
    for i in range(n):
        images[i, 0, 10:22,
               (2 + 16 * side[i]):(14 + 16 * side[i])] += (50 + 100 * level[i]).to(torch.uint8)
    return images.expand(-1, 3, -1, -1), {"side": side, "age": 10 + 80 * level}


def fresh(**kwargs):
    return Predictor([SIDE, AGE], **{"width": 8, "size": 32, **kwargs})


@pytest.fixture(scope="module")
def trained():
    images, labels = toy(200, 1)
    labels = {"side": labels["side"].clone(), "age": labels["age"].clone()}
    labels["side"][:40], labels["age"][20:80] = -1, math.nan
    predictor = fresh()
    log = fit(predictor, images, labels, steps=40, batch=32, lr=5e-3, seed=3)
    return predictor, log, images, labels


def test_learns_a_category_and_a_number(trained):
    predictor, log, *_ = trained
    images, truth = toy(200, 2)
    side, age = judge_agreement(predictor, images, truth, "held-out")
    assert side["n"] == 200 and side["accuracy"] > 0.95
    assert age["r"] > 0.8 and age["mae"] < 15  # in years, not in deviations
    assert log[-1]["loss"] < log[0]["loss"] and [line["step"] for line in log] == [10, 20, 30, 40]


def test_equal_fits_are_equal_bit_for_bit_and_another_seed_is_not(trained):
    predictor, log, images, labels = trained
    again = fresh()
    torch.rand(7)
    before = torch.get_rng_state()
    assert fit(again, images, labels, steps=40, batch=32, lr=5e-3, seed=3) == log
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b)
               for a, b in zip(predictor.state_dict().values(), again.state_dict().values()))
    assert fit(fresh(), images, labels, steps=10, batch=32, lr=5e-3, seed=4)[0] != log[0]


@pytest.mark.parametrize("cell",
                         [("side", -1), ("side", -2), ("age", math.nan), ("age", -math.inf)])
def test_an_unknown_cell_has_no_gradient(cell):
    name, value = cell
    out = {"side": torch.randn(3, 2, requires_grad=True),
           "age": torch.randn(3, 1, requires_grad=True)}
    labels = {"side": torch.tensor([0, 1, 1]), "age": torch.tensor([30.0, 40.0, 50.5])}
    labels[name][1] = value
    loss([SIDE, AGE], out, labels).backward()
    assert (out[name].grad[1] == 0).all() and (out[name].grad[[0, 2]] != 0).all()
    labels[name][:] = value
    value = loss([SIDE, AGE], {k: x.detach().requires_grad_() for k, x in out.items()}, labels)
    assert value.isfinite()


def test_loss_is_its_formula():
    out = {"side": torch.tensor([[0.0, 0.0], [2.0, 0.0]]), "age": torch.tensor([[0.5], [-1.0]])}
    # 70 years are one deviation
    labels = {"side": torch.tensor([0, 1]), "age": torch.tensor([70.0, math.nan])}
    a, b = math.log(2), math.log(1 + math.exp(2))
    assert loss([SIDE, AGE], out, labels).item() == pytest.approx((a + b) / 2 + 0.25, abs=1e-6)
    weighted = loss([SIDE, AGE], out, labels, {"side": torch.tensor([3.0, 1.0])})
    assert weighted.item() == pytest.approx((3 * a + b) / 4 + 0.25, abs=1e-6)


def test_balance_gives_every_class_the_same_weight():
    weights = balance(Category("label", ("a", "b", "c")),
                      {"label": torch.tensor([0] * 6 + [1] * 2 + [-1])})
    assert torch.allclose(weights["label"], torch.tensor([8 / 12, 8 / 4, 0.0]))
    assert balance(Findings("label", ("a", "b")), {}) == {}


def test_save_and_load_give_the_same_answers(trained, tmp_path):
    predictor, _, images, _ = trained
    predictor.save(tmp_path / "judge")
    again = Predictor.load(tmp_path / "judge")
    assert again.variables == predictor.variables and not again.training
    for name, y in predictor.predict(images).items():
        assert torch.equal(y, again.predict(images)[name])
    assert torch.equal(predictor.features(images), again.features(images))
    assert sorted(p.name for p in (tmp_path / "judge").iterdir()) == ["predictor.json",
                                                                      "predictor.safetensors"]


def test_a_missing_or_half_written_predictor_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no predictor.*predictor.json: no such file"):
        Predictor.load(tmp_path)
    fresh().save(tmp_path)
    whole = (tmp_path / "predictor.safetensors").read_bytes()
    (tmp_path / "predictor.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="holds no predictor, or half of one"):
        Predictor.load(tmp_path)
    fresh(width=16).save(tmp_path / "other")
    (tmp_path / "predictor.safetensors").write_bytes(
        (tmp_path / "other" / "predictor.safetensors").read_bytes())
    with pytest.raises(InputError, match="holds no predictor, or half of one"):
        Predictor.load(tmp_path)


def test_shapes_and_ranges_whatever_the_image_size_and_batch(trained):
    predictor, _, images, _ = trained
    out = predictor.predict(images[:50])
    assert out["side"].shape == (50, 2) and out["age"].shape == (50,) and predictor.features(
        images[:50]).shape == (50, 64)
    assert torch.allclose(out["side"].sum(1), torch.ones(50))
    assert torch.allclose(out["age"], predictor.predict(images[:50], batch=7)["age"], atol=1e-3)
    large = images[:50].float()
    large = torch.nn.functional.interpolate(large, (64, 64),
                                            mode="bilinear").round().to(torch.uint8)
    assert (
        predictor.predict(large)["side"].argmax(1) == out["side"].argmax(1)).float().mean() > 0.9
    assert not predictor.training


def test_grey_is_the_mean_of_the_channels():
    image = torch.tensor([10, 20, 60], dtype=torch.uint8).view(1, 3, 1, 1)
    assert to_grey(image).flatten().tolist() == [30]
    same = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_grey(same.expand(-1, 3, -1, -1)),
                       same) and torch.equal(to_grey(same.repeat(1, 3, 1, 1)), same)


def test_damaged_json_is_named(tmp_path):
    fresh().save(tmp_path)
    (tmp_path / "predictor.json").write_text("{")
    with pytest.raises(InputError, match="predictor.json is damaged"):
        Predictor.load(tmp_path)


def test_a_fault_names_the_images():
    predictor, (images, labels) = fresh(), toy(12, 1)
    predictor.net.fc.weight.data.fill_(math.nan)
    with pytest.raises(TrainingFault, match=r"images \[\d+, \d+, \d+, \d+\] of the training set"):
        fit(predictor, images, labels, steps=5, batch=4)


# ---- pictures made alike


def test_it_keeps_and_applies_how_pictures_are_made_alike(trained, tmp_path):
    images, labels = trained[2:]
    net = fresh(standardise=("equalise",))
    fit(net, images, labels, steps=3, batch=8)
    brighter = 255 - (255 - images.float()).square().div(255).round().to(torch.uint8)
    assert torch.equal(net.standard(images), net.standard(images.contiguous()))
    rising = images[:, :1] // 2 + 60  # of pairs of greys one: equal to images of even greys
    even = images[:, :1] // 2 * 2
    assert torch.equal(net.logits(rising)["side"], net.logits(even)["side"])
    assert not torch.equal(net.logits(brighter)["side"], net.logits(255 - brighter)["side"])
    net.save(tmp_path)
    again = Predictor.load(tmp_path)
    assert again.standardise == ("equalise",)
    assert torch.equal(again.logits(rising)["side"], net.logits(even)["side"])
    assert torch.equal(again.logits(net.made_alike(images), alike=True)["age"],
                       net.logits(images)["age"])


def test_the_lungs_go_with_the_predictor_and_are_not_trained(trained, tmp_path):
    images, labels = trained[2:]
    finder = LungNet(3)
    before = {k: x.clone() for k, x in finder.state_dict().items()}
    net = fresh(standardise=("lungs", "local"), lungs=finder)
    fit(net, images[:32], {k: x[:32] for k, x in labels.items()}, steps=2, batch=8,
        validation=(images[:8], {k: x[:8] for k, x in labels.items()}, None))
    net.save(tmp_path)
    again = Predictor.load(tmp_path)
    assert again.standardise == ("lungs", "local")
    assert all(torch.equal(x, before[k]) for k, x in again.lungs.state_dict().items())
    assert torch.equal(again.logits(images)["side"], net.logits(images)["side"])
    (tmp_path / "lungs.safetensors").unlink()
    with pytest.raises(InputError, match="lungs.safetensors is not there; copy the whole folder"):
        Predictor.load(tmp_path)


def test_a_predictor_of_before_is_read_as_it_was(trained, tmp_path):
    trained[0].save(tmp_path)
    form = json.loads((tmp_path / "predictor.json").read_text())
    assert "standardise" not in form
    again = Predictor.load(tmp_path)
    assert again.standardise == () and again.standard(trained[2]) is trained[2]
    (tmp_path / "predictor.json").write_text(json.dumps({**form, "standardise": ["blur"]}))
    with pytest.raises(InputError, match="--standardise blur; allowed are equalise"):
        Predictor.load(tmp_path)


# ---- where a classifier starts


X = torch.randint(0, 256, (4, 1, 64, 64),
                  generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def of_width(width, seed, values=("a", "b", "c")):
    return Predictor([Category("label", values)], width=width, size=64, seed=seed)


@pytest.mark.parametrize("form", ["pth", "wrapped.pth", "safetensors"])
def test_a_torchvision_file_of_three_channels_and_a_thousand_classes(tmp_path, form):
    theirs = of_width(64, 1).net.state_dict()
    state = {**theirs, "conv1.weight": (theirs["conv1.weight"] / 3).repeat(1, 3, 1, 1),
             "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    path = tmp_path / f"resnet18.{form}"
    if form == "safetensors":
        safetensors.torch.save_file({k: x.contiguous() for k, x in state.items()}, path)
    else:
        torch.save({"state_dict": state} if "wrapped" in form else state, path)
    ours = of_width(64, 2)
    before = ours.net.fc.weight.clone()
    assert begin(ours, path) == ["fc.weight", "fc.bias"] and torch.equal(ours.net.fc.weight, before)
    assert (ours.features(X) - of_width(64, 1).features(X)).abs().max() < 1e-4


def test_another_predictor_with_the_same_labels_and_with_others(tmp_path):
    theirs = of_width(8, 1)
    theirs.save(tmp_path)
    ours, other = of_width(8, 2), of_width(8, 2, ("x", "y"))
    assert begin(ours, tmp_path) == [] and torch.equal(ours.logits(X)["label"],
                                                       theirs.logits(X)["label"])
    assert begin(other, tmp_path) == ["fc.weight", "fc.bias"] and torch.equal(other.features(X),
                                                                              theirs.features(X))


def test_another_width_is_named(tmp_path):
    of_width(8, 1).save(tmp_path)
    with pytest.raises(InputError,
                       match=r"not a resnet18 of this size.*--width 16; resnet18 has 64"):
        begin(of_width(16, 1), tmp_path)
