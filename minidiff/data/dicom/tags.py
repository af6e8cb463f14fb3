"""What may leave a DICOM file besides its pixels: five facts, each from a closed set of values.

    age       whole years, 90 for all who are older; from PatientAge, else from birth date and the
              date of the study
    sex       F, M or O
    view      a code of VIEWS
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

from minidiff.data.dicom import Dataset, Refused
from minidiff.data.dicom.pixels import text
from minidiff.errors import InputError

OLDEST = 90  # years; higher ages are few enough to name a person (45 CFR 164.514(b)(2)(i)(C))
SEXES = ("F", "M", "O")
VIEWS = ("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "LATERAL", "LPO", "RPO", "LAO", "RAO")
MODALITIES = ("CR", "DX", "RG", "RF", "XA", "PX", "IO", "MG", "CT", "MR", "PT", "NM", "US", "OT",
              "SC")
DATES = ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")  # of the image; the first
NEEDED = ("PatientAge", "PatientBirthDate", *DATES, "PatientSex", "ViewPosition", "Modality",
          "PatientID", "StudyInstanceUID", "BurnedInAnnotation")
UNITS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def facts(ds: Dataset, salt: bytes) -> dict[str, str]:
    """The row of one file: patient, sex, age, view, modality. Raises Refused for a modality whose
    values are not grey levels."""
    kind = text(ds, "Modality")
    if kind not in ("", *MODALITIES):
        raise Refused("modality", kind)
    patient, study = text(ds, "PatientID"), text(ds, "StudyInstanceUID")
    known = "s" + keyed(salt, "study", study) if study else ""
    known = "p" + keyed(salt, "patient", patient) if patient else known
    sex, view = text(ds, "PatientSex").upper(), text(ds, "ViewPosition").upper()
    return {"patient": known, "sex": sex if sex in SEXES else "", "age": age(ds),
            "view": view if view in VIEWS else "", "modality": kind}


def age(ds: Dataset) -> str:
    """Whole years at the study, OLDEST at most; "" where unknown or impossible."""
    match = re.fullmatch(r"(\d{1,3})([YMWD])", text(ds, "PatientAge"))
    if match:
        years = int(int(match[1]) * UNITS[match[2]])
    else:
        born = _day(text(ds, "PatientBirthDate"))
        day = next(filter(None, (_day(text(ds, name)) for name in DATES)), None)
        if not born or not day:
            return ""
        years = day.year - born.year - ((day.month, day.day) < (born.month, born.day))
    return str(min(years, OLDEST)) if 0 <= years <= 120 else ""


def keyed(salt: bytes, what: str, value: str | bytes) -> str:
    """64 bits in hexadecimal that name a value to those who have the salt alone (RFC 2104)."""
    value = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return hmac.new(salt, what.encode() + b"\0" + value, hashlib.sha256).hexdigest()[:16]


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
        day = datetime.strptime(digits, "%Y%m%d").date()
    except ValueError:
        return None
    return day if day.year > 1850 and len(digits) == 8 else None
