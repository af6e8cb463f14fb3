"""What several test files share: the way to the scripts, one thread, and a tiny run of the first stages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small tensors; and several threads would slow the subprocesses that some tests start


@pytest.fixture(scope="session")
def cxr() -> Path:
    """Real chest X-rays, where this machine has them."""
    folder = Path(os.environ.get("MINIDIFF_CXR", ROOT.parent / "shared" / "cxr"))
    if not (folder / "metadata.csv").exists():
        pytest.skip(f"no real chest X-rays at {folder}; set MINIDIFF_CXR to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with data/ (72 phantoms of 32 px), vae/ and diffusion/, trained for a few steps."""
    import train
    from minidiff.data import phantom

    root = tmp_path_factory.mktemp("tiny")
    phantom.write(root / "data", n=72, size=32)
    train.train_vae(train.VAEConfig(data=(str(root / "data"),), out=str(root / "vae"), size=32, steps=12, batch=4))
    train.train_diffusion(train.DiffusionConfig(data=(str(root / "data"),), vae=str(root / "vae"), views=2, steps=6, batch=6,
                                                save_every=3, snapshots=0, log_every=2, out=str(root / "diffusion")))
    return root


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A finished demo: that of MINIDIFF_DEMO, or one made here (about 8 minutes)."""
    if "MINIDIFF_DEMO" in os.environ:
        return Path(os.environ["MINIDIFF_DEMO"]).absolute()
    folder = tmp_path_factory.mktemp("demo")
    for script in ("train", "sample", "classify", "evaluate"):
        subprocess.run([sys.executable, str(ROOT / f"{script}.py")], cwd=folder, check=True,
                       env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder / "runs" / "demo"


@pytest.fixture(scope="session")
def judge(demo):
    """The demo's classifier, trained on real phantoms alone."""
    from minidiff.classification.predictor import Predictor
    return Predictor.load(demo / "classifier" / "judge")
