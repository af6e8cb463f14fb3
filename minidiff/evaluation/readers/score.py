"""Score a reading study: how often readers call synthetic and real images Good, how far they agree,
and whether they can tell the two apart.

That readers call 68 % of the synthetic images Good means little until the same readers have judged
real ones. Rates count first showings only. A pooled rate has two intervals: over other images with
these readers, where an image is one draw however many read it, and over other images and readers
(`rating.two_way_random_interval`).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy

from minidiff import runs
from minidiff.cells import is_unknown, to_number
from minidiff.data.table import read_csv
from minidiff.errors import InputError
from minidiff.evaluation import pages, verdicts
from minidiff.evaluation.format import jsonable
from minidiff.evaluation.readers.answers import REASONS, Key, Reading, read_key, read_readings
from minidiff.rating import (
    against_chance,
    agreement,
    effective_wilson,
    intraclass,
    newcombe,
    short_by,
    two_way_random_interval,
)
from minidiff.root import Rooted
from minidiff.statistics import auroc, auroc_interval, pearson, wilson

KINDS = ("synthetic", "real")


@dataclass(frozen=True)
class Config(Rooted):
    answers: tuple[str, ...] = ()           # the readers' exports, JSONL or CSV
    key: str = "ROOT/readers-key/key.json"  # the study's key
    out: str = "ROOT/readers-score"         # readers.html and readers.json
    numbers: str = ""                       # CSV: file_name (and set) and numbers of images


def run(cfg: Config) -> None:
    """Score a reading study: one page and its numbers from the readers' files and the key."""
    if not cfg.answers:
        raise InputError("--answers: no file given; name the readers' exports")
    key = read_key(cfg.key)
    readings, remarks = read_readings(cfg.answers, key)
    for remark in remarks:
        print(remark)
    if not readings:
        raise InputError("none of the files can be used: " + "; ".join(remarks))
    numbers = read_numbers(cfg.numbers, key) if cfg.numbers else {}
    out = runs.open_run(cfg.out, cfg, "readers", free=("answers", "numbers"), key_sha256=key.sha256)
    result = jsonable({
        **summary(key, readings, numbers), "remarks": remarks, "study": key.study,
        "key_sha256": key.sha256, "design": key.design,
        "answers": {file: runs.sha256(file) for file in cfg.answers if Path(file).is_file()},
        "provenance": runs.provenance()})
    result["verdict"] = pages.answers(verdicts.of_readers(result))
    runs.write_json(out / "readers.json", result)
    rows = [{**v, "kind": verdicts.kind(v)} for v in result["verdict"]]
    runs.write_atomic(out / "readers.html", pages.render(
        "readers.html", **{**result, "verdict": rows, "answers_of": result["answers"]}))
    for v in result["verdict"]:
        print(f"{v['answer']:>12}  {v['question']} {v['text']}")
    print(out / "readers.html")


def summary(key: Key, readings: Sequence[Reading],
            numbers: dict[str, np.ndarray] | None = None) -> dict:
    """All numbers of the page: each reader's, and those of the finished and attentive readers
    together."""
    rows = [of_reader(key, r) for r in readings]
    pooled = [r for r, row in zip(readings, rows) if row["pooled"]]
    if not pooled:
        return {"readers": rows, "pooled": None, "agreement": [], "labels": [], "reasons": [],
                "numbers": []}
    good = {kind: np.array([r.first(key, key.where(kind=kind)) for r in pooled], float)
            for kind in KINDS}
    return {
        "readers": rows,
        "pooled": {"readers": [r.reader for r in pooled],
                   **{kind: share(table) for kind, table in good.items()},
                   "difference": difference(good["synthetic"], good["real"]),
                   "origin": of_origin(key, pooled)},
        "agreement": agreements(key, pooled, good),
        "labels": of_labels(key, good),
        "reasons": [{"reason": name, **{kind: of_reason(key, pooled, kind, name)
                                        for kind in KINDS}} for name in REASONS],
        "numbers": [against(name, values, good["synthetic"])
                    for name, values in (numbers or {}).items()]}


