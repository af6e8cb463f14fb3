"""One process at a time in a run folder, and nothing left of one that was killed."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from minidiff import config, lock
from minidiff.errors import InputError

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from minidiff.lock import alone
with alone(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is at work in tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@dataclass(frozen=True)
class Config:
    out: str = ""  # run folder


@dataclass(frozen=True)
class ReadOnly(Config):
    writes: ClassVar[str] = ""


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    said = rf"run: process {holder.pid} on .* has been at work here since 20.*; wait until it"
    with pytest.raises(InputError, match=said), lock.alone(tmp_path / "run"):
        pass
    assert (tmp_path / "run/.lock").exists()


def test_what_was_killed_does_not_block(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == holder.pid
    with lock.alone(tmp_path / "run"):
        assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_command_that_wrote_nothing_leaves_nothing(tmp_path):
    with lock.alone(tmp_path / "runs/x/vae"):
        pass
    assert not any(tmp_path.iterdir())
    with lock.alone(tmp_path / "runs/x/vae"):
        (tmp_path / "runs/x/vae/model").touch()
    assert [path.name for path in (tmp_path / "runs/x/vae").iterdir()] == ["model"]


@pytest.mark.parametrize("change, free", [
    ({}, False), ({"host": "another"}, False), ({"boot": "an earlier one"}, True),
    ({"pid": 2**22 + 1}, True)])  # no process has this number
def test_on_a_disk_without_locks_the_process_is_looked_for(change, free, holder, tmp_path,
                                                           monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "run/.lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused = pytest.raises(InputError, match=f"if it has ended, delete {path}")
    with nullcontext() if free else refused, lock.alone(tmp_path / "run"):
        pass


def test_every_command_that_writes_a_folder_is_alone_in_it(holder, tmp_path, capsys, monkeypatch):
    out, done = str(tmp_path / "run"), []
    verbs = {"write": (Config, done.append), "read": (ReadOnly, done.append)}
    config.main(verbs, default="write", doc="", argv=["read", "--out", out])
    monkeypatch.setenv("RANK", "")  # left over: this is no rank of torchrun's
    with pytest.raises(SystemExit) as stop:
        config.main(verbs, default="write", doc="", argv=["write", "--out", out])
    assert stop.value.code == 2 and f"process {holder.pid} on" in capsys.readouterr().err
    for name, value in zip(("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "12ab"):
        monkeypatch.setenv(name, value)
    config.main(verbs, default="write", doc="", argv=["write", "--out", out])  # rank 0 has the lock
    assert len(done) == 2


def test_a_folder_whose_name_is_no_utf8_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be UTF-8"), lock.alone(
            tmp_path / os.fsdecode(b"\xe9") / "vae"):
        pass
    assert not any(tmp_path.iterdir())
