"""The embedded default: a procedural frontal chest X-ray whose every factor is known.

Organs are smooth solids in normalised coordinates (x to the image's right, y down, both -1..1), their path lengths
along the beam add up to an attenuation, and a film curve turns it into brightness (bright = dense, image right =
patient's left). Nothing is drawn in pixels, so one index looks alike at every size. About two dozen smooth parameters
make a patient; ribs, vessels and vertebrae follow from them.

    factor    what it changes in the picture
    --------  -----------------------------------------------------------------------------------------------------
    label     pneumonia: air of one zone of one lung is replaced, sharp at the fissure; covid: hazy patches at the
              periphery of both lungs, lower zones first; normal: neither
    severity  .3..1, extent and density of the opacity; empty for normal
    sex       F: breast shadows over the lower lungs, thorax 8 % narrower, thinner bones, sloping shoulders
    age       20..90: larger heart and aortic knob, wider (unfolded) aorta with a calcified rim, fainter bones,
              shorter lungs and steeper ribs (kyphosis)
    view      AP: heart 20 % wider, higher diaphragm, scapulae over the lungs, clavicles higher and flatter, brighter
              and flatter film; PA: scapulae beside the lungs

Factors are independent of the label unless `confounding` is asked for. Image 10k+9 is a follow-up of image 10k+8: the
same patient on another day, with another severity, positioning and exposure.
"""

import csv
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minidiff.data import images
from minidiff.errors import InputError

LABELS = ("normal", "pneumonia", "covid")
ZONES = {"upper": (0.46, -1, 0.45), "middle": (0.40, 1, 0.37), "lower": (0.56, 1, 0.46)}  # fissure, direction, length
UNKNOWN = 0.15  # share of patients whose age (and, independently, sex) is left out of the table
COLUMNS = ("file_name", "label", "split", "patient", "sex", "age", "view", "severity")
SPLITS = {"train": 0.625, "val": 0.125, "test": 0.25}


class Phantom(NamedTuple):
    """One image, its masks, its table row (cells are str, "" = unknown) and its true factors."""

    image: np.ndarray  # uint8 (H,W)
    lungs: np.ndarray  # bool (H,W), aerated or diseased lung not hidden by heart and diaphragm
    opacity: np.ndarray  # bool (H,W), where the disease is
    row: dict[str, str]  # label, patient, sex, age, view, severity
    factors: dict  # label, sex, age, view, severity (0. for normal), side, zone: never unknown


def phantom(seed: int, index: int, size: int = 64, *, label: str | None = None, confounding: float = 0.0,
            noise: float = 0.02, sex: str | None = None, age: float | None = None, view: str | None = None,
            severity: float | None = None) -> Phantom:
    """Draw image `index` of the phantom data set `seed` at size x size pixels (32..512).

    noise is a standard deviation of the 0..1 range; confounding is the probability that the view is tied to
    the label (AP for covid, PA otherwise); sex, age, view, severity force a factor, which is then known, and leave all
    else as it was. Raises InputError for values outside the module's table.
    """
    patient = index - (index % 10 == 9)
    label = LABELS[patient % 3] if label is None else label
    _check(seed, index, size, label, confounding, noise, sex, age, view, severity)
    person, visit = np.random.default_rng((seed, patient, 0)), np.random.default_rng((seed, index, 1))

    # Everything is drawn before anything is forced: a forced factor must not shift the rest of the patient.
    drawn_sex, drawn_age = "FM"[person.integers(2)], int(person.integers(20, 91))
    tied, coin = person.random() < confounding, ("AP", "PA")[person.integers(2)]
    hidden = person.random(2) < UNKNOWN
    side, zone = ("right", "left")[person.integers(2)], list(ZONES)[person.integers(3)]
    build, spots = np.clip(person.standard_normal(16), -2, 2).tolist(), person.uniform(-1, 1, 6).tolist()
    drawn_severity = round(visit.uniform(0.3, 1.0), 2)
    pose, film = visit.uniform(-1, 1, 4).tolist(), visit.uniform(-1, 1, 3).tolist()

    factors = {
        "label": label,
        "sex": drawn_sex if sex is None else sex,
        "age": drawn_age if age is None else age,
        "view": (("AP" if label == "covid" else "PA") if tied else coin) if view is None else view,
        "severity": 0.0 if label == "normal" else drawn_severity if severity is None else severity,
        **({"side": side, "zone": zone} if label == "pneumonia" else {"side": "", "zone": ""}),
    }
    brightness, lungs, opacity = _render(_anatomy(factors, build), factors, spots, pose, film, size)
    brightness = brightness + noise * visit.standard_normal((size, size), dtype=np.float32)
    row = {"label": label, "patient": f"phantom{seed}-{patient:06d}"}
    row["sex"] = "" if hidden[0] and sex is None else factors["sex"]
    row["age"] = "" if hidden[1] and age is None else f"{factors['age']:g}"
    row |= {"view": factors["view"], "severity": "" if label == "normal" else f"{factors['severity']:g}"}
    return Phantom(np.clip(brightness * 255 + 0.5, 0, 255).astype(np.uint8), lungs, opacity, row, factors)


