import errno
import json
import os
import re
import shlex
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

import train
from minidiff import config, runs
from minidiff.errors import InputError


@dataclass(frozen=True)
class Knobs:
    steps: int = 1
    names: tuple[str, ...] = ("a",)
    device: str = "cpu"


def test_the_same_command_reopens_and_every_session_is_recorded(tmp_path):
    for _ in range(2):
        run = runs.open_run(tmp_path / "r", Knobs(), "toy", data="f00")
    record = json.loads((run / "run.json").read_text())
    assert len(record["sessions"]) == 2 and record["facts"] == {"data": "f00"}
    assert {"command", "minidiff", "torch", "machine", "commit"} <= set(record["sessions"][0])


def test_a_machine_without_git_records_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.provenance()["commit"] == ""


@pytest.mark.parametrize("cfg, kind, facts, said", [
    (Knobs(steps=2), "toy", {"data": "f00"}, "steps: 1 there, 2 now"),
    (Knobs(), "vae", {"data": "f00"}, "kind: 'toy' there, 'vae' now"),
    (Knobs(), "toy", {"data": "bad"}, "data: 'f00' there, 'bad' now"),
])
def test_another_run_is_refused_and_left_alone(tmp_path, cfg, kind, facts, said):
    run = runs.open_run(tmp_path / "r", Knobs(), "toy", data="f00")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(InputError, match=said):
        runs.open_run(run, cfg, kind, **facts)
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}


def test_free_knobs_may_change(tmp_path):
    runs.open_run(tmp_path / "r", Knobs(), "toy", free=("device",))
    run = runs.open_run(tmp_path / "r", Knobs(device="cuda"), "toy", free=("device",))
    assert len(json.loads((run / "run.json").read_text())["sessions"]) == 2


def test_a_path_may_be_spelled_differently_and_a_run_may_move(tmp_path):
    runs.open_run(tmp_path / "r", Knobs(names=("runs/x/", "b")), "toy")
    (tmp_path / "r").rename(tmp_path / "s")
    run = runs.open_run(tmp_path / "s", Knobs(names=("./runs/x", "b")), "toy")
    assert len(json.loads((run / "run.json").read_text())["sessions"]) == 2


def test_a_damaged_json_is_named(tmp_path):
    run = runs.open_run(tmp_path / "r", Knobs(), "toy")
    (run / "run.json").write_text('{"kind"')
    with pytest.raises(InputError, match="run.json is damaged"):
        runs.open_run(run, Knobs(), "toy")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(InputError, match="is no toy run"):
        runs.open_run(tmp_path, Knobs(), "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    runs.write_atomic(tmp_path / "f", "old")
    monkeypatch.setattr(runs.os, "replace",
                        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        runs.write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_log_survives_a_torn_line_and_rewinds(tmp_path):
    log = tmp_path / "log.jsonl"
    for step in range(1, 6):
        runs.append_log(log, step=step, loss=0.1 * step)
    with open(log, "a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in runs.read_log(log)] == [1, 2, 3, 4, 5]
    before = log.read_text().splitlines()[:3]
    runs.rewind_log(log, 3)
    assert log.read_text().splitlines() == before
    assert runs.read_log(tmp_path / "none") == []


def test_a_run_killed_before_its_config_was_written_starts_again(tmp_path):
    run = runs.open_run(tmp_path / "r", Knobs(), "toy")
    (run / "config.json").unlink()
    (run / ".config.json.tmp-1").write_text("{")
    assert runs.open_run(tmp_path / "r", Knobs(), "toy") == run


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path):
    runs.save_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(2)})
    runs.write_json(tmp_path / "w.json", {})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "w.json").stat().st_mode


def test_other_knobs_are_refused_before_any_work(tmp_path):
    runs.open_run(tmp_path / "r", Knobs(), "vae")
    with pytest.raises(
            InputError,
            match=r"steps: 1 there, 9 now\); give another --root or --out, or go on from it"):
        runs.refuse_other(tmp_path / "r", Knobs(steps=9), "vae")
    assert runs.refuse_other(tmp_path / "r", Knobs(device="cuda"), "vae",
                             ("device",))["device"] == "cuda"
    assert runs.refuse_other(tmp_path / "new", Knobs(),
                             "vae")["kind"] == "vae" and not (tmp_path / "new").exists()


