"""LPIPS: equal to the lpips package and to eq. 1 written out, from each form of its files;
gradients; refusals.
"""

import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision_peer import torchvision

from minidiff.diffusion.lpips import BLOCKS, LPIPS, load_lpips, unit
from minidiff.errors import InputError

# index: lpips' slice
CONVS = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
HEADS = {f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
SHIFT, SCALE = torch.tensor([-.030, -.088, -.188]), torch.tensor([.458, .448, .450])
CLASSIFIER = {f"classifier.{i}.{x}": torch.ones(2) for i in (0, 3, 6) for x in ("weight", "bias")}


@pytest.fixture(scope="module")
def tensors():
    """VGG-16's tensors in torchvision's names and the heads in lpips': all random, the activations
    of size 1 throughout.
    """
    g, vgg = torch.Generator().manual_seed(1), {}
    for i, a, b in zip(CONVS, WIDTHS, WIDTHS[1:]):
        vgg[f"features.{i}.weight"] = torch.randn(b, a, 3, 3, generator=g) * (2 / (9 * a)) ** 0.5
        vgg[f"features.{i}.bias"] = torch.randn(b, generator=g) * 0.1
    return vgg, {name: torch.rand(shape, generator=g) for name, shape in HEADS.items()}


def sliced(vgg):
    return {f"net.slice{CONVS[int(n.split('.')[1])]}.{n.removeprefix('features.')}": x
            for n, x in vgg.items()}


def package(vgg, heads):
    """The whole state dict of the lpips package: constants, sliced VGG, every head twice."""
    return {"scaling_layer.shift": SHIFT.view(1, 3, 1, 1),
            "scaling_layer.scale": SCALE.view(1, 3, 1, 1), **sliced(vgg),
            **heads, **{n.replace("lin", "lins."): x for n, x in heads.items()}}


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    """{form: the files of it}, written as the public ones are."""
    vgg, heads = tensors
    folder = tmp_path_factory.mktemp("lpips")
    paths = {n: folder / n for n in ("vgg16.pth", "heads.pth", "package.pth", "all.safetensors")}
    # as torchvision's is
    torch.save({**vgg, **CLASSIFIER}, paths["vgg16.pth"], _use_new_zipfile_serialization=False)
    torch.save(heads, paths["heads.pth"])
    torch.save(package(vgg, heads), paths["package.pth"])
    save_file({**vgg, **heads}, paths["all.safetensors"])
    yield {"package": [paths["package.pth"]], "safetensors": [paths["all.safetensors"]],
           "baseline": [paths["vgg16.pth"]], "two files": [paths["vgg16.pth"], paths["heads.pth"]],
           "reversed": [paths["heads.pth"], paths["vgg16.pth"]]}
    shutil.rmtree(folder)  # 180 MB


@pytest.fixture(scope="module")
def net(files):
    return load_lpips(*files["two files"])


def pair(n=2, h=32, w=40, seed=2, dtype=torch.float32):
    return torch.rand(2, n, 3, h, w, generator=torch.Generator().manual_seed(seed),
                      dtype=dtype) * 2 - 1


def written_out(vgg, heads, x, y):
    """Eq. 1 in float64, sharing nothing with the package: per layer, Σ_c w_c (a_c/|a| − b_c/|b|)²,
    its mean, their sum.
    """
    state, total = {n: t.double() for n, t in {**vgg, **heads}.items()}, 0
    a, b = (((v.double().permute(0, 2, 3, 1) - SHIFT) / SCALE).permute(0, 3, 1, 2) for v in (x, y))
    for i in CONVS:
        if i in (5, 10, 17, 24):
            a, b = F.max_pool2d(a, 2, 2), F.max_pool2d(b, 2, 2)
        a, b = (F.conv2d(v, state[f"features.{i}.weight"], state[f"features.{i}.bias"],
                         padding=1).clamp(min=0) for v in (a, b))
        if i in (2, 7, 14, 21, 28):
            w = state[f"lin{(2, 7, 14, 21, 28).index(i)}.model.1.weight"].flatten()
            aa, bb, ab = (torch.einsum("nchw,nchw->nhw", p, q) for p, q in ((a, a), (b, b), (a, b)))
            assert (aa > 0).all() and (bb > 0).all() and (
                ab <= (aa * bb).sqrt() * (1 + 1e-12)).all()
            error = a / aa.sqrt()[:, None] - b / bb.sqrt()[:, None]
            total = total + torch.einsum("c,nchw,nchw->nhw", w, error, error).mean((1, 2))
    return total


@pytest.mark.parametrize("form", ["package", "safetensors", "two files", "reversed", "baseline"])
def test_every_form_of_file_gives_equation_1(files, tensors, form):
    vgg, heads = tensors
    net, (x, y) = load_lpips(*files[form]), pair()
    if form == "baseline":
        heads = {n: torch.ones_like(w) for n, w in heads.items()}
    expected = written_out(vgg, heads, x, y)
    assert net(x, y).dtype == torch.float32 and net(x, y).shape == (2,) and expected.min() > 0.1
    assert (net(x, y) - expected).abs().max() <= 1e-5 * expected.max()
    # the constants stay float32's, as there
    assert (net.double()(x.double(), y.double()) - expected).abs().max() <= 1e-9


def test_about_says_where_the_heads_come_from(files):
    assert load_lpips(
        *files["two files"]).about == "LPIPS: VGG-16 of vgg16.pth, learned heads of heads.pth"
    assert load_lpips(
        *files["package"]).about == "LPIPS: VGG-16 of package.pth, learned heads of package.pth"
    assert load_lpips(*files["baseline"]).about == (
        "LPIPS: VGG-16 of vgg16.pth, no heads: every channel weighs 1, the baseline")


@pytest.fixture(scope="module")
def peers(tensors):
    """The lpips package's own network with these tensors: the learned distance and its baseline."""
    torchvision()  # mended first where plain import fails
    lpips = pytest.importorskip("lpips",
                                reason="the peer lpips is not installed: pip install lpips")
    state = package(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision in an old way
        learned, baseline = (lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, lpips=kind,
                                         verbose=False) for kind in (True, False))
    learned.load_state_dict(state)  # strict: every name of ours is theirs, too
    baseline.load_state_dict({n: x for n, x in state.items() if not n.startswith("lin")})
    return {"learned": learned, "baseline": baseline}


@pytest.mark.parametrize("form, kind", [("package", "learned"), ("safetensors", "learned"),
                                        ("two files", "learned"), ("baseline", "baseline")])
def test_parity_with_the_lpips_package(files, peers, form, kind):
    net, peer = load_lpips(*files[form]), peers[kind]
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        x, y = pair(h=35, w=48, dtype=dtype)
        y.requires_grad_()
        theirs, ours = peer.to(dtype)(x, y).flatten(), net.to(dtype)(x, y)
        assert theirs.min() > 0.1 and (theirs - ours).abs().max() <= bound
        a, b = (torch.autograd.grad(d.sum(), y)[0] for d in (theirs, ours))
        assert (a - b).abs().max() <= (1e-4 if dtype == torch.float32 else 1e-9) * a.abs().max()


def test_the_packages_published_heads_load(files, tensors, peers):
    import lpips
    path = f"{lpips.__path__[0]}/weights/v0.1/vgg.pth"
    with pytest.raises(InputError,
                       match=r"vgg.pth holds the heads of LPIPS alone: give VGG-16 as well"):
        load_lpips(path)
    net, (x, y) = load_lpips(files["baseline"][0], path), pair()
    heads = torch.load(path, weights_only=True, map_location="cpu")
    expected = written_out(tensors[0], heads, x, y)
    assert (net(x, y) - expected).abs().max() <= 1e-5
    assert {n: tuple(w.shape) for n, w in heads.items()} == HEADS


def test_parity_with_torchvisions_vgg16(tensors, net):
    models = torchvision().models
    # vgg16().features without 120 M of classifier
    theirs = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=False)
    state = {n.removeprefix("features."): x for n, x in tensors[0].items()}
    theirs.load_state_dict(state)
    assert {n: tuple(x.shape) for n, x in theirs.state_dict().items()} == {
        n: tuple(x.shape) for n, x in net.features.state_dict().items()}
    x, taps = pair()[0], {}
    h = (x - net.shift) / net.scale
    with torch.no_grad():
        for i, layer in enumerate(theirs):
            h = layer(h)
            taps[i] = h.clone()
    for i, ours, (c, _) in zip((3, 8, 15, 22, 29), net.blocks(x), BLOCKS):
        assert ours.shape[1] == c and (ours - taps[i]).abs().max() <= 1e-5 * taps[i].abs().max()


