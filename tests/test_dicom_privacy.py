"""What leaves a DICOM file: five facts, and no attribute of the confidentiality profile."""

import hashlib
import struct

import pytest
from dicom_files import (
    ARRAY,
    encode,
    everything,
    fates,
    item,
    make,
    run,
)
from pydicom.datadict import DicomDictionary, dictionary_VR

from minidiff.data.dicom import reader, tags
from minidiff.data.table import read_table

pytestmark = pytest.mark.filterwarnings("ignore")
# Attributes of PS3.15 Table E.1-1 (Basic Application Level Confidentiality Profile), by keyword
CONFIDENTIAL = """
AccessionNumber AcquisitionComments AcquisitionContextSequence AcquisitionDate AcquisitionDateTime
AcquisitionDeviceProcessingDescription AcquisitionProtocolDescription AcquisitionTime
ActualHumanPerformersSequence AdditionalPatientHistory AddressTrial AdmissionID AdmittingDate
AdmittingDiagnosesCodeSequence AdmittingDiagnosesDescription AdmittingTime AffectedSOPInstanceUID
Allergies AuthorObserverSequence BranchOfService CassetteID CommentsOnThePerformedProcedureStep
ConcatenationUID ConfidentialityConstraintOnPatientDataDescription ContentCreatorName
ContentCreatorIdentificationCodeSequence ContentDate ContentSequence ContentTime
ContextGroupExtensionCreatorUID ContrastBolusAgent ContributionDescription CountryOfResidence
CurrentObserverTrial CurrentPatientLocation CustodialOrganizationSequence DataSetTrailingPadding
DateOfSecondaryCapture DerivationDescription DetectorID DeviceSerialNumber DeviceUID
DigitalSignaturesSequence DimensionOrganizationUID DischargeDiagnosisDescription
DistributionAddress DistributionName EndAcquisitionDateTime EthnicGroup ExpectedCompletionDateTime
FailedSOPInstanceUIDList FiducialUID FillerOrderNumberImagingServiceRequest FrameComments
FrameOfReferenceUID GantryID GeneratorID GraphicAnnotationSequence HumanPerformerName
HumanPerformerOrganization IconImageSequence IdentifyingComments ImageComments
ImagePresentationComments ImagingServiceRequestComments Impressions InstanceCreatorUID
InstanceCoercionDateTime InsurancePlanIdentification
IntendedRecipientsOfResultsIdentificationSequence InterpretationApproverSequence
InterpretationAuthor InterpretationDiagnosisDescription InterpretationIDIssuer
InterpretationRecorder InterpretationText InterpretationTranscriber IrradiationEventUID
IssueDateOfImagingServiceRequest IssuerOfAdmissionID IssuerOfPatientID IssuerOfServiceEpisodeID
LargePaletteColorLookupTableUID LastMenstrualDate MAC MediaStorageSOPInstanceUID MedicalAlerts
MedicalRecordLocator MilitaryRank ModifiedAttributesSequence ModifiedImageDescription
ModifyingDeviceID ModifyingSystem NameOfPhysiciansReadingStudy NamesOfIntendedRecipientsOfResults
Occupation OperatorIdentificationSequence OperatorsName OriginalAttributesSequence
OrderCallbackPhoneNumber OrderEnteredBy OrderEntererLocation OtherPatientIDs
OtherPatientIDsSequence OtherPatientNames OverlayDate OverlayTime PaletteColorLookupTableUID
ParticipantSequence PatientAddress PatientAge PatientBirthDate PatientBirthName PatientBirthTime
PatientComments PatientID PatientInstitutionResidence PatientInsurancePlanCodeSequence
PatientMotherBirthName PatientName PatientPrimaryLanguageCodeSequence PatientReligiousPreference
PatientSex PatientSexNeutered PatientSize PatientState PatientTelecomInformation
PatientTelephoneNumbers PatientTransportArrangements PatientWeight PerformedLocation
PerformedProcedureStepDescription PerformedProcedureStepID PerformedProcedureStepStartDate
PerformedProcedureStepStartTime PerformedStationAETitle
PerformedStationGeographicLocationCodeSequence PerformedStationName
PerformedStationNameCodeSequence PerformingPhysicianIdentificationSequence PerformingPhysicianName
PersonAddress PersonIdentificationCodeSequence PersonName PersonTelephoneNumbers
PhysicianApprovingInterpretation PhysiciansOfRecord PhysiciansOfRecordIdentificationSequence
PhysiciansReadingStudyIdentificationSequence PlacerOrderNumberImagingServiceRequest PlateID
PreMedication PregnancyStatus ProtocolName ReasonForTheImagingServiceRequest ReasonForStudy
ReferencedDigitalSignatureSequence ReferencedFrameOfReferenceUID
ReferencedGeneralPurposeScheduledProcedureStepTransactionUID ReferencedImageSequence
ReferencedPatientAliasSequence ReferencedPatientSequence ReferencedPerformedProcedureStepSequence
ReferencedSOPInstanceMACSequence ReferencedSOPInstanceUID ReferencedStudySequence
ReferringPhysicianAddress ReferringPhysicianIdentificationSequence ReferringPhysicianName
ReferringPhysicianTelephoneNumbers RegionOfResidence RelatedFrameOfReferenceUID
RequestAttributesSequence RequestedContrastAgent RequestedProcedureComments
RequestedProcedureDescription RequestedProcedureID RequestedProcedureLocation
RequestedSOPInstanceUID RequestingPhysician RequestingService ResponsibleOrganization
ResponsiblePerson ResultsComments ResultsDistributionListSequence ResultsIDIssuer ReviewerName
ScheduledHumanPerformersSequence ScheduledPatientInstitutionResidence
ScheduledPerformingPhysicianIdentificationSequence ScheduledPerformingPhysicianName
ScheduledProcedureStepEndDate ScheduledProcedureStepDescription ScheduledProcedureStepLocation
ScheduledProcedureStepStartDate ScheduledStationAETitle ScheduledStationName ScheduledStudyLocation
SeriesDate SeriesDescription SeriesInstanceUID SeriesTime ServiceEpisodeDescription
ServiceEpisodeID SmokingStatus SOPInstanceUID SourceImageSequence SpecialNeeds StationName
StorageMediaFileSetUID StudyComments StudyDate StudyDescription StudyIDIssuer StudyInstanceUID
StudyTime SynchronizationFrameOfReferenceUID TemplateExtensionCreatorUID
TemplateExtensionOrganizationUID TextComments TextString TimezoneOffsetFromUTC TopicAuthor
TopicKeywords TopicSubject TopicTitle TransactionUID UID
VerifyingObserverIdentificationCodeSequence VerifyingObserverName VerifyingObserverSequence
VerifyingOrganization VisitComments InstitutionAddress InstitutionName InstitutionCodeSequence
InstitutionalDepartmentName
""".split()  # noqa: SIM905
TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
MARK = {**dict.fromkeys(TEXT, "ZEBRA7"), "UI": "1.2.9997773.1", "DA": "19870607",
        "TM": "031415.926", "DT": "19870607031415", "IS": "9997773", "DS": "9997773", "AS": "053Y",
        **dict.fromkeys(("OB", "OW", "UN"), b"ZEBRA7")}
