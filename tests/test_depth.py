"""Grey of 8 and 16 bits from one code: files, data sets, training, samples, DICOM; and what reads
16 as 8 says so.
"""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from minidiff import pixels, runs
from minidiff.cells import in_units
from minidiff.data import images
from minidiff.data.dataset import load_pixels, read_training_set
from minidiff.data.table import read_table, write_table
from minidiff.download import CACHE
from minidiff.evaluation.features.extractor import grey
from minidiff.evaluation.fid import files, load
from minidiff.sampling import plan
from minidiff.sampling.again import VerifyConfig, levels_apart, make_again

WINDOW = "-1000 1000 HU"
N = 30


def write_set(folder, bits=16, shift=0, **cells) -> np.ndarray:
    """N pictures of 32 px, a patient each, two labels; their uint16 values."""
    rng, rows, found = np.random.default_rng(shift), [], []
    for k in range(N):
        y, x = np.mgrid[:32, :32] / 31
        values = 20000 + 9000 * np.sin(3 * x + k) * y + 300 * rng.normal(size=(32, 32)) + shift
        values[8:20, 8:20] += 6000 * (k % 2)
        found.append(np.rint(values).clip(0, 65535).astype(np.uint16))
        name = f"images/{k:02d}.png"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        images.write(folder / name, images.in_depth(found[-1], bits))
        rows.append({"file_name": name, "label": "ab"[k % 2], "patient": str(k + shift),
                     "split": ["train", "train", "val"][k % 3], **cells})
    write_table(folder / "metadata.csv", rows)
    return np.stack(found)


def test_every_value_of_16_bits_goes_to_a_float_and_back():
    for dtype, top in ((torch.uint8, 255), (torch.uint16, 65535)):
        x = torch.arange(top + 1, dtype=torch.int32).to(dtype)
        floats = pixels.to_float(x)
        assert floats.min() == -1 and floats.max() == 1 and len(floats.unique()) == top + 1
        assert torch.equal(pixels.rounded(floats, dtype), x)
        assert torch.equal(pixels.to_pixels(floats, dtype), x)
    eight = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels.to_depth(pixels.to_depth(eight, torch.uint16), torch.uint8), eight)
    assert torch.equal(pixels.to_float(pixels.to_depth(eight, torch.uint16)),
                       pixels.to_float(eight))
    deep = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    gap = deep.float() - 257 * pixels.to_depth(deep, torch.uint8).float()
    assert gap.abs().max() <= 128  # the nearest of 256


def test_our_16_bits_are_read_as_they_are_and_those_of_others_are_stretched(tmp_path):
    values = np.linspace(20000, 30000, 40 * 30).reshape(30, 40).astype(np.uint16)
    images.write(tmp_path / "ours.png", values)
    Image.fromarray(values).save(tmp_path / "theirs.png")
    assert np.array_equal(images.read(tmp_path / "ours.png", deep=True), values[None])
    assert np.array_equal(images.read(tmp_path / "ours.png")[0], np.rint(values / 257))
    theirs = images.read(tmp_path / "theirs.png", deep=True)
    assert theirs.dtype == np.uint8 and (theirs.min(), theirs.max()) == (0, 255)
    small = images.square(values[None], 15)
    assert small.shape == (1, 15, 15) and small.dtype == np.uint16
    wanted = images.square(images.in_depth(values[None], 8), 15)
    assert np.abs(small / 257 - wanted).max() < 1
    assert images.smaller(images.png_bytes(values), 0.5)  # a page's picture, of 8 bits


@pytest.mark.parametrize("mapped", [False, True])
def test_a_set_is_of_16_bits_where_all_are_and_who_asks_for_8_is_told(tmp_path, monkeypatch,
                                                                        mapped):
    if mapped:
        monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    truth = write_set(tmp_path / "d")
    table, deep = load_pixels(read_table(tmp_path / "d"), 32, deep=True)
    order = [int(row["file_name"][-6:-4]) for row in table.rows]
    assert deep.dtype == torch.uint16 and np.array_equal(deep[:, 0].numpy(), truth[order])
    assert not any("16 bits" in note for note in table.notes)
    table, flat = load_pixels(read_table(tmp_path / "d"), 32)
    assert torch.equal(flat[:, :1], pixels.to_depth(deep[:, :1].contiguous(), torch.uint8))
    assert f"{N} images of 16 bits, read here as 8" in table.notes[-1]
    images.write(tmp_path / "d/images/07.png", np.arange(1024).reshape(32, 32).astype(np.uint8))
    table, mixed = load_pixels(read_table(tmp_path / "d"), 32, deep=True)
    assert mixed.dtype == torch.uint8 and f"{N - 1} images of 16 bits" in table.notes[-1]


