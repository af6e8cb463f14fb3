"""The tables of a study: for its page, as CSV with every number, and for a terminal."""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from minidiff.classification.compare import BENEFIT, grouped
from minidiff.data.table import csv_text
from minidiff.errors import count
from minidiff.evaluation import pages
from minidiff.evaluation.format import (
    POINTS,
    Row,
    Table,
    area,
    delta,
    difference,
    metric_name,
    num,
    p_value,
    patients,
    percent,
    points,
    set_name,
    share,
    size,
)
from minidiff.evaluation.study_verdicts import GAIN, HARM, headlines, primary
from minidiff.variables import NONE, present

GROUP_FIGURES = {"auroc": "AUROC", "tpr": "sensitivity", "fpr": "false alarms"}
UNCERTAINTIES = {"entropy": "entropy", "mutual_information": "disagreement of seeds",
                 "distance": "distance from training"}


def figure_of(score: Mapping, metric: str, positive: str) -> tuple[float | None, Sequence]:
    """A figure of `scores.score` and its interval."""
    if metric == "auroc":
        return (score["auroc"].get(positive),
                score["auroc_interval_patients"].get(positive, (None, None)))
    return score[metric], score.get(f"{metric}_interval", (None, None))


def with_unit(metric: str, positive: str) -> str:
    return metric_name(metric, positive) + (", %" if metric in POINTS else "")


# --- for the page

def audit(rows: Sequence[Mapping]) -> Table:
    """Every trivial feature and label, a column for each test set."""
    sets, lines = grouped(rows, "test_set"), []
    for (features, label), own in grouped(rows, "features", "label").items():
        cells = {r["test_set"]: f"{area(r['auroc'], (r['low'], r['high']))}; {r['n']}, "
                                f"{r['n_rest']}" for r in own}
        lines.append(Row((features, label, *(cells.get(name, "–") for name in sets)),
                         "bad" if any(r["shortcut"] for r in own) else ""))
    return Table(("predicted from", "label", *map(set_name, sets)), lines)


def arms(rows: Sequence[Mapping], positive: str, metric: str) -> Table:
    """By single networks: mean ± SD over seeds."""
    net = [BENEFIT] if BENEFIT in rows[0] else []
    return Table(("arm", "images", "seeds", with_unit(metric, positive),
                  f"AUROC, {positive}", *("net benefit, cases per 100" for _ in net)),
                 [Row((f"{r['arm']} †" if r["remark"] else r["arm"], r["n_train"], r["seeds"],
                       single(r, metric), single(r, "auroc_positive"),
                       *(single(r, name) for name in net)), _own(r)) for r in rows])


def single(row: Mapping, name: str) -> str:
    """A figure of single networks, mean ± SD."""
    show, sd = share if name in POINTS else area, row[f"{name}_sd"]
    return show(row[name]) + ("" if sd is None else f" ± {show(sd)}")


def ensembles(rows: Sequence[Mapping], positive: str, metric: str) -> Table:
    """By the mean of the seeds' probabilities."""
    show, lines = share if metric in POINTS else area, []
    for r in rows:
        whole = r["ensemble"]
        cut = (whole["at_threshold"] or {}).get(positive) or {}
        lines.append(Row((r["arm"], show(*figure_of(whole, metric, positive)),
                          area(*figure_of(whole, "auroc", positive)),
                          *(share(cut.get(side), cut.get(f"{side}_interval"))
                            for side in ("sensitivity", "specificity"))), _own(r)))
    return Table(("ensemble of", with_unit(metric, positive), f"AUROC, {positive}",
                  "sensitivity, %", "specificity, %"), lines)


def _own(row: Mapping) -> str:
    return "own" if row["added_kind"] == "synthetic" else ""


