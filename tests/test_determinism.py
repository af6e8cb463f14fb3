"""Two threads, ten pairs of trainings, one of each beside a busy neighbour: the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minidiff.data import phantom
from minidiff.runs import sha256

ROOT = Path(__file__).parents[1]
PAIRS, STEPS = 10, 30
TRAIN = """
import sys
import minidiff.threads
import train
data, out = sys.argv[1:3]
train.draw_pictures = train.draw_losses = lambda *_, **__: None  # they change no weights
for seed in range(int(sys.argv[3])):
    how = dict(data=(data,), steps=int(sys.argv[4]), seed=seed, save_every=1000)
    train.train_vae(train.VAEConfig(**how, batch=2, out=f"{out}/{seed}/vae"))
    train.train_diffusion(train.DiffusionConfig(**how, batch=4, vae=f"{out}/{seed}/vae",
                                                snapshots=0, out=f"{out}/{seed}/diffusion"))
"""


@pytest.mark.slow
def test_ten_pairs_of_trainings_with_two_threads_write_the_same_bytes(tmp_path):
    data = phantom.write(tmp_path / "data", n=30)
    env = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    for name in ("one", "other"):  # the other one beside a neighbour that never rests
        busy = subprocess.Popen([sys.executable, "-c",
                                 "while True: pass"]) if name == "other" else None
        try:
            subprocess.run([sys.executable, "-c", TRAIN, str(data), str(tmp_path / name),
                            str(PAIRS), str(STEPS)],
                           env=env, cwd=ROOT, check=True, capture_output=True)
        finally:
            if busy:
                busy.kill()
                busy.wait()
    for kind in ("vae/vae", "diffusion/model"):
        one, other = (sorted((tmp_path / name).glob(f"*/{kind}.safetensors"))
                      for name in ("one", "other"))
        assert len(one) == len(other) == PAIRS
        assert [sha256(path) for path in one] == [sha256(path) for path in other], kind