def test_a_distance_zero_symmetric_positive(net):
    x, y = pair()
    assert torch.equal(net(x, x), torch.zeros(2))
    assert torch.equal(net(x, y), net(y, x)) and (net(x, y) > 0).all()
    near = net(x, x + 0.01 * (y - x))
    assert (near > 0).all() and (near < 0.1 * net(x, y)).all()
    # an image's distance is its own
    assert torch.allclose(net(x[:1], y[:1]), net(x, y)[:1], rtol=1e-5)
    assert net(*pair(h=32, w=32)).isfinite().all()
    assert [tuple(h.shape[2:]) for h in net.blocks(pair(h=32, w=32)[0])] == [(32, 32), (16, 16),
                                                                             (8, 8), (4, 4), (2, 2)]


def test_gradient_by_finite_differences(files):
    net = load_lpips(*files["two files"]).double()
    x, y = pair(n=1, h=32, w=32, dtype=torch.float64)
    y.requires_grad_()
    gradient = torch.autograd.grad(net(x, y).sum(), y)[0]
    for seed in range(3):
        v = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            slope = (net(x, y + 1e-6 * v) - net(x, y - 1e-6 * v)).item() / 2e-6
        assert slope == pytest.approx((gradient * v).sum().item(), rel=1e-4)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training