MARKS = (b"ZEBRA7", b"zebra7", b"9997773", b"19870607", b"1987-06-07", b"031415",
         "ZEBRA7".encode("utf-16-le"))


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


def facts(salt=b"x" * 32, **elements):
    return tags.facts(make(**elements), salt)


@pytest.mark.parametrize("elements,years", [
    *(({"PatientAge": text}, years)
      for text, years in (("045Y", "45"), ("018M", "1"), ("011M", "0"), ("024M", "2"),
                          ("003W", "0"), ("400D", "1"), ("090Y", "90"), ("101Y", "90"))),
    ({"PatientAge": "999Y"}, ""), ({"PatientAge": "MARKER"}, ""), ({}, ""),
    ({"PatientBirthDate": "19400229", "StudyDate": "20200228"}, "79"),
    ({"PatientBirthDate": "19400229", "StudyDate": "20200229"}, "80"),
    ({"PatientBirthDate": "19200101", "StudyDate": "20200229"}, "90"),
    ({"PatientBirthDate": "19700101", "ContentDate": "20200229"}, "50"),
    ({"PatientBirthDate": "1970.01.01", "StudyDate": "2020.02.29"}, "50"),
    ({"PatientBirthDate": "20300101", "StudyDate": "20200229"}, ""),
    ({"PatientBirthDate": "19701301", "StudyDate": "20200229"}, ""),
    ({"PatientBirthDate": "19700101"}, ""),
    ({"PatientAge": "050Y", "PatientBirthDate": "19200101", "StudyDate": "20200229"}, "50"),
    # as exports write it: without a unit, in small letters, in words
    *(({"PatientAge": text}, years)
      for text, years in (("45", "45"), ("045", "45"), ("6", "6"), ("120", "90"), ("045y", "45"),
                          ("45 Y", "45"), ("45.0", "45"), ("60 years", "60"), ("8 months", "0"),
                          ("151", ""), ("0", ""), ("000", ""), ("000Y", "0"), ("045X", ""),
                          ("-5", ""), ("4-5", ""), ("", ""))),
    # what has no unit yields to a birth date, which leaves no doubt
    ({"PatientAge": "006", "PatientBirthDate": "20190601", "StudyDate": "20200229"}, "0"),
    ({"PatientAge": "045X", "PatientBirthDate": "19200101", "StudyDate": "19700101"}, "50"),
])
def test_age_in_whole_years_capped(elements, years):
    assert facts(**elements)["age"] == years


