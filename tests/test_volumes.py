"""CT and MRI into slices: one volume in every orientation and in both formats gives the same data
set, and what is no volume is named.
"""

import csv
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_files import encode, item, make
from PIL import Image
from pydicom import uid

from minidiff import runs
from minidiff.data.dicom import REASONS, Refused
from minidiff.data.dicom.guard import Guard
from minidiff.data.volumes import Volume, folder, in_lps, nifti, phantom, series, slices
from minidiff.errors import InputError

nib = pytest.importorskip("nibabel")
SALT = "ab" * 32
MM = (2.0, 2.0, 5.0)
LPS = np.diag([-1.0, -1.0, 1.0])


def body(shape=(24, 20, 8)) -> np.ndarray:
    """HU in LPS: a body in air, a bright organ to the left, back and head."""
    x, y, z = np.indices(shape)
    values = np.full(shape, -1000)
    values[(abs(x - 11.5) < 9) & (abs(y - 9.5) < 7)] = 40
    values[(x > 14) & (y > 12) & (z > 4) & (values > 0)] = 300
    return values.astype(np.int16)


def affine(axes=(0, 1, 2), signs=(1, 1, 1), spacing=MM) -> np.ndarray:
    """RAS of an array whose axis k runs along signs[k] times patient axis axes[k], in LPS."""
    steps = np.zeros((3, 3))
    for k, (axis, sign) in enumerate(zip(axes, signs)):
        steps[axis, k] = sign * spacing[axis]
    whole = np.eye(4)
    whole[:3, :3] = LPS @ steps
    return whole


def save(path: Path, values: np.ndarray, to_ras: np.ndarray, **header) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, to_ras)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def dicoms(path: Path, values: np.ndarray, **elements) -> Path:
    """An axial series of HU in LPS, an instance a slice, in no order."""
    path.mkdir(parents=True)
    for k in np.random.default_rng(0).permutation(values.shape[2]):
        given = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024,
                 "SOPInstanceUID": f"2.25.{k + 9}", "SeriesInstanceUID": "2.25.7",
                 "SOPClassUID": uid.CTImageStorage, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                 "ImagePositionPatient": [-20, -20, 5 * float(k)], "PixelSpacing": [2, 2],
                 "SliceThickness": 5, "PatientAge": "061Y", "PatientSex": "F", **elements}
        given = {name: value(k) if callable(value) else value for name, value in given.items()}
        ds = make(values[:, :, k].T + 1024, stored=16, **given)
        (path / f"{k}.dcm").write_bytes(encode(ds))
    return path