def test_all_zero_cells_have_a_finite_gradient(net):
    """√Σh² has gradient NaN there, and a black border with negative biases is such a cell."""
    h = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit(h).sum().backward()
    assert h.grad.isfinite().all() and (unit(h) == 0).all()
    # widened first
    assert all(unit(h.to(t)).equal(torch.zeros(1, 4, 2, 2))
               for t in (torch.float16, torch.bfloat16))
    dead = LPIPS()
    dead.load_state_dict({n: -x.abs() if n.endswith("bias")
                          else x * 1e-3 for n, x in net.state_dict().items()})
    y = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert (list(dead.blocks(y))[-1] == 0).all()
    dead(torch.ones(1, 3, 32, 32), y).sum().backward()
    assert y.grad.isfinite().all()


def test_under_bf16_autocast(net):
    x, y = pair(h=32, w=32)
    y.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        d = net(x, y)
    d.sum().backward()
    assert d.dtype == torch.float32 and y.grad.isfinite().all() and y.grad.abs().max() > 0
    assert torch.allclose(d, net(x, y), rtol=0.02)
    small = net(x, x + 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, x), torch.zeros(2))
        assert (net(x, x + 0.01) < 20 * small).all()


@pytest.mark.parametrize("x, y, said", [
    ((1, 3, 31, 64), (1, 3, 31, 64), r"32 px a side at the least; these are \(1, 3, 31, 64\)"),
    ((1, 3, 16, 16), (1, 3, 16, 16), "32 px"),
    ((1, 1, 32, 32), (1, 1, 32, 32), r"\(N, 3, H, W\)"),
    ((2, 3, 32, 32), (1, 3, 32, 32), "of one shape"),
    ((3, 32, 32), (3, 32, 32), r"\(N, 3, H, W\)"),
])
def test_images_that_cannot_be_compared(x, y, said):
    with pytest.raises(InputError, match=said):
        LPIPS()(torch.zeros(x), torch.zeros(y))


def hollow(value=0.5):
    """Tensors of the right shapes that hold one number each: files of a few kB."""
    one = torch.tensor(value)
    vgg = {}
    for i, a, b in zip(CONVS, WIDTHS, WIDTHS[1:]):
        vgg |= {f"features.{i}.weight": one.expand(b, a, 3, 3), f"features.{i}.bias": one.expand(b)}
    return vgg, {n: one.expand(shape) for n, shape in HEADS.items()}


