"""extractors: what specs build, what is refused, and tensors taken out of pickled models without
running anything.
"""

import contextlib
import hashlib
import subprocess
import sys
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from test_backbones import Evil, saved, torchvision_net, xrv_net

from minidiff.classification.predictor import Predictor
from minidiff.errors import InputError
from minidiff.evaluation.features import backbones
from minidiff.evaluation.features.backbones import BACKBONES, load
from minidiff.evaluation.features.build import (
    EXTRACTORS,
    NETWORKS,
    build,
    convert,
    describe,
    main,
)
from minidiff.evaluation.features.pickled import DTYPES, read_pickled
from minidiff.variables import Category

TRAIN = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def judge():
    return Predictor([Category("label", ("a", "b"))], width=8, size=32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return saved(torchvision_net("resnet18"), tmp_path_factory.mktemp("weights") / "resnet18.pth")


def names(*specs, **given):
    return [e.name for e in build(specs, train=TRAIN, **given)]


def test_defaults_and_order(judge, weights):
    assert names() == ["pixels-pca64"] and names(judge=judge) == ["pixels-pca64", "classifier"]
    assert names(f"resnet18={weights}", "pixels", judge=judge) == ["resnet18", "pixels-pca64"]


def test_every_extractor_says_what_it_is(judge, weights, monkeypatch):
    monkeypatch.setattr(backbones, "BATCH", 2)
    pin = hashlib.sha256(weights.read_bytes()).hexdigest()
    for extractor in build(["pixels", "classifier", f"resnet18={weights}@{pin}"], train=TRAIN,
                           judge=judge):
        said = describe(extractor)
        assert said["name"] == extractor.name and len(said["identity"]) == 64
        assert extractor(TRAIN[:2]).shape[0] == 2 and extractor(TRAIN[:2]).dtype == torch.float32
    assert said["sha256"] == pin and said["file"] == "resnet18.pth" and said[
        "side"] == 224 and said["public"] is False


REFUSED = {
    "pixel": "'pixel' is not known, nearest: pixels; allowed are pixels, classifier, vae and, as "
    "NAME=FILE, resnet18", "classifier": "classifier needs a classifier run",
    "vae": "vae needs a VAE run", "pixels=x": "pixels takes no file", "resnet18": "resnet18 needs "
    "its weights, as resnet18=FILE:", "resnet18=auto": "only Inception's file is downloaded",
    "resnet18=/no/such": "there is no file /no/such",
    "inception-clean-fid": "inception-clean-fid=FILE, auto: pt_inception",
    "pixels pixels": "pixels is given twice",
    "resnet18={weights}@" + "0" * 64: "its SHA-256 is .*, not 0000",
}


@pytest.mark.parametrize("specs", REFUSED)
def test_specs_are_refused_with_what_is_allowed(specs, weights):
    with pytest.raises(InputError, match=REFUSED[specs]):
        names(*specs.format(weights=weights).split())


def test_the_generators_own_vae_is_never_the_only_one():
    vae = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="own VAE cannot be the only"):
        names("vae", vae=vae)
    assert names("vae", "pixels", vae=vae) == ["vae", "pixels-pca64"]


def test_all_specs_are_checked_before_the_first_is_worked_on(monkeypatch):
    monkeypatch.setattr("minidiff.evaluation.features.build.PixelPCA", None)
    with pytest.raises(InputError, match="not known"):
        names("pixels", "nonsense")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_convert_takes_the_tensors_out_of_a_pickled_model(tmp_path, old):
    peer = xrv_net()
    # what TorchXRayVision's carry besides
    peer.pathologies, peer.op_threshs = ["Atelectasis", ""], None
    peer.register_buffer("passing", torch.zeros(2), persistent=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(peer, tmp_path / "model.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError, match="pickled object"):
        load("xrv-densenet121", BACKBONES["xrv-densenet121"], tmp_path / "model.pt")
    state, out = peer.state_dict(), tmp_path / "model.safetensors"
    assert convert(tmp_path / "model.pt", out) == len(state)
    found = safetensors.torch.load_file(out)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    load("xrv-densenet121", BACKBONES["xrv-densenet121"], out)


class System:
    def __reduce__(self):
        import os
        return os.system, ("echo this code has run; touch was-here",)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_convert_runs_nothing_and_needs_no_package_of_the_model(tmp_path, monkeypatch, capfd, old):
    """Calls of print and os.system in a model, whose class is of a package that is not
    installed.
    """
    module = torch.nn.Linear(2, 3)
    module.extra = [Evil(), System()]
    torch.save(module, tmp_path / "evil.pt", _use_new_zipfile_serialization=not old)
    data = (tmp_path / "evil.pt").read_bytes()
    assert data.count(b"ctorch.nn.modules.linear\n") == 1
    with zipfile.ZipFile(tmp_path / "evil.pt") if not old else contextlib.nullcontext() as archive:
        parts = {n: archive.read(n) for n in archive.namelist()} if archive else {}
    if old:
        (tmp_path / "evil.pt").write_bytes(data.replace(b"ctorch.nn.modules.linear\n",
                                                        b"cnot.installed.anywhere\n"))
    else:
        with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part.replace(b"ctorch.nn.modules.linear\n",
                                                    b"cnot.installed.anywhere\n"))
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "evil.pt", "out.safetensors"]) == 0
    said = capfd.readouterr()
    assert "2 tensors" in said.out and "has run" not in said.out + said.err and not (
        tmp_path / "was-here").exists()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["weight"],
                       module.weight)
    assert hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest() in said.out
    assert main(["convert", "evil.pt",
                 "out.safetensors"]) == 2 and "exists already" in capfd.readouterr().err


def test_the_command_as_written_in_the_messages():
    done = subprocess.run([sys.executable, *backbones.CONVERT.split()[1:]], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and f"usage: {backbones.CONVERT} FILE.pt OUT.safetensors" in done.stderr


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_convert_reads_every_kind_of_tensor_as_pytorch_does(tmp_path, old):
    whole = torch.arange(24.0)
    state = {"view": whole.view(4, 6)[1:, ::2], "turned": whole.view(4, 6).T,
             "empty": torch.zeros(0, 3), "scalar": torch.tensor(3),
             **{str(d): torch.tensor([0, 1]).to(d) for d in DTYPES.values()}}
    torch.save({"state_dict": state, "step": 3}, tmp_path / "w.pt",
               _use_new_zipfile_serialization=not old)
    found = read_pickled(tmp_path / "w.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], x) and found[k].dtype == x.dtype for k, x in state.items())


def test_convert_refuses_what_is_no_model(tmp_path):
    torch.save({"a": 1, "b": System()}, tmp_path / "numbers.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-10])
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    for name, message in {"numbers.pt": "no tensors by name", "noise.pt": "damaged, or no pickled",
                          "bomb.pt": "compressed", "none.pt": "no such file",
                          "cut.pt": "3990 bytes where 4000 should be"}.items():
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="out.pt has not the ending"):
        convert(tmp_path / "cut.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_table_in_the_docs_is_that_of_the_code():
    text = (ROOT / "docs" / "extractors.md").read_text()
    for name in EXTRACTORS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        if name in NETWORKS:
            network = NETWORKS[name]
            assert f"| {network.input.side} |" in row and f"| {network.d} |" in row
            assert f"`{network.input.resize.__name__}`" in row and all(f"`{k[:8]}" in row
                                                                       for k in network.known)
    assert backbones.CONVERT in text