def run(source: Path, out: Path, tmp_path: Path, **knobs) -> list[dict[str, str]]:
    salt = tmp_path / "salt"
    salt.write_text(SALT)
    salt.chmod(0o600)
    given = {"label": "a", "modality": "CT", "window": "soft", "salt": str(salt), **knobs}
    folder.import_volumes(folder.VolumesConfig(source=str(source), out=str(out), **given))
    with open(out / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def pictures(out: Path, rows: list[dict[str, str]]) -> list[np.ndarray]:
    return [np.asarray(Image.open(out / row["file_name"])) for row in rows]


@pytest.mark.parametrize("axes", itertools.permutations(range(3)))
@pytest.mark.parametrize("signs", itertools.product((1, -1), repeat=3))
def test_every_orientation_is_turned_to_the_patient(axes, signs):
    stored = np.flip(body().transpose(axes), [k for k in range(3) if signs[k] < 0])
    found, spacing, was = in_lps(stored, LPS @ affine(axes, signs)[:3, :3])
    assert np.array_equal(found, body()) and spacing == MM
    assert [axes[k] for k in was] == [0, 1, 2]


def test_a_volume_is_the_same_from_nifti_and_from_dicom(tmp_path):
    save(tmp_path / "n/x.nii.gz", body().transpose(2, 0, 1)[::-1], affine((2, 0, 1), (-1, 1, 1)))
    dicoms(tmp_path / "d/series", body())
    (one, first), (two, second) = ((tmp_path / f"out-{kind}", run(
        tmp_path / kind, tmp_path / f"out-{kind}", tmp_path)) for kind in "nd")
    for a, b in zip(pictures(one, first), pictures(two, second)):
        assert np.array_equal(a, b)
    assert [row["position"] for row in first] == [row["position"] for row in second] == [
        f"{(k + 0.5) / 8:.4f}" for k in range(8)]
    row = second[0]
    assert (row["age"], row["sex"], row["modality"], row["spacing"]) == ("61", "F", "CT", "2.000")
    assert len({row["patient"] for row in first}) == 1 and first[0]["patient"][0] == "v"
    assert second[0]["patient"][0] == "p" and "age" not in first[0]


def test_slices_lie_as_radiologists_look_at_them(tmp_path):
    """The organ is to the patient's left, at the back, below the head."""
    volume = Volume(body().astype(np.float32), MM, {"modality": "CT"})
    seen = {plane: [grey for grey, _ in slices.cut(volume, slices.Cut(plane, "soft"))]
            for plane in ("axial", "coronal", "sagittal")}
    assert {plane: made[0].shape for plane, made in seen.items()} == {
        "axial": (20, 24), "coronal": (20, 24), "sagittal": (20, 20)}  # 8 slices of 5 mm at 2 mm
    # slices that are all air are not there: y from 3 on, x from 3 on
    for plane, at in (("axial", 7), ("coronal", 14 - 3), ("sagittal", 17 - 3)):
        rows, columns = np.where(seen[plane][at] == 255)
        high, wide = seen[plane][at].shape
        assert columns.mean() / wide > 0.6                      # left, or back
        assert (rows.mean() / high > 0.6) == (plane == "axial")  # back, or else head


def test_values_become_the_grey_of_their_window():
    values = np.array([-1000, -160, 40, 240, 3000], np.float32)
    volume = Volume(values[:, None, None].repeat(3, 1), (1, 1, 1), {"modality": "CT"})
    for bits, top in ((8, 255), (16, 65535)):
        (grey, row), = slices.cut(volume, slices.Cut(window="soft", bits=bits))
        assert grey.dtype == f"uint{bits}" and row["position"] == "0.5000"
        assert np.abs(grey[0] - np.array([0, 0, 0.5, 1, 1]) * top).max() <= 0.5
    other = volume._replace(facts={"modality": "MR"})
    (grey, _), = slices.cut(other, slices.Cut())
    assert grey.min() == 0 and grey.max() == 255
    for how, of in ((slices.Cut(), volume), (slices.Cut(window="percentile"), volume),
                    (slices.Cut(window="lung"), other)):
        with pytest.raises(Refused) as fault:
            next(slices.cut(of, how))
        assert fault.value.key == "window"


def test_slices_are_chosen_by_number_and_place(tmp_path):
    save(tmp_path / "n/x.nii", body(), affine())
    rows = run(tmp_path / "n", tmp_path / "out", tmp_path, slices=2, between=(0.25, 0.75))
    assert [row["position"] for row in rows] == ["0.4375", "0.6875"]


@pytest.mark.parametrize("key, values, header", [
    ("complex", body().astype(np.complex64), {}),
    ("colour", np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), {}),
    ("frames", np.stack([body(), body()], 3), {}),
    ("labels", (body() > 0).astype(np.uint8), {}),
    ("labels", body(), {"intent_code": 1002}),
    ("scale", body(), {"scl_slope": np.nan, "scl_inter": np.inf}),
    ("geometry", body(), {"qform_code": 0, "sform_code": 0}),
    ("damaged", np.full((4, 4, 4), np.nan, np.float32), {}),
])
def test_what_is_no_volume_of_grey_levels_is_named(tmp_path, key, values, header):
    path = save(tmp_path / "x.nii", values, affine())
    if header:  # nibabel would mend it
        data = bytearray(path.read_bytes())
        head = nib.Nifti1Header(bytes(data[:348]), check=False)
        for name, value in header.items():
            head[name] = value
        data[:348] = head.binaryblock
        path.write_bytes(data)
    with pytest.raises(Refused) as fault:
        nifti.read(str(path), "CT", bytes.fromhex(SALT), "0")
    assert fault.value.key == key and key in REASONS


