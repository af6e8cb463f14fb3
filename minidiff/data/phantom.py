"""The embedded default: a procedural frontal chest X-ray whose every factor is known.

Organs are smooth solids in normalised coordinates (x to the image's right, y down, both -1..1),
their path lengths along the beam add up to an attenuation, and a film curve turns it into
brightness (bright = dense, image right = patient's left). Nothing is drawn in pixels, so an index
looks the same at every size. About two dozen smooth parameters make a patient; ribs, vessels and
vertebrae follow from them.

    factor    what it changes in the image
    --------  ------------------------------------------------------------------------------------
    label     pneumonia: a cluster of small nodules in one zone of one lung; covid: a fine net on
              faint haze at the periphery of both lungs, lower zones first; nodule: one round,
              sharp, solid spot; pneumothorax: a thin line inside the wall of one lung's upper
              half, and no vessels beyond it; normal: none of them; "covid|nodule": both
    severity  .3..1, extent and density of every finding; empty for normal
    sex       F: breast shadows over the lower lungs, thorax 8 % narrower, thinner bones, sloping
              shoulders
    age       20..90: larger heart and aortic knob, wider (unfolded) aorta with a calcified rim,
              fainter bones, shorter lungs and steeper ribs (kyphosis)
    view      AP: heart 20 % wider, higher diaphragm, scapulae over the lungs, clavicles higher and
              flatter, brighter and flatter image; PA: scapulae beside the lungs

The diseases are textures a few pixels wide at 64 px: means over an eighth of the side hardly show
them, and nothing outside the lungs does.

The default data set has `LABELS`; nodule and pneumothorax are drawn when they are asked for.
Factors are independent of the label unless `confounding` is asked for. Image 10k+9 is a follow-up
of image 10k+8: the same patient on another day, with another severity, positioning and exposure.
"""

import os
import shutil
from collections import Counter
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minidiff.data import anatomy as organs
from minidiff.data import images
from minidiff.data.table import write_table
from minidiff.errors import InputError
from minidiff.runs import beside, read_json, write_json

LABELS = ("normal", "pneumonia", "covid")
ZONES = {"upper": 0.30, "middle": 0.52, "lower": 0.76}  # pneumonia's centre; 0 apex, 1 base
SPOT, NODULE, HALO = 0.05, 1.4, 0.85  # a nodule: radius, air replaced, emphysema around it
TUMOUR, PLEURA = 0.09, 0.03  # radius of a nodule of severity 1; half width of a pleural line
NET, GLASS, RETICLE = 2 * np.pi / 0.2, 0.1, 0.8  # covid: waves of 6 px at 64 px; air replaced by
                                                 # haze and by net
UNKNOWN = 0.15  # share of patients whose age (and, independently, sex) is left out of the table
SPLITS = {"train": 0.625, "val": 0.125, "test": 0.25}
SCARCE = {"covid": 0.12}  # of the demo: the share of a label's patients outside test that is kept


class Phantom(NamedTuple):
    """One image, its masks, its table row (cells are str, "" = unknown) and its true factors."""

    image: np.ndarray  # uint8 (H,W)
    lungs: np.ndarray  # bool (H,W), aerated or diseased lung not hidden by heart and diaphragm
    opacity: np.ndarray  # bool (H,W), where the disease is
    row: dict[str, str]  # label, patient, sex, age, view, severity
    factors: dict  # label, sex, age, view, severity (0. for normal), side, zone: never unknown


