"""inception: parity with pytorch-fid, torch-fidelity and clean-fid on random weights in the true
shapes; the download.
"""

import hashlib
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision_peer import torchvision

from minidiff import download as downloads
from minidiff.data import images
from minidiff.errors import InputError
from minidiff.evaluation.features import backbones
from minidiff.evaluation.features import build as extractors
from minidiff.evaluation.features.backbones import Network
from minidiff.evaluation.features.inception import (
    INCEPTIONS,
    SHA256,
    URL,
    Inception,
    download,
    pillow_bicubic,
    tensorflow_bilinear,
)

FIDELITY = "pip install --no-deps torch-fidelity"


def random_state(seed=1):
    """Every tensor random, norms included, and the signal of size 1 to the last block."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {k: x.shape for k, x in Inception().state_dict().items()
                  if not k.endswith("num_batches_tracked")}
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=g) + 0.5
        elif len(shape) == 1:
            state[name] = 0.3 * torch.randn(shape, generator=g)
        else:
            state[name] = torch.randn(shape, generator=g) * (2 / shape[1:].numel()) ** 0.5
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same random weights as .pth and as .safetensors."""
    folder, state = tmp_path_factory.mktemp("inception"), random_state()
    torch.save(state, folder / "random.pth")
    safetensors.torch.save_file(state, folder / "random.safetensors")
    return folder / "random.pth", folder / "random.safetensors"


@pytest.fixture
def inception(files, monkeypatch):
    """name → extractor, in batches of 2, which are faster for a few images than a batch of 32
    filled up.
    """
    monkeypatch.setattr(backbones, "BATCH", 2)
    return lambda name: Network(name, INCEPTIONS[name], files[0])


def pictures(n=2, height=64, width=64, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def pytorch_fid(file, monkeypatch):
    torchvision()  # mended first where plain import fails
    peer = pytest.importorskip("pytorch_fid.inception", reason="pip install --no-deps pytorch-fid")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_,
                        **__: torch.load(file, weights_only=True))
    return peer


def test_names_and_shapes_are_those_of_the_public_file(files, monkeypatch):
    peer = pytorch_fid(files[0], monkeypatch).fid_inception_v3().state_dict()
    with torch.device("meta"):
        ours = {k: tuple(x.shape) for k, x in Inception().state_dict().items()}
    assert ours == {k: tuple(x.shape) for k, x in peer.items()} and ours["fc.weight"] == (1008,
                                                                                          2048)


@pytest.mark.parametrize("shape", [(64, 64), (310, 402)], ids=str)
def test_parity_with_pytorch_fid(inception, files, monkeypatch, shape):
    peer, x = pytorch_fid(files[0], monkeypatch).InceptionV3([3]).eval(), pictures(2, *shape)
    with torch.no_grad():
        theirs = peer(x.float() / 255)[0][:, :, 0, 0]
    ours = inception("inception-pytorch-fid")(x)
    assert ours.shape == (2, 2048) and ours.dtype == torch.float32 and theirs.std(0).mean() > 0.01
    assert (ours - theirs).abs().max() <= 1e-4


def test_parity_with_pytorch_fid_from_folder_to_features(inception, files, tmp_path, monkeypatch):
    """Grey and colour, PNG and JPEG, of several sizes: the peer takes these one at a time only."""
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]
    for path, size, mode in zip(paths, ((64, 64), (300, 420), (512, 512)), ("L", "RGB", "L")):
        image = pictures(1, *size)[0].numpy().transpose(1, 2, 0)
        Image.fromarray(image if mode == "RGB" else image[:, :, 0]).save(path)
    model = pytorch_fid(files[0], monkeypatch).InceptionV3([3]).eval()
    score = pytest.importorskip("pytorch_fid.fid_score", reason="pip install --no-deps pytorch-fid")
    theirs = score.get_activations(paths, model, batch_size=1, num_workers=0)
    extractor = inception("inception-pytorch-fid")
    ours = torch.cat([extractor(torch.tensor(images.read(path)[None])) for path in paths])
    assert np.abs(ours.numpy() - theirs).max() <= 1e-4


def test_parity_with_torch_fidelity(inception, files):
    torchvision()
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason=FIDELITY)
    peer = module.FeatureExtractorInceptionV3("peer", ["2048"],
                                              feature_extractor_weights_path=str(files[0]))
    x = pictures(2, 72, 64)
    assert (inception("inception-torch-fidelity")(x) - peer(x)[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", [(32, 32), (299, 299), (512, 330)], ids=str)
def test_resizers_are_the_peers_bit_for_bit(shape):
    x = pictures(2, *shape).float()
    torchvision()
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow", reason=FIDELITY)
    assert torch.equal(tensorflow_bilinear(x, 299),
                       theirs.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299),
                                                                        align_corners=False))
    theirs = pytest.importorskip("cleanfid.resize",
                                 reason="pip install --no-deps clean-fid").build_resizer("clean")
    resized = pillow_bicubic(x, 299)
    for image, own in zip(x.byte().numpy(), resized.numpy()):
        assert np.array_equal(theirs(image.transpose(1, 2, 0)).transpose(2, 0, 1), own)
    # not rounded to grey values
    assert resized.frac().abs().max() > 0 or shape == (299, 299)


def test_the_resizers_differ_and_so_do_their_names_and_identities(inception):
    x = pictures(2, 512, 512)
    found = [inception(name) for name in INCEPTIONS]
    features = [extractor(x) for extractor in found]
    assert [e.name for e in found] == list(INCEPTIONS) and len({e.identity for e in found}) == 3
    spread = features[0].std(0).mean()
    assert all((a - b).abs().mean() > 0.1 * spread for a, b in zip(features, features[1:]))


