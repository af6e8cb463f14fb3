"""Whole folders: what becomes of every file, what leaves and what does not, faults, limits, and
going on.
"""

import csv
import hashlib
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_files import ARRAY, NATIVE, OPTIONS, PACKED, SALT, encode, item, make, pydicom, uid
from PIL import Image
from pydicom.datadict import DicomDictionary, dictionary_VR

from minidiff import config
from minidiff.data import images
from minidiff.data.dicom import REASONS, Refused, folder, reader
from minidiff.data.dicom import __main__ as commands
from minidiff.data.dicom.guard import Guard
from minidiff.data.table import read_table
from minidiff.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")
# Attributes of PS3.15 Table E.1-1 (Basic Application Level Confidentiality Profile), by keyword
CONFIDENTIAL = """
AccessionNumber AcquisitionComments AcquisitionContextSequence AcquisitionDate AcquisitionDateTime
AcquisitionDeviceProcessingDescription AcquisitionProtocolDescription AcquisitionTime ActualHumanPerformersSequence
AdditionalPatientHistory AddressTrial AdmissionID AdmittingDate AdmittingDiagnosesCodeSequence
AdmittingDiagnosesDescription AdmittingTime AffectedSOPInstanceUID Allergies AuthorObserverSequence BranchOfService
CassetteID CommentsOnThePerformedProcedureStep ConcatenationUID ConfidentialityConstraintOnPatientDataDescription
ContentCreatorName ContentCreatorIdentificationCodeSequence ContentDate ContentSequence ContentTime
ContextGroupExtensionCreatorUID ContrastBolusAgent ContributionDescription CountryOfResidence CurrentObserverTrial
CurrentPatientLocation CustodialOrganizationSequence DataSetTrailingPadding DateOfSecondaryCapture DerivationDescription
DetectorID DeviceSerialNumber DeviceUID DigitalSignaturesSequence DimensionOrganizationUID DischargeDiagnosisDescription
DistributionAddress DistributionName EndAcquisitionDateTime EthnicGroup ExpectedCompletionDateTime
FailedSOPInstanceUIDList FiducialUID FillerOrderNumberImagingServiceRequest FrameComments FrameOfReferenceUID GantryID
GeneratorID GraphicAnnotationSequence HumanPerformerName HumanPerformerOrganization IconImageSequence
IdentifyingComments ImageComments ImagePresentationComments ImagingServiceRequestComments Impressions InstanceCreatorUID
InstanceCoercionDateTime InsurancePlanIdentification IntendedRecipientsOfResultsIdentificationSequence
InterpretationApproverSequence InterpretationAuthor InterpretationDiagnosisDescription InterpretationIDIssuer
InterpretationRecorder InterpretationText InterpretationTranscriber IrradiationEventUID IssueDateOfImagingServiceRequest
IssuerOfAdmissionID IssuerOfPatientID IssuerOfServiceEpisodeID LargePaletteColorLookupTableUID LastMenstrualDate MAC
MediaStorageSOPInstanceUID MedicalAlerts MedicalRecordLocator MilitaryRank ModifiedAttributesSequence
ModifiedImageDescription ModifyingDeviceID ModifyingSystem NameOfPhysiciansReadingStudy
NamesOfIntendedRecipientsOfResults Occupation OperatorIdentificationSequence OperatorsName OriginalAttributesSequence
OrderCallbackPhoneNumber OrderEnteredBy OrderEntererLocation OtherPatientIDs OtherPatientIDsSequence OtherPatientNames
OverlayDate OverlayTime PaletteColorLookupTableUID ParticipantSequence PatientAddress PatientAge PatientBirthDate
PatientBirthName PatientBirthTime PatientComments PatientID PatientInstitutionResidence PatientInsurancePlanCodeSequence
PatientMotherBirthName PatientName PatientPrimaryLanguageCodeSequence PatientReligiousPreference PatientSex
PatientSexNeutered PatientSize PatientState PatientTelecomInformation PatientTelephoneNumbers
PatientTransportArrangements PatientWeight PerformedLocation PerformedProcedureStepDescription PerformedProcedureStepID
PerformedProcedureStepStartDate PerformedProcedureStepStartTime PerformedStationAETitle
PerformedStationGeographicLocationCodeSequence PerformedStationName PerformedStationNameCodeSequence
PerformingPhysicianIdentificationSequence PerformingPhysicianName PersonAddress PersonIdentificationCodeSequence
PersonName PersonTelephoneNumbers PhysicianApprovingInterpretation PhysiciansOfRecord
PhysiciansOfRecordIdentificationSequence PhysiciansReadingStudyIdentificationSequence
PlacerOrderNumberImagingServiceRequest PlateID PreMedication PregnancyStatus ProtocolName
ReasonForTheImagingServiceRequest ReasonForStudy ReferencedDigitalSignatureSequence ReferencedFrameOfReferenceUID
ReferencedGeneralPurposeScheduledProcedureStepTransactionUID ReferencedImageSequence ReferencedPatientAliasSequence
ReferencedPatientSequence ReferencedPerformedProcedureStepSequence ReferencedSOPInstanceMACSequence
ReferencedSOPInstanceUID ReferencedStudySequence ReferringPhysicianAddress ReferringPhysicianIdentificationSequence
ReferringPhysicianName ReferringPhysicianTelephoneNumbers RegionOfResidence RelatedFrameOfReferenceUID
RequestAttributesSequence RequestedContrastAgent RequestedProcedureComments RequestedProcedureDescription
RequestedProcedureID RequestedProcedureLocation RequestedSOPInstanceUID RequestingPhysician RequestingService
ResponsibleOrganization ResponsiblePerson ResultsComments ResultsDistributionListSequence ResultsIDIssuer ReviewerName
ScheduledHumanPerformersSequence ScheduledPatientInstitutionResidence ScheduledPerformingPhysicianIdentificationSequence
ScheduledPerformingPhysicianName ScheduledProcedureStepEndDate ScheduledProcedureStepDescription
ScheduledProcedureStepLocation ScheduledProcedureStepStartDate ScheduledStationAETitle ScheduledStationName
ScheduledStudyLocation SeriesDate SeriesDescription SeriesInstanceUID SeriesTime ServiceEpisodeDescription
ServiceEpisodeID SmokingStatus SOPInstanceUID SourceImageSequence SpecialNeeds StationName StorageMediaFileSetUID
StudyComments StudyDate StudyDescription StudyIDIssuer StudyInstanceUID StudyTime SynchronizationFrameOfReferenceUID
TemplateExtensionCreatorUID TemplateExtensionOrganizationUID TextComments TextString TimezoneOffsetFromUTC TopicAuthor
TopicKeywords TopicSubject TopicTitle TransactionUID UID VerifyingObserverIdentificationCodeSequence
VerifyingObserverName VerifyingObserverSequence VerifyingOrganization VisitComments InstitutionAddress InstitutionName
InstitutionCodeSequence InstitutionalDepartmentName
""".split()  # noqa: SIM905
TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
MARK = {**dict.fromkeys(TEXT, "ZEBRA7"), "UI": "1.2.9997773.1", "DA": "19870607",
        "TM": "031415.926", "DT": "19870607031415", "IS": "9997773", "DS": "9997773", "AS": "053Y",
        **dict.fromkeys(("OB", "OW", "UN"), b"ZEBRA7")}
