"""Pixels of written-then-read DICOM files against values by hand and against pydicom."""

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
from dicom_files import ARRAY, NATIVE, OPTIONS, PACKED, encode, item, lut, make, pydicom, uid
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from minidiff.data.dicom import Refused, pixels, reader

pytestmark = pytest.mark.filterwarnings("ignore")
DEPTHS = [(8, False), (10, False), (12, False), (16, False), (8, True), (12, True), (16, True)]


def shown(ds, syntax=uid.ExplicitVRLittleEndian, **how):
    return pixels.grey(reader.load(encode(ds, syntax)), **how)


def refused(ds, syntax=uid.ExplicitVRLittleEndian, **how) -> str:
    with pytest.raises(Refused) as error:
        shown(ds, syntax, **how)
    return error.value.key


def spread(stored, signed):
    """All of the range of these bits: least, greatest and what lies between, in 6 x 8."""
    low = -(2 ** (stored - 1)) if signed else 0
    return np.rint(np.linspace(low, low + 2**stored - 1, 48)).astype(int).reshape(6, 8), low


@pytest.mark.parametrize("stored,signed", DEPTHS)
@pytest.mark.parametrize("syntax", {**NATIVE, **PACKED}.values(), ids=list({**NATIVE, **PACKED}))
def test_every_depth_survives_every_transfer_syntax_exactly(syntax, stored, signed):
    """A LINEAR window of 2^b values round the middle of the range maps x to (x − low) / (2^b − 1):
    the identity.
    """
    x, low = spread(stored, signed)
    ds = make(np.tile(x, (6, 6)), stored, signed, WindowCenter=low + 2 ** (stored - 1),
              WindowWidth=2**stored)
    expected = np.tile((x - low) / (2**stored - 1), (6, 6))
    got = shown(ds, syntax, window="file", bits=16)
    assert got.dtype == np.uint16
    assert np.array_equal(got, np.rint(expected * 65535))


@pytest.mark.skipif(not shutil.which("dcmcjpeg"), reason="dcmtk is not installed")
@pytest.mark.parametrize("stored,signed", [(8, False), (12, False), (16, False), (16, True)])
def test_lossless_jpeg_as_dcmtk_writes_it(tmp_path, stored, signed):
    if not pydicom.pixels.get_decoder(uid.JPEGLosslessSV1).is_available:
        pytest.skip("no decoder of lossless JPEG is installed")
    x, low = spread(stored, signed)
    x = np.tile(x, (8, 8))
    ds = make(x, stored, signed, WindowCenter=low + 2 ** (stored - 1), WindowWidth=2**stored)
    (tmp_path / "a").write_bytes(encode(ds))
    subprocess.run(["dcmcjpeg", "+e1", tmp_path / "a", tmp_path / "b"], check=True)
    ds = reader.load((tmp_path / "b").read_bytes())
    assert ds.file_meta.TransferSyntaxUID == uid.JPEGLosslessSV1
    assert np.array_equal(pixels.grey(ds, bits=16), np.rint((x - low) / (2**stored - 1) * 65535))


def test_windows_give_the_values_of_the_standard():
    x = np.array([[0, 29, 30, 31, 40, 49, 50, 51]])
    # LINEAR: 0 at 29.5, 1 at 49.5; EXACT: 0 at 29.5, 1 at 50.5
    edges = {"WindowCenter": 40, "WindowWidth": 21}
    assert shown(make(x, 12, **edges)).tolist() == [np.rint(255 * np.clip((x[0] - 29.5) / 20, 0,
                                                                          1)).tolist()]
    exact = shown(make(x, 12, **edges, VOILUTFunction="LINEAR_EXACT"))
    assert exact.tolist() == [np.rint(255 * np.clip((x[0] - 29.5) / 21, 0, 1)).tolist()]
    sigmoid = shown(make(x, 12, **edges, VOILUTFunction="SIGMOID"), bits=16)
    assert sigmoid.tolist() == [np.rint(65535 / (1 + np.exp(-4 * (x[0] - 40) / 21))).tolist()]
    step = shown(make(x, 12, WindowCenter=40, WindowWidth=1))
    assert step.tolist() == [[0, 0, 0, 0, 255, 255, 255, 255]]
    several = shown(make(x, 12, WindowCenter=[40, 1000], WindowWidth=[21, 2000]))
    assert np.array_equal(several, shown(make(x, 12, **edges)))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