def test_a_slope_of_zero_means_none_and_a_frame_is_taken(tmp_path):
    path = save(tmp_path / "x.nii", np.stack([body(), body() + 7], 3), affine())
    data = bytearray(path.read_bytes())
    head = nib.Nifti1Header(bytes(data[:348]), check=False)
    head["scl_slope"], head["scl_inter"] = 0, 50
    data[:348] = head.binaryblock
    path.write_bytes(data)
    found = nifti.read(str(path), "CT", bytes.fromhex(SALT), "0", frame=2)
    assert np.array_equal(found.values, body() + 7)


def test_a_sheared_volume_is_refused_and_a_patient_is_that_of_bids(tmp_path):
    sheared = affine()
    sheared[0, 2] = 1.0
    with pytest.raises(Refused, match="tilted"):
        nifti.read(str(save(tmp_path / "x.nii", body(), sheared)), "CT", b"s", "0")
    found = {nifti.read(str(save(tmp_path / name, body(), affine())), "MR", b"s", name)
             .facts["patient"] for name in ("sub-01_T1w.nii.gz", "sub-01_ses-2_T1w.nii.gz")}
    assert len(found) == 1 and "sub-01" not in str(found)


@pytest.mark.parametrize("elements, key", [
    ({"ImagePositionPatient": lambda k: [-20, -20, 5.0 * min(k, 6)]}, "doubled"),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "scout"),
    ({"ImagePositionPatient": None}, "geometry"), ({"Modality": "US"}, "modality"),
])
def test_files_that_make_no_volume_are_named(tmp_path, capsys, elements, key):
    dicoms(tmp_path / "d", body(), **elements)
    with pytest.raises(InputError, match="not one slice"):
        run(tmp_path / "d", tmp_path / "out", tmp_path)
    assert REASONS[key][1] in capsys.readouterr().err


@pytest.mark.parametrize("elements", [
    {"ImagePositionPatient": lambda k: [-20, -20, 5.0 * k + 5 * (k > 4)]},   # a slice is missing
    {"ImagePositionPatient": lambda k: [-20, -20 + 1.0 * k, 5.0 * k]},       # a tilted gantry
])
def test_gaps_and_tilts_are_cut_along_their_slices_alone(tmp_path, capsys, elements):
    dicoms(tmp_path / "d", body(), **elements)
    assert len(run(tmp_path / "d", tmp_path / "out", tmp_path)) == 8
    with pytest.raises(InputError, match="not one slice"):
        run(tmp_path / "d", tmp_path / "other", tmp_path, plane="coronal")
    assert "its slices are axial" in capsys.readouterr().err


def test_echoes_of_a_series_are_volumes_of_their_own_and_doubles_are_left_out(tmp_path, capsys):
    dicoms(tmp_path / "d/one", body(), EchoTime=10)
    dicoms(tmp_path / "d/two", body() + 1, EchoTime=20)
    shutil.copy(tmp_path / "d/one/0.dcm", tmp_path / "d/again.dcm")
    (tmp_path / "d/notes.txt").write_text("n")
    rows = run(tmp_path / "d", tmp_path / "out", tmp_path)
    assert len({row["volume"] for row in rows}) == 2 and len({row["patient"] for row in rows}) == 1
    said = capsys.readouterr().err
    assert "duplicate" not in said and "1 ignored: the same bytes as another file here" in said