def of_reader(key: Key, r: Reading) -> dict:
    """One reader's row."""
    good = {kind: r.first(key, key.where(kind=kind)) for kind in KINDS}
    counts = {kind: (int((g == 1).sum()), int((g >= 0).sum())) for kind, g in good.items()}
    controls = r.answer["quality"][key.where(kind="control")]
    controls = controls[controls >= 0]
    attentive = len(controls) == 0 or (controls == 0).mean() >= key.design["attentive"]
    pairs = np.array(key.repeats, np.int64).reshape(-1, 2)
    looks = r.answer["quality"][pairs]
    looks = looks[(looks >= 0).all(1)]
    low, high = newcombe(*counts["synthetic"], *counts["real"])
    shares = {kind: proportion(*count) for kind, count in counts.items()}
    row = {"reader": r.reader, "file": r.file, "missing": r.missing, "attentive": bool(attentive),
           "pooled": bool(attentive and not r.missing), "controls": len(controls),
           "controls_bad": int((controls == 0).sum()), "seconds": float(np.median(r.seconds)),
           **shares,
           "difference": {"value": shares["synthetic"]["value"] - shares["real"]["value"],
                          "low": low, "high": high},
           "intra": {**dict(zip(("value", "low", "high"), intraclass(looks[:, 0], looks[:, 1]))),
                     "n": len(looks), "same": float((looks[:, 0] == looks[:, 1]).mean())
                     if len(looks) else math.nan}}
    if "origin" in r.answer:
        row["origin"] = tell(key, r)
    return row


def tell(key: Key, r: Reading) -> dict:
    """One reader's answers to "real or generated?": right answers against chance, and the AUROC of
    the answers graded by confidence."""
    places = np.array([k for kind in KINDS for k in key.where(kind=kind)])
    made = np.array([key.items[k]["kind"] == "synthetic" for k in places])
    said, sure = r.answer["origin"][places], r.confidence["origin"][places]
    made, said, sure = made[said >= 0], said[said >= 0], sure[said >= 0]
    right = int((said == made).sum())
    graded = np.where(said == 1, sure, -sure)
    low, high = auroc_interval(graded, made)
    return {**proportion(right, len(said)), "p": against_chance(right, len(said)),
            "auroc": auroc(graded, made), "auroc_low": low, "auroc_high": high,
            **{f"said_{name}": float(said[made == flag].mean()) if (made == flag).any()
               else math.nan for name, flag in (("synthetic", True), ("real", False))}}


def share(table: np.ndarray) -> dict:
    """Mean of a (readers, images) table of 0 and 1 with both intervals."""
    mean, n = float(table.mean()), table.shape[1]
    variance = table.mean(0).var() / n
    low, high = effective_wilson(mean, variance, n)
    wide = two_way_random_interval(table)[1] if len(table) > 1 and n > 1 else (math.nan, math.nan)
    return {"value": mean, "n": n, "worth": mean * (1 - mean) / variance if variance else n,
            "low": low, "high": high, "wide_low": wide[0], "wide_high": wide[1]}


def difference(made: np.ndarray, real: np.ndarray) -> dict:
    """Good-rate of synthetic minus real images, with both intervals."""
    a, b = share(made), share(real)
    low, high = short_by(a["value"], a["worth"], b["value"], b["worth"])
    wide = two_way_random_interval(made, real)[1] if len(made) > 1 and min(
        made.shape[1], real.shape[1]) > 1 else (math.nan, math.nan)
    return {"value": a["value"] - b["value"], "low": low, "high": high,
            "wide_low": wide[0], "wide_high": wide[1]}


def of_origin(key: Key, pooled: Sequence[Reading]) -> dict | None:
    """Share of right answers to "real or generated?", pooled."""
    if any("origin" not in r.answer for r in pooled):
        return None
    right = [np.array([r.answer["origin"][key.where(kind=kind)] == (kind == "synthetic")
                       for r in pooled]) for kind in KINDS]
    return share(np.concatenate(right, 1).astype(float))


