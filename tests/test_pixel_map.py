"""data.pixel_map: what is mapped equals what is in memory, is made once, and survives a kill."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff.config import parse
from minidiff.data import images, pixel_map
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.table import read_table, write_table
from minidiff.download import CACHE
from minidiff.errors import InputError
from minidiff.pixels import is_grey

N, SIDE = 40, 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 grey images in interleaved splits."""
    monkeypatch.delenv(CACHE, raising=False)
    rng = np.random.default_rng(0)
    for k in range(N):
        images.write(tmp_path / "data" / f"{k:02d}.png", rng.integers(0, 256, (20, 18), np.uint8))
    write_table(tmp_path / "data" / "metadata.csv",
                [{"file_name": f"{k:02d}.png", "label": "ab"[k % 2], "patient": f"p{k}",
                  "split": ("train", "test", "val", "train")[k % 4]} for k in range(N)])
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def both(folder, cache, monkeypatch, **knobs) -> list[Images]:
    """In memory, and mapped."""
    found = [Images(*load_pixels(read_table(folder), SIDE, **knobs))]
    monkeypatch.setenv(CACHE, str(cache))
    return [*found, Images(*load_pixels(read_table(folder), SIDE, **knobs))]


def by_file(data: Images) -> dict[str, bytes]:
    return {row["file"]: picture.numpy().tobytes()
            for row, picture in zip(data.table.rows, data.pixels)}