def test_windows_equal_pydicoms(function, signed):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.integers(-2048 * signed, 4096 - 2048 * signed, (6, 8))
        ds = make(
            x, 12, signed, VOILUTFunction=function, WindowCenter=str(rng.integers(-500, 2000)),
            WindowWidth=str(rng.integers(2, 3000)), RescaleSlope=str(rng.choice([0.5, 1, 2.5])),
            RescaleIntercept=str(rng.integers(-1024, 10)))
        got = shown(ds, bits=16).astype(int)
        peer = apply_voi_lut(apply_modality_lut(x.astype("i4"), ds), ds)
        ends = np.array([0, 4095]) - 2048 * signed
        low, high = ends * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.abs(got - (peer - low) / (high - low) * 65535).max() <= 0.5 + 1e-6


def test_lookup_tables():
    x = np.array([[0, 5, 9, 10, 11, 12, 13, 200]])
    entries = [7, 100, 1000, 4095]
    for packed in (False, True):
        got = shown(make(x, 12, VOILUTSequence=[lut(10, 12, entries, packed)], WindowCenter=1,
                         WindowWidth=2), bits=16)
        # below the first value the first entry, above the last one the last
        index = [0, 0, 0, 0, 1, 2, 3, 3]
        assert got.tolist() == [np.rint(np.take(entries, index) / 4095 * 65535).tolist()]
    shifted = make(x - 12, 12, True, VOILUTSequence=[lut(-2, 12, entries)])
    assert shown(shifted, bits=16).tolist() == got.tolist()
    both = make(x, 12, ModalityLUTSequence=[lut(9, 8, [0, 50, 100])],
                VOILUTSequence=[lut(50, 8, [0, 255])])
    assert shown(both).tolist() == [[0, 0, 0, 0, 255, 255, 255, 255]]
    short = item(LUTData=b"\0\0\1\1")
    short.add_new("LUTDescriptor", "US", [9, 0, 12])
    assert refused(make(x, 12, VOILUTSequence=[short])) == "damaged"


def test_a_table_of_8_bits_may_have_more_than_256_entries():
    """There pydicom 3.0 counts the entries in the type of their values, and wraps."""
    x = np.array([[0, 255, 256, 1000, 4095, 300, 10, 20]])
    entries = np.arange(4096) // 16
    got = shown(make(x, 12, VOILUTSequence=[lut(0, 8, entries)]))
    assert got.tolist() == [(x[0] // 16).tolist()]


def test_65536_entries_and_a_first_value_read_with_the_wrong_sign():
    x = np.array([[0, 1, 40000, 65535, 5, 6, 7, 8]])
    table = item(LUTData=np.arange(65536).astype("<u2").tobytes())
    table["LUTData"].VR = "OW"
    table.add_new("LUTDescriptor", "US", [0, 0, 16])
    assert np.array_equal(shown(make(x, 16, VOILUTSequence=[table]), bits=16), x)
    late = lut(40000, 8, [3, 255])
    assert shown(make(x, 16, VOILUTSequence=[late]),
                 uid.ImplicitVRLittleEndian).tolist() == [[3, 3, 3, 255, 3, 3, 3, 3]]


def test_monochrome1_is_turned_and_rescale_may_turn_too():
    plain = shown(make(ARRAY))
    assert np.array_equal(plain, ARRAY)  # 8 bits without a window stay as they are
    assert np.array_equal(shown(make(ARRAY, photometric="MONOCHROME1")), 255 - ARRAY)
    assert np.array_equal(shown(make(ARRAY, photometric="MONOCHROME1",
                                     PresentationLUTShape="INVERSE")), 255 - ARRAY)
    assert np.array_equal(shown(make(ARRAY, RescaleSlope=-1, RescaleIntercept=255)), 255 - ARRAY)
    assert refused(make(ARRAY, PresentationLUTShape="INVERSE")) == "sense"
    assert np.array_equal(shown(make(ARRAY - 128, signed=True)), ARRAY)


def test_percentiles_leave_padding_out():
    rng = np.random.default_rng(1)
    x = rng.normal(2000, 300, (40, 50)).astype(int)
    padded = x.copy()
    padded[:10] = 4095
    low, high = np.percentile(padded[10:], pixels.PERCENTILES, method="inverted_cdf")
    expected = np.rint(255 * np.clip((padded - low) / (high - low), 0, 1))
    expected[:10] = 0  # padding is black, bright though its value is
    assert np.array_equal(shown(make(padded, 12, PixelPaddingValue=4095)), expected)
    padded[0], expected[0] = 4090, 0
    assert np.array_equal(shown(make(padded, 12, PixelPaddingValue=4095,
                                     PixelPaddingRangeLimit=4090)), expected)
    turned = make(x - 2048, 12, True, "MONOCHROME1")
    # two's complement, read as unsigned
    turned.add_new("PixelPaddingValue", "US", int(x[0, 0] - 2048) & 0xFFFF)
    assert shown(turned)[0, 0] == 0
    assert refused(make(np.full((4, 4), 9), 12, PixelPaddingValue=9)) == "window"
    assert shown(make(np.full((4, 4), 9), 12)).max() == 0


def test_ct_and_mr_windows():
    hounsfield = np.array([[-1350, -1349, -600, 0, 40, 149, 150, 400]])
    ct = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
    stored = hounsfield + 1024
    stored[stored < 0] = 0
    lung = shown(make(stored, 12, **ct), window="lung", bits=16)
    assert np.array_equal(lung,
                          np.rint(65535 * np.clip((stored - 1024 + 600.5) / 1499 + 0.5, 0, 1)))
    assert shown(make(stored, 12, **ct), window="soft")[0, [0, 3, 4, 7]].tolist() == [0, 102, 128,
                                                                                      255]
    assert refused(make(stored, 12, **ct)) == "window"
    for wrong in ({"RescaleType": "US"}, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
                  {"RescaleIntercept": None}):
        assert refused(make(stored, 12, **{**ct, **wrong}), window="lung") == "window"
    assert refused(make(ARRAY), window="bone") == refused(make(ARRAY, 12),
                                                          window="file") == "window"
    mr = make(ARRAY, 12, Modality="MR", WindowCenter=10, WindowWidth=2)
    assert np.array_equal(shown(mr), shown(mr, window="percentile"))
    assert not np.array_equal(shown(mr), shown(mr, window="file"))


def test_one_frame_of_several():
    frames = np.stack([ARRAY, ARRAY + 100, 255 - ARRAY])
    ds = make(frames[0], NumberOfFrames=3, PixelData=frames.astype("u1").tobytes())
    assert refused(ds) == refused(ds, frame=4) == "frames"
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless):
        for k in (1, 2, 3):
            ds = make(ARRAY, NumberOfFrames=3, PixelData=frames.astype("u1").tobytes())
            assert np.array_equal(shown(ds, syntax, frame=k), frames[k - 1])
    assert np.array_equal(shown(make(ARRAY), frame=2), ARRAY)  # an image of one frame is that frame
    assert refused(make(ARRAY, NumberOfFrames=10**9), frame=5) == "frames"


def test_an_enhanced_image_keeps_rescale_and_window_with_its_frames():
    frames = np.stack([ARRAY, ARRAY])
    shared = item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-10,
                                                         RescaleType="US")])
    per = [item(FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=41)]) for c in (10, 30)]
    ds = make(ARRAY, 12, NumberOfFrames=2, PixelData=frames.astype("u2").tobytes(),
              SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=per)
    for k, centre in ((1, 10), (2, 30)):
        expected = np.rint(255 * np.clip((2 * ARRAY - 10 - centre + 0.5) / 40 + 0.5, 0, 1))
        assert np.array_equal(shown(ds, frame=k), expected)


