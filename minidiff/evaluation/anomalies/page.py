"""anomalies.html and what is printed: functions of anomalies.json and pictures."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minidiff.data import images
from minidiff.evaluation.anomalies import maps
from minidiff.evaluation.anomalies.collect import DENSITIES, Found
from minidiff.evaluation.format import Row, Table, area, delta, num
from minidiff.evaluation.pages import render
from minidiff.pixels import to_grey


def said(result: dict) -> str:
    """The answers and the figures of the primary method, the baselines and the densities, as
    text."""
    short = (result["primary"], *maps.BASELINES, *DENSITIES.values())
    parts = [f"{result['primary']}, average precision of pixels: "
             + "; ".join(f"{a['answer']} {'than' if a['answer'] != 'not resolved' else 'against'} "
                         f"{a['baseline']}" for a in result["pixels_against"]),
             pixel_table(result, short).text()] if result["pixels"] else []
    parts += [image_table(result, short).text()]
    return "\n".join(parts + ([blurred_table(result).text()] if result["blurred"] else []))


def pixel_table(result: dict, only: Sequence[str] = ()) -> Table:
    return Table(("method", "AUROC", "average precision", "Dice", "best possible Dice"), [
        Row((row["method"], *(area(row[name]["value"], row[name]["interval"])
                              for name in ("auroc", "auprc", "dice")), num(row["best_dice"])),
            kind(row, result))
        for row in result["pixels"] if not only or row["method"] in only])


def image_table(result: dict, only: Sequence[str] = ()) -> Table:
    """A row for each score, a column for each label against normal, also within a source."""
    rows = result["images"]
    sides = list(dict.fromkeys((row["label"], row["within"]) for row in rows))
    head = {side: next(row for row in rows if (row["label"], row["within"]) == side)
            for side in sides}
    names = [f"{label}{f' within {within}' if within else ''}, n = {head[label, within]['n']} and "
             f"{head[label, within]['n_normal']}" for label, within in sides]
    cells = {(row["method"], (row["label"], row["within"])): area(row["auroc"], row["interval"])
             for row in rows}
    return Table(("AUROC by the score", *names), [
        Row((method, *(cells[method, side] for side in sides)), kind({"method": method}, result))
        for method in dict.fromkeys(row["method"] for row in rows)
        if not only or method in only])


def blurred_table(result: dict) -> Table:
    return Table(("AUROC of blurred normal images by", "", "n"), [
        (row["method"], area(row["auroc"], row["interval"]), row["n"])
        for row in result["blurred"]])


def kind(row: Mapping, result: Mapping) -> str:
    return "own" if row["method"] == result["primary"] else ""


def against(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of ui.answers: the primary method against each baseline."""
    chips = {"better": "yes", "worse": "no", "not resolved": "open"}
    return [{"kind": chips[row["answer"]], "answer": row["answer"],
             "question": " ".join(filter(None, (
                 f"against {row['baseline']}", f"on {row['label']}" if "label" in row else "",
                 f"within {row['within']}" if row.get("within") else ""))),
             "text": delta(row["difference"], row["interval"])} for row in rows]


def page(result: dict, rows: Sequence[Mapping[str, str]], pixels: Tensor,
         found: Found, masks: np.ndarray | None) -> str:
    """The page, with the images that `found` has kept pictures of."""
    trays = []
    for label in sorted({row["label"] for row in rows}):
        own = [i for i, row in enumerate(rows) if row["label"] == label]
        index = [i for i in own if i in found.kept]
        trays.append((label, len(own), *columns(index, pixels, found, masks)))
    within = {row["label"] for row in result["images"] if row["within"]}
    apart = sorted({row["label"] for row in result["images"]} - within)
    return render("anomalies.html", result=result, trays=trays, apart=apart,
                  pixel_answers=against(result["pixels_against"]),
                  image_answers=against(result["images_against"]),
                  pixel_figures=pixel_table(result), image_figures=image_table(result),
                  blurred=blurred_table(result),
                  shortcuts=Table(("label", "predicted from", "AUROC", "n", "n of normal"), [
                      (row["label"], row["features"], area(row["auroc"], (row["low"], row["high"])),
                       row["n"], row["n_rest"]) for row in result["shortcuts"]]))


def columns(index: Sequence[int], pixels: Tensor, found: Found,
            masks: np.ndarray | None) -> tuple[list[str], list[list[bytes]]]:
    """Names of the rows of pictures, and for each image its pictures, PNG."""
    made, heat = found.kept[index[0]]
    names = ["image", *made, *(f"map: {name}" for name in heat),
             *(["mask"] if masks is not None else [])]
    tiles = []
    for i in index:
        made, heat = found.kept[i]
        lit = [torch.from_numpy((own / found.white[name]).clip(0, 1) * 255).to(torch.uint8)[None]
               for name, own in heat.items()]
        mask = [] if masks is None else [torch.from_numpy(masks[i] * np.uint8(255))[None]]
        shots = [to_grey(pixels[i : i + 1])[0], *made.values(), *lit, *mask]
        tiles.append([images.png_bytes(shot) for shot in shots])
    return names, tiles
