"""The organs of the phantom: smooth solids in normalised coordinates, and the beam's path length
through each.

x runs to the image's right and y down, both -1..1; `side` is |x|, `px` the width of a pixel, `a`
the `anatomy` of one patient.
"""

from types import SimpleNamespace

import numpy as np


def anatomy(factors: dict, z: list[float]) -> SimpleNamespace:
    """Lengths (in half image sides) and densities of one patient; z (16,) are normal deviates."""
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
        spacing=0.190 + 0.004 * z[8],  # of the ribs
        slope=0.30 + 0.03 * z[9] + 0.16 * old,  # of the ribs
        bone=(1.15 - 0.55 * old) * (0.85 if female else 1.0) * (1 + 0.08 * z[10]),
        clavicle=-0.62 + 0.02 * z[11] - (0.10 if ap else 0.0),  # y of the medial ends
        breast=0.37 + 0.02 * z[12],  # radius
        sag=0.26 + 0.03 * z[13] + 0.06 * old,  # y of the breasts' centres
        vessels=1 + 0.15 * z[14],
        shoulder=-0.76 + 0.02 * z[15] + (0.06 if female else 0.0),
    )


def edge(d: np.ndarray, width: float) -> np.ndarray:
    """0 outside, 1 inside a border at signed distance d = 0, blurred over `width`."""
    t = np.clip(d / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def bell(d: np.ndarray, width: float) -> np.ndarray:
    """exp(-(d/width)²): the profile of everything that has no edge."""
    return np.exp(-np.square(d / width))


def union(a: np.ndarray, b: np.ndarray, blend: float = 0.05) -> np.ndarray:
    """Signed distance inside a or b, rounded between them over `blend`: a smooth maximum."""
    return 0.5 * (a + b + np.sqrt(np.square(a - b) + blend * blend))


def band(d: np.ndarray, half: float, px: float) -> np.ndarray:
    """Profile of a bone at distance d from its axis: marrow between two denser cortical lines."""
    d = np.abs(d)
    soft = max(0.02, 1.5 * px)
    cortex = bell(d - 0.85 * half, 0.35 * half + 0.4 * px) * edge(half + px - d, soft)
    return 0.65 * edge(half - d, soft) + 0.5 * cortex


def body(a, x, y, side, sharp):
    """Path length in soft tissue, and the silhouette of trunk, neck, shoulders and arms."""
    wall = a.wall + 0.03 * np.cos(2.5 * (y - 0.1))
    trapezius = 0.35 * np.exp(-np.maximum(side - 0.24, 0) / 0.22) + 8 * np.maximum(0.24 - side, 0)
    shoulder = y - a.shoulder + trapezius - 0.9 * np.square(np.maximum(side - 0.62, 0))
    arm = 0.3 * ((side - wall) * 3 - y - 0.02)
    outline = np.minimum(shoulder, np.maximum(wall - side, arm))
    chord = np.sqrt(np.clip(1 - np.square(x / (a.wall * 1.02)), 0, 1))
    path = (0.22 + 0.60 * chord) * (0.85 + 0.15 * edge(y + 0.6, 0.7))
    if a.female:
        r = np.hypot(side - 0.43, (y - a.sag) * 1.05)
        thick = np.clip(0.6 + (y - a.sag) / a.breast, 0.05, 1.5)
        path = path + 0.14 * edge(a.breast - r, 3 * sharp) * thick
    inside = edge(outline, 1.5 * sharp)
    return path * inside, inside


def lungs(a, x, y, side):
    """Signed distance inside the lungs, distance to the chest wall, reach 0 (midline)..1 (wall)."""
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


def mediastinum(a, x, y, sharp):
    """Signed distance inside heart and great vessels, and their extra path length."""
    cx, cy = 0.34 * a.heart, a.dome - 0.10
    u, v = (x - cx) * 0.88 + (y - cy) * 0.47, (y - cy) * 0.88 - (x - cx) * 0.47
    r = np.sqrt(np.square(u / a.heart) + np.square(v / (0.66 * a.heart + 0.03)))
    heart = (1 - r) * a.heart * 0.8
    knob_y = -0.36 + 0.05 * a.old
    knob = a.knob - np.hypot(x - 0.10 - 0.3 * a.knob, y - knob_y)
    stem = 0.12 + a.unfold * bell(y + 0.08, 0.25) - np.where(x > 0, x - 0.03, -x)
    stem = np.minimum(stem, a.dome + 0.1 - y)
    inside = union(union(heart, stem), knob)
    path = 0.24 * np.sqrt(np.clip(1 - r * r, 0, 1)) + 0.08 * edge(knob, 2 * sharp)
    path = path + 0.16 * edge(stem, 0.12) * edge(y + 0.62, 0.3)
    calcified = 0.22 * a.old**2 * bell(np.abs(knob) - 0.008, 0.014) * edge(x - 0.1, 0.05)
    trachea = edge(0.05 - np.abs(x + 0.02 * bell(y - knob_y, 0.2)), 0.04) * edge(-0.28 - y, 0.1)
    return inside, path + calcified - 0.20 * trachea


def bones(a, x, y, side, reach, depth, px):
    """Path length in bone at unit density: spine, ribs, clavicles, scapulae and humeral heads."""
    disc = np.cos(2 * np.pi * (y - 0.12 * y * y) / 0.16)
    spine = edge(0.08 + 0.015 * y - 0.008 * disc - side, 0.05) * (0.22 - 0.06 * disc)
    spine = spine + 0.10 * bell(side, 0.022) * (1 - disc)  # spinous processes
    # One periodic profile along y draws all ribs: k counts them, s runs along each.
    s = np.minimum(reach, 1.2)
    bend = a.slope * s**2.2 * (0.72 + 0.25 * y) - 0.05 * np.sin(np.pi * np.minimum(s, 1))
    k = (y - a.apex - 0.02 - bend) / a.spacing
    back = band((k - np.round(k)) * a.spacing, 0.042, px) * edge(k + 0.4, 0.2) * edge(6.6 - k, 0.8)
    back = back * edge(side - 0.09, 0.05) * edge(depth + 0.02, 0.10) * (1 - 0.35 * s)
    step = 1.15 * a.spacing
    k = (y - a.apex - 0.30 + 0.36 * s * np.sqrt(s)) / step
    front = band((k - np.round(k)) * step, 0.044, px) * edge(k + 0.3, 0.3) * edge(4.2 - k, 0.4)
    front = front * edge(s - 0.55, 0.25) * edge(depth + 0.05, 0.10)  # no cartilage, medially
    run = side - 0.08
    axis = a.clavicle - (0.17 if a.ap else 0.28) * run - 0.03 * np.sin(2 * np.pi * run / 0.75)
    clavicle = band(y - axis, 0.032 + 0.012 * bell(run, 0.08), px)
    clavicle = clavicle * edge(run, 0.03) * edge(0.7 - run, 0.1)
    inner = (0.52 if a.ap else 0.80) * a.width / 0.75  # the scapula's medial border at its top
    medial = side - inner - 0.12 * (y + 0.55) + 0.25 * np.square(y + 0.25)
    lateral = inner + 0.34 - side - 0.38 * (y + 0.48)
    top = y + 0.55 + 0.35 * (side - inner)
    blade = -union(union(-medial, -lateral, 0.06), -top, 0.06)
    scapula = 0.09 * edge(blade, 0.05) + 0.10 * bell(blade - 0.015, 0.016 + 0.5 * px)
    humerus = 0.16 * edge(0.13 - np.hypot(side - a.wall - 0.08, y - a.shoulder - 0.14), 0.05)
    return spine + 0.15 * back + 0.055 * front + 0.20 * clavicle + scapula + humerus


def vessels(a, x, y, side):
    """Pulmonary vessels: branches of constant width that fan out from the hila and fade away."""
    hx, hy = side - 0.17, y + 0.10 - 0.04 * (x > 0)
    r = np.hypot(hx, hy)
    angle = np.arctan2(hy, hx) + 0.35 * np.sin(4 * r)
    trunk = bell(r * np.sin(3.5 * angle + 0.6) / 3.5, 0.022) * np.exp(-r / 0.30)
    twig = bell(r * np.sin(7.5 * angle + 2.0 + x) / 7.5, 0.014)
    twig = twig * np.exp(-np.square((r - 0.35) / 0.2))
    return 1.2 * bell(r, 0.12) + trunk + 0.6 * twig
