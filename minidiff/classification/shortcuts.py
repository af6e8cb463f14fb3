"""How well is each label predicted without seeing the lungs?

    header, border, 8 × 8 thumbnail, metadata    ridge logistic regression on the files as they came
                                                 (data/baselines.py)
    lungs blacked out                            a small ResNet on the study's pictures, of which
                                                 the lungs are taken out

Any but the thumbnail, which shows a large disease, may be called a shortcut.

A classifier may predict a label from any of these. Its figures on patients of the same hospitals
then say nothing about disease (Maguolo & Nanni 2021; DeGrave et al. 2021). A shortcut that fails on
an external set was a property of the hospital.

A study's CNN is not given the header: every picture was decoded, made grey and brought to one
square (images.square). It still sees what width, height, bytes, mode and format did to the picture:
a crop that cuts off the sides of wide films, the sharpness of a reduced or enlarged one, JPEG's
blocks, the window of greys, and letters that were burned in.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff.classification.arms import Images
from minidiff.classification.predictor import Predictor, balance, fit
from minidiff.classification.scores import finite
from minidiff.data import images
from minidiff.data.baselines import FEWEST, THUMBNAIL, features, is_shortcut, out_of_fold
from minidiff.data.files import read_facts
from minidiff.data.split import Row
from minidiff.errors import InputError
from minidiff.pixels import Pictures, laid_in, scratch, to_grey
from minidiff.statistics import auroc_by_patient
from minidiff.variables import Category

BLACKOUT = "lungs blacked out"
# the set of the training hospitals, on which a shortcut counts as one
INTERNAL = "test"
# share of the side that is left at each edge by the box, where there are no masks
RIM = 0.1
# share of the side by which masks are grown: the outermost haze is of the lung, too
GROWN = 0.03
SIDE, WIDTH = 64, 8             # px and channels of the small ResNet, …
STEPS, BATCH, LR = 150, 64, 4e-3    # … and its training
NAMES = {"header": "the file's header alone (size, format, bytes)",
         "border": "the border of the picture alone", THUMBNAIL: "a thumbnail of 8 × 8 px",
         "metadata": "the metadata alone", BLACKOUT: "the picture without the lungs"}


def shortcut_audit(train: Images, tests: Mapping[str, Images], *, target: Category,
                   columns: Sequence[str], seed: int = 0, size: int = SIDE, steps: int = STEPS,
                   device: torch.device | str = "cpu") -> dict:
    """AUROC of each label against the rest, by each kind of trivial features, on each test set.

    `columns` are the metadata; the ResNet sees at most 64 px. Labels of fewer than 10 training
    patients, or faced by fewer, are left out. Returns plain JSON: rows (an AUROC and its interval
    over patients, None where the set has one side only; shortcut: in `test`, as `is_shortcut`
    says), shortcut, sentence (for the head of every table, "" for none), region ("masks" or "box"),
    text (lines to print).
    """
    sets = {"train": train, **tests}
    truth = {name: target.bits(each.labels).numpy() for name, each in sets.items()}
    patients = np.array(train.patients)
    learnable = [k for k, own in enumerate(truth["train"].T)
                 if min(len(set(patients[own])), len(set(patients[~own]))) >= FEWEST]
    scores = trivial_scores(sets, truth, learnable, columns)
    dark, region = blackout_scores(sets, target, seed=seed, size=min(size, SIDE), steps=steps,
                                   device=device)
    rows = [_row(kind, target.values[k], name, found[name][:, k], truth[name][:, k], own.patients)
            for kind, found in {**scores, BLACKOUT: dark}.items() for k in learnable
            for name, own in tests.items()]
    sentence = _sentence(rows)
    return {"rows": rows, "shortcut": bool(sentence), "sentence": sentence, "region": region,
            "text": [*_text(rows, region), *([sentence] if sentence else [])]}


def trivial_scores(sets: Mapping[str, Images], truth: Mapping[str, np.ndarray],
                   learnable: Sequence[int],
                   columns: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """features → set → log odds (N,k) of a regression fitted on train.

    A label that cannot be learned has zeros.
    """
    rows = [row for each in sets.values() for row in each.rows]
    facts, _ = read_facts([row["file"] for row in rows], 8)
    for fault in [f.fault for f in facts if f.fault]:
        raise InputError(fault)
    ends = np.cumsum([len(each) for each in sets.values()])
    held_out = np.arange(len(rows)) >= len(sets["train"])
    found, positive = {}, np.concatenate(list(truth.values()))
    for kind, x in features(facts, rows, columns).items():
        scores = np.zeros(positive.shape)
        for k in learnable:
            # two folds: each is scored by what the other taught
            scores[:, k] = out_of_fold(x, positive[:, k], held_out)
        found[kind] = dict(zip(sets, np.split(scores, ends[:-1])))
    return found


def blackout_scores(sets: Mapping[str, Images], target: Category, *, seed: int, size: int,
                    steps: int, device: torch.device | str) -> tuple[dict[str, np.ndarray], str]:
    """Set → probabilities (N,k) of a small ResNet that sees black lungs; and the region.

    The lungs are those of the data sets' masks where every image has one, else all are under one
    box: that some have masks would itself say something. Masks leave the outline of the lungs to be
    seen, and the box their upper and outer edges.
    """
    masks = {name: [lung_mask(row) for row in each.rows] for name, each in sets.items()}
    region = "masks" if all(path is not None for paths in masks.values()
                            for path in paths) else "box"
    dark = {name: without_lungs(each.pixels, masks[name] if region == "masks" else None)
            for name, each in sets.items()}
    small = Predictor([target], width=WIDTH, size=size, seed=seed).to(device)
    known = {"label": sets["train"].labels}
    fit(small, dark["train"], known, steps=steps, batch=BATCH, lr=LR, seed=seed, progress=BLACKOUT,
        weights=balance(target, known), precision="fp32")
    return {name: small.predict(pixels)["label"].double().numpy()
            for name, pixels in dark.items()}, region


def lung_mask(row: Row) -> Path | None:
    """The mask of an image, if there is one: masks/lungs/<label>/<file> for images/<label>/<file>,
    or masks/<file> beside images/<file> within a class folder, as Kaggle's COVID-19 Radiography
    Database has them."""
    path, depth = Path(row["file"]), len(Path(row["file_name"]).parts)
    for k in range(2, depth + 1):  # the `images` nearest to the file, within its data set
        if path.parts[-k] == "images":
            base, inside = path.parents[k - 1], Path(*path.parts[1 - k:])
            found = [base / "masks" / "lungs" / inside,
                     *([base / "masks" / inside] if k == 2 else [])]
            return next((mask for mask in found if mask.is_file()), None)
    return None


def without_lungs(pixels: Pictures, masks: Sequence[Path] | None) -> Tensor:
    """uint8 (N,C,S,S) → (N,1,S,S), black under the masks, or in the middle of all.

    Masks are grown a little.
    """
    size = pixels.shape[-1]
    dark = laid_in(torch.from_numpy(scratch((len(pixels), 1, size, size))),
                   map(to_grey, pixels.split(256)))
    if masks is None:
        rim = round(RIM * size)
        dark[:, :, rim : size - rim, rim : size - rim] = 0
        return dark
    reach = max(1, round(GROWN * size))
    for picture, path in zip(dark, masks):
        lungs = torch.from_numpy(images.square(images.read(path)[:1].copy(), size) > 127).float()
        picture[torch.nn.functional.max_pool2d(lungs[None], 2 * reach + 1, 1, reach)[0] > 0] = 0
    return dark


def _row(kind: str, label: str, name: str, scores: np.ndarray, positive: np.ndarray,
         patients: Sequence[str]) -> dict:
    area, (low, high) = auroc_by_patient(scores, positive, patients)
    return {"features": kind, "label": label, "test_set": name, "auroc": finite(area),
            "low": finite(low), "high": finite(high), "n": int(positive.sum()),
            "n_rest": int((~positive).sum()),
            "shortcut": name == INTERNAL and is_shortcut(kind, area, low)}


def _sentence(rows: Sequence[dict]) -> str:
    """What the page says in every section if a trivial feature predicts a label."""
    found = [row for row in rows if row["shortcut"]]
    if not found:
        return ""
    best = max(found, key=lambda row: row["auroc"])
    also = sorted({row["label"] for row in found} - {best["label"]})
    return (f"SHORTCUT: {NAMES[best['features']]} predicts {best['label']} with AUROC "
            f"{best['auroc']:.3f} ({best['low']:.3f} to {best['high']:.3f}, n = {best['n']} and "
            f"{best['n_rest']})" + (f"; a trivial feature also predicts {', '.join(also)}"
                                    if also else "") + ". What a classifier scores on the internal "
            "test set is no evidence that it sees disease.")


def _text(rows: Sequence[dict], region: str) -> list[str]:
    """A line for each kind of features and label: all test sets side by side."""
    lines = [f"Predicted from trivial features (lungs blacked out: "
             f"{'by their masks' if region == 'masks' else 'a central box'}), AUROC and 95 % "
             f"interval over patients:"]
    wide = max((len(row["label"]) for row in rows), default=0)
    for kind, label in dict.fromkeys((row["features"], row["label"]) for row in rows):
        cells = [f"{row['test_set']} "
                 + ("–" if row["auroc"] is None
                    else f"{row['auroc']:.3f} ({row['low']:.2f}–{row['high']:.2f})")
                 + f" n={row['n']}/{row['n_rest']}" + (" SHORTCUT" if row["shortcut"] else "")
                 for row in rows if (row["features"], row["label"]) == (kind, label)]
        lines.append(f"  {kind:{len(BLACKOUT)}}  {label:{wide}}  " + "   ".join(cells))
    return lines
