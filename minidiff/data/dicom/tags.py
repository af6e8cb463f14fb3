"""What may leave a DICOM file besides its pixels: five facts, each from a closed set of values.

    age       whole years, 90 for all who are older; from PatientAge, else from birth date and the
              date of the study; a PatientAge without a unit is years, where there is no birth date
    sex       F, M or O
    view      a code of VIEWS, from ViewPosition, else from ViewCodeSequence
    modality  a code of MODALITIES
    patient   "p" and 64 bits of HMAC-SHA256 of PatientID under a secret salt; without an id "s" and
              that of the study, so that images of one examination stay together

A value outside its set is unknown (""), since a free text may hold anything. (DICOM PS3.15 Annex E
lists elements to remove; a list of what may stay cannot forget one.)
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
import sys
from datetime import date, datetime
from pathlib import Path

from minidiff import cells
from minidiff.data.dicom import Dataset, Refused
from minidiff.data.dicom.pixels import text
from minidiff.download import home
from minidiff.errors import InputError

OLDEST = 90  # years; higher ages are few enough to name a person (45 CFR 164.514(b)(2)(i)(C))
SEXES = ("F", "M", "O")
VIEWS = ("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "LATERAL", "LPO", "RPO", "LAO", "RAO")
WORDS = {  # how a view is also written, in capitals and without signs; the first that fits
    r"ANTER(O|IOR) ?POSTERIOR": "AP", r"POSTER(O|IOR) ?ANTERIOR": "PA", "A P": "AP", "P A": "PA",
    "(LEFT|LT|L) ?LAT(ERAL)? DECUB(ITUS)?": "LLD", "(RIGHT|RT|R) ?LAT(ERAL)? DECUB(ITUS)?": "RLD",
    "LEFT ANTERIOR OBLIQUE": "LAO", "LEFT POSTERIOR OBLIQUE": "LPO",
    "RIGHT ANTERIOR OBLIQUE": "RAO", "RIGHT POSTERIOR OBLIQUE": "RPO",
    "(LEFT|LT|L) ?LAT(ERAL)?|LAT(ERAL)? (LEFT|LT|L)": "LL",
    "(RIGHT|RT|R) ?LAT(ERAL)?|LAT(ERAL)? (RIGHT|RT|R)": "RL", "LAT": "LATERAL",
}
BESIDE = ("CHEST", "THORAX", "VIEW", "PROJECTION", "PORTABLE", "BEDSIDE", "MOBILE", "ERECT",
          "UPRIGHT", "STANDING", "SITTING", "SUPINE", "SEMI", "AXIAL", "LORDOTIC", "XTABLE", "IM",
          "LIEGEN", "LIEGEND", "STEHEN", "STEHEND", "SITZEN", "SITZEND")
VIEW_CODES = {  # of PS3.16 CID 4010, in SNOMED CT and in SNOMED RT
    "399348003": "AP", "R-10206": "AP", "272479007": "PA", "R-40888": "PA", "R-10214": "PA",
    "399067008": "LATERAL", "R-102CD": "LATERAL", "399173006": "LL", "R-10236": "LL",
    "399198007": "RL", "R-10232": "RL", "399135007": "LAO", "R-10220": "LAO",
    "399006002": "LPO", "R-10212": "LPO", "399356000": "RAO", "R-40985": "RAO",
    "399038007": "RPO", "R-10210": "RPO",
}
MODALITIES = ("CR", "DX", "RG", "RF", "XA", "PX", "IO", "MG", "CT", "MR", "PT", "NM", "US", "OT",
              "SC")
DATES = ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")  # of the image; the first
NEEDED = ("PatientAge", "PatientBirthDate", *DATES, "PatientSex", "ViewPosition",
          "ViewCodeSequence", "Modality", "PatientID", "StudyInstanceUID", "BurnedInAnnotation")


def facts(ds: Dataset, salt: bytes) -> dict[str, str]:
    """The row of one file: patient, sex, age, view, modality. Raises Refused for a modality whose
    values are not grey levels."""
    kind = text(ds, "Modality").upper()
    if kind not in ("", *MODALITIES):
        raise Refused("modality", kind)
    patient, study = text(ds, "PatientID"), text(ds, "StudyInstanceUID")
    known = "s" + keyed(salt, "study", study) if study else ""
    known = "p" + keyed(salt, "patient", patient) if patient else known
    return {"patient": known, "sex": sex(text(ds, "PatientSex")), "age": age(ds),
            "view": view(ds), "modality": kind}


def sex(words: str) -> str:
    """One of SEXES, however it is spelled; "" for all else."""
    known = cells.WORDS["sex"].get(words.casefold(), "").upper()
    return known if known in SEXES else ""


def age(ds: Dataset) -> str:
    """Whole years at the study, OLDEST at most; "" where unknown or impossible."""
    match = re.fullmatch(r"(\d{1,3})(?:\.0*)? ?([a-z]*)", text(ds, "PatientAge").casefold())
    number, unit = (int(match[1]), match[2]) if match else (0, "")
    born = _day(text(ds, "PatientBirthDate"))
    day = next(filter(None, (_day(text(ds, name)) for name in DATES)), None)
    if unit and unit in cells.YEARS:
        years = int(number * cells.YEARS[unit])
    elif born and day:
        years = day.year - born.year - ((day.month, day.day) < (born.month, born.day))
    else:  # 0 without a unit may stand for unknown
        years = number if number and not unit else -1
    return str(min(years, OLDEST)) if 0 <= years <= cells.OLDEST else ""


def view(ds: Dataset) -> str:
    """A code of VIEWS; "" where it is unknown, and where two are named that contradict each other:
    in the elements, or as code and meaning."""
    named = {view_of(text(ds, "ViewPosition"))}
    for item in ds.get("ViewCodeSequence") or []:
        named |= {VIEW_CODES.get(text(item, "CodeValue"), ""), view_of(text(item, "CodeMeaning"))}
    named -= {""} if not named & {"LL", "RL"} else {"", "LATERAL"}  # which says less
    return named.pop() if len(named) == 1 else ""


def view_of(words: str) -> str:
    """The one view that a text names, and nothing else but how the patient stood or lay."""
    words = " ".join(re.findall("[A-Z]+", words.upper()))
    for pattern, code in WORDS.items():
        words = re.sub(rf"\b({pattern})\b", code, words)
    named = [word for word in words.split() if word not in BESIDE]
    return named[0] if len(named) == 1 and named[0] in VIEWS else ""


def keyed(salt: bytes, what: str, value: str | bytes) -> str:
    """64 bits in hexadecimal that name a value to those who have the salt alone (RFC 2104)."""
    value = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return hmac.new(salt, what.encode() + b"\0" + value, hashlib.sha256).hexdigest()[:16]


def salt_file(named: str) -> Path:
    """The file of the secret: the one that is named, else that of this user."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home() / ".config")
    return Path(named or config / "minidiff" / "dicom.salt")


def read_salt(path: Path) -> bytes:
    """The secret in this file, which is made on first use, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            print(f"{path}: others may read the salt; chmod 600 it", file=sys.stderr)
    salt = path.read_text(errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{64}", salt):
        raise InputError(f"{path}: no salt, which is one line of 64 hexadecimal digits; a new file "
                         "is made where none is")
    return bytes.fromhex(salt)


def _day(digits: str) -> date | None:
    try:
        day = datetime.strptime(re.sub("[.-]", "", digits), "%Y%m%d").date()  # once 1960.01.31
    except ValueError:
        return None
    return day if day.year > 1850 and len(digits) in (8, 10) else None