def test_an_import_goes_on_and_leaves_no_name_behind(tmp_path, monkeypatch):
    for k in range(3):
        save(tmp_path / f"n/MUELLER_{k}.nii.gz", body() + k, affine(), descrip=b"Mueller 1950",
             aux_file=b"Mueller.doc")
    real, calls = Guard.call, []

    def call(self, name, *given):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, name, *given)

    monkeypatch.setattr(Guard, "call", call)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "n", tmp_path / "out", tmp_path)
    rows = run(tmp_path / "n", tmp_path / "out", tmp_path)
    assert len(calls) == 4 and len(rows) == 24  # one volume in the second call
    for path in (tmp_path / "out").rglob("*"):
        assert "MUELLER" not in path.name.upper()
        assert path.is_dir() or b"MUELLER" not in path.read_bytes().upper()
    with pytest.raises(InputError, match="imported with another cut"):
        run(tmp_path / "n", tmp_path / "out", tmp_path, window="lung")


def test_a_unit_of_length_is_that_of_the_header(tmp_path, capsys):
    """In metres, microns and millimetres the same volume; without a unit mm is assumed, and said.
    """
    for unit, of_mm in (("meter", 0.001), ("mm", 1.0), ("micron", 1000.0), ("unknown", 1.0)):
        image = nib.Nifti1Image(body(), np.diag([of_mm] * 3 + [1]) @ affine())
        image.header.set_xyzt_units(unit)
        (path := tmp_path / f"{unit}/x.nii").parent.mkdir()
        image.to_filename(path)
        found = nifti.read(str(path), "CT", b"s", "0")
        assert np.allclose(found.spacing, MM) and np.array_equal(found.values, body())
        assert found.facts.get("unit") == ("mm assumed" if unit == "unknown" else None)
    rows = run(tmp_path / "unknown", tmp_path / "out", tmp_path)
    assert {(row["unit"], row["spacing"]) for row in rows} == {("mm assumed", "2.000")}
    assert "1 volume of a header that names no unit of length" in capsys.readouterr().out
    data = bytearray((tmp_path / "mm/x.nii").read_bytes())
    data[123] = 5  # xyzt_units
    (tmp_path / "bad.nii").write_bytes(data)
    with pytest.raises(Refused, match="geometry"):
        nifti.read(str(tmp_path / "bad.nii"), "CT", b"s", "0")


def enhanced(path: Path, values: np.ndarray, orientations=((1, 0, 0, 0, 1, 0),), z=5.0, **elements):
    """One enhanced CT of HU in LPS: frames in no order, each with a rescale of its own."""
    order = np.random.default_rng(0).permutation(values.shape[2])
    ds = make(values[:, :, 0].T, stored=16, signed=True, **{
        "Modality": "CT", "SOPClassUID": uid.EnhancedCTImageStorage, "SOPInstanceUID": "2.25.9",
        "SeriesInstanceUID": "2.25.7", "NumberOfFrames": len(order), **elements})
    ds.SharedFunctionalGroupsSequence = [item(PixelMeasuresSequence=[
        item(PixelSpacing=[2, 2], SliceThickness=5)])]
    ds.PerFrameFunctionalGroupsSequence = [item(
        PlanePositionSequence=[item(ImagePositionPatient=[-20, -20, z * float(k)])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=list(
            orientations[n % len(orientations)]))],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=int(k),
                                               RescaleType="HU")]) for n, k in enumerate(order)]
    ds.PixelData = np.stack([values[:, :, k].T - k for k in order]).astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(ds))
    return path


def test_an_enhanced_file_is_the_volume_of_its_frames(tmp_path):
    plain = dicoms(tmp_path / "plain", body())
    whole = enhanced(tmp_path / "many/one.dcm", body())
    one, two = (series.read([str(path) for path in sorted(folder.glob("*.dcm"))], b"s")
                for folder in (plain, whole.parent))
    assert np.array_equal(one.values, two.values) and np.array_equal(two.values, body())
    assert (one.spacing, one.only, one.facts["patient"]) == (MM, None, two.facts["patient"])
    assert two.spacing == MM and two.only is None
    rows = run(whole.parent, tmp_path / "out", tmp_path)
    assert [row["position"] for row in rows] == [f"{(k + 0.5) / 8:.4f}" for k in range(8)]
    turned = enhanced(tmp_path / "t.dcm", body(), ((1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)))
    with pytest.raises(Refused, match="frames of 2 orientations"):
        series.describe(str(turned))
    with pytest.raises(Refused, match="doubled"):
        series.read([str(enhanced(tmp_path / "d.dcm", body(), z=0.0))], b"s")