def test_colour_is_refused_unless_it_is_grey():
    same = np.repeat(ARRAY[..., None], 3, 2)
    assert np.array_equal(shown(make(same, photometric="RGB")), ARRAY)
    assert np.array_equal(shown(make(same, photometric="RGB"), bits=16), ARRAY * 257)
    assert np.array_equal(shown(make(np.stack([ARRAY, ARRAY * 0 + 128, ARRAY * 0 + 128], 2),
                                     photometric="YBR_FULL")), ARRAY)
    same[2, 3, 1] += 3
    assert refused(make(same, photometric="RGB")) == "colour"
    assert refused(make(ARRAY, photometric="PALETTE COLOR")) == "colour"


def test_overlays_in_unused_bits_are_masked():
    x = ARRAY * 20
    marked = x | np.where(ARRAY % 2, 0xF000, 0)
    assert np.array_equal(shown(make(marked, 12, WindowCenter=2048, WindowWidth=4096), bits=16),
                          np.rint(x / 4095 * 65535))


@pytest.mark.parametrize("elements,key", [
    ({"Rows": 60000, "Columns": 60000}, "size"), ({"Rows": 0}, "size"),
    ({"Columns": 9000, "Rows": 10}, "size"),
    ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "bits"), ({"HighBit": 6}, "bits"),
    ({"BitsStored": 4}, "bits"), ({"PhotometricInterpretation": "MARKER"}, "damaged"),
    ({"PixelRepresentation": None}, "damaged"), ({"PixelSpacing": [0.1, 0.2]}, "stretched"),
    ({"PixelAspectRatio": [1, 2]}, "stretched"),
    ({"WindowCenter": 1, "WindowWidth": 0}, "window_values"), ({"WindowWidth": 9}, "window_values"),
    ({"WindowCenter": 1, "WindowWidth": 9, "VOILUTFunction": "X"}, "window_values"),
    ({"WindowCenter": -900, "WindowWidth": 9}, "window_values"),  # all is white
    ({"RescaleSlope": 0, "RescaleIntercept": 0}, "damaged"), ({"Rows": 7}, "damaged"),
    ({"PixelData": b""}, "damaged"),
    ({"PixelData": None}, "damaged"), ({"PixelData": None, "Rows": None}, "damaged"),
    ({"PixelData": None, "Rows": None, "SOPClassUID": uid.BasicTextSRStorage}, "pixelless"),
    ({"PixelData": None, "FloatPixelData": b"\0" * 192}, "bits"),
    ({"ImageType": ["DERIVED", "SECONDARY", "SYNTHETIC"]}, "synthetic"),
    ({"Modality": "SEG"}, "modality"), ({"BurnedInAnnotation": None}, "burned_absent"),
    ({"BurnedInAnnotation": "YES"}, "burned_yes"), ({"BurnedInAnnotation": ""}, "burned_absent"),
    ({"BurnedInAnnotation": "PERHAPS"}, "burned_absent"),
])
def test_each_reason_to_refuse(tmp_path, elements, key):
    (tmp_path / "x").write_bytes(encode(make(**elements)))
    with pytest.raises(Refused) as error:
        reader.convert(str(tmp_path / "x"), OPTIONS)
    assert error.value.key == key


