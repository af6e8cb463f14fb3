"""What a cell of a table says, whoever wrote it: unknown, a number, an age, one word for another.

A cell is text. The same rules serve tables, conditions, the audit and the command line: what a
word list or a spelling means is decided here and nowhere else.
"""

import ast
import math
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence

from minidiff.errors import InputError, first_few

# as pandas, R, SPSS, Excel, databases and people write that a cell is empty; any case
CLASSES = frozenset((  # which may be the name of a label
    "none", "unknown", "missing", "not known", "unspecified", "not specified", "undetermined",
    "undefined", "not reported", "not recorded", "not applicable", "anonymous", "anonymized",
    "anonymised", "anon", "unbekannt", "nicht bekannt", "keine angabe", "inconnu", "inconnue",
    "desconocido", "desconocida", "sconosciuto", "sconosciuta"))
UNKNOWN = CLASSES | {
    "", "nan", "<na>", "nat", "na", "n/a", "n.a.", "n.d.", "k.a.", "null", "nil", "(null)",
    "(blank)", "unk", "not available", "tbd", ".", "?", "??", "-", "--", "–", "—", "#n/a",
    "#div/0!", "#ref!", "#value!", "#name?", "#num!", "#null!"}
NO_FINDING = ("none", "no finding", "no_finding")  # as NIH, CheXpert and MIMIC write it, any case
AND = "|"  # Edema|Effusion: both are present
TOP = 89      # years; lower ages are not hidden behind a sign, such as 60+, but grouped
OLDEST = 120  # years; an age beyond, or below 0, stands for unknown or is a mistake
UNITS = {"y yr yrs yo year years j jahr jahre an ans año años ano anos anni": 1.0,
         "m mo mos mon month months monat monate mois mes meses mesi": 1 / 12,
         "w wk wks week weeks woche wochen": 7 / 365.25,
         "d day days tag tage jour jours": 1 / 365.25}
YEARS = {"": 1.0} | {word: years for words, years in UNITS.items() for word in words.split()}
WORDS = {  # column: its words, as they are without case, space and punctuation, by what they mean
    "sex": {"f": "f female fem w woman girl weiblich frau femme féminin femenino femenina",
            "m": "m male masc man boy männlich maennlich mann homme masculin masculino",
            "o": "o other", "d": "d divers diverse", "x": "x nonbinary intersex"},
    "view": {"ap": "ap anteroposterior anteriorposterior",
             "pa": "pa posteroanterior posterioranterior", "lateral": "lateral lat",
             "ll": "ll leftlateral", "rl": "rl rightlateral"}}
WORDS = {column: {word: meaning for meaning, words in of.items() for word in words.split()}
         for column, of in WORDS.items()}
SWITCH = {**dict.fromkeys(("yes", "y", "true", "1", "1.0", "ja", "si", "sí", "oui"), True),
          **dict.fromkeys(("no", "n", "false", "0", "0.0", "nein", "non"), False)}
COLUMNS = {"gender": "sex", "geschlecht": "sex",  # other names of columns
           "viewposition": "view", "projection": "view"}

PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)
COMMA = re.compile(r"[+-]?(\d*,\d{1,2}|\d*,\d{4,}|0,\d{3}|\d{4,},\d{3})")  # 34,5; never 1,234
GROUPS = re.compile(r"([+-]?\d{1,3}([ '’.,])\d{3}(?:\2\d{3})*)((?!\2)[.,]\d+)?")  # 12,345.6
THOUSANDS = re.compile(r"[1-9]\d{0,2}\.\d{3}")  # 1.234, where others of the column have a comma
NUMBERLIKE = re.compile(  # 1,234  >89  70 kg  38 °C  2020-03-01
    r"[<>≤≥=~+-]*\s*\d[\d.,' ’]*\s*([%+]|°\w|[^\W\d_]{2}[\w/%]*)?"
    r"|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?")