def phantom(seed: int, index: int, size: int = 64, *, label: str | None = None,
            confounding: float = 0.0, noise: float = 0.02, sex: str | None = None, age: float
            | None = None, view: str | None = None, severity: float | None = None) -> Phantom:
    """Draw image `index` of the phantom data set `seed` at size x size pixels (32..512).

    noise is a standard deviation of the 0..1 range. confounding is the probability that the view is
    tied to the label (AP for covid, PA otherwise). sex, age, view and severity force a factor,
    which is then known, and change nothing else. Raises InputError for values outside the module's
    table.
    """
    patient = index - (index % 10 == 9)
    label = LABELS[patient % 3] if label is None else label
    present = label.split("|")
    _check(seed, index, size, label, confounding, noise, sex, age, view, severity)
    person = np.random.default_rng((seed, patient, 0))
    visit = np.random.default_rng((seed, index, 1))

    # Everything is drawn before anything is forced: a forced factor must not shift the other draws.
    drawn_sex, drawn_age = "FM"[person.integers(2)], int(person.integers(20, 91))
    tied, coin = person.random() < confounding, ("AP", "PA")[person.integers(2)]
    hidden = person.random(2) < UNKNOWN
    side, zone = ("right", "left")[person.integers(2)], list(ZONES)[person.integers(3)]
    build = np.clip(person.standard_normal(16), -2, 2).tolist()
    spots = person.uniform(-1, 1, 32).tolist()
    drawn_severity = round(visit.uniform(0.3, 1.0), 2)
    pose, exposure = visit.uniform(-1, 1, 4).tolist(), visit.uniform(-1, 1, 3).tolist()

    factors = {
        "label": label,
        "sex": drawn_sex if sex is None else sex,
        "age": drawn_age if age is None else age,
        "view": view or (coin if not tied else "AP" if "covid" in present else "PA"),
        "severity": 0.0 if label == "normal" else drawn_severity if severity is None else severity,
        **({"side": side, "zone": zone} if "pneumonia" in present else {"side": "", "zone": ""}),
    }
    brightness, lungs, opacity = _render(organs.anatomy(factors, build), factors, spots, pose,
                                         exposure, size)
    brightness = brightness + noise * visit.standard_normal((size, size), dtype=np.float32)
    row = {"label": label, "patient": f"phantom{seed}-{patient:06d}",
           "sex": "" if hidden[0] and sex is None else factors["sex"],
           "age": "" if hidden[1] and age is None else f"{factors['age']:g}",
           "view": factors["view"],
           "severity": "" if label == "normal" else f"{factors['severity']:g}"}
    return Phantom(np.clip(brightness * 255 + 0.5, 0, 255).astype(np.uint8), lungs, opacity, row,
                   factors)


def _check(seed, index, size, label, confounding, noise, sex, age, view, severity):
    """Raise InputError for arguments outside what the phantom can draw."""
    ranges = {"seed": (seed, 0, 2**31), "index": (index, 0, 2**31), "size": (size, 32, 512),
              "noise": (noise, 0, 1), "confounding": (confounding, 0, 1), "age": (age, 20, 90),
              "severity": (severity, 0.01, 1)}
    present, ok = label.split("|"), len(set(label.split("|"))) == label.count("|") + 1
    labels = (label,) if label == "normal" or ok and FINDINGS.keys() >= {*present} else (
        "normal", *FINDINGS, "several findings joined by |")
    choices = {"label": (label, labels), "sex": (sex, ("F", "M")), "view": (view, ("AP", "PA")),
               "severity of normal": (severity if label == "normal" else None, ("none",))}
    faults = [f"{name} is {value!r}, allowed: {low} to {high}"
              for name, (value, low, high) in ranges.items()
              if value is not None and not low <= value <= high]
    faults += [f"{name} is {value!r}, allowed: {', '.join(allowed)}"
               for name, (value, allowed) in choices.items() if value not in (None, *allowed)]
    if faults:
        raise InputError(f"phantom: {'; '.join(faults)}")


