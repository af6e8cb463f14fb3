"""What several test files share: one machine like another, the way to the scripts, and a tiny run
of the first stages.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Before torch and numpy are imported, here and in every process that a test starts: one thread, as
# each core has a worker of its own, and sums of floats depend on the number of threads.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
                                "1"))

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

ROOT = Path(__file__).parents[1]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # an environment that hides AVX-512
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    """Hide the GPUs unless `-m gpu` asks for them; let what tests start know Ctrl-C, though a
    shell's `&` ignores it.
    """
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # ignored here as before, but not in a process that is started here
        signal.signal(signal.SIGINT, lambda *_: None)
    import torch
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_cache_left():
    """--cache of a command that runs in this process is none of the next test's."""
    yield
    os.environ.pop("MINIDIFF_CACHE", None)


@pytest.fixture(scope="session")
def cxr() -> Path:
    """Real chest X-rays, where this machine has them."""
    folder = Path(os.environ.get("MINIDIFF_CXR", ROOT.parent / "shared" / "cxr"))
    if not (folder / "metadata.csv").exists():
        pytest.skip(f"no real chest X-rays at {folder}; set MINIDIFF_CXR to a folder that holds "
                    "them")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) → a folder that `make` has filled for all workers: the first to ask makes
    it, the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def get(name: str, make) -> Path:
        folder, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed half-way
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def tiny(once) -> Path:
    """A folder with data/ (72 phantoms of 32 px), vae/ and diffusion/, trained for a few steps. To
    be read only.
    """
    def make(root: Path) -> None:
        import train
        from minidiff.data import phantom

        data = (str(root / "data"),)
        phantom.write(root / "data", n=72, size=32)
        train.train_vae(train.VAEConfig(data=data, out=str(root / "vae"), size=32, steps=12,
                                        batch=4))
        train.train_diffusion(train.DiffusionConfig(data=data, vae=str(root / "vae"), views=2,
                                                    steps=6, batch=6, log_every=2, save_every=3,
                                                    snapshots=0, out=str(root / "diffusion")))

    return once("tiny", make)


@pytest.fixture
def no_pictures(monkeypatch):
    """Train without the pictures on the way: most of the time of a run this short, where they are
    not what is tested.
    """
    import train
    monkeypatch.setattr(train, "draw_pictures", lambda *_, **__: None)


@pytest.fixture(scope="session")
def demo(once) -> Path:
    """A finished demo: that of MINIDIFF_DEMO, or one made here (about 8 minutes)."""
    if "MINIDIFF_DEMO" in os.environ:
        return Path(os.environ["MINIDIFF_DEMO"]).absolute()

    def make(folder: Path) -> None:
        for script in ("train", "sample", "classify", "evaluate"):
            subprocess.run([sys.executable, str(ROOT / f"{script}.py")], cwd=folder, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})

    return once("demo", make) / "runs" / "demo"


@pytest.fixture(scope="session")
def judge(demo):
    """The demo's classifier, trained on real phantoms alone."""
    from minidiff.classification.predictor import Predictor
    return Predictor.load(demo / "classifier" / "judge")