def labels(rows: Sequence[Mapping]) -> Table:
    """Every label, and, where labels exclude each other, what its images were called."""
    names = list(rows[0]["ensemble"]["auroc"])
    called = names if rows[0]["ensemble"]["confusion"] else []

    def cells(whole: Mapping, k: int, label: str) -> list:
        recall = whole["recall"] and share(whole["recall"][label], whole["recall_interval"][label])
        return [label, round(whole["prevalence"][label] * whole["n"]), recall or "–",
                area(*figure_of(whole, "auroc", label)),
                area(whole["auprc"][label], whole["auprc_interval"][label]),
                *(whole["confusion"][k] if called else ())]

    return Table(("arm", "label", "n", "recall, %", "AUROC", "AUPRC",
                  *(f"called {name}" for name in called)),
                 [Row((r["arm"], *cells(r["ensemble"], k, label)), "" if k else "first")
                  for r in rows for k, label in enumerate(names)])


def differences(rows: Sequence[Mapping], positive: str) -> Table:
    """All pairs of arms by one figure on one test set."""
    metric, lines = rows[0]["metric"], []
    for d in rows:
        tested = d["p_holm"] is not None
        lines.append(Row((f"{d['arm']} − {d['against']}", difference(d, ""), d["answer"],
                          p_value(d["p_holm"]), size(d["sees"], metric, "") if tested else "–",
                          patients(d["patients_needed"]) if tested and d["patients_needed"]
                          else "–"), "own" if d["answer"] in (GAIN, HARM) else ""))
    return Table((metric_name(metric, positive),
                  f"{'points' if metric in POINTS else 'difference'} (95 %)", "answer",
                  "adjusted p", "detectable", "patients needed"), lines)


def calibration(found: Mapping[str, Mapping], kinds: Mapping[str, str | None]) -> Table:
    lines = []
    for arm, c in found.items():
        scaled = c["scaled"]
        lines.append(Row((arm, c["n"], area(c["ece"]), area(c["ece_null_high"]),
                          area(scaled["ece"]), area(scaled["ece_null_high"]),
                          num(c["temperature"]),
                          *(f"{area(c[key])} → {area(scaled[key])}" for key in ("brier", "nll"))),
                         "own" if kinds.get(arm) == "synthetic" else ""))
    return Table(("arm", "n", "ECE", "chance", "ECE, scaled", "chance", "temperature", "Brier",
                  "NLL"), lines)


def coverage(found: Mapping[str, Mapping]) -> Table:
    """Where the coverage of prediction sets should lie, which depends on n alone; then each arm."""
    def expected(c: Mapping) -> str:
        if not c["n"]:
            return "no image"
        where = "in every set" if c["always"] else "–".join(map(share, c["expected"]))
        return f"{where}; n = {c['n']}"

    classes = next(iter(found.values()))["conformal"]["classes"]
    lines = [Row(("should be", *map(expected, classes.values()), "", "", ""), "small")]
    for arm, own in ((arm, measured["conformal"]) for arm, measured in found.items()):
        cells = [share(c["coverage"], (c["low"], c["high"]))
                 + (" BELOW" if c["kept"] is False else "") for c in own["classes"].values()]
        lines.append(Row((arm, *cells, share(own["single"]), share(own["empty"]),
                          f"{own['mean_size']:.2f}"),
                         "bad" if any("BELOW" in cell for cell in cells) else ""))
    return Table(("arm", *(f"{label}, %" for label in classes), "one label, %", "none, %",
                  "labels in a set"), lines)


def errors(found: Mapping[str, Mapping]) -> Table:
    """How well each uncertainty predicts wrong answers, and images of other hospitals."""
    lines = []
    for arm, own in found.items():
        dropout = own.get("mc_dropout") or {}
        measures = {name: own[key] for key, name in UNCERTAINTIES.items() if key in own}
        measures |= {f"{name}, MC dropout": dropout[key]
                     for key, name in UNCERTAINTIES.items() if key in dropout}
        for k, (name, m) in enumerate(measures.items()):
            wrong, away, far = m["wrong"], m.get("ood") or {}, m.get("atypical") or {}
            lines.append(Row((
                arm, name, num(m["mean_right"]), num(m["mean_wrong"]),
                f"{area(wrong['auroc'], (wrong['low'], wrong['high']))}; {wrong['n']}, "
                f"{wrong['n_rest']}", area(away.get("auroc"), (away.get("low"), away.get("high"))),
                share(far.get("share"), (far.get("low"), far.get("high")))), "" if k else "first"))
    return Table(("arm", "by", "mean, right", "mean, wrong", "AUROC for errors; n wrong, right",
                  "AUROC for this set", "far from training, %"), lines)