def _render(a, factors, spots, pose, exposure, size):
    """Brightness float32 (size,size) about 0..1, lung mask, opacity mask."""
    px = 2 / size
    grid = (np.arange(size, dtype=np.float32) + 0.5) * px - 1
    turn, zoom = 0.03 * pose[0], 1 + 0.03 * pose[1]
    gx, gy = grid[None, :] - 0.03 * pose[2], grid[:, None] - 0.03 * pose[3]
    x, y = (gx - turn * gy) * zoom, (gy + turn * gx) * zoom
    side = np.abs(x)
    sharp = max(0.02, 1.5 * px)

    body, inside = organs.body(a, x, y, side, sharp)
    lung, depth, reach = organs.lungs(a, x, y, side)
    heart, great = organs.mediastinum(a, x, y, sharp)
    visible = organs.edge(lung, sharp) * (1 - organs.edge(heart, sharp))
    air = visible * (1 - np.exp(-np.maximum(depth, 0) / 0.06)) * (0.86 + 0.1 * y)
    haze, opacity, vessels = _disease(a, factors, spots, x, y, side, reach)
    opacity = opacity & (visible > 0.5)

    soft = body * (1 + 0.50 * organs.edge(y - a.dome, 0.5)) + great * inside
    bone = a.bone * organs.bones(a, x, y, side, reach, depth, px)
    fluid = air * (haze + 0.22 * a.vessels * vessels)
    gas = 0.16 * organs.edge(0.09 - np.hypot((x - 0.34) * 0.7, y - a.dome - 0.16), 0.06)  # stomach
    total = soft - gas + bone * inside - 0.72 * (air - fluid)
    gain = (1.55 if a.ap else 1.75) * (1 + 0.06 * exposure[0])
    veil = (0.10 if a.ap else 0.0) + 0.02 * exposure[1]  # scatter
    brightness = 1 - np.exp(-gain * np.maximum(total + veil * inside, 0))
    brightness = brightness * (0.97 + 0.02 * exposure[2] * x)
    return brightness.astype(np.float32), visible > 0.5, opacity


def _disease(a, factors, spots, x, y, side, reach):
    """Share of the air that is replaced, float (H,W) about -.1..1, where the opacity counts as
    present, and the vessels that are left.

    All are faint and a few pixels wide at 64 px, so that means over an eighth of the image hardly
    change: only the texture shows them. spots (32,) are the patient's own, uniform in -1..1.
    """
    low = (y - a.apex) / (a.dome + 0.5 * a.dip - a.apex)  # 0 at the apex, 1 at the base
    haze, opacity = np.zeros_like(x), np.zeros(x.shape, bool)
    vessels = organs.vessels(a, x, y, side)
    for name in factors["label"].split("|") if factors["label"] != "normal" else ():
        more, there, kept = FINDINGS[name](a, factors, spots, x, y, low, reach)
        haze, opacity, vessels = haze + more, opacity | there, vessels * kept
    return haze, opacity, vessels


def _pneumonia(a, factors, spots, x, y, low, reach):
    lobe = x < 0 if factors["side"] == "right" else x > 0
    severity, centre, haze = factors["severity"], ZONES[factors["zone"]], np.zeros_like(x)
    for up, out, wide in np.reshape(spots[6:24], (6, 3))[: 3 + round(3 * severity)]:
        r2 = np.square(low - centre - 0.13 * up) + np.square(0.5 * (reach - 0.6 - 0.3 * out))
        r2 = r2 / (SPOT * (1 + 0.2 * wide)) ** 2
        haze = haze + np.exp(-r2) - HALO * np.exp(-r2 / 4) / 4
    haze = NODULE * (0.4 + 0.6 * severity) * lobe * np.minimum(haze, 1.3)
    return haze, haze > 0.3 * NODULE, 1.0


def _covid(a, factors, spots, x, y, low, reach):
    severity, where = factors["severity"], np.zeros_like(x)
    for i, (level, out, gain) in enumerate(((0.40, 0.88, 0.5), (0.64, 0.78, 0.8),
                                            (0.86, 0.60, 1.0))):
        jitter = np.where(x < 0, spots[i], spots[3 + i]).astype(np.float32)
        r2 = np.square((low - level - 0.05 * jitter) / 0.10) + np.square((reach - out) / 0.24)
        where = where + gain * (0.8 + 0.3 * jitter) * np.exp(-r2 / (0.5 + 0.8 * severity))
    where = 1 - np.exp(-1.5 * where)
    net = np.zeros_like(x)
    for k in range(3):  # three waves at 60 degrees: a hexagonal net
        angle = np.pi * (k + spots[24]) / 3
        net = net + np.cos(NET * (np.cos(angle) * x + np.sin(angle) * y) + np.pi * spots[6 + k]) / 3
    return (0.4 + 0.6 * severity) * where * (GLASS + RETICLE * net), where > 0.3, 1.0