AGE = re.compile(r"(>=?|≥)?\s*([-+\d.,]+?)\s*(\+?)\s*([^\W\d_]*)\.?")
CUT = re.compile(r"\d([.,]\d+)?e\+\d+", re.I)  # 1.23E+11: what a spreadsheet leaves of a number


def is_unknown(cell: str, column: str = "") -> bool:
    """Does a cell say that nothing is known? A label may be called none or unknown; a sex of U, as
    hospitals write it, is unknown."""
    word = _fold(cell)
    return (word in UNKNOWN and not (column == "label" and word in CLASSES)) or (
        word == "u" and meaning(column) == "sex")


def meaning(column: str) -> str:
    """age, sex or view, however the column is called (PatientSex, Gender, View Position); else its
    name."""
    name = re.sub(r"[\W_]|patient|dicom|anchor", "", column.casefold())
    return COLUMNS.get(name, name) if name in (*COLUMNS, *WORDS, "age") else column


def to_number(cell: str) -> float:
    """A cell as a finite number, else nan: 34.5 and 34,5, 1 234 and 12,345.6, 95 %.

    1,234 is nan, for it may be 1234 or 1.234; so are >89 and dates.
    """
    text = unicodedata.normalize("NFKC", cell).strip().replace("−", "-").removesuffix("%").strip()
    if COMMA.fullmatch(text):
        text = text.replace(",", ".")
    elif found := GROUPS.fullmatch(text):
        whole, mark, rest = found.groups("")
        if rest or mark not in ".," or whole.count(mark) > 1:  # 1.234 and 1,234 are not known to be
            text = whole.replace(mark, "") + rest.replace(",", ".")
    value = float(text) if PLAIN.fullmatch(text) else math.nan
    return value if math.isfinite(value) else math.nan


def to_years(cell: str) -> float:
    """An age in years, else nan: 60, 060Y, 6M (months), 3W, 10D, 60 years.

    >89 and 90+, as anonymised tables have it, are 90; 60+ may be any age.
    """
    found = AGE.fullmatch(cell.strip().casefold())
    if not found or found[4] not in YEARS:
        return to_number(cell)
    over, number, more, unit = found.groups()
    age = to_number(number) * YEARS[unit] + (over == ">")
    return math.nan if (over or more) and age < TOP else age


def number(column: str, cell: str) -> float:
    """The number in a cell of a column, else nan; an age is in years."""
    return to_years(cell) if meaning(column) == "age" else to_number(cell)


def is_numberlike(column: str, cell: str) -> bool:
    """Is it meant as a number, though `number` may not read it: 1,234, >89, 70 kg, 2020-03-01?"""
    return not math.isnan(number(column, cell)) or bool(NUMBERLIKE.fullmatch(cell.strip()))


def check_numbers(column: str, cells: Iterable[str]) -> None:
    """Refuse a column whose numbers are of two units, or may be."""
    cells = [cell for cell in cells if not math.isnan(number(column, cell))]
    percent, plain = [c for c in cells if "%" in c], [c for c in cells if "%" not in c]
    thousands, comma = ([c for c in cells if form.fullmatch(c)] for form in (THOUSANDS, COMMA))
    for one, other, why in ((percent, plain, "write all of them in one unit"),
                            (thousands, comma, "which may be a thousand times as much")):
        if one and other:
            raise InputError(f"{column} {one[0]!r} stands beside {other[0]!r}: {why}")


def keys(column: str, cells: Sequence[str]) -> list[Hashable]:
    """A key for each known cell of a column: what says the same has the same key.

    The same are words in other capitals or another Unicode form, 1 and 1.0, F and female, AP and
    antero-posterior; and, where a column says yes or no throughout, yes, true and 1.
    """
    words, folded = WORDS.get(meaning(column), {}), [_fold(cell) for cell in cells]
    if not words and all(text in SWITCH for text in folded):
        return [SWITCH[text] for text in folded]
    return [_key(words, number(column, text), text) for text in folded]


def spelled(column: str, cells: Iterable[str]) -> dict[str, str]:
    """Each of the known cells of a column → the first of those that say the same."""
    cells, first = list(dict.fromkeys(cells)), {}
    return {cell: first.setdefault(key, cell) for cell, key in zip(cells, keys(column, cells))}