def agreements(key: Key, pooled: Sequence[Reading], good: dict[str, np.ndarray]) -> list[dict]:
    """Cohen's kappa of two readers or Fleiss' of more, and Gwet's AC1, on each kind of images and
    on both."""
    if len(pooled) < 2:
        return []
    sets = {"Good or Bad, synthetic": good["synthetic"], "Good or Bad, real": good["real"],
            "Good or Bad, both": np.concatenate([good[kind] for kind in KINDS], 1)}
    if all("origin" in r.answer for r in pooled):
        places = [k for kind in KINDS for k in key.where(kind=kind)]
        sets["real or generated, both"] = np.array([r.answer["origin"][places] for r in pooled])
    kappa = "cohen" if len(pooled) == 2 else "fleiss"
    found = []
    for name, table in sets.items():
        by_name = {"kappa": agreement(table.T.astype(int), kappa),
                   "ac1": agreement(table.T.astype(int), "ac1")}
        found.append(
            {"of": name, "n": table.shape[1], "which": kappa, "observed": by_name["ac1"].observed,
             **{n: {"value": a.value, "low": a.low, "high": a.high} for n, a in by_name.items()}})
    return found


def of_labels(key: Key, good: dict[str, np.ndarray]) -> list[dict]:
    """Good-rate of each set and label."""
    found = []
    for kind in KINDS:
        groups = defaultdict(list)
        for column, k in enumerate(key.where(kind=kind)):
            groups[key.items[k]["set"], key.items[k]["label"]].append(column)
        found += [{"kind": kind, "set": name, "label": label, **share(good[kind][:, own])}
                  for (name, label), own in sorted(groups.items())]
    return found


def of_reason(key: Key, pooled: Sequence[Reading], kind: str, name: str) -> dict:
    """How often a reason is given, of all answers Bad to images of one kind, second showings
    included."""
    bad = [r.reasons[k] for r in pooled for k, item in enumerate(key.items)
           if item["kind"] == kind and r.answer["quality"][k] == 0]
    return {"k": sum(given.count(name) for given in bad), "n": len(bad)}


def against(name: str, values: np.ndarray, table: np.ndarray) -> dict:
    """Does a number of a synthetic image go with its being called Good? Rank correlation with the
    share of readers who do, and the area under the curve for the majority's Good; images without a
    number, and for the latter ties, aside."""
    known = ~np.isnan(values)
    x, y = values[known], table.mean(0)[known]
    decided = y != 0.5
    ranks = [scipy.stats.rankdata(v) for v in (x, y)] if len(x) else [x, y]
    low, high = auroc_interval(x[decided], y[decided] > 0.5)
    return {"number": name, "n": len(x), **dict(zip(("r", "r_low", "r_high"), pearson(*ranks))),
            "auroc": auroc(x[decided], y[decided] > 0.5), "auroc_low": low, "auroc_high": high}


def read_numbers(path: str, key: Key) -> dict[str, np.ndarray]:
    """Columns of numbers, each in the order of the key's synthetic images; nan where an image has
    none.

    Raises InputError where no row names an image of the study, where a file name stands for two of
    its images, and where a column of numbers has another word.
    """
    rows = read_csv(path, needed=("file_name",))
    names = ["set", "file_name"] if "set" in rows[0] else ["file_name"]
    items = [tuple(key.items[k][n] for n in names) for k in key.where(kind="synthetic")]
    place = {item: k for k, item in enumerate(items)}
    if len(place) < len(items):
        raise InputError(f"{path}: file names stand for images of several sets; add a column 'set' "
                         "with the sets' folders")
    found, words = {}, {}
    for row in rows:
        at = place.get(tuple(row[n] for n in names))
        for name, cell in row.items():
            value = to_number(cell)
            if at is None or name in (*names, "where"):
                continue
            if math.isnan(value) and not is_unknown(cell):
                words.setdefault(name, (row["where"], cell))
            elif not math.isnan(value):
                column = found.setdefault(name, np.full(len(items), np.nan))
                if not np.isnan(column[at]):
                    raise InputError(f"{path}: {' '.join(row[n] for n in names)} has two rows")
                column[at] = value
    for name in (name for name in words if name in found):
        where, cell = words[name]
        raise InputError(f"{where}: {name} {cell!r} is not a number, unlike others of its column; "
                         "write 1234.5, or leave it empty")
    if not found:
        raise InputError(f"{path}: no row has a number for an image of the study, such as "
                         f"{' '.join(items[0])}")
    return found


def proportion(k: int, n: int) -> dict:
    low, high = wilson(k, n)
    return {"k": k, "n": n, "value": k / n if n else math.nan, "low": low, "high": high}