def _check(seed, index, size, label, confounding, noise, sex, age, view, severity):
    """Raise InputError for the first argument outside what the phantom can draw."""
    ranges = {"seed": (seed, 0, 2**31), "index": (index, 0, 2**31), "size": (size, 32, 512), "noise": (noise, 0, 1)}
    ranges |= {"confounding": (confounding, 0, 1), "age": (age, 20, 90), "severity": (severity, 0.01, 1)}
    for name, (value, low, high) in ranges.items():
        if value is not None and not low <= value <= high:
            raise InputError(f"phantom: {name} is {value!r}, allowed: {low} to {high}")
    for name, value, allowed in (("label", label, LABELS), ("sex", sex, ("F", "M")), ("view", view, ("AP", "PA"))):
        if value is not None and value not in allowed:
            raise InputError(f"phantom: {name} is {value!r}, allowed: {', '.join(allowed)}")
    if severity is not None and label == "normal":
        raise InputError(f"phantom: severity is {severity!r} for label normal, allowed: none")


def _anatomy(factors: dict, z: list[float]) -> SimpleNamespace:
    """Lengths (units of half the image's side) and densities of one patient; z (16,) are its normal deviates."""
    old, ap, female = (factors["age"] - 20) / 70, factors["view"] == "AP", factors["sex"] == "F"
    width = 0.75 * (0.92 if female else 1.0) * (1 + 0.03 * z[0])
    apex = -0.80 + 0.02 * z[1] + 0.08 * old
    dome = 0.46 + 0.03 * z[2] - 0.10 * old - (0.12 if ap else 0.0)
    return SimpleNamespace(
        female=female, ap=ap, old=old,
        width=width,  # lung half width at the base
        wall=width + 0.16 + 0.02 * z[3],  # trunk half width
        apex=apex,  # y of the lungs' tops
        dome=dome,  # y of the left dome's top
        lift=0.06 + 0.015 * z[4],  # by which the right dome stands higher
        dip=0.24 + 0.02 * z[5],  # from dome to costophrenic angle
        heart=width * (0.44 + 0.02 * z[6] + 0.10 * old) * (1.2 if ap else 1.0),  # half width
        knob=0.075 + 0.006 * z[7] + 0.055 * old,  # radius
        unfold=0.02 + 0.07 * old,  # by which the aorta bulges sideways
        spacing=0.140 + 0.003 * z[8],  # of the ribs
        slope=0.30 + 0.03 * z[9] + 0.16 * old,  # of the ribs
        bone=(1.15 - 0.55 * old) * (0.85 if female else 1.0) * (1 + 0.08 * z[10]),
        clavicle=-0.62 + 0.02 * z[11] - (0.10 if ap else 0.0),  # y of the medial ends
        breast=0.37 + 0.02 * z[12],  # radius
        sag=0.26 + 0.03 * z[13] + 0.06 * old,  # y of the breasts' centres
        vessels=1 + 0.15 * z[14],
        shoulder=-0.76 + 0.02 * z[15] + (0.06 if female else 0.0),
    )