VGG, LINEAR = hollow()
WHOLE = package(VGG, LINEAR)
BROKEN = {
    "missing": ({n: x for n, x in VGG.items() if n != "features.17.bias"},
                "1 missing: features.17.bias"), "missing first":
    ({n: x for n, x in VGG.items() if n != "features.0.weight"}, "1 missing: features.0.weight"),
    "missing in a slice": ({n: x for n, x in WHOLE.items() if n != "net.slice3.12.weight"},
                           "missing: net.slice3.12.weight"),
    "missing head": ({n: x for n, x in WHOLE.items() if n != "lin4.model.1.weight"},
                     "1 missing: lin4.model.1.weight"), "only the repeated heads":
    ({n: x for n, x in WHOLE.items() if n not in HEADS}, "5 missing: lin0.model.1.weight"),
    "unexpected": ({**VGG, "features.30.weight": torch.ones(1)},
                   "1 unexpected: features.30.weight"), "unexpected classifier":
    ({**VGG, "classifier.9.bias": torch.ones(1)}, "1 unexpected: classifier.9.bias"),
    "both dialects": ({**VGG, **sliced(VGG)}, "26 unexpected: features.0.bias"),
    "shape": ({**VGG, "features.2.bias": torch.ones(65)},
              r"1 of another shape: features.2.bias \(65,\) for \(64,\)"),
    "alexnet's head": ({**WHOLE, "lin1.model.1.weight": torch.ones(1, 192, 1, 1)},
                       r"lin1.model.1.weight \(1, 192, 1, 1\) for \(1, 128, 1, 1\)"),
    "negative head": ({**VGG, **LINEAR, "lin2.model.1.weight": torch.full((1, 256, 1, 1), -.1)},
                      "lin2.model.1.weight holds other than finite numbers ≥ 0"),
    "head of NaN": ({**VGG, **LINEAR, "lin0.model.1.weight": torch.full((1, 64, 1, 1), torch.nan)},
                    "lin0.model.1.weight holds other than finite"),
    "infinite bias": ({**sliced(VGG), "net.slice1.2.bias": torch.full((64,), torch.inf)},
                      "net.slice1.2.bias holds other than finite numbers"),
    "two opinions": ({**WHOLE, "lins.3.model.1.weight": torch.ones(1, 512, 1, 1)},
                     "lins.3.model.1.weight differs from"), "another scaling":
    ({**WHOLE, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, "scaling_layer.shift differs from"),
    "scaling of another shape": ({**WHOLE, "scaling_layer.scale": SCALE},
                                 "scaling_layer.scale differs from"),
    "dtype": ({**VGG, "features.0.bias": torch.ones(64, dtype=torch.int64)},
              "features.0.bias is int64; allowed are"),
    "heads alone": (LINEAR, "holds the heads of LPIPS alone: give VGG-16 as well, as torchvision's "
                    "vgg16-397923af"), "another model":
    ({"encoder.conv_in.weight": torch.ones(1)}, "holds no weights of VGG-16: give VGG-16 instead"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_broken_file_is_refused_by_name(fault, tmp_path):
    state, said = BROKEN[fault]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match=said) as caught:
        load_lpips(tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in str(caught.value) and "\n" not in str(caught.value)


def test_two_files_that_do_not_go_together(tmp_path):
    for name, state in {"vgg.pth": VGG, "whole.pth": WHOLE, "lin.pth": LINEAR,
                        "sd.pth": {"z": torch.ones(1)}}.items():
        torch.save(state, tmp_path / name)
    vgg, whole, linear, other = (tmp_path / n
                                 for n in ("vgg.pth", "whole.pth", "lin.pth", "sd.pth"))
    for paths, said in [
        ((vgg, whole), "vgg.pth and .*whole.pth both hold the VGG-16 of LPIPS: give one"),
        ((whole, linear), "both hold the heads of LPIPS: give one"),
        ((vgg, linear, linear), "both hold the heads"),
        ((linear, other), "lin.pth holds the heads of LPIPS alone"),
        ((vgg, other), "sd.pth: .* 1 unexpected: z"),
        ((vgg, tmp_path / "none.pth"), "none.pth: no such file"),
    ]:
        with pytest.raises(InputError, match=said):
            load_lpips(*paths)


class Payload:
    def __reduce__(self):
        return print, ("run",)


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    torch.save({**VGG, "x": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(InputError,
                       match="evil.pth wants to run .*print; nothing in a checkpoint is run"):
        load_lpips(tmp_path / "evil.pth")
    assert "run" not in capsys.readouterr().out


def test_half_precision_files_load_and_the_global_stream_is_untouched(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({n: x.to(dtype) for n, x in WHOLE.items()}, tmp_path / "half.pth")
        state = torch.get_rng_state()
        net = load_lpips(tmp_path / "half.pth")
        assert torch.equal(torch.get_rng_state(), state)
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert torch.equal(net.shift.flatten(), SHIFT)  # the constants are ours, exactly