def test_what_measures_takes_both_depths(tmp_path, capsys):
    truth = torch.from_numpy(write_set(tmp_path / "d"))[:, None]
    assert torch.allclose(grey(truth), truth[:, 0].float() / 65535)
    load(tmp_path / "d", files(tmp_path / "d"))
    assert f"{N} images {images.AS_EIGHT}" in capsys.readouterr().err
    some = pixels.Gathered(truth[:10], truth[10:], index=[3, 29, 11])
    assert torch.equal(some[:], truth[[3, 29, 11]]) and some[:].dtype == torch.uint16
    assert torch.equal(pixels.to_grey(truth.expand(-1, 3, -1, -1).contiguous()), truth)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A root trained for a few steps on 16 bits, and its samples."""
    root = tmp_path_factory.mktemp("deep")
    write_set(root / "data", modality="CT", window=WINDOW)
    known = {"root": str(root), "data": (str(root / "data"),), "batch": 4}
    train.train_vae(train.VAEConfig(**known, size=32, steps=12))
    train.train_diffusion(train.DiffusionConfig(**known, steps=4, snapshots=0))
    sample.sample(sample.SampleConfig(root=str(root), run=str(root / "diffusion"), per_label=3,
                                      steps=3, batch=4))
    return root


def test_training_sees_16_bits(run):
    cfg = train.VAEConfig(root=str(run), data=(str(run / "data"),), size=32)
    data = read_training_set(cfg, 32)
    assert data.bits == 16 and data.pixels.dtype == data.part("train").pixels.dtype == torch.uint16
    steps = pixels.to_float(data.pixels[:1]).unique().diff()
    assert steps.min() < 1.5 / 32767.5  # finer than 8 bits, 1/127.5
    facts = runs.read_json(run / "diffusion/model.json")
    assert (facts["bits"], facts["windows"]) == (16, {"CT": WINDOW})


def test_samples_are_of_16_bits_and_are_made_again(run):
    out = run / "samples"
    files = sorted(out.glob("images/*/*.png"))
    deep = [images.read(file, deep=True) for file in files]
    assert len(files) == 6 and {x.dtype for x in deep} == {np.dtype("uint16")}
    assert any((x % 257 != 0).any() for x in deep)  # not 8 bits in 16
    with open(out / "metadata.csv", newline="") as file:
        assert {row["window"] for row in csv.DictReader(file)} == {WINDOW}
    assert Image.open(files[0]).text["window"] == WINDOW
    again = make_again(out, VerifyConfig(root=str(run), out=str(out), k=6))
    assert set(again.apart.values()) == {0}
    assert levels_apart(torch.from_numpy(deep[0]), deep[0] + np.uint16(514)) == 2
    assert images.read(out / "sheets/set_0001.png").dtype == np.uint8


def test_what_a_mask_keeps_is_kept_in_16_bits(run, tmp_path):
    (tmp_path / "masks").mkdir()
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    for k in range(N):
        images.write(tmp_path / f"masks/{k:02d}.png", mask)
    sample.sample(sample.SampleConfig(
        root=str(run), run=str(run / "diffusion"), out=str(tmp_path / "edited"), per_label=1,
        origin=(str(run / "data"),), mask=str(tmp_path / "masks"), strength=1.0, steps=2))
    with open(tmp_path / "edited/metadata.csv", newline="") as file:
        for row in csv.DictReader(file):
            made, real = (images.read(path, deep=True) for path in (
                tmp_path / "edited" / row["file_name"], row["origin"]))
            assert np.array_equal(made[..., :16], real[..., :16])
            assert not np.array_equal(made[..., 16:], real[..., 16:])


def test_dicom_files_hold_hounsfield_units(run, tmp_path):
    pydicom = pytest.importorskip("pydicom", minversion="3")
    from minidiff.data.dicom import writer

    writer.export_samples(writer.ExportConfig(str(run / "samples"), str(tmp_path / "out")))
    for path in sorted((tmp_path / "out").rglob("*.dcm")):
        ds = pydicom.dcmread(path)
        png = images.read(run / "samples" / path.relative_to(tmp_path / "out").with_suffix(".png"),
                          deep=True)[0]
        units = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.abs(units - (-1000 + png / 65535 * 2000)).max() < 1e-3
        assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.RescaleType) == (16, 16, 15, "HU")
        assert (float(ds.WindowCenter), float(ds.WindowWidth)) == (0, 2000)
        assert "window" not in ds.ImageComments
    eight, deep = (writer.burn(np.zeros((1, 200, 200), f"uint{bits}")) for bits in (8, 16))
    assert eight.max() > 250 and np.array_equal(deep, eight * np.uint16(257))


def test_a_window_goes_to_the_samples_that_share_it():
    windows = {"CT": WINDOW, "MR": ""}
    rows = [{"label": "a", "modality": "CT"}, {"label": "a", "modality": "MR"}, {"label": "CT"},
            {"label": "a"}]
    assert [row.get("window") for row in plan.in_windows(rows, windows)] == [WINDOW, None, WINDOW,
                                                                            None]
    assert plan.in_windows([{"label": "a"}], {"CT": WINDOW})[0]["window"] == WINDOW
    assert plan.in_windows([{"label": "a"}], {}) == [{"label": "a"}]


@pytest.mark.parametrize("cell, found", [
    ("-1350 150 HU", (-1350, 150, "HU")), ("0 900", (0, 900, "")), ("lung", None), ("", None),
    ("150 -1350 HU", None), ("3 3", None), ("-160,240", None), ("nan 4", None), ("0 inf HU", None)])
def test_a_window_has_two_ends(cell, found):
    assert in_units(cell) == found