@pytest.mark.parametrize("centre,width,says", [
    (b"2048", b"0 ", "WindowWidth 0, LINEAR: the width must be 1 or more"),
    (b"2048", b"-4096 ", "WindowWidth -4096"), (b"NaN ", b"4096", "WindowCenter nan"),
    (b"2048", b"", "WindowWidth None"), (b"20,5", b"4096", "WindowCenter: "),
    (b"auto", b"4096", "WindowCenter: "), (b"2048", b"1E400 ", "WindowWidth inf"),
    (b"9000", b"10", "WindowCenter 9000, WindowWidth 10: all its values become one grey"),
])
def test_a_faulty_window_is_named_and_percentiles_do_without_it(tmp_path, centre, width, says):
    ds = make(ARRAY * 80, 12)
    data = bytearray(encode(ds))
    at = data.index(b"\xe0\x7f\x10\x00")  # before the pixels
    for element, value in ((0x1051, width), (0x1050, centre)):
        data[at:at] = struct.pack("<HH2sH", 0x28, element, b"DS", len(value)) + value
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(Refused) as error:
        reader.convert(str(tmp_path / "x"), OPTIONS)
    assert error.value.key == "window_values" and says in error.value.detail
    (tmp_path / "plain").write_bytes(encode(ds))
    image, _ = reader.convert(str(tmp_path / "x"), OPTIONS._replace(window="percentile"))
    assert image == reader.convert(str(tmp_path / "plain"), OPTIONS)[0]


def test_burned_in_text_is_accepted_by_its_name_alone(tmp_path):
    for value, name in ((None, "absent"), ("YES", "yes")):
        (tmp_path / "x").write_bytes(encode(make(BurnedInAnnotation=value)))
        assert reader.convert(str(tmp_path / "x"), OPTIONS._replace(accept=(name,)))
        with pytest.raises(Refused):
            reader.convert(str(tmp_path / "x"),
                           OPTIONS._replace(accept=tuple({"absent", "yes"} - {name})))


def test_a_small_header_before_a_huge_stream_is_not_decoded():
    big = encode(make(np.zeros((600, 700))), uid.JPEG2000Lossless)
    ds = pydicom.dcmread(io.BytesIO(big))
    ds.Rows, ds.Columns = 6, 8
    buffer = io.BytesIO()
    ds.save_as(buffer)
    with pytest.raises(Refused) as error:
        pixels.grey(reader.load(buffer.getvalue()))
    assert error.value.args == ("mismatch", "700 x 600 compressed, 8 x 6 in the header")


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "JPEG2000", "JPEG-LS"])
def test_the_size_of_a_stream_is_read_without_decoding_it(kind):
    if kind == "JPEG-LS":
        stream = pydicom.encaps.get_frame(
            pydicom.dcmread(io.BytesIO(encode(make(), PACKED[kind]))).PixelData, 0)
        assert pixels.codestream_size(stream) == (6, 8)
        return
    buffer = io.BytesIO()
    Image.new("L", (37, 21)).save(buffer, "JPEG2000" if kind == "JPEG2000" else "JPEG",
                                  **({"progressive": True} if kind == "progressive" else {}))
    assert pixels.codestream_size(buffer.getvalue()) == (21, 37)
    assert pixels.codestream_size(b"") is None and pixels.codestream_size(
        buffer.getvalue()[:9]) is None
