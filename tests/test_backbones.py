"""backbones: parity with torchvision and TorchXRayVision on random weights, their input, and files
that do not fit.
"""

import re

import pytest
import safetensors.torch
import torch
from test_resnet import randomise
from torchvision_peer import torchvision

from minidiff.errors import InputError
from minidiff.evaluation.features import backbones
from minidiff.evaluation.features.backbones import BACKBONES, Network, read_state


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(backbones, "BATCH", 3)


def pictures(n=3, side=96):
    """Noise of different strength and grain: pictures that a network of random weights tells
    apart.
    """
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, side // 4, side // 4,
                        generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fine, share = torch.rand(n, 3, side, side, generator=g), torch.linspace(0, 1, n).view(-1, 1, 1,
                                                                                          1)
    return (255 * (share * coarse + (1 - share) * fine * 0.6)).byte()


def torchvision_net(name):
    peer = getattr(torchvision().models, name)(weights=None, num_classes=11).eval()
    randomise(peer, 3)
    return peer


@torch.no_grad()
def pooled(peer, x):
    """What the peer's last layer reads, caught on its way."""
    caught = []
    last = peer.fc if hasattr(peer, "fc") else peer.classifier
    hook = last.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    peer(x)
    hook.remove()
    return caught[0]


def saved(peer, path):
    torch.save(peer.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "densenet121"])
def test_parity_with_torchvision(name, tmp_path):
    peer = torchvision_net(name)
    extractor = Network(name, BACKBONES[name], saved(peer, tmp_path / "w.pth"))
    x = pictures()
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    resized = torchvision().transforms.functional.resize(x.float() / 255, [224, 224],
                                                         antialias=True)
    theirs, ours = pooled(peer, (resized - mean) / std), extractor(x)
    assert ours.shape == (3, BACKBONES[name].d) and theirs.std(0).mean() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def xrv_net():
    """DenseNet-121 for one channel and 18 findings: torchvision's, cut to size."""
    peer = torchvision().models.densenet121(weights=None, num_classes=18)
    peer.features.conv0 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    randomise(peer, 4)
    return peer.eval()


def test_parity_with_a_grey_densenet(tmp_path):
    peer = xrv_net()
    extractor = Network("xrv-densenet121", BACKBONES["xrv-densenet121"],
                     saved(peer, tmp_path / "w.pth"))
    x = pictures(side=224)[:, :1].expand(-1, 3, -1, -1)
    theirs = pooled(peer, (2 * x[:, :1].float() / 255 - 1) * 1024)
    assert (extractor(x) - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_parity_with_torchxrayvision(tmp_path):
    torchvision()
    xrv = pytest.importorskip("torchxrayvision", reason="pip install torchxrayvision",
                              exc_type=ImportError)
    peer = xrv.models.DenseNet(op_threshs=torch.rand(18)).eval()
    randomise(peer, 5)
    peer.input_resolution = 224
    extractor = Network("xrv-densenet121", BACKBONES["xrv-densenet121"],
                     saved(peer, tmp_path / "w.pth"))
    x = pictures(side=300)[:, :1]
    given = torch.stack([torch.from_numpy(xrv.utils.normalize(image.numpy(), 255)) for image in x])
    with torch.no_grad():
        theirs = peer.features2(given)
    assert -1024 <= given.min() < -1000 and (extractor(x)
                                             - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_old_names_of_densenet_are_read(tmp_path):
    """torchvision's own file says norm.1 where its code says norm1."""
    state = torchvision_net("densenet121").state_dict()
    old = {re.sub(r"(?<=norm|conv)([12])\.", r".\1.", k) if "denselayer" in k
           else k: x for k, x in state.items()}
    row = BACKBONES["densenet121"]
    torch.save(old, tmp_path / "old.pth")
    torch.save(state, tmp_path / "new.pth")
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert Network("densenet121", row, tmp_path / "old.pth").identity == Network(
        "densenet121", row, tmp_path / "new.pth").identity


def test_features_do_not_depend_on_company(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "BATCH", 4)
    extractor = Network("resnet18", BACKBONES["resnet18"],
                     saved(torchvision_net("resnet18"), tmp_path / "w.pth"))
    x = pictures(6)
    whole = extractor(x)
    assert torch.equal(extractor(x.flip(0)), whole.flip(0))
    assert all(torch.equal(extractor(x[k : k + 1]), whole[k : k + 1]) for k in (0, 5))
    assert torch.equal(extractor(x), whole) and not whole.requires_grad


def test_autocast_around_it_does_not_lower_the_precision(tmp_path):
    extractor = Network("resnet18", BACKBONES["resnet18"],
                     saved(torchvision_net("resnet18"), tmp_path / "w.pth"))
    x = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        inside = extractor(x)
    assert torch.equal(inside, extractor(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_gives_the_same_without_tf32(tmp_path):
    path, x = saved(torchvision_net("resnet18"), tmp_path / "w.pth"), pictures()
    there, here = (Network("resnet18", BACKBONES["resnet18"], path, device=device)(x)
                   for device in ("cuda", "cpu"))
    assert there.device.type == "cpu" and (there - here).abs().max() <= 1e-5 * here.abs().max()


def test_the_global_generator_is_not_touched(tmp_path):
    path = saved(torchvision_net("resnet18"), tmp_path / "w.pth")
    before = torch.get_rng_state()
    Network("resnet18", BACKBONES["resnet18"], path)
    assert torch.equal(torch.get_rng_state(), before)


def test_files_that_do_not_fit_are_named(tmp_path):
    path = saved(torchvision_net("resnet18"), tmp_path / "w.pth")
    for name, message in {
            "resnet34": "no resnet34. missing: layer1.2.conv1.weight",
            "densenet121": "no densenet121. missing", "resnet50":
            r"of another shape: layer1.0.conv1.weight \(64, 64, 3, 3\), it has \(64, 64, 1, 1\)",
    }.items():
        with pytest.raises(InputError, match=f"w.pth: .*{message}"):
            Network(name, BACKBONES[name], path)
    path = saved(torchvision().models.densenet121(weights=None, num_classes=18),
                 tmp_path / "colour.pth")
    with pytest.raises(
            InputError,
            match=r"no xrv-densenet121. of another shape: features.conv0.weight \(64, 3, 7, 7\)"):
        Network("xrv-densenet121", BACKBONES["xrv-densenet121"], path)


class Evil:
    def __reduce__(self):
        return print, ("this code has run",)


def test_unreadable_files_are_named_and_nothing_in_them_is_run(tmp_path, capsys):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    safetensors.torch.save_file({"a": torch.zeros(100)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name, message in {
            "none.pth": "no such file", "empty.pth": "damaged", "noise.pth": "damaged",
            "cut.safetensors": "damaged or cut short", "list.pth": "no table of tensors",
            "evil.pth": "would run code", "module.pt":
            r"Linear.*`python tools/unpickle\.py .*module.pt"}.items():
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            read_state(tmp_path / name)
    assert "has run" not in capsys.readouterr().out