def _nodule(a, factors, spots, x, y, low, reach):
    centre_x = np.sign(spots[26]) * (0.55 + 0.15 * spots[27]) * a.width
    centre_y = a.apex + (0.55 + 0.2 * spots[28]) * (a.dome - a.apex)
    radius = TUMOUR * (0.6 + 0.4 * factors["severity"])
    r = np.hypot(x - centre_x, y - centre_y)
    inside = organs.edge(radius - r, 0.04)
    return 0.8 * (inside - HALO / 4 * organs.bell(r, 2 * radius)), inside > 0.5, 1.0


def _pneumothorax(a, factors, spots, x, y, low, reach):
    """The lung has fallen off its wall: beyond the pleura there is air without vessels."""
    sunk = 0.15 + 0.2 * factors["severity"]
    sunk = sunk * organs.edge(0.75 + 0.1 * spots[31] - low, 0.5) * (x * spots[30] > 0)
    beyond = reach - (1 - sunk)
    free = organs.edge(beyond, 0.04) * (sunk > 0.02)
    line = organs.bell(beyond, PLEURA) * organs.edge(sunk - 0.05, 0.06)
    return 0.45 * line - 0.06 * free, free > 0.5, 1 - free


FINDINGS = {"pneumonia": _pneumonia, "covid": _covid, "nodule": _nodule,
            "pneumothorax": _pneumothorax}


def write(folder: str | os.PathLike, *, n: int = 2400, size: int = 64, seed: int = 0,
          confounding: float = 0.0, noise: float = 0.02, splits: dict[str, float] = SPLITS,
          scarce: dict[str, float] | None = None, masks: bool = False) -> Path:
    """Write n phantoms as images/<label>/000017.png with metadata.csv; a finished folder of the
    same arguments is kept.

    masks adds masks/lungs/ and masks/opacity/ beside images/. Splits are made by patient and
    balanced within each label. Of a label in `scarce` only this share of the patients is written,
    except in test: few to learn from, and enough to measure with. The folder appears whole or not
    at all. Raises InputError when it holds anything else.
    """
    folder = Path(folder)
    drawing = {"size": size, "confounding": confounding, "noise": noise}
    arguments = {"n": n, "seed": seed, **drawing, "splits": dict(splits),
                 "scarce": dict(scarce or {}), "masks": masks}
    if n < 1 or not splits or min(splits.values()) < 0 or sum(splits.values()) <= 0:
        raise InputError(f"phantom: n is {n} and splits are {splits}, allowed: n of 1 or more, "
                         "shares of 0 or more")

    def finished() -> bool:
        note = folder / "phantom.json"
        return note.is_file() and read_json(note) == arguments

    if finished():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than this phantom data set: choose "
                         "another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_table(partial / "metadata.csv",
                    _write_images(partial, n, seed, drawing, splits, scarce or {}, masks))
        write_json(partial / "phantom.json", arguments)
        os.replace(partial, folder)
    except OSError:
        if not finished():  # by another process, meanwhile
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_images(folder, n, seed, drawing, splits, scarce, masks) -> list[dict[str, str]]:
    """Write the PNGs and return their rows; a patient goes to the split farthest behind its share.
    """
    counts = {label: {name: 0 for name, share in splits.items() if share > 0} for label in LABELS}
    patients, home, rows = Counter(), {}, []
    for index in tqdm(range(n), desc="drawing phantoms", unit="image"):
        p = phantom(seed, index, **drawing)
        label, patient = p.row["label"], p.row["patient"]
        done, share = counts[label], scarce.get(label, 1.0)
        if patient not in home:
            split = min(done, key=lambda name: (done[name] + 0.5) / splits[name])
            before = patients[label, split]
            patients[label, split] += 1
            is_next = ceil((before + 1) * share) > ceil(before * share)
            home[patient] = split, split == "test" or is_next
        split, kept = home[patient]
        done[split] += 1
        if not kept:
            continue
        name = f"{label}/{index:06d}.png"
        images.write(folder / "images" / name, p.image)
        if masks:
            images.write(folder / "masks/lungs" / name, p.lungs * np.uint8(255))
            images.write(folder / "masks/opacity" / name, p.opacity * np.uint8(255))
        rows.append({"file_name": f"images/{name}", "label": label, "split": split, **p.row})
    return rows
