"""Synthetic sets as DICOM: what the files say, that other tools read them, and what is refused."""

import shutil
import subprocess

import numpy as np
import pytest
from dicom_files import OPTIONS, pydicom

from minidiff import config, runs
from minidiff.data import images
from minidiff.data.dicom import Refused, reader, writer
from minidiff.data.dicom import __main__ as commands
from minidiff.data.phantom import phantom
from minidiff.data.table import write_table
from minidiff.errors import InputError

MODEL = "d7" * 32


@pytest.fixture
def samples(tmp_path):
    """A folder as sample.py leaves it: grey, of odd size, in colour, and with words beyond
    ASCII.
    """
    folder = tmp_path / "samples"
    rows = []
    for k, label in enumerate(("covid", "covid", "normal", "normal")):
        image = phantom(0, k, 64).image[None]
        image = [image, image[:, :63, :63], np.concatenate([image, image, image // 2]), image][k]
        rows.append({"file_name": f"images/{label}/{k:06d}.png", "label": label, "set": 1,
                     "seed": 100 + k, "sex": "FM"[k % 2], "age": ["", "69", "7.5", "90"][k],
                     "view": "PA", "finding": ["", "", "", "Fundé > 3 µm"][k],
                     "origin": ["", "", "", "/home/real.png"][k],
                     "change": ["", "", "", "sex=other"][k], "before_sex": ["", "", "", "F"][k],
                     "sampler": "dpmpp_2m", "steps": 16, "guidance": 1.5})
        images.write(folder / rows[-1]["file_name"], image)
    write_table(folder / "metadata.csv", rows)
    hashes = {row["file_name"]: runs.sha256(folder / row["file_name"]) for row in rows}
    runs.write_json(folder / "manifest.json", {"model": MODEL, "sha256": hashes})
    return folder


def export(samples, out, burn_in=False):
    writer.export_samples(writer.ExportConfig(str(samples), str(out), burn_in))


def files(folder):
    return sorted(folder.rglob("*.dcm"))


def test_pixels_come_back_and_every_file_says_what_it_is(samples, tmp_path):
    export(samples, tmp_path / "out")
    assert len(files(tmp_path / "out")) == 4
    assert [p.relative_to(tmp_path / "out").with_suffix(".png")
            for p in files(tmp_path / "out")] == sorted(p.relative_to(samples)
                                                        for p in samples.rglob("*.png"))
    for path in files(tmp_path / "out"):
        ds = pydicom.dcmread(path)
        png = images.read(samples / path.relative_to(tmp_path / "out").with_suffix(".png"))
        assert np.array_equal(ds.pixel_array, png[0] if len(png) == 1 else png.transpose(1, 2, 0))
        assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert ds.ImageType == ["DERIVED", "SECONDARY",
                                "SYNTHETIC"] and ds.ConversionType == "SYN" and ds.Modality == "OT"
        assert ds.SeriesDescription == ds.StudyDescription == "SYNTHETIC - NOT A PATIENT"
        assert str(ds.PatientName) == "SYNTHETIC^NOT A PATIENT" and ds.PatientID.startswith(
            "SYNTHETIC-")
        assert ds.ContentQualification == "RESEARCH" and ds.BurnedInAnnotation == "NO"
        assert MODEL in ds.DerivationDescription and "seed 10" in ds.DerivationDescription
        assert "dpmpp_2m" in ds.DerivationDescription and "minidiff" in ds.DerivationDescription
        assert f"label={path.parent.name}" in ds.ImageComments and "view=PA" in ds.ImageComments
        assert b"/home" not in path.read_bytes()
    ages = [pydicom.dcmread(path).get("PatientAge", "") for path in files(tmp_path / "out")]
    assert ages == ["", "069Y", "007Y", "090Y"]
    last = pydicom.dcmread(files(tmp_path / "out")[-1])
    assert "finding=Fundé > 3 µm" in last.ImageComments
    assert "Drawn from a real image, changed to sex=other, by" in last.DerivationDescription
    assert "sex=M" in last.ImageComments and "before" not in last.ImageComments
    assert "Drawn from noise" in pydicom.dcmread(files(tmp_path / "out")[0]).DerivationDescription


def test_the_same_command_makes_the_same_files_and_all_uids_differ(samples, tmp_path):
    for name, burn in (("a", False), ("b", False), ("c", True)):
        export(samples, tmp_path / name, burn_in=burn)
    export(samples, tmp_path / "a")  # over its own earlier run
    content = {name: [path.read_bytes() for path in files(tmp_path / name)] for name in "abc"}
    assert content["a"] == content["b"]
    uids = [pydicom.dcmread(path)[name].value for folder in "ac"
            for path in files(tmp_path / folder)
            for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")]
    assert len(set(uids)) == len(uids) == 24
    assert all(uid.is_valid and uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)
    assert {pydicom.dcmread(path).BurnedInAnnotation for path in files(tmp_path / "c")} == {"YES"}


@pytest.mark.parametrize("tool", ["dcmdump", "dciodvfy"])
def test_other_tools_find_no_error(samples, tmp_path, tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed (Debian: dcmtk, dicom3tools)")
    for burn in (False, True):
        export(samples, tmp_path / str(burn), burn_in=burn)
        for path in files(tmp_path / str(burn)):
            words = [tool, "+E", path] if tool == "dcmdump" else [tool, path]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace")
            assert done.returncode == 0 and "rror" not in done.stderr, done.stderr
            assert not [line for line in (done.stderr + done.stdout).splitlines()
                        if line.startswith(("E:", "W:", "Error"))]
            assert tool == "dcmdump" or "SCImage" in done.stderr


def test_a_fault_is_seen_by_these_tools(samples, tmp_path):
    """The check above can fail."""
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    export(samples, tmp_path / "out")
    ds = pydicom.dcmread(files(tmp_path / "out")[0])
    del ds.ConversionType
    ds.save_as(tmp_path / "bad.dcm")
    assert "Error" in subprocess.run(["dciodvfy", tmp_path / "bad.dcm"], capture_output=True,
                                     text=True).stderr


@pytest.mark.parametrize("size",
                         [(64, 90), (64, 64), (100, 80), (128, 128), (256, 200), (512, 512)])
def test_the_notice_covers_a_corner_and_nothing_else(size):
    grey = np.full((1, *size), 99, np.uint8)
    burned = writer.burn(grey)
    rows, columns = np.nonzero((burned != grey).any(0))
    assert grey.min() == grey.max() == 99  # the argument is left alone
    assert rows.max() == size[0] - 1 and columns.min() == 0  # lower left
    assert rows.min() >= size[0] // 2 - 1
    box = burned[0, rows.min():, : columns.max() + 1]
    assert box.min() == 0 and box.max() > 200 and not (box == 99).any()
    assert 0.05 < (box > 128).mean() < 0.4  # strokes on a ground
    colour = writer.burn(np.full((3, *size), 99, np.uint8))
    assert np.array_equal(colour, np.repeat(burned, 3, 0))


def test_a_notice_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="64 or more pixels"):
        writer.burn(np.zeros((1, 32, 32), np.uint8))


def test_synthetic_files_do_not_come_in_as_a_patients(samples, tmp_path):
    export(samples, tmp_path / "out")
    for path in files(tmp_path / "out"):
        with pytest.raises(Refused, match="synthetic"):
            reader.convert(str(path), OPTIONS._replace(accept=("absent", "yes")))


def test_only_what_the_manifest_vouches_for_is_exported(samples, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(InputError, match="is no export"):
        export(samples, tmp_path / "mine")
    images.write(samples / "images/covid/000000.png", np.zeros((64, 64), np.uint8))
    with pytest.raises(InputError, match="1 of 4 images differ from the manifest"):
        export(samples, tmp_path / "out")
    (samples / "manifest.json").unlink()
    with pytest.raises(InputError, match="no manifest.json"):
        export(samples, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(samples, tmp_path, capsys):
    words = ["export", str(samples), "--out", str(tmp_path / "out"), "--burn-in"]
    config.main(commands.VERBS, default="import", doc="", argv=words)
    assert "4 DICOM files, each marked 'SYNTHETIC - NOT A PATIENT'" in capsys.readouterr().out
    assert (tmp_path / "out" / "export.csv").read_text().count("\n") == 5