def is_view(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_the_map_holds_what_memory_holds_and_a_part_is_no_copy(folder, cache, monkeypatch, capsys):
    monkeypatch.setattr(pixel_map, "SHARD", 8)  # in two processes
    monkeypatch.setattr(pixel_map, "cores", lambda: {0, 1})
    there, mapped = both(folder, cache, monkeypatch)
    assert by_file(there) == by_file(mapped) and mapped.pixels.shape == (N, 3, SIDE, SIDE)
    assert there.table.fingerprint == mapped.table.fingerprint and mapped.grey
    for splits in (("train",), ("val",), ("test",), ("val", "test")):
        part = mapped.part(*splits)
        assert is_view(part.pixels, mapped.pixels) and part.grey
        assert by_file(part) == by_file(there.part(*splits))
    assert torch.equal(there.part("train").pixels, mapped.part("train").pixels)  # in one order
    (path,) = cache.glob("*.pixels")
    assert path.stat().st_size == N * (SIDE**2 + 65)
    assert f"40 images in {path}" in capsys.readouterr().out


def test_it_is_made_once_and_parts_of_a_table_find_their_slices(folder, cache, monkeypatch):
    there, mapped = both(folder, cache, monkeypatch)
    monkeypatch.setattr(pixel_map, "_fill", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(images, "read", lambda file, **_: np.zeros((1, 20, 18), np.uint8))
    table = read_table(folder)
    assert by_file(Images(*load_pixels(table, SIDE))) == by_file(there)
    for split in ("train", "val", "test"):  # as a study of classifiers reads them
        found = Images(*load_pixels(table.select(split=split), SIDE))
        assert by_file(found) == by_file(there.part(split))
    assert len(list(cache.glob("*.pixels"))) == 1


def test_what_the_pictures_hold_is_kept_and_a_second_start_reads_none(folder, cache, monkeypatch):
    """Copies and one grey among them; with colour, three channels are mapped."""
    for colour in (False, True):
        images.write(folder / "09.png", np.full((20, 18), 9, np.uint8))
        shutil.copy(folder / "03.png", folder / "11.png")
        if colour:
            images.write(folder / "39.png", np.random.default_rng(1).integers(
                0, 256, (3, 20, 18), np.uint8))
        monkeypatch.delenv(CACHE, raising=False)
        there = load_pixels(read_table(folder), SIDE, grey="no")
        by_content = dict(zip(there[0].column("file"), pixel_map.contents(*there)))
        assert list(by_content.values()).count(None) == 1 and len(set(by_content.values())) == N - 1
        monkeypatch.setenv(CACHE, str(cache))
        load_pixels(read_table(folder), SIDE, grey="no")  # makes the map
        table, mapped = load_pixels(read_table(folder), SIDE, grey="no")
        assert is_grey(mapped) is not colour
        with monkeypatch.context() as patch:
            patch.setattr(pixel_map, "content", lambda _: pytest.fail("pixels are read"))
            kept = dict(zip(table.column("file"), pixel_map.contents(table, mapped)))
        assert kept == by_content and list(kept) != list(by_content)  # a map is ordered by split


def test_another_size_other_content_and_a_deleted_cache_are_read_anew(folder, cache, monkeypatch):
    there, _ = both(folder, cache, monkeypatch)
    assert load_pixels(read_table(folder), 8)[1].shape[-1] == 8
    assert len(list(cache.glob("*.pixels"))) == 2
    shutil.rmtree(cache)
    assert by_file(Images(*load_pixels(read_table(folder), SIDE))) == by_file(there)
    images.write(folder / "07.png", np.full((20, 18), 9, np.uint8))
    table, pixels = load_pixels(read_table(folder), SIDE)
    place = next(i for i, row in enumerate(table.rows) if row["file_name"] == "07.png")
    assert (pixels[place] == 9).all() and "1 image of one grey throughout" in table.notes[-1]
    assert len(list(cache.glob("*.pixels"))) == 2


@pytest.mark.parametrize("n, grey", [(1, "auto"), (20, "auto"), (40, "auto"), (1, "no"),
                                     (20, "yes"), (40, "yes")])
def test_colour_is_kept_or_made_grey_as_in_memory(folder, cache, monkeypatch, n, grey):
    rng = np.random.default_rng(1)
    for k in range(N - n, N):
        images.write(folder / f"{k:02d}.png", rng.integers(0, 256, (3, 20, 18), np.uint8))
    there, mapped = both(folder, cache, monkeypatch, grey=grey)
    assert by_file(there) == by_file(mapped) and there.grey is mapped.grey
    assert there.grey is (grey == "yes" or (n == 1 and grey == "auto"))
    without = "; these were "
    assert [note.split(without)[0] for note in there.table.notes] == [
        note.split(without)[0] for note in mapped.table.notes]


def test_bad_files_are_named_dropped_and_left_out_of_the_slices(folder, cache, monkeypatch):
    (folder / "05.png").write_bytes(b"")
    (folder / "30.png").write_bytes((folder / "29.png").read_bytes()[:60])
    said = []
    for name in ("", str(cache)):
        monkeypatch.setenv(CACHE, name) if name else monkeypatch.delenv(CACHE, raising=False)
        with pytest.raises(InputError) as error:
            load_pixels(read_table(folder), SIDE)
        said.append(str(error.value))
    for part in ("2 of 40 images cannot be read", "metadata.csv:7", "05.png", "0 bytes", "30.png"):
        assert all(part in text for text in said)
    monkeypatch.delenv(CACHE)
    there, mapped = both(folder, cache, monkeypatch, skip_bad=True)
    again = Images(*load_pixels(read_table(folder), SIDE, skip_bad=True))
    assert len(mapped) == len(mapped.pixels) == 38
    assert by_file(there) == by_file(mapped) == by_file(again)
    assert "2 of 40 images could not be read and were dropped" in mapped.table.notes[-1]
    assert is_view(mapped.part("train").pixels, mapped.pixels)
    assert len(list(cache.glob("*.pixels"))) == 1


def test_a_folder_of_bad_files_is_refused(folder, cache, monkeypatch):
    for k in range(N):
        (folder / f"{k:02d}.png").write_bytes(b"x%d" % k)
    monkeypatch.setenv(CACHE, str(cache))
    for _ in range(2):
        with pytest.raises(InputError, match="40 of 40 images"):
            load_pixels(read_table(folder), SIDE, skip_bad=True)


def test_a_full_disk_is_refused_before_it_is_full(folder, cache, monkeypatch):
    monkeypatch.setenv(CACHE, str(cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 5000}))
    with pytest.raises(InputError, match="name another folder by --cache"):
        load_pixels(read_table(folder), SIDE)
    assert not list(cache.glob("*.pixels"))


KILLED = """
import time
from dataclasses import dataclass
from pathlib import Path
from minidiff.config import parse
from minidiff.data import images, pixel_map
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table
pixel_map.SHARD, pixel_map.cores = 4, lambda: {CORES}
read = images.read
images.read = lambda file, **how: (time.sleep(0.05), read(file, **how))[1]
if not WORKERS:  # in this process, slowly
    pixel_map._fill = lambda path, size, channels, todo: list(pixel_map._write_shards(
        path, size, channels, [todo[i : i + 4] for i in range(0, len(todo), 4)]))
load_pixels(read_table(FOLDER), 16)
"""


def test_a_kill_loses_one_shard_at_most(folder, cache, monkeypatch):
    there, _ = both(folder, cache, monkeypatch)
    shutil.rmtree(cache)
    code = KILLED.replace("FOLDER", repr(str(folder))).replace("WORKERS", "0")
    building = subprocess.Popen([sys.executable, "-c", code.replace("CORES", "0")],
                                env={**os.environ, CACHE: str(cache)})
    end, done = time.monotonic() + 60, 0
    while done < 12 and time.monotonic() < end:
        time.sleep(0.01)
        for path in cache.glob("*.pixels"):
            done = int((pixel_map.Map.open(path, SIDE**2).kinds > 0).sum())
    building.send_signal(signal.SIGKILL)
    building.wait()
    done = int((pixel_map.Map.open(path, SIDE**2).kinds > 0).sum())
    assert 12 <= done < N and done % 4 == 0
    again, fill = [], pixel_map._fill

    def counted(path, size, channels, todo):
        again.append(len(todo))
        fill(path, size, channels, todo)

    monkeypatch.setattr(pixel_map, "_fill", counted)
    found = Images(*load_pixels(read_table(folder), SIDE))
    assert again == [N - done] and by_file(found) == by_file(there)


def test_the_processes_end_with_the_command_that_started_them(folder, cache, monkeypatch):
    monkeypatch.setenv(CACHE, str(cache))
    code = (KILLED.replace("FOLDER", repr(str(folder))).replace("CORES", "0, 1")
            .replace("WORKERS", "1"))
    building = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    children, workers = Path(f"/proc/{building.pid}/task/{building.pid}/children"), []
    end = time.monotonic() + 300
    while not workers and building.poll() is None and time.monotonic() < end:
        workers = children.read_text().split()
    building.send_signal(signal.SIGKILL)
    building.wait()
    assert workers
    while any(runs(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def runs(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_the_flag_names_the_folder_and_is_no_knob(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, "before")  # and after
    monkeypatch.chdir(tmp_path)
    ((_, cfg),) = parse({"train": (Knobs, print)}, "train", "", ["--cache", "maps", "--steps", "3"])
    assert os.environ[CACHE] == str(tmp_path / "maps") and cfg == Knobs(3)


@dataclass(frozen=True)
class Knobs:
    steps: int = 1  # optimiser steps
