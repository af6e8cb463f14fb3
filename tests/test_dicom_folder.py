"""Whole folders of DICOM files: what becomes of each, faults, and going on."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_files import (
    ARRAY,
    SALT,
    encode,
    everything,
    fates,
    make,
    pydicom,
    run,
    uid,
)
from PIL import Image

from minidiff import config
from minidiff.data import images
from minidiff.data.dicom import Refused, reader
from minidiff.data.dicom import __main__ as commands
from minidiff.data.dicom.guard import Guard
from minidiff.data.table import read_table
from minidiff.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def write_hostile(folder):
    """Files that are no good; name → what must become of each."""
    good = encode(make())
    folder.mkdir()
    (folder / "good").write_bytes(good)
    (folder / "again.dcm").write_bytes(good)
    for name, data in {"empty": b"", "text.dcm": b"not an image" * 99, "short.dcm": good[:200],
                       "cut.dcm": good[:-9], "DICOMDIR": good,
                       "noise.dcm": b"\0" * 128 + b"DICM" + np.random.default_rng(0).bytes(5000),
                       "bare": good[good.index(b"\x08\x00\x16\x00"):]}.items():
        (folder / name).write_bytes(data)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("../../../escaped.dcm", good)
    with zipfile.ZipFile(folder / "zip of zips.zip", "w") as file:
        file.writestr("inner.zip", inner.getvalue())
    zeros = pydicom.filebase.DicomBytesIO()
    bomb = make()
    bomb.file_meta = pydicom.dataset.FileMetaDataset()
    bomb.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    bomb.file_meta.MediaStorageSOPClassUID = bomb.SOPClassUID
    bomb.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    bomb.save_as(zeros, enforce_file_format=True)
    head = zeros.getvalue()[: 144 + int.from_bytes(zeros.getvalue()[140:144], "little")]
    packer = zlib.compressobj(1, wbits=-15)
    # 16 MiB in a few kB, that can be repeated
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    (folder / "bomb.dcm").write_bytes(head + block * 40 + packer.flush())
    nested = bytes.fromhex(
        "08000011 53510000 ffffffff".replace(" ", "")) + bytes.fromhex("feff00e0ffffffff")
    (folder / "nested.dcm").write_bytes(good[: good.index(b"\x08\x00\x16\x00")] + nested * 20000)
    (folder / "..%2f..%2fetc").write_bytes(encode(make(ARRAY + 1)))
    (folder / "new\nline\x1b[31m").write_bytes(encode(make(ARRAY + 2)))
    os.symlink("/etc/passwd", folder / "link")
    os.symlink("/", folder / "root")
    os.mkfifo(folder / "pipe")
    with open(folder / "sparse.dcm", "wb") as file:
        file.write(good[:300])
        file.truncate(600 * 2**20)
    return {"good": "duplicate", "again.dcm": "imported", "empty": "empty", "text.dcm": "foreign",
            "short.dcm": "damaged", "cut.dcm": "damaged", "DICOMDIR": "dicomdir",
            "noise.dcm": "damaged", "bare": "imported", "zip of zips.zip": "archive",
            "bomb.dcm": "huge", "nested.dcm": "damaged", "..%2f..%2fetc": "imported",
            "new line\x1b[31m": "imported", "link": "link", "root": "link", "pipe": "link",
            "sparse.dcm": "huge"}


def test_hostile_files_are_named_and_nothing_else_is_written(tmp_path, capsys):
    expected = write_hostile(tmp_path / "in")
    before = set(tmp_path.rglob("*"))
    assert run(tmp_path / "in", tmp_path / "out") == 1
    assert fates(tmp_path / "out") == expected
    made = set(tmp_path.rglob("*")) - before
    outside = {path.name for path in made if tmp_path / "out" not in (path, *path.parents)}
    assert outside == {"salt", "out.names.csv"}
    assert "\x1b" not in capsys.readouterr().err
    table = read_table(tmp_path / "out", split=False)
    assert len(table) == 4
    left_out = list(
        csv.DictReader((tmp_path / "out" / "not_imported.csv").read_text().splitlines()))
    assert len(left_out) == len(expected) - 4 and all(len(line["source"]) == 16
                                                      for line in left_out)


def test_pydicoms_own_files_are_imported_or_named(tmp_path):
    files = Path(pydicom.data.__file__).parent / "test_files"
    if not files.is_dir():
        pytest.skip("pydicom was installed without its test files")
    run(files, tmp_path / "out", accept_burned_in=("absent", "yes"), frame=1, window="auto")
    fate = fates(tmp_path / "out")
    assert set(fate) == {os.path.relpath(p, files) for p in files.rglob("*") if p.is_file()}
    for name in ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm",
                 "MR_small_implicit.dcm", "MR_small_padded.dcm", "image_dfl.dcm",
                 "examples_overlay.dcm", "dicomdirtests/77654033/CR1/6154"):
        assert fate[name] == "imported", name
    for name, key in {
            "CT_small.dcm": "window", "rtplan.dcm": "pixelless", "waveform_ecg.dcm": "pixelless",
            "zipMR.gz": "archive", "SC_rgb_rle.dcm": "colour", "MR_truncated.dcm": "damaged",
            "rtdose.dcm": "modality", "README.txt": "foreign", "dicomdirtests/DICOMDIR": "dicomdir",
            "JPEG2000-embedded-sequence-delimiter.dcm": "mismatch"}.items():
        assert fate[name] == key, name
    rows = {row["file_name"] for row in read_table(tmp_path / "out", split=False).rows}
    assert len(rows) == list(fate.values()).count("imported") >= 25
    run(files, tmp_path / "ct", accept_burned_in=("absent",), window="lung")
    assert fates(tmp_path / "ct")["CT_small.dcm"] == "imported"
    # one MR in seven transfer syntaxes: one picture
    with open(tmp_path / "out.names.csv", newline="") as file:
        names = {line["source"]: line["image"] for line in csv.DictReader(file)}
    kinds = ("", "_RLE", "_bigendian", "_implicit", "_expb", "_jpeg_ls_lossless", "_jp2klossless")
    same = [f"MR_small{kind}" for kind in kinds]
    pictures = [images.read(tmp_path / "out/images/covid" / f"{names[f'{name}.dcm']}.png")
                for name in same if fate[f"{name}.dcm"] == "imported"]
    assert len(pictures) >= 5 and all(np.array_equal(pictures[0], other) for other in pictures)


def test_the_same_command_goes_on_and_others_are_refused(tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for k in range(5):
        (source / f"{k}").write_bytes(encode(make(ARRAY + k, PatientID=str(k // 2))))
    (source / "unstated").write_bytes(encode(make(ARRAY + 9, BurnedInAnnotation=None)))
    converted = []
    convert = Guard.convert
    monkeypatch.setattr(Guard, "convert", lambda self, path,
                        how: (converted.append(path), convert(self, path, how))[1])
    assert run(source, out) == 1
    assert len(converted) == 6 and fates(out)["unstated"] == "burned_absent"
    first = {path.name: path.read_bytes() for path in out.glob("images/*/*.png")}
    table = (out / "metadata.csv").read_bytes()
    lost = next(out.glob("images/*/*.png"))
    lost.unlink()
    converted.clear()
    # makes the lost one again, and asks again for the one that was not imported
    assert run(source, out) == 1
    assert len(converted) == 2 and (out / "metadata.csv").read_bytes() == table
    assert {path.name: path.read_bytes() for path in out.glob("images/*/*.png")} == first
    converted.clear()
    assert run(source, out, accept_burned_in=("absent",)) == 0
    assert len(converted) == 1 and len(read_table(out, split=False)) == 6
    # 0, 1, 2 and 12345
    assert len({row["patient"] for row in read_table(out, split=False).rows}) == 4
    with pytest.raises(InputError, match="another window, bits"):
        run(source, out, window="percentile", bits="16")
    with pytest.raises(InputError, match="another salt"):
        run(source, out, salt=tmp_path / "other")
    # the same salt: the same names
    assert run(source, tmp_path / "b", accept_burned_in=("absent",)) == 0
    assert (tmp_path / "b" / "metadata.csv").read_bytes() == (out / "metadata.csv").read_bytes()
    assert run(source, tmp_path / "c", salt=tmp_path / "other", accept_burned_in=("absent",)) == 0
    assert not set(first) & {path.name for path in (tmp_path / "c").glob("images/*/*.png")}


def test_labels_come_from_named_folders_only(tmp_path):
    for label, k in (("covid", 0), ("normal", 1), ("John Doe", 2), ("normal", 3)):
        (tmp_path / "in" / label / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / label / "deep" / str(k)).write_bytes(encode(make(ARRAY + k % 3)))
    (tmp_path / "in" / "top").write_bytes(encode(make(ARRAY + 7)))
    (tmp_path / "in" / "covid" / "x").write_bytes(encode(make(ARRAY + 8)))
    (tmp_path / "in" / "normal" / "x").write_bytes(encode(make(ARRAY + 8)))
    assert run(tmp_path / "in", tmp_path / "out", label="", label_from=("covid", "normal")) == 1
    assert fates(tmp_path / "out") == {
        "covid/deep/0": "conflict", "normal/deep/3": "conflict", "normal/deep/1": "imported",
        "John Doe/deep/2": "label", "top": "label", "covid/x": "conflict", "normal/x": "conflict"}
    assert b"John" not in everything(tmp_path / "out")


@pytest.mark.parametrize("changes,message", [
    ({"label": ""}, "needs --label"), ({"label_from": ("a",)}, "needs --label"),
    ({"label": "../x"}, "allowed are letters"),
    ({"label": ".x"}, "allowed are letters"),
    ({"accept_burned_in": ("all",)}, "allowed are absent and yes"),
])
def test_settings_that_cannot_be(tmp_path, changes, message):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=message):
        run(tmp_path / "in", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for source, out, message in (("none", "out", "no such"), ("in", "in/out", "within each"),
                                 ("in", "full", "no import")):
        with pytest.raises(InputError, match=message):
            run(tmp_path / source, tmp_path / out)
    with pytest.raises(InputError, match="--salt .* lies in --out"):
        run(tmp_path / "in", tmp_path / "out", salt=tmp_path / "out" / "salt")
    with pytest.raises(InputError, match="not one image of 0 files"):
        run(tmp_path / "in", tmp_path / "out")


def test_16_bits_and_the_command_line(tmp_path, capsys):
    x = np.arange(48).reshape(6, 8) * 80
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(encode(make(x, 12, WindowCenter=2048, WindowWidth=4096)))
    words = ["import", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--label", "covid",
             "--bits", "16", "--salt", str(tmp_path / "salt")]
    config.main(commands.VERBS, default="import", doc="", argv=words)
    assert "1 images of 1 patients; known: patient of 1, age of 0" in capsys.readouterr().out
    with Image.open(next((tmp_path / "out").rglob("*.png"))) as image:
        assert np.array_equal(np.asarray(image), np.rint(x / 4095 * 65535))
    (tmp_path / "in" / "b").write_bytes(b"PK\x03\x04")
    assert status(words) == 1 and "an archive" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "in")
    assert status(words) == 2 and "no such file or folder" in capsys.readouterr().err
    assert status(["import"]) == 2 and "needs a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_stopped_by_a_signal_it_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(6)
    for k in range(24):
        (tmp_path / "in" / str(k)).write_bytes(encode(make(rng.integers(0, 4096, (1500, 1500)), 12,
                                                           PatientID=str(k))))
    words = [sys.executable, "-m", "minidiff.data.dicom", "import", str(tmp_path / "in"), "--out",
             str(tmp_path / "out"), "--label", "x", "--salt", str(tmp_path / "salt")]
    going = subprocess.Popen(words, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE,
                             text=True, start_new_session=True)
    while len(list(tmp_path.glob("out/images/x/*.png"))) < 3 and going.poll() is None:
        time.sleep(0.05)
    os.killpg(going.pid, signal.SIGINT)  # as Ctrl-C does, to the workers, too
    assert "the same command resumes" in going.communicate()[1] and going.returncode == 130
    assert 3 <= len(list(tmp_path.glob("out/images/x/*.png"))) < 24 and not (
        tmp_path / "out" / "metadata.csv").exists()
    assert not list(tmp_path.rglob("*.tmp-*"))
    assert run(tmp_path / "in", tmp_path / "out",
               label="x") == 0 and len(read_table(tmp_path / "out", split=False)) == 24


@pytest.mark.slow
def test_the_module_runs_as_a_command(tmp_path):
    write_hostile(tmp_path / "in")
    words = f"import {tmp_path}/in --out {tmp_path}/out --label x --salt {tmp_path}/salt".split()
    done = subprocess.run([sys.executable, "-m", "minidiff.data.dicom", *words],
                          capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and "4 images of 1 patients" in done.stdout
    assert "Traceback" not in done.stderr


def status(words) -> int:
    with pytest.raises(SystemExit) as end:
        config.main(commands.VERBS, default="import", doc="", argv=words)
    return end.value.code


def test_without_pydicom_the_extra_is_named(monkeypatch):
    from minidiff.data.dicom import need_pydicom
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match=r"pip install 'minidiff\[dicom\]'"):
        need_pydicom()


def test_a_compression_without_a_decoder_says_what_to_install(monkeypatch):
    data = encode(make(np.zeros((40, 40))), uid.JPEG2000Lossless)
    decoder = pydicom.pixels.get_decoder(uid.JPEG2000Lossless)
    monkeypatch.setattr(decoder, "_available", {})
    monkeypatch.setattr(decoder, "_unavailable",
                        {"pylibjpeg": ("pylibjpeg>=2.0", "pylibjpeg-openjpeg>=2.0")})
    with pytest.raises(Refused) as error:
        reader.pixels.grey(reader.load(data))
    assert error.value.key == "codec" and "pylibjpeg-openjpeg" in error.value.detail
    assert SALT not in error.value.detail