def gaps(metric: str, rows: Sequence[Mapping]) -> Table:
    """The largest gap of every arm by one figure, a column for each attribute."""
    unit = "" if metric == "auroc" else ", points"
    return Table((f"{GROUP_FIGURES[metric]}{unit}", *grouped(rows, "column")),
                 [(arm, *map(_gap, own)) for arm, own in grouped(rows, "arm").items()])


def _gap(g: Mapping) -> str:
    if g["gap"] is None:
        return "too few"
    text = (delta if g["metric"] == "auroc" else points)(g["gap"], g["interval"])
    return f"{g['high']} over {g['low']}: {text}{' *' if g['resolved'] else ''}"


def groups(found: Mapping[str, Mapping]) -> Table:
    return Table(("arm", "group", "n", "positives", "AUROC", "sensitivity, %",
                  "false alarms, %", ""),
                 [Row((arm, f"{g['column']}: {g['group']}", g["n"], g["positives"],
                       area(g["auroc"], g["interval"]), share(g["tpr"], g["tpr_interval"]),
                       share(g["fpr"], g["fpr_interval"]), "too few" if g["few"] else ""),
                      "small" if g["few"] else "")
                  for arm, own in found.items() for g in own["groups"]])


def association(rows: Sequence[Mapping]) -> Table:
    """How much the label says about each column, in real and in synthetic images."""
    return Table(("", "real", "synthetic", "difference", ""),
                 [Row((f"{a['column']} by {a['label'] or 'label'}",
                       area(a["real"], a["real_interval"]),
                       area(a["synthetic"], a["synthetic_interval"]),
                       delta(a["difference"], a["interval"]),
                       "amplified" if a["amplified"] else ""),
                      "bad" if a["amplified"] else "") for a in rows])


def shares(rows: Sequence[Mapping]) -> Table:
    return Table(("column", "value", "label", "real, %", "synthetic, %"),
                 [(r["column"], r["value"], r["label"], f"{share(r['real'])} of {r['n_real']}",
                   f"{share(r['synthetic'])} of {r['n_synthetic']}") for r in rows])


def training(rows: Sequence[Mapping]) -> Table:
    return Table(("arm", "real", "added", "of", "all", "seeds", ""),
                 [Row((r["arm"], r["real"], r["n_train"] - r["real"], r["added_kind"],
                       r["n_train"], r["seeds"], r["remark"]), "own" if r["remark"] else "")
                  for r in {row["arm"]: row for row in rows}.values()])


def generators(found: Mapping[str, Mapping]) -> Table:
    return Table(("synthetic folder", "generators", "images", "real images a generator saw"),
                 [(name, g["generators"], g["n_images"], g["saw"] if g["known"] else "unknown")
                  for name, g in found.items()])


def sets(images: Mapping[str, Mapping], known: Mapping[str, int], exclusive: bool) -> Table:
    """Patients and images of each set, and the images of each label or finding."""
    counts = {name: of_each(cells, exclusive) for name, cells in images.items()}
    names = sorted({label for own in counts.values() for label in own})
    return Table(("set", "patients", "images", *names),
                 [(name, known.get(name, "–"), sum(images[name].values()),
                   *(own[label] for label in names)) for name, own in counts.items()])


def of_each(cells: Mapping[str, int], exclusive: bool) -> Counter:
    """Images of each label, or with each finding or none, from those of each cell."""
    counts = Counter()
    for cell, n in cells.items():
        own = [cell] if exclusive else present("label", cell) or [NONE]
        counts.update(dict.fromkeys(own, n))
    return counts


def judge(rows: Sequence[Mapping]) -> Table:
    return Table(("judge of", "n", "right"), [(a["variable"], a["n"], _right(a)) for a in rows])


def _right(a: Mapping) -> str:
    return percent(a["accuracy"]) if "accuracy" in a else f"r = {num(a.get('r'))}"


# --- as CSV

