"""The SHA-256 that are kept: what is read again, what is trusted, and what damage does."""

import builtins
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_sets import data_set, rows_of

from minidiff import hashes, runs
from minidiff.data.table import read_table
from minidiff.hashes import cached_sha256, hashes_of
from minidiff.root import Reading


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of this test's own, to which its files, though just written, are old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "YOUNG", -1)


@pytest.fixture
def opened(monkeypatch):
    """The files that are read for their SHA-256."""
    found = []
    monkeypatch.setattr(hashes, "sha256", lambda file: found.append(str(file)) or runs.sha256(file))
    return found


@pytest.fixture
def files(tmp_path):
    paths = [str(tmp_path / f"{k}.png") for k in range(20)]
    for k, path in enumerate(paths):
        Path(path).write_bytes(b"%04d" % k)
    return paths


def truth(files):
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def test_a_file_is_read_once(files, opened, tmp_path):
    assert hashes_of(files) == hashes_of(files) == truth(files) and opened == files
    assert (tmp_path / "cache/minidiff/sha256").stat().st_mode & 0o777 == 0o600
    assert hashes_of(files, rehash=True) == truth(files) and opened == 2 * files


@pytest.mark.parametrize("change", ["time", "size", "inode", "path"])
def test_another_file_is_not_taken_for_it(files, opened, change):
    """Of each of the four facts, the three others stay as they were."""
    file, before = files[0], os.stat(files[0])
    cached_sha256(file)
    text = b"longer" if change == "size" else b"edit"
    if change == "inode":
        Path(f"{file}.new").write_bytes(text)
        os.replace(f"{file}.new", file)
    elif change == "path":
        file = str(Path(file).rename(f"{file}.moved"))
    else:
        Path(file).write_bytes(text)
    later = before.st_mtime_ns + (change == "time")
    os.utime(file, ns=(later, later))
    same = [getattr(os.stat(file), f"st_{name}") == getattr(before, f"st_{name}")
            for name in ("mtime_ns", "size", "ino")]
    assert same == [change != "time", change != "size", change != "inode"]
    assert cached_sha256(file) == truth([file])[file] and opened == [files[0], file]


def test_rehash_finds_what_hides_behind_the_same_facts_and_keeps_it(files):
    file, before = files[0], os.stat(files[0])
    then = cached_sha256(file)
    Path(file).write_bytes(b"edit")
    os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert cached_sha256(file) == then != truth([file])[file]  # as git, too, would be deceived
    assert hashes_of([file], rehash=True) == hashes_of([file]) == truth([file])


def test_what_changed_a_moment_ago_is_not_trusted(files, opened, monkeypatch):
    monkeypatch.setattr(hashes, "YOUNG", 2 * 10**9)
    os.utime(files[0], ns=(0, 0))  # an old time on a file that was written just now
    assert hashes_of(files[:2]) == hashes_of(files[:2]) and opened == 2 * files[:2]
    moment = hashes.time.time_ns()
    monkeypatch.setattr(hashes.time, "time_ns", lambda: moment + 3 * 10**9)
    assert hashes_of(files[:2]) == hashes_of(files[:2]) and opened == 3 * files[:2]


def test_a_file_that_changes_while_it_is_read_is_not_kept(files, monkeypatch):
    def read_and_change(file):
        digest = runs.sha256(file)
        Path(file).write_bytes(b"longer")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "sha256", read_and_change)
        cached_sha256(files[0])
    assert cached_sha256(files[0]) == truth(files[:1])[files[0]]


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[: len(data) // 2 + 5], lambda data: b"\xff" * 500,
    lambda data: data.replace(b"\n", b""), lambda data: data.replace(b" ", b"\n"),
    lambda data: bytes(c ^ 1 if k % 107 == 60 else c for k, c in enumerate(data)),
    lambda data: b"\n".join(reversed(data.split(b"\n"))), lambda data: data[1:] + data])
def test_damage_is_passed_over_and_made_good(files, opened, damage, tmp_path):
    hashes_of(files)
    store = tmp_path / "cache/minidiff/sha256"
    store.write_bytes(damage(store.read_bytes()))
    assert hashes_of(files) == truth(files)
    opened.clear()
    assert hashes_of(files) == truth(files) and opened == []


def test_without_a_cache_the_files_are_read(files, opened, tmp_path):
    """A file lies where the folder of the cache should be, or a folder where its file should."""
    (tmp_path / "cache").write_text("")
    assert hashes_of(files) == truth(files)
    (tmp_path / "cache").unlink()
    (tmp_path / "cache/minidiff/sha256").mkdir(parents=True)
    assert hashes_of(files) == truth(files) and opened == 2 * files


def test_the_oldest_are_forgotten_before_it_grows_too_large(files, opened, monkeypatch):
    monkeypatch.setattr(hashes, "LARGEST", 107 * 10)
    for file in files:
        cached_sha256(file)
    opened.clear()
    assert hashes_of(files) == truth(files) and 0 < len(opened) < len(files)
    assert files[-1] not in opened


def test_two_processes_at_once(files, opened, tmp_path):
    """Both add to one file, each in an order of its own: no line is lost or mixed."""
    code = ("import sys; from minidiff import hashes; hashes.YOUNG = -1; hashes.AT_ONCE = 1\n"
            "for _ in range(5): hashes.hashes_of(sys.argv[1:], rehash=True)")
    at_work = [subprocess.Popen([sys.executable, "-c", code, *order])
               for order in (files, files[::-1])]
    assert [process.wait() for process in at_work] == [0, 0]
    lines = [line for line in (tmp_path / "cache/minidiff/sha256").read_bytes().split(b"\n")
             if line]
    assert len(lines) == 2 * 5 * len(files) and len(set(lines)) == len(files)
    assert hashes_of(files) == truth(files) and opened == []


# --- tables


def test_the_second_start_reads_no_image(tmp_path, monkeypatch):
    folder = data_set(tmp_path / "d", rows_of(9, label=["a"] * 9))
    first, seen = read_table(folder), []
    honest = builtins.open

    def count(file, *args, **kwargs):
        seen.append(str(file))
        return honest(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", count)
    again = read_table(folder, split=False)
    assert again.hashes == first.hashes and not [f for f in seen if f.endswith(".png")]
    read_table(folder, Reading(rehash=True), split=False)
    assert len([f for f in seen if f.endswith(".png")]) == 9


def test_an_image_that_changed_in_place_changes_the_fingerprint(tmp_path):
    folder = data_set(tmp_path / "d", rows_of(9, label=["a"] * 9))
    first = read_table(folder, split=False)
    victim, other = (Path(row["file"]) for row in first.rows[:2])
    data = victim.read_bytes()
    victim.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
    assert read_table(folder, split=False).fingerprint != first.fingerprint
    victim.write_bytes(data)
    assert read_table(folder, split=False).fingerprint == first.fingerprint
    assert other.exists()


@dataclass(frozen=True)
class Knobs(Reading):
    steps: int = 1


def test_a_run_does_not_record_rehash_and_resumes_with_and_without(tmp_path):
    for rehash in (False, True, False):
        runs.open_run(tmp_path / "r", Knobs(rehash=rehash), "toy")
        assert "rehash" not in json.loads((tmp_path / "r/config.json").read_text())
