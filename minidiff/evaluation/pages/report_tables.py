"""The report's tables of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from minidiff.evaluation.metrics.comparison import EQUAL, FEWEST
from minidiff.evaluation.pages.format import distance_names, num, p_value, percent, signed, span
from minidiff.evaluation.pages.tables import Row, Table

SHARES = ("precision", "recall", "coverage", "C2ST")   # printed in per cent


def nearness(spaces: Sequence[Mapping]) -> tuple[Table, Table]:
    """How near synthetic images lie to training images: the tests behind the answer, and others."""
    return Table(
        ["space", "near, %", "95 %", "held-out, %", "p", "with training", "by chance", "p"],
        [[s["space"], num(100 * s["near_share"]), _percents(s["near_low"], s["near_high"]),
          num(100 * s["near_heldout_share"]), p_value(s["near_p"]),
          f"{s['closest_train']} of {s['closest']}", f"{s['closest_expected']:.1f}",
          p_value(s["closest_p"])] for s in spaces]), Table(
        ["space", "q, 5 %", "q, median", "C_T, z", "p", "AuthPct", "held-out", "p",
         "calibrated", "p"],
        [[s["space"], num(s["q05"]), num(s["q50"]), num(s["copying_z"]), p_value(s["copying_p"]),
          f"{s['auth_pct']:.1f}", f"{s['auth_heldout']:.1f}", p_value(s["auth_p"]),
          f"{s['calibrated_near']} of {s['n']}", p_value(s["calibrated_p"])] for s in spaces])


def membership(found: Mapping) -> Table:
    return Table(
        ["attack", "training, held-out", "AUROC", "95 %, by patient", "p",
         "found at 1 % false alarms", "95 %"],
        [["denoising error", f"{found['n_train']}, {found['n_heldout']}", num(found["auroc"]),
          span(*found["by_patient"]), p_value(found["p"]), percent(found["tpr"]),
          _percents(*found["tpr_by_patient"])]])


def distances(rows: Sequence[Mapping]) -> dict[str, list[Table]]:
    """Extractor → kernel distances, Fréchet distances, and what is measured at equal numbers."""
    found = {}
    for extractor in _unique(rows, "extractor"):
        own = [r for r in rows if r["extractor"] == extractor]
        kernel, frechet = distance_names(extractor)
        head = ["label", "set", "n held-out", "n of set"]
        found[extractor] = [
            Table([*head, kernel, "95 %", "p", "floor"], _blocks(own, "label", _kernel)),
            Table([*head, frechet, "floor", "of halves", "floor of halves"],
                  _blocks(own, "label", _frechet)),
            Table([*head[:2], "n of each", *(f"{name}, %" if name in SHARES else name
                                               for name in EQUAL), "p"],
                  [row for label in _unique(own, "label")
                   for row in _equal([r for r in own if r["label"] == label])])]
    return found


def variety(rows: Sequence[Mapping]) -> Table:
    return Table(["label", "measure", "n of each", "synthetic", "held-out real", "real, 5–95 %"], [
        Row([r["label"], r["measure"], r["n"], why(r)], "small") if r["small"] else
        [r["label"], r["measure"], r["n"], num(r["synthetic"]), num(r["real"]),
         span(r["range"]["low"], r["range"]["high"])] for r in rows])


def conditions(rows: Sequence[Mapping]) -> dict[str, Table]:
    """Extractor → the distance of each value of each condition."""
    def cells(r: Mapping, first: bool) -> list:
        values = [why(r)] if r["small"] else [
            num(r["KD"]), span(r["KD_low"], r["KD_high"]), _floor(r["KD_floor"])]
        return [r["value"], r["n"], r["m"], *values]

    return {extractor: Table(
        ["condition", "value", "n held-out", "n synthetic", distance_names(extractor)[0], "95 %",
         "floor"], _blocks([r for r in rows if r["extractor"] == extractor], "condition", cells))
            for extractor in _unique(rows, "extractor")}


def agreement(rows: Sequence[Mapping]) -> tuple[Table, Table]:
    """What the judge reads off the images: a table of categories and one of numbers."""
    rows = [r for name in _unique(rows, "variable") for r in rows if r["variable"] == name]
    numbers = {r["variable"] for r in rows if r.get("kind") == "number"}
    return Table(
        ["variable", "images", "n", "as labelled, %", "95 %", "by guessing, %", "AUROC",
         "of each value, %"],
        _blocks([r for r in rows if r["variable"] not in numbers], "variable", _category)), Table(
        ["variable", "images", "n", "r", "95 %", "r within label", "95 %", "slope", "mean error"],
        _blocks([r for r in rows if r["variable"] in numbers], "variable", _number))


def arms(rows: Iterable[Mapping]) -> Table:
    return Table(
        ["test set", "trained on", "seeds", "images", "accuracy, %", "balanced accuracy, %",
         "AUROC"],
        [Row([r["test_set"], r["arm"], r.get("seeds"), r.get("n_train"), _sd(r, "accuracy", 100),
              _sd(r, "balanced_accuracy", 100), _sd(r, "auroc_macro", 1)],
             "own" if "synthetic" in r["arm"] else "") for r in rows])


def differences(found: Mapping[str, Sequence[Mapping]]) -> Table:
    return Table(["test set", "arms", "of", "difference", "95 %", ""], [
        [name, f"{d['arm']} − {d['against']}", d["metric"].replace("_", " "),
         signed(d["difference"]), span(*d["interval"]),
         "resolved" if d.get("resolved") else "not resolved"]
        for name, own in found.items() for d in own])


def why(r: Mapping) -> str:
    """Why nothing was measured."""
    return f"n < {FEWEST}" if min(r["n"], r.get("m", r["n"])) < FEWEST else "one patient"


def _blocks(rows: Sequence[Mapping], key: str,
            cells: Callable[[Mapping, bool], list]) -> list[Row]:
    """A row for each of `rows`; those of one value of `key` stand together, named once."""
    made, before = [], None
    for r in rows:
        first, before = r[key] != before, r[key]
        made.append(Row([r[key] if first else "", *cells(r, first)], _kind(r, first)))
    return made


def _kind(r: Mapping, first: bool) -> str:
    kind = "small" if r.get("small") or not r["n"] else "own" if r.get("set") == "synthetic" else ""
    return f"{kind} first".strip() if first else kind


def _kernel(r: Mapping, first: bool) -> list:
    values = [why(r)] if r["small"] else [
        num(r["KD"]), span(r["KD_low"], r["KD_high"]), p_value(r["KD_p"]),
        _floor(r.get("KD_floor")) if first else ""]
    return [r["set"], r["n"], r["m"], *values]


def _frechet(r: Mapping, first: bool) -> list:
    floors = [_floor(r.get(name)) if first else "" for name in ("FD_floor", "FD_floor_halves")]
    values = [why(r)] if r["small"] else [
        num(r["FD"]), floors[0], span(r["FD_low"], r["FD_high"]), floors[1]]
    return [r["set"], r["n"], r["m"], *values]


def _equal(own: Sequence[Mapping]) -> list[Row]:
    """The rows of one label at equal numbers, and below them one of real against real."""
    def cells(r: Mapping, first: bool) -> list:
        values = [why(r)] if r["small"] else [
            *(_with_ends(name, r.get(name), r.get(f"{name}_low"), r.get(f"{name}_high"))
              for name in EQUAL), p_value(r["C2ST_p"])]
        return [r["set"], r.get("equal_n", r["n"]), *values]

    floors = [own[0].get(f"{name}_floor") for name in EQUAL]
    real = [Row(["", "real vs real", floors[0]["n"], *(
        _with_ends(name, f["median"], f["low"], f["high"]) for name, f in zip(EQUAL, floors))])
            ] if all(floors) and not all(r["small"] for r in own) else []
    return [*_blocks(own, "label", cells), *real]


def _category(r: Mapping, first: bool) -> list:
    if not r["n"]:
        return [r["set"], 0, "no known cell"]
    values = ", ".join(f"{v['value']} {num(100 * v['accuracy'])} of {v['n']}" + (
        f" (AUROC {num(v['auroc'])})" if "auroc" in v else "") for v in r["by_value"])
    return [r["set"], r["n"], num(100 * r["accuracy"]), _percents(r["low"], r["high"]),
            num(100 * r["within_chance"]) if "within_chance" in r else "",
            num(r["auroc"]) if "auroc" in r else "", values]


def _number(r: Mapping, first: bool) -> list:
    return [r["set"], r["n"], *([num(r["r"]), span(r["low"], r["high"]), num(r["within_r"]),
                                 span(r["within_low"], r["within_high"]), num(r["slope"]),
                                 num(r["mae"])] if r["n"] else ["no known cell"])]


def _with_ends(name: str, *values: float | None) -> str:
    """A value with the ends of its interval, where it has one."""
    texts = [("–" if x is None else f"{100 * x:.0f}") if name in SHARES else num(x) for x in values]
    return texts[0] if values[1] is None else f"{texts[0]} ({texts[1]}–{texts[2]})"


def _floor(f: Mapping | None) -> str:
    return f"{num(f['median'])} ({span(f['low'], f['high'])})" if f else "–"


def _percents(low: float | None, high: float | None) -> str:
    return span(*(None if x is None else 100 * x for x in (low, high)))


def _sd(row: Mapping, name: str, unit: float) -> str:
    value, sd = row.get(name), row.get(f"{name}_sd")
    if value is None:
        return "–"
    return num(unit * value) + ("" if sd is None else f" ± {num(unit * sd)}")


def _unique(rows: Iterable[Mapping], key: str) -> list[str]:
    return list(dict.fromkeys(r[key] for r in rows))