def csv_tables(summary: Mapping, results: Sequence[Mapping] = ()) -> dict[str, str]:
    """Name → CSV text of every table of the page, a column for each number; no empty ones."""
    def by_arm(kind: str) -> list[tuple[dict, dict]]:
        return [({"test_set": name, "arm": arm}, found)
                for name, own in (summary.get(kind) or {}).items() for arm, found in own.items()]

    tables: dict[str, list[dict]] = {
        "arms": [flat(row) for row in summary.get("arms") or []],
        "seeds": [flat(row) for row in results],
        "differences": [{"test_set": name, **flat(d)} for name, own
                        in (summary.get("differences") or {}).items() for d in own],
        "shortcuts": [flat(row) for row in (summary.get("audit") or {}).get("rows") or []],
        "roc": [{**at, "fpr": x, "tpr": y} for at, corners in by_arm("roc") for x, y in corners],
        "calibration": [], "reliability": [], "conformal": [], "uncertainty": [], "selective": [],
        "groups": [{**at, **flat(row)} for at, own in by_arm("fairness") for row in own["groups"]],
        "gaps": [{**at, **flat(row)} for at, own in by_arm("fairness") for row in own["gaps"]],
        **{name: [{"source": source, **flat(row)}
                  for source, own in (summary.get("attributes") or {}).items()
                  for row in own[name]] for name in ("shares", "association")},
    }
    for at, found in by_arm("calibration"):
        tables["calibration"].append(
            {**at, **flat({k: v for k, v in found.items() if not k.startswith("bins")})})
        for name, key in (("as trained", "bins"), ("scaled", "bins_scaled")):
            tables["reliability"] += [{**at, "probabilities": name, **row} for row in found[key]]
    for at, found in by_arm("uncertainty"):
        tables["conformal"] += [{**at, "label": label, **flat(row)}
                                for label, row in found["conformal"]["classes"].items()]
        for name in UNCERTAINTIES:
            if name in found:
                one = dict(found[name])
                curve = one.pop("selective")["curve"]
                tables["uncertainty"].append({**at, "by": name, **flat(one)})
                tables["selective"] += [{**at, "by": name, **row} for row in curve]
    return {name: csv_text(rows) for name, rows in tables.items() if rows}


def flat(value: Mapping, before: str = "") -> dict[str, object]:
    """Nested figures as columns: {"auroc": {"covid": .9}} → auroc_covid; lists as JSON.

    An interval becomes …_low and …_high.
    """
    found: dict[str, object] = {}
    for key, x in value.items():
        name = f"{before}{key}"
        if isinstance(x, Mapping):
            found |= flat(x, f"{name}_")
        elif isinstance(x, (list, tuple)) and len(x) == 2 and "interval" in name:
            found |= {f"{name}_low": x[0], f"{name}_high": x[1]}
        else:
            found[name] = json.dumps(x) if isinstance(x, (list, tuple)) else x
    return found


# --- for a terminal

def printed(summary: Mapping) -> str:
    """summary.json as text: a table for each test set, then the primary comparison and notes."""
    positive, audit = summary["positive"], summary.get("audit") or {}
    metric = headlines(summary)[1]
    lines = ["judge on held-out patients: " + ", ".join(
        f"{a['variable']} {_right(a)}" for a in summary["judge"])]
    for name, differ in summary["differences"].items():
        images = summary["images"][name]
        counts = of_each(images, summary.get("exclusive", True))
        named = ", ".join(f"{n} {label}" for label, n in sorted(counts.items()))
        lines.append(f"\n{name}: {count(sum(images.values()), 'image')} of "
                     f"{count(summary['patients'][name], 'patient')} ({named})")
        if audit.get("shortcut"):
            lines.append("  SHORTCUT: see above")
        rows = [row for row in summary["arms"] if row["test_set"] == name]
        lines.append(arms(rows, positive, metric).text())
        lines += [f"  † {row['arm']}: {row['remark']}" for row in rows if row["remark"]]
        pairs = [d for d in differ if d["metric"] == metric and d["difference"] is not None]
        if pairs:
            lines.append(differences(pairs, positive).text())
    for answer in pages.answers(primary(summary)):
        lines.append(f"\n{answer['question']} {answer['answer'].upper()}.\n{answer['text']}")
    notes = [textwrap.shorten(f"note: {note}", 240, placeholder=" …") for note in summary["notes"]]
    return "\n".join(["", *lines, "", *notes])