def test_only_values_of_closed_sets_leave():
    row = facts(PatientSex="F", ViewPosition="PA")
    assert (row["sex"], row["view"], row["modality"]) == ("F", "PA", "DX")
    row = facts(PatientSex="SMITH", ViewPosition="PA SMITH", Modality="")
    assert (row["sex"], row["view"], row["modality"]) == ("", "", "")
    assert set(row) == {"patient", "sex", "age", "view", "modality"}


@pytest.mark.parametrize("stated,view", [
    ("PA", "PA"), ("pa", "PA"), ("P.A.", "PA"), ("P-A", "PA"), ("p/a", "PA"), ("CHEST PA", "PA"),
    ("POSTEROANTERIOR", "PA"), ("postero-anterior", "PA"), ("Posterior Anterior", "PA"),
    ("a.p. im Liegen", "AP"),
    ("AP SUPINE", "AP"), ("AP_PORTABLE", "AP"), ("ANTERO-POSTERIOR", "AP"), ("Thorax a.p.", "AP"),
    ("LAT", "LATERAL"), ("Lateral view", "LATERAL"), ("L LAT", "LL"), ("LEFT LATERAL", "LL"),
    ("LLAT", "LL"), ("RT LATERAL", "RL"), ("Right Lat.", "RL"), ("LAT R", "RL"),
    ("left lateral decubitus", "LLD"), ("LEFT ANTERIOR OBLIQUE", "LAO"), ("XTABLE LATERAL",
                                                                          "LATERAL"),
    ("PA AND LATERAL", ""), ("PA/LAT", ""), ("AP/PA", ""), ("AP LLD", ""), ("AP OBLIQUE", ""),
    ("FRONTAL", ""), ("PASTOR", ""), ("AP SMITH", ""), ("", ""),
])
def test_views_in_the_spellings_of_hospitals(stated, view):
    assert facts(ViewPosition=stated)["view"] == view


@pytest.mark.parametrize("stated,coded,view", [
    (None, ("399348003", "antero-posterior"), "AP"), ("", ("R-10214", "postero-anterior"), "PA"),
    (None, ("399173006", "Lateral links"), "LL"), (None, ("X-1", "left lateral"), "LL"),
    (None, ("399099002", "latero-medial oblique"), ""), (None, ("R-10202", "frontal"), ""),
    ("LL", ("399067008", "lateral"), "LL"), ("LATERAL", ("399198007", "right lateral"), "RL"),
    ("AP", ("272479007", "postero-anterior"), ""),        # they contradict each other
    (None, ("R-10214", "antero-posterior"), ""), ("SMITH", ("272479007", "SMITH"), "PA"),
])
def test_the_view_may_be_coded(stated, coded, view):
    code, meaning = coded
    sequence = [item(CodeValue=code, CodingSchemeDesignator="SCT", CodeMeaning=meaning)]
    assert facts(ViewPosition=stated or "", ViewCodeSequence=sequence)["view"] == view
    two = [*sequence, item(CodeValue="399061009", CodeMeaning="axial")]
    assert facts(ViewPosition=stated or "", ViewCodeSequence=two)["view"] == view


def test_sex_may_be_a_word():
    for text, sex in (("Female", "F"), ("m", "M"), ("OTHER", "O"), ("weiblich", "F"), ("D", ""),
                      ("FM", "")):
        assert facts(PatientSex=text)["sex"] == sex


def test_patients_have_the_same_name_under_the_same_salt_only():
    assert facts(PatientID="7") == facts(PatientID="7 ") != facts(PatientID="8")
    assert facts(PatientID="7") != facts(b"y" * 32, PatientID="7")
    assert facts(PatientID="7")["patient"][0] == "p"
    study = facts(PatientID=None, StudyInstanceUID="2.25.9")["patient"]
    assert study[0] == "s" and study != facts(PatientID="2.25.9")["patient"]
    assert facts(PatientID="", StudyInstanceUID="")["patient"] == ""


def test_the_salt_is_made_once_for_its_owner(tmp_path, capsys):
    path = tmp_path / "deep" / "salt"
    first = tags.read_salt(path)
    assert len(first) == 32 and path.stat().st_mode & 0o777 == 0o600 and tags.read_salt(
        path) == first
    assert tags.read_salt(tmp_path / "other") != first
    assert capsys.readouterr().err == ""
    path.chmod(0o644)
    tags.read_salt(path)
    assert "chmod 600" in capsys.readouterr().err
    path.write_text("secret")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        tags.read_salt(path)