# --- what lies in the place of a file


@pytest.mark.parametrize(("begins", "says"), [
    (b"<!DOCTYPE html><html>", "web page"), (b"\xef\xbb\xbf\r\n  <HTML lang=de>", "web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied", "web page"),
    (b"<!-- saved from url -->", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    (b"/annex/objects/MD5E-s123--abc.png\n", "git annex get"),
    (b"../../.git/annex/objects/zz/xx/MD5E-s123--abc", "git annex get"),
    (bytes(128) + b"DICM\2\0\0\0UL", "minidiff.data.dicom import"),
    (b"GIF89a@", "a GIF"), (b"%PDF-1.4", "a PDF"), (bytes(300), "zero bytes"),
    (b"\0\0\0\x18ftypheic", "HEIC"), (b"Entry not found", "text, which begins 'Entry not found'"),
    (b'{"error":"Invalid username or\n password."}', "text, which begins '{\"error\":\"Invalid"),
])
def test_what_lies_in_the_place_of_a_file_is_named(begins, says):
    assert says in runs.what_it_is(begins)


@pytest.mark.parametrize("begins", [
    b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF", b"II*\0\x08\0\0\0", b"BM6\0\0\0",
    b"RIFF\0\0", b"PK\3\4", b"\x80\x02}q\0X\5\0\0\0", b"\x98\1\0\0\0\0\0\0{\"__metadata__\":{}}"])
def test_images_and_weights_themselves_are_not_named(begins):
    assert runs.what_it_is(begins) == ""


@pytest.mark.parametrize("before, now, ended, said", [
    ({"steps": 9}, {"steps": 12}, True, "--steps 3 --train all"),
    ({"steps": 9}, {"steps": 12}, False, "go on from it, once it has ended after 9 steps: python"),
    ({"steps": 9, "init": "sd"}, {"steps": 9, "init": "sd", "lr": 0.1}, True,
     "--steps 9 --lr 0.1 --out"),
    ({"steps": 9}, {"steps": 5}, True, "--steps 5 --train all")])
def test_other_steps_name_the_command_that_goes_on(before, now, ended, said, tmp_path):
    @dataclass(frozen=True)
    class Training:
        steps: int = 1
        lr: float = 1e-3
        init: str = ""
        train: str = "auto"
        out: str = ""

    run = runs.open_run(tmp_path / "my run", Training(**before), "vae")
    if ended:
        (run / "vae.json").touch()
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        runs.open_run(run, Training(**now), "vae")
    words = shlex.split(str(refused.value).rpartition(": ")[2])  # and they are one command
    assert words[:3] == ["python", "train.py", "vae"] and words[-1] == f"{run}-2"
    (_, cfg), = config.parse(train.VERBS, ["vae"], "", ["vae", "--data", "D", *words[5:]])
    assert cfg.out == f"{run}-2" and cfg.train == ("auto" if "init" in before else "all")


@pytest.mark.parametrize("code, passes", [(errno.EINVAL, True), (errno.EACCES, True),
                                          (errno.EIO, False), (errno.ENOSPC, False)])
def test_a_disk_that_cannot_sync_is_no_fault_and_one_that_fails_is(code, passes, tmp_path,
                                                                   monkeypatch):
    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with nullcontext() if passes else pytest.raises(OSError):
        runs.write_json(tmp_path / "a.json", [1])
        assert runs.read_json(tmp_path / "a.json") == [1]


def test_a_file_name_that_is_no_utf8_survives_json(tmp_path):
    name = os.fsdecode(b"b\xe9.png")
    runs.write_json(tmp_path / "a.json", {"name": name, "é": "→"})
    assert runs.read_json(tmp_path / "a.json") == {"name": name, "é": "→"}


def test_two_hosts_with_processes_of_one_number_write_two_files(tmp_path, monkeypatch):
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr(runs.platform, "node", lambda host=host: host)
        names.add(runs.beside(tmp_path / "model").name)
    assert len(names) == 2 and all(name.startswith(".model.tmp-") for name in names)


def test_hidden_files_occupy_no_folder(tmp_path):
    (tmp_path / ".DS_Store").touch()
    assert not runs.occupied(tmp_path) and not runs.occupied(tmp_path / "none")
    (tmp_path / "x").touch()
    assert runs.occupied(tmp_path) and runs.occupied(tmp_path / "x")
