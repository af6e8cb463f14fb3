"""tools/unpickle.py: tensors taken out of pickled models without running anything."""

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
from test_backbones import Evil, xrv_net

from minidiff.errors import InputError
from minidiff.evaluation.features.backbones import BACKBONES, CONVERT, Network

sys.path.insert(0, str(ROOT / "tools"))
from unpickle import DTYPES, convert, main, read_pickled  # noqa: E402


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
        Network("xrv-densenet121", BACKBONES["xrv-densenet121"], tmp_path / "model.pt")
    state, out = peer.state_dict(), tmp_path / "model.safetensors"
    assert convert(tmp_path / "model.pt", out) == len(state)
    found = safetensors.torch.load_file(out)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    Network("xrv-densenet121", BACKBONES["xrv-densenet121"], out)


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
    assert main(["evil.pt", "out.safetensors"]) == 0
    said = capfd.readouterr()
    assert "2 tensors" in said.out and "has run" not in said.out + said.err and not (
        tmp_path / "was-here").exists()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["weight"],
                       module.weight)
    assert hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest() in said.out
    assert main(["evil.pt", "out.safetensors"]) == 2 and "exists already" in capfd.readouterr().err


def test_the_command_as_written_in_the_messages():
    done = subprocess.run([sys.executable, *CONVERT.split()[1:]], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and f"usage: {CONVERT} FILE.pt OUT.safetensors" in done.stderr


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