@pytest.mark.parametrize("spoil, said", [
    (lambda data: data[:-200], "damaged"), (lambda data: b"\x1f\x8b" + b"\0" * 60, "damaged"),
    (lambda data: data[:40], "damaged"),
    (lambda data: b"\x1f\x8b\x08\0\0\0\0\0\0\0" + b"\xff" * 400, "damaged"),  # no deflate
    (lambda data: data[:-8] + b"\0\0\0\0" + data[-4:], "damaged"),          # its checksum
])
def test_damaged_files_are_named_and_the_rest_comes_in(tmp_path, capsys, spoil, said):
    save(tmp_path / "n/good.nii.gz", body(), affine())
    path = save(tmp_path / "n/bad.nii.gz", np.random.default_rng(0).normal(size=(24, 20, 8)),
                affine())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "n", tmp_path / "out", tmp_path)
    assert ended.value.code == 1 and said in capsys.readouterr().err
    assert [len(line["rows"]) for line in runs.read_log(tmp_path / "out/import.jsonl")] == [8]


def test_a_pipe_is_not_opened_and_one_content_under_two_labels_is_left_out(tmp_path, capsys):
    save(tmp_path / "n/a/x.nii.gz", body(), affine())
    shutil.copytree(tmp_path / "n/a", tmp_path / "n/b")
    save(tmp_path / "n/b/y.nii.gz", body() + 1, affine())
    os.mkfifo(tmp_path / "n/b/z.nii")
    dicoms(tmp_path / "n/a/series", body())
    shutil.copytree(tmp_path / "n/a/series", tmp_path / "n/b/series")
    with pytest.raises(SystemExit):
        run(tmp_path / "n", tmp_path / "out", tmp_path, label="", label_from=("a", "b"))
    with open(tmp_path / "out/metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["label"] for row in rows} == {"b"}
    said = capsys.readouterr().err
    assert f"18 skipped: {REASONS['conflict'][1]}" in said and REASONS["link"][1] in said


@pytest.mark.parametrize("one, two, volumes", [
    ({"PatientID": "1"}, {"PatientID": "2"}, 2),             # two patients, one series
    ({"ImageOrientationPatient": [1, 1e-5, 0, 0, 1, 0]},
     {"ImageOrientationPatient": [1, -1e-5, 0, 0, 1, 0]}, 1)])
def test_a_volume_is_of_one_patient_and_one_orientation_but_for_rounding(tmp_path, one, two,
                                                                         volumes):
    dicoms(tmp_path / "d/one", body()[:, :, :4], **one)
    dicoms(tmp_path / "d/two", body()[:, :, :4], **two, ImagePositionPatient=lambda k: [
        -20, -20, 20 + 5.0 * k])
    rows = run(tmp_path / "d", tmp_path / "out", tmp_path)
    assert len(rows) == 8 and len({row["volume"] for row in rows}) == volumes


def test_without_a_patient_a_volume_is_one_and_grey_is_bright_where_the_file_means_it(tmp_path):
    def volume(name, **elements) -> Volume:
        folder = dicoms(tmp_path / name, body(), **elements)
        return series.read([str(path) for path in folder.glob("*.dcm")], b"s")

    nobody = volume("none", PatientID=None, StudyInstanceUID=None)
    assert nobody.facts["patient"] == "v" + nobody.facts["volume"]
    for fault in ({"RescaleIntercept": None}, {"RescaleType": "US"}):
        with pytest.raises(Refused) as found:
            volume(f"no {fault}", **fault)
        assert found.value.key == "scale"
    plain, turned = (next(slices.cut(volume(kind, Modality="MR", photometric=kind), slices.Cut()))
                     [0].astype(int) for kind in ("MONOCHROME2", "MONOCHROME1"))
    assert np.abs(plain + turned - 255).max() <= 1


def test_a_kill_within_a_volume_and_a_series_that_grows(tmp_path, monkeypatch):
    """What was half written is written again; the volume of fewer slices is gone."""
    whole, late = dicoms(tmp_path / "d", body()), tmp_path / "7.dcm"
    shutil.move(whole / "7.dcm", late)
    real, written = runs.write_atomic, []

    def write(path, *given, **knobs):
        written.append(path)
        if len(written) == 4:
            raise KeyboardInterrupt
        real(path, *given, **knobs)

    monkeypatch.setattr(runs, "write_atomic", write)
    with pytest.raises(KeyboardInterrupt):
        run(whole, tmp_path / "out", tmp_path)
    assert len(run(whole, tmp_path / "out", tmp_path)) == 7
    shutil.move(late, whole / "7.dcm")
    rows = run(whole, tmp_path / "out", tmp_path)
    assert len(rows) == 8 == len([*(tmp_path / "out/images").rglob("*.png")])


@pytest.mark.parametrize("knobs, said", [
    ({"window": "auto"}, "--window auto: CT needs lung, soft, bone or wide"),
    ({"accept_burned_in": ("maybe",)}, "allowed are absent and yes"),
    ({"label": ""}, "--label NAME"), ({"between": (0.5, 0.2)}, "--between 0.5 0.2"),
    ({"slices": -1}, "--slices -1"), ({"modality": ""}, "--modality CT or MR"),
])
def test_bad_settings_are_one_sentence(tmp_path, knobs, said):
    save(tmp_path / "n/x.nii", body(), affine())
    with pytest.raises(InputError, match=said):
        run(tmp_path / "n", tmp_path / "out", tmp_path, **knobs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("modality, window", [("CT", "lung"), ("MR", "auto")])
def test_the_phantom_shows_what_its_label_says(tmp_path, modality, window):
    phantom.write(phantom.PhantomConfig(str(tmp_path / "n"), 4, modality))
    rows = run(tmp_path / "n", tmp_path / "out", tmp_path, label="", label_from=phantom.LABELS,
               modality=modality, slices=4, between=(0.25, 0.75), window=window)
    assert len(rows) == 16 and {row["label"] for row in rows} == {*phantom.LABELS}
    roughness = {label: np.mean([np.abs(np.diff(x[10:-10, 10:-10].astype(float), axis=0)).mean()
                                 for x, row in zip(pictures(tmp_path / "out", rows), rows)
                                 if row["label"] == label]) for label in phantom.LABELS}
    assert roughness["nodules"] > 1.1 * roughness["normal"]
    again, label = phantom.volume(1, 0, modality)
    assert np.array_equal(again, phantom.volume(1, 0, modality)[0]) and label == "nodules"


def test_the_files_of_nibabel_and_pydicom_come_in(tmp_path):
    from nibabel.testing import data_path
    for name, frame in (("anatomical.nii", 0), ("functional.nii", 3), ("example4d.nii.gz", 2),
                        ("example_nifti2.nii.gz", 1)):
        found = nifti.read(str(Path(data_path) / name), "MR", b"s", "0", frame)
        assert [*slices.cut(found, slices.Cut("coronal"))] and min(found.spacing) > 0
    files = pytest.importorskip("pydicom.data")
    for name, kind in (("CT_small.dcm", "CT"), ("MR_small.dcm", "MR")):
        path = files.get_testdata_file(name)
        assert series.describe(path)
        found = series.read([path], b"s", ("absent",))
        window = "soft" if kind == "CT" else "auto"
        (grey, row), = slices.cut(found, slices.Cut(window=window))
        assert row["modality"] == kind and grey.shape == found.values.shape[1::-1]
