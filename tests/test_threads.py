"""Threads: how they wait is said before torch is loaded, how many there are is chosen once, and the
user goes first.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minidiff import runs, threads

ROOT = Path(__file__).parents[1]
STAT = """cpu  900 0 90 9000 0 0 0 0 0 0
cpu0 {0} 0 10 1000 5 0 0 0 0 0
cpu1 {1} 2 10 1000 5 1 1 1 0 0
cpu2 {2} 0 10 1000 5 0 0 0 0 0
intr 12345
"""


@pytest.fixture
def free(monkeypatch):
    """As if the user had set nothing; torch's threads are put back."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield monkeypatch
    torch.set_num_threads(before)


def shown(command: list[str], **env: str) -> str:
    """What libgomp says of its settings when torch loads it."""
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env={**plain, "OMP_DISPLAY_ENV": "VERBOSE", **env})
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("this torch does not use libgomp")
    return done.stderr


@pytest.mark.parametrize("command", [["train.py", "vae"], ["classify.py", "study"],
                                     ["-m", "minidiff.diffusion.public", "show"]],
                         ids=lambda c: c[-2])
def test_every_command_tells_libgomp_how_long_to_spin(command):
    assert "GOMP_SPINCOUNT = '1000'" in shown([*command, "--dry-run"])


def test_what_the_user_has_set_stays():
    assert "GOMP_SPINCOUNT = '77'" in shown(["train.py", "vae", "--dry-run"], GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '1000'" not in shown(["train.py", "vae", "--dry-run"],
                                                  OMP_WAIT_POLICY="ACTIVE")


def test_all_scripts_import_threads_first():
    for script in ("train", "sample", "classify", "evaluate"):
        ours = [line for line in (ROOT / f"{script}.py").read_text().splitlines()
                if line.startswith(("import minidiff", "from minidiff", "import torch",
                                    "import numpy"))]
        assert ours[0].startswith("import minidiff.threads"), script


def test_work_is_counted_on_the_cores_that_this_process_may_use():
    tick = os.sysconf("SC_CLK_TCK")
    assert threads.worked(STAT.format(100, 200, 300), {0}) == pytest.approx(110 / tick)
    assert threads.worked(STAT.format(100, 200, 300),
                          {0, 1}) == pytest.approx((110 + 200 + 2 + 10 + 3) / tick)


@pytest.mark.parametrize("busy,left", [((0, 0), 2), ((1.0, 0), 1), ((0.7, 0.05), 1),
                                       ((0.3, 0.1), 2), ((1.0, 1.0), 1)])
def test_cores_that_others_keep_busy_are_left_to_them(tmp_path, monkeypatch, busy, left):
    stat, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK") * threads.LOOK
    stat.write_text(STAT.format(100, 100, 0))
    monkeypatch.setattr(threads, "STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(threads.time, "sleep", lambda _: stat.write_text(
        STAT.format(*(100 + round(b * ticks) for b in busy), 10**6)))  # cpu2 is not ours
    assert threads.free_cores() == left


def test_the_number_is_the_users_or_the_one_given(free):
    assert threads.use(2) == 2 and threads.use(1) == 1
    free.setenv("OMP_NUM_THREADS", "1")
    assert threads.use(2) == 1


@dataclass(frozen=True)
class Knobs:
    out: str = ""


def test_a_resumed_run_computes_with_as_many_threads_as_it_began(tmp_path, free):
    torch.set_num_threads(2)
    runs.open_run(tmp_path / "run", Knobs(), "test")
    torch.set_num_threads(1)
    runs.open_run(tmp_path / "run", Knobs(), "test")
    assert torch.get_num_threads() == 2
    assert [s["threads"] for s in runs.read_json(tmp_path / "run" / "run.json")["sessions"]] == [2,
                                                                                                 2]