def test_grey_is_three_equal_channels_and_pth_is_safetensors(inception, files):
    x, name = pictures(2)[:, :1], "inception-clean-fid"
    extractor, other = inception(name), Network(name, INCEPTIONS[name], files[1])
    assert extractor.identity == other.identity and extractor.source["sha256"] != other.source[
        "sha256"]
    features = extractor(x.expand(-1, 3, -1, -1))
    assert torch.equal(features, extractor(x.repeat(1, 3, 1, 1))) and torch.equal(features,
                                                                                  other(x))
    assert extractor(x[:0]).shape == (0, 2048)


@pytest.mark.slow
def test_features_do_not_depend_on_the_size_of_the_batch(files):
    x, extractor = pictures(33), Network("inception-clean-fid", INCEPTIONS["inception-clean-fid"],
                                      files[0])
    whole = extractor(x)
    assert torch.equal(extractor(x.flip(0)), whole.flip(0))
    assert torch.equal(extractor(x[:1]), whole[:1]) and torch.equal(extractor(x[3:10]), whole[3:10])
    with torch.no_grad():  # what filling up a batch avoids, and how much it is
        alone = extractor.net.pooled(
            extractor.prepare(x[:1]).contiguous(memory_format=torch.channels_last))
    assert (alone - whole[:1]).abs().max() <= 1e-4


FAULTS = {
    "fc.weight": (lambda s: s | {"fc.weight": torch.zeros(1000, 2048)},
                  r"fc.weight \(1000, 2048\), it has \(1008, 2048\)"),
    "missing": (lambda s: {k: x for k, x in s.items() if "7c" not in k},
                r"missing: Mixed_7c.branch1x1.conv.weight.* more"), "unexpected":
    (lambda s: s | {"AuxLogits.fc.bias": torch.zeros(3)}, "unexpected: AuxLogits.fc.bias"),
    "half": (lambda s: {k: x.bfloat16() for k, x in s.items()}, "not float32: .*bfloat16"),
    "nan": (lambda s: s | {"fc.bias": torch.full((1008,), torch.nan)}, "not finite: fc.bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_named(files, tmp_path, fault):
    change, message = FAULTS[fault]
    safetensors.torch.save_file(change(safetensors.torch.load_file(files[1])),
                                tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=f"bad.safetensors: no inception-clean-fid.*{message}"):
        Network("inception-clean-fid", INCEPTIONS["inception-clean-fid"],
                tmp_path / "bad.safetensors")


def test_the_hash_is_printed_recorded_and_can_be_pinned(files, capsys):
    name, digest = "inception-clean-fid", hashlib.sha256(files[0].read_bytes()).hexdigest()
    source = Network(name, INCEPTIONS[name], files[0]).source
    assert f"SHA-256 {digest}, not the public file" in capsys.readouterr().out
    assert source["sha256"] == digest and source["public"] is False and source[
        "resize"] == "pillow_bicubic"
    Network(name, INCEPTIONS[name], files[0], pin=digest.upper())
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=f"its SHA-256 is {digest}, not {'0' * 64}"):
        Network(name, INCEPTIONS[name], files[0], pin="0" * 64)


@pytest.fixture
def server():
    """A web server on loopback that sends `server.body`, and counts how often it was asked."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(self.server.body) + self.server.lacks))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.status, server.asked, server.lacks = b"weights " * 300_000, 200, 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}/inception.pth"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_checks_the_hash_and_fetches_once(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digest = hashlib.sha256(server.body).hexdigest()
    fetch = partial(download, server.url, digest=digest, size=len(server.body))
    path = fetch()
    assert path.read_bytes() == server.body and fetch() == path and server.asked == 1
    path.write_bytes(b"cut")
    assert fetch().read_bytes() == server.body and server.asked == 2
    assert "is damaged" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fault,message", {
    "other": "2400000 bytes with SHA-256", "large": "2400000 bytes or more with SHA-256",
    "cut": "2400000 bytes with|cannot", "404": "cannot be fetched .*Not Found",
    "offline": "cannot be fetched .*refused.*copy the file here by hand"}.items())
def test_download_keeps_nothing_that_is_wrong(server, tmp_path, monkeypatch, fault, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    size, url = len(server.body) - (fault == "large"), server.url
    if fault == "404":
        server.status = 404
    if fault == "cut":
        server.lacks = 1000  # and the connection ends, as HTTP/1.0's do
    if fault == "offline":
        server.shutdown()
        server.server_close()
    with pytest.raises(InputError,
                       match=message.replace("2400000", str(size + (fault == "large")))):
        download(url, digest="0" * 64, size=size)
    assert not downloads.cache().exists()


def test_auto_and_a_mirror_fetch_when_told_to(server, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server.body = files[0].read_bytes()
    digest = hashlib.sha256(server.body).hexdigest()
    spec = f"inception-clean-fid={server.url}"
    # a mirror is held to the hash
    with pytest.raises(InputError, match=f"the public file has 95628359 and {SHA256}"):
        extractors.build([spec], train=pictures())
    known = partial(download, digest=digest, size=len(server.body))
    monkeypatch.setattr(extractors, "download", known)
    for words in (spec, f"{spec}@{digest}"):
        extractor, = extractors.build([words], train=pictures())
        assert extractor.source["sha256"] == digest
    monkeypatch.setattr(extractors, "download",
                        lambda **given: known(**{"url": server.url, **given}))
    auto, = extractors.build(["inception-clean-fid=auto"], train=pictures())
    assert auto.identity == extractor.identity
    assert server.asked == 2


def test_the_public_file_is_named_by_its_hash(monkeypatch, tmp_path):
    assert URL.endswith(f"-{SHA256[:8]}.pth") and len(SHA256) == 64
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert downloads.cache() == tmp_path / "minidiff"