MARKS = (b"ZEBRA7", b"zebra7", b"9997773", b"19870607", b"1987-06-07", b"031415",
         "ZEBRA7".encode("utf-16-le"))


def run(source, out, *, salt=None, **changes):
    given = {"label": "covid", "label_from": (), "salt_file": salt or out.parent / "salt",
             "window": "auto", "frame": 0,
             "bits": 8, "accept": (), "workers": 2, "seconds": 60, **changes}
    return folder.import_folder(Path(source), out, **given)


def fates(out) -> dict[str, str]:
    """Source file → key of REASONS, or "imported"."""
    keys = {(result, why): key
            for key, (result, why) in REASONS.items()} | {("imported", ""): "imported"}
    with open(f"{out}.names.csv", newline="") as file:
        return {line["source"]: keys[line["result"], line["reason"]]
                for line in csv.DictReader(file)}


def everything(out) -> bytes:
    """All that stands in a folder: contents and names."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return b"\n".join([str(path.relative_to(out)).encode() for path in files] + [path.read_bytes()
                                                                                 for path in files])


def mark_all(ds, depth=0):
    """Fill every attribute of the dictionary that the image does not need; a sequence holds the
    same again.
    """
    kept = {*reader.pixels.NEEDED, "SpecificCharacterSet", "PixelData", "BurnedInAnnotation",
            "SOPClassUID"}
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if keyword in ("", *kept) or tag >> 16 in (
                0, 2, 4) or "LUT" in keyword or "FunctionalGroups" in keyword:
            continue
        vr = vr.split(" or ")[0]
        if vr in MARK:
            ds.add_new(tag, vr, MARK[vr])
        elif vr == "SQ" and depth == 0 and keyword in CONFIDENTIAL:
            ds.add_new(tag, "SQ", [mark_all(item(), depth=1)])
    block = ds.private_block(0x0099, "ZEBRA7 PRIVATE", create=True)
    block.add_new(1, "LO", "ZEBRA7")
    ds.add_new(0x60003000, "OW", b"ZEBRA7" * 3)
    ds.add_new(0x60000022, "LO", "ZEBRA7")
    return ds


def test_no_attribute_of_the_confidentiality_profile_survives(tmp_path):
    folder_name = tmp_path / "in" / "covid" / "ZEBRA7^JOHN"
    folder_name.mkdir(parents=True)
    ds = mark_all(make(ARRAY, BurnedInAnnotation="NO"))
    known = {keyword for keyword in CONFIDENTIAL
             if keyword in {v[4] for v in DicomDictionary.values()}}
    assert len(known) > 190
    planted = {element.keyword for element in ds.iterall()}
    elsewhere = {"AffectedSOPInstanceUID", "RequestedSOPInstanceUID", "MediaStorageSOPInstanceUID",
                 "StorageMediaFileSetUID"}
    values = {keyword for keyword in known
              if dictionary_VR(keyword).split(" or ")[0] in (*MARK, "SQ")}
    assert len(planted) > 2500 and not values - planted - elsewhere, values - planted
    ds.Modality = "DX"
    data = bytearray(encode(ds))
    data[:128] = b"ZEBRA7".ljust(128, b"Z")  # the preamble is free for anything
    (folder_name / "ZEBRA7.dcm").write_bytes(data)
    (folder_name / "ZEBRA7.txt").write_bytes(b"ZEBRA7")
    (folder_name / "ZEBRA7_bad.dcm").write_bytes(data[: len(data) // 2])
    sick = mark_all(make(ARRAY + 1))
    sick.Modality = "ZEBRA7"
    (folder_name / "ZEBRA7_modality.dcm").write_bytes(encode(sick))
    plain = make(ARRAY + 2, PatientName="ZEBRA7", PatientAge="053Y", PatientSex="M",
                 ViewPosition="AP")
    plain.PatientID = "ZEBRA7"
    (folder_name / "plain").write_bytes(encode(plain))
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, label="", label_from=("covid",)) == 1
    assert sorted(fates(out).values()) == ["damaged", "foreign", "imported", "imported", "modality"]
    content = everything(out)
    for mark in MARKS:
        assert mark not in content
    # nor an unsalted hash of an id, which a list of ids would open
    for way in ("sha256", "sha1", "md5"):
        assert hashlib.new(way, b"ZEBRA7").hexdigest()[:12].encode() not in content
    for path in out.glob("images/covid/*.png"):
        assert chunks(path.read_bytes()) <= {b"IHDR", b"IDAT", b"IEND"}
    rows = read_table(out, split=False).rows
    assert {row["age"] for row in rows} == {"53"} and {row["sex"] for row in rows} == {"", "M"}
    of_the_reader = {"file", "where", "split", "source"}
    assert set(rows[0]) - of_the_reader == {"file_name", "label", "patient", "sex", "age", "view",
                                            "modality"}
    assert len({row["patient"] for row in rows}) == 1  # the same PatientID
    for path in (tmp_path / "salt", tmp_path / "out.names.csv"):
        assert path.stat().st_mode & 0o777 == 0o600
    # this one names the sources, and stays outside
    assert b"ZEBRA7" in (tmp_path / "out.names.csv").read_bytes()


def chunks(data: bytes) -> set[bytes]:
    found, at = set(), 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        found, at = found | {kind}, at + 12 + length
    return found


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
    bomb.file_meta.MediaStorageSOPClassUID, bomb.file_meta.MediaStorageSOPInstanceUID = bomb.SOPClassUID, "2.25.1"
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
    run(files, tmp_path / "out", accept=("absent", "yes"), frame=1, window="auto")
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
    run(files, tmp_path / "ct", accept=("absent",), window="lung")
    assert fates(tmp_path / "ct")["CT_small.dcm"] == "imported"
    # one MR in seven transfer syntaxes: one picture
    with open(tmp_path / "out.names.csv", newline="") as file:
        names = {line["source"]: line["image"] for line in csv.DictReader(file)}
    kinds = ("", "_RLE", "_bigendian", "_implicit", "_expb", "_jpeg_ls_lossless", "_jp2klossless")
    same = [f"MR_small{kind}" for kind in kinds]
    pictures = [images.read(tmp_path / "out/images/covid" / f"{names[f'{name}.dcm']}.png")
                for name in same if fate[f"{name}.dcm"] == "imported"]
    assert len(pictures) >= 5 and all(np.array_equal(pictures[0], other) for other in pictures)


@pytest.fixture(scope="module")
def guard():
    guard = Guard()
    yield guard
    guard.stop()


@pytest.mark.parametrize("syntax", {**NATIVE, **PACKED}.values(), ids=list({**NATIVE, **PACKED}))
def test_a_file_cut_anywhere_is_never_half_an_image(tmp_path, guard, syntax):
    rng = np.random.default_rng(3)
    data = encode(make(rng.integers(0, 4096, (40, 48)), 12), syntax)
    image, _ = reader.convert(write(tmp_path, data), OPTIONS)
    for end in sorted({*rng.integers(0, len(data), 40), *range(len(data) - 8, len(data))}):
        try:
            assert guard.convert(write(tmp_path, data[:end]), OPTIONS)[0] == image
            assert end >= len(data) - 4  # an end mark or a filling byte: the image is whole without
        except Refused as refused:
            assert refused.key == "damaged" or end < 200


@pytest.mark.parametrize("syntax", {**NATIVE, **PACKED}.values(), ids=list({**NATIVE, **PACKED}))
def test_flipped_bytes_do_no_more_than_spoil_the_image(tmp_path, guard, syntax):
    rng = np.random.default_rng(4)
    data = encode(make(rng.integers(0, 4096, (40, 48)), 12, WindowCenter=9, WindowWidth=99), syntax)
    for _ in range(60):
        spoilt = bytearray(data)
        for at in rng.integers(128, len(data) if rng.random() < 0.3 else 700, 3):
            spoilt[at] = rng.integers(256)
        try:
            image, row = guard.convert(write(tmp_path, spoilt), OPTIONS)
        except Refused as refused:
            assert refused.key not in ("time", "memory")
        else:
            (tmp_path / "x.png").write_bytes(image)
            assert images.read(tmp_path / "x.png").ndim == 3 and set(row) == {
                "patient", "sex", "age", "view", "modality"}


def write(tmp_path, data) -> str:
    (tmp_path / "x").write_bytes(data)
    return str(tmp_path / "x")


def test_time_memory_and_a_crash_cost_one_file_only(tmp_path, guard):
    small = write(tmp_path, encode(make()))
    assert guard.convert(small, OPTIONS)
    os.kill(guard.process.pid, signal.SIGKILL)
    with pytest.raises(Refused, match="crash"):
        guard.convert(small, OPTIONS)
    assert guard.convert(small, OPTIONS)
    guard.seconds = 0
    os.kill(guard.process.pid, signal.SIGSTOP)  # or it might have answered before anybody looked
    with pytest.raises(Refused, match="time"):
        guard.convert(small, OPTIONS)
    guard.seconds = 60
    if sys.platform == "linux":
        tight = Guard(gigabytes=0.1)
        with pytest.raises(Refused, match="memory"):
            tight.convert(write(tmp_path, encode(make(np.zeros((6000, 6000)), 16))), OPTIONS)
        assert tight.convert(write(tmp_path, encode(make())), OPTIONS)
        tight.stop()


@pytest.mark.slow
def test_the_largest_image_that_is_allowed_fits(tmp_path, guard):
    x = np.random.default_rng(5).integers(0, 65536, (8000, 8000))
    assert x.size == images.MAX_PIXELS
    image, _ = guard.convert(write(tmp_path, encode(make(x, 16))), OPTIONS._replace(bits=16))
    assert len(image) > 10**8


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
    assert run(source, out, accept=("absent",)) == 0
    assert len(converted) == 1 and len(read_table(out, split=False)) == 6
    # 0, 1, 2 and 12345
    assert len({row["patient"] for row in read_table(out, split=False).rows}) == 4
    with pytest.raises(InputError, match="another window, bits"):
        run(source, out, window="percentile", bits=16)
    with pytest.raises(InputError, match="another salt"):
        run(source, out, salt=tmp_path / "other")
    assert run(source, tmp_path / "b", accept=("absent",)) == 0  # the same salt: the same names
    assert (tmp_path / "b" / "metadata.csv").read_bytes() == (out / "metadata.csv").read_bytes()
    assert run(source, tmp_path / "c", salt=tmp_path / "other", accept=("absent",)) == 0
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
    ({"label": ".x"}, "allowed are letters"), ({"accept": ("all",)}, "allowed are absent and yes"),
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
    assert done.returncode == 1 and "4 images of 1 patients" in done.stdout and "Traceback" not in done.stderr


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