def _edge(d: np.ndarray, width: float) -> np.ndarray:
    """0 outside, 1 inside a border at signed distance d = 0, blurred over `width` about a pixel or more."""
    t = np.clip(d / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _bell(d: np.ndarray, width: float) -> np.ndarray:
    """exp(-(d/width)²): the profile of everything that has no edge."""
    return np.exp(-np.square(d / width))


def _union(a: np.ndarray, b: np.ndarray, blend: float = 0.05) -> np.ndarray:
    """Signed distance inside a or b, the corner between them filled over `blend`: a smooth maximum."""
    return 0.5 * (a + b + np.sqrt(np.square(a - b) + blend * blend))


def _band(d: np.ndarray, half: float, px: float) -> np.ndarray:
    """Profile of a bone across its axis: a marrow plateau between two denser cortical lines; d is from the axis."""
    d = np.abs(d)
    soft = max(0.02, 1.5 * px)
    cortex = _bell(d - 0.85 * half, 0.35 * half + 0.4 * px) * _edge(half + px - d, soft)
    return 0.65 * _edge(half - d, soft) + 0.5 * cortex


def _render(a, factors, spots, pose, film, size):
    """Brightness float32 (size,size) about 0..1, lung mask, opacity mask; the beam's path lengths add up."""
    px = 2 / size
    grid = (np.arange(size, dtype=np.float32) + 0.5) * px - 1
    turn, zoom = 0.03 * pose[0], 1 + 0.03 * pose[1]
    gx, gy = grid[None, :] - 0.03 * pose[2], grid[:, None] - 0.03 * pose[3]
    x, y = (gx - turn * gy) * zoom, (gy + turn * gx) * zoom
    side = np.abs(x)
    sharp = max(0.02, 1.5 * px)

    body, inside = _body(a, x, y, side, sharp)
    lung, depth, reach = _lungs(a, x, y, side)
    heart, great = _mediastinum(a, x, y, sharp)
    visible = _edge(lung, sharp) * (1 - _edge(heart, sharp))
    air = visible * (1 - np.exp(-np.maximum(depth, 0) / 0.06)) * (0.86 + 0.1 * y)
    haze, opacity = _disease(a, factors, spots, x, y, side, reach)
    opacity = opacity & (visible > 0.5)

    soft = body * (1 + 0.50 * _edge(y - a.dome, 0.5)) + great * inside
    bone = a.bone * _bones(a, x, y, side, reach, depth, px)
    fluid = air * (haze + 0.22 * a.vessels * _vessels(a, x, y, side))
    stomach = 0.16 * _edge(0.09 - np.hypot((x - 0.34) * 0.7, y - a.dome - 0.16), 0.06)  # its gas, under the left dome
    total = soft - stomach + bone * inside - 0.72 * (air - fluid)
    gain = (1.55 if a.ap else 1.75) * (1 + 0.06 * film[0])
    veil = (0.10 if a.ap else 0.0) + 0.02 * film[1]  # scatter
    brightness = (1 - np.exp(-gain * np.maximum(total + veil * inside, 0))) * (0.97 + 0.02 * film[2] * x)
    return brightness.astype(np.float32), visible > 0.5, opacity


def _body(a, x, y, side, sharp):
    """Path length in soft tissue, and the silhouette of trunk, neck, shoulders and arms."""
    wall = a.wall + 0.03 * np.cos(2.5 * (y - 0.1))
    trapezius = 0.35 * np.exp(-np.maximum(side - 0.24, 0) / 0.22) + 8 * np.maximum(0.24 - side, 0)
    shoulder = y - a.shoulder + trapezius - 0.9 * np.square(np.maximum(side - 0.62, 0))
    arm = 0.3 * ((side - wall) * 3 - y - 0.02)
    outline = np.minimum(shoulder, np.maximum(wall - side, arm))
    chord = np.sqrt(np.clip(1 - np.square(x / (a.wall * 1.02)), 0, 1))
    path = (0.22 + 0.60 * chord) * (0.85 + 0.15 * _edge(y + 0.6, 0.7))
    if a.female:
        r = np.hypot(side - 0.43, (y - a.sag) * 1.05)
        path = path + 0.14 * _edge(a.breast - r, 3 * sharp) * np.clip(0.6 + (y - a.sag) / a.breast, 0.05, 1.5)
    inside = _edge(outline, 1.5 * sharp)
    return path * inside, inside


def _lungs(a, x, y, side):
    """Signed distance inside the lungs, air depth's distance to the chest wall, and reach 0 (midline)..1 (wall)."""
    base = a.dome + a.dip
    height = base - a.apex
    rest = np.maximum((base - y) / height, 0)  # 0 at the base, 1 at the apex
    t, cube = side / a.width, rest * rest * rest
    wall = 1 - t * t * np.sqrt(t) - cube  # a superellipse; its slope turns it into a distance
    lateral = wall / (np.hypot(2.5 / a.width * t * np.sqrt(t), 3 / height * rest * rest) + 1e-3)
    medial = side - 0.10 - 0.16 * np.exp(-np.maximum(y - a.apex, 0) / 0.12)
    out = (side - 0.48 * a.width) / 0.39
    dip = np.where(out > 0, np.abs(out) ** 2.4, 0.35 * np.square(out))
    floor = a.dome - a.lift * (x < 0) + a.dip * dip
    reach = side / (np.clip(1 - cube, 0.03, 1) ** 0.4 * a.width)
    depth = np.minimum(lateral, medial + 0.08)
    return np.minimum(np.minimum(lateral, medial), 0.8 * (floor - y)), depth, reach


def _mediastinum(a, x, y, sharp):
    """Signed distance inside heart and great vessels, and their extra path length (trachea: less)."""
    cx, cy = 0.34 * a.heart, a.dome - 0.10
    u, v = (x - cx) * 0.88 + (y - cy) * 0.47, (y - cy) * 0.88 - (x - cx) * 0.47
    r = np.sqrt(np.square(u / a.heart) + np.square(v / (0.66 * a.heart + 0.03)))
    heart = (1 - r) * a.heart * 0.8
    knob_y = -0.36 + 0.05 * a.old
    knob = a.knob - np.hypot(x - 0.10 - 0.3 * a.knob, y - knob_y)
    stem = 0.12 + a.unfold * _bell(y + 0.08, 0.25) - np.where(x > 0, x - 0.03, -x)
    stem = np.minimum(stem, a.dome + 0.1 - y)
    inside = _union(_union(heart, stem), knob)
    path = 0.24 * np.sqrt(np.clip(1 - r * r, 0, 1)) + 0.08 * _edge(knob, 2 * sharp)
    path = path + 0.16 * _edge(stem, 0.12) * _edge(y + 0.62, 0.3)
    rim = 0.22 * a.old**2 * _bell(np.abs(knob) - 0.008, 0.014) * _edge(x - 0.1, 0.05)  # calcified wall
    trachea = _edge(0.05 - np.abs(x + 0.02 * _bell(y - knob_y, 0.2)), 0.04) * _edge(-0.28 - y, 0.1)
    return inside, path + rim - 0.20 * trachea


def _bones(a, x, y, side, reach, depth, px):
    """Path length in bone at unit density: spine, ribs, clavicles, scapulae and humeral heads."""
    disc = np.cos(2 * np.pi * (y - 0.12 * y * y) / 0.16)
    spine = _edge(0.08 + 0.015 * y - 0.008 * disc - side, 0.05) * (0.22 - 0.06 * disc)
    spine = spine + 0.10 * _bell(side, 0.022) * (1 - disc)  # spinous processes
    # Ribs repeat along y, so one periodic profile draws all of them: k counts ribs, s runs along each.
    s = np.minimum(reach, 1.2)
    bend = a.slope * s**2.2 * (0.72 + 0.25 * y) - 0.05 * np.sin(np.pi * np.minimum(s, 1))
    k = (y - a.apex - 0.02 - bend) / a.spacing
    back = _band((k - np.round(k)) * a.spacing, 0.034, px) * _edge(k + 0.4, 0.2) * _edge(8.7 - k, 0.8)
    back = back * _edge(side - 0.09, 0.05) * _edge(depth + 0.02, 0.10) * (1 - 0.35 * s)
    step = 1.15 * a.spacing
    k = (y - a.apex - 0.30 + 0.36 * s * np.sqrt(s)) / step
    front = _band((k - np.round(k)) * step, 0.036, px) * _edge(k + 0.3, 0.3) * _edge(5.4 - k, 0.4)
    front = front * _edge(s - 0.55, 0.25) * _edge(depth + 0.05, 0.10)  # cartilage, medially, is not seen
    run = side - 0.08
    axis = a.clavicle - (0.17 if a.ap else 0.28) * run - 0.03 * np.sin(2 * np.pi * run / 0.75)
    clavicle = _band(y - axis, 0.032 + 0.012 * _bell(run, 0.08), px) * _edge(run, 0.03) * _edge(0.7 - run, 0.1)
    inner = (0.52 if a.ap else 0.80) * a.width / 0.75  # the scapula's medial border at its top
    medial = side - inner - 0.12 * (y + 0.55) + 0.25 * np.square(y + 0.25)
    lateral = inner + 0.34 - side - 0.38 * (y + 0.48)
    top = y + 0.55 + 0.35 * (side - inner)
    blade = -_union(_union(-medial, -lateral, 0.06), -top, 0.06)
    scapula = 0.09 * _edge(blade, 0.05) + 0.10 * _bell(blade - 0.015, 0.016 + 0.5 * px)
    humerus = 0.16 * _edge(0.13 - np.hypot(side - a.wall - 0.08, y - a.shoulder - 0.14), 0.05)
    return spine + 0.15 * back + 0.055 * front + 0.20 * clavicle + scapula + humerus


def _vessels(a, x, y, side):
    """Pulmonary vessels: branches of constant width that fan out from the hila and thin out to the periphery."""
    hx, hy = side - 0.17, y + 0.10 - 0.04 * (x > 0)
    r = np.hypot(hx, hy)
    angle = np.arctan2(hy, hx) + 0.35 * np.sin(4 * r)
    trunk = _bell(r * np.sin(3.5 * angle + 0.6) / 3.5, 0.022) * np.exp(-r / 0.30)
    twig = _bell(r * np.sin(7.5 * angle + 2.0 + x) / 7.5, 0.014) * np.exp(-np.square((r - 0.35) / 0.2))
    return 1.2 * _bell(r, 0.12) + trunk + 0.6 * twig


def _disease(a, factors, spots, x, y, side, reach):
    """Share of the air that is replaced, float (H,W) 0..1, and where the opacity counts as present."""
    severity, label = factors["severity"], factors["label"]
    if label == "normal":
        return np.zeros_like(x), np.zeros(x.shape, bool)
    low = (y - a.apex) / (a.dome + 0.5 * a.dip - a.apex)  # 0 at the apex, 1 at the base
    if label == "pneumonia":
        lobe = x < 0 if factors["side"] == "right" else x > 0
        fissure, down, length = ZONES[factors["zone"]]  # the upper lobe stands on its fissure, the others hang
        d = down * (low - 0.10 * (reach - 0.5) - fissure)
        fill = _edge(d, 0.04) * _edge(length * (0.2 + 0.8 * severity) - d, 0.2)
        haze = fill * lobe * (0.50 + 0.45 * severity)
        return haze, haze > 0.2
    haze = np.zeros_like(x)
    for i, (level, out, gain) in enumerate(((0.40, 0.88, 0.8), (0.64, 0.78, 1.1), (0.86, 0.60, 1.4))):
        jitter = np.where(x < 0, spots[i], spots[3 + i]).astype(np.float32)
        r2 = np.square((low - level - 0.05 * jitter) / 0.10) + np.square((reach - out) / 0.24)
        haze = haze + gain * (0.8 + 0.3 * jitter) * np.exp(-r2 / (0.5 + 0.8 * severity))
    haze = 0.78 * (1 - np.exp(-1.3 * (0.45 + 0.55 * severity) * haze))
    return haze, haze > 0.2


def write(folder: str | os.PathLike, *, n: int = 2400, size: int = 64, seed: int = 0, confounding: float = 0.0,
          noise: float = 0.02, splits: dict[str, float] = SPLITS, masks: bool = False) -> Path:
    """Write n phantoms as images/<label>/000017.png with metadata.csv; a finished folder of the same arguments is kept.

    masks adds masks/lungs/ and masks/opacity/ beside images/. Splits are decided by patient and stay balanced within
    each label. The folder appears whole or not at all. Raises InputError when it holds anything else.
    """
    folder = Path(folder)
    drawing = {"size": size, "confounding": confounding, "noise": noise}
    arguments = {"n": n, "seed": seed, **drawing, "splits": dict(splits), "masks": masks}
    if n < 1 or not splits or min(splits.values()) < 0 or sum(splits.values()) <= 0:
        raise InputError(f"phantom: n is {n} and splits are {splits}, allowed: n of 1 or more, shares of 0 or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        note = folder / "phantom.json"
        if not note.is_file() or json.loads(note.read_text()) != arguments:
            raise InputError(f"{folder} holds something else than this phantom data set: choose another folder")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        rows = _write_images(partial, n, seed, drawing, splits, masks)
        with (partial / "metadata.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        (partial / "phantom.json").write_text(json.dumps(arguments, indent=1) + "\n")
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_images(folder, n, seed, drawing, splits, masks) -> list[dict[str, str]]:
    """Write the PNGs and return their rows; each patient goes to the split that lags most behind its share."""
    counts = {label: {name: 0 for name, share in splits.items() if share > 0} for label in LABELS}
    home, rows = {}, []
    for index in tqdm(range(n), desc="drawing phantoms", unit="image"):
        p = phantom(seed, index, **drawing)
        label, done = p.row["label"], counts[p.row["label"]]
        split = home.setdefault(p.row["patient"], min(done, key=lambda name: (done[name] + 0.5) / splits[name]))
        done[split] += 1
        for kind, picture in (("images", p.image), ("masks/lungs", p.lungs), ("masks/opacity", p.opacity)):
            if kind == "images" or masks:
                path = folder / kind / label / f"{index:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                images.write(path, picture if picture.dtype == np.uint8 else picture * np.uint8(255))
        rows.append({"file_name": f"images/{label}/{index:06d}.png", "split": split, **p.row})
    return rows