def strange(column: str, cells: Iterable[str]) -> list[str]:
    """Cells whose meaning is a guess beside others of the column: a sex of 1 beside F and M, an age
    of 60+ beside 61."""
    cells = list(cells)
    read = {"sex": lambda cell: _fold(cell) in WORDS["sex"],
            "age": lambda cell: not math.isnan(to_years(cell))}.get(meaning(column), bool)
    unread = [cell for cell in cells if not read(cell)]
    return unread if len(unread) < len(cells) else []


def patient(cell: str, where: str = "") -> str:
    """The id of a patient in its normal form; "" if it is unknown.

    13 and 13.0 (pandas after an empty cell) are one patient, 007 and 7 are two.
    """
    if is_unknown(cell):
        return ""
    if CUT.fullmatch(cell):
        raise InputError(f"{where}: patient {cell!r} is a number that a spreadsheet has cut, and "
                         "two patients may have become one; export the column as text")
    whole = re.fullmatch(r"(0|[1-9]\d*)\.0+", cell)
    return whole[1] if whole else unicodedata.normalize("NFC", cell)


def unlisted(cell: str) -> str | None:
    """edema|mass of a list as Python prints it, ['edema', 'mass'] (PadChest); None for other cells.
    """
    if not re.fullmatch(r"\[.*\]", cell):
        return None
    try:
        items = map(str, ast.literal_eval(cell))
    except (ValueError, SyntaxError):
        items = cell[1:-1].split(",")
    return AND.join(dict.fromkeys(filter(None, (item.strip(" '\"") for item in items))))


def listed(column: str, cells: Sequence[str]) -> dict[str, str]:
    """Cell → Edema|Effusion, of those known cells of a column that say this in another way.

    Edema; Effusion and ['Edema', 'Effusion'] are lists. Edema, Effusion is one if Edema and
    Effusion also stand alone, a name like Pneumonia, viral if neither does, else a fault. A finding
    is spelled as the first time.
    """
    found, alone = {}, {cell.casefold() for cell in cells}
    for cell in dict.fromkeys(cells):
        items = unlisted(cell)
        text = re.sub(r"\s*;\s*", AND, cell if items is None else items or NO_FINDING[0])
        if text != cell:
            found[cell] = text
            alone.update(part.strip().casefold() for part in text.split(AND))
    for cell in dict.fromkeys(cells):
        parts = [part.strip() for part in cell.split(",")]
        if cell in found or AND in cell or len(parts) < 2 or is_numberlike(column, cell):
            continue
        known = [part for part in parts if part.casefold() in alone]
        if len(known) == len(parts):
            found[cell] = AND.join(parts)
        elif known:
            raise InputError(f"{column} {cell!r} may be one value or several, as only "
                             f"{first_few(known)} also stands alone; write {AND.join(parts)} if it "
                             "is a list, else leave out the comma")
    forms = {cell: found.get(cell, cell) for cell in dict.fromkeys(cells)}
    if any(AND in form for form in forms.values()):
        parts = {cell: [part.strip() for part in form.split(AND)] for cell, form in forms.items()}
        said = spelled(column, (part for own in parts.values() for part in own))
        found |= {cell: AND.join(said[part] for part in own) for cell, own in parts.items()
                  if any(said[part] != part for part in own)}
    return found


def _fold(cell: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", cell).casefold().split())


def _key(words: dict[str, str], value: float, text: str) -> Hashable:
    if not math.isnan(value):
        return value
    return words.get(re.sub(r"[\W_]|view|projection", "", text), text)


def in_units(cell: str) -> tuple[float, float, str] | None:
    """The ends and the unit, or "", of a window that an import recorded, "-1350 150 HU": the values
    of black and of white. None of any other cell."""
    try:
        low, high, unit = [*cell.split(), ""][:3]
        low, high = float(low), float(high)
    except ValueError:
        return None
    return (low, high, unit) if -math.inf < low < high < math.inf else None
