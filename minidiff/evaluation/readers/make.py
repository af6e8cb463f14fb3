"""Make a reading study: a page for the readers, and apart from it the key that says what each image
is.

The page needs neither network nor server. All images have one size, are grey and are stored without
compression, so that all files are equally long: a generated image compresses better, and the length
would give it away. Names and orders come from a secret in the key file (`keyed`); the page and
preregistration.json carry the key's hash.
"""

import base64
import hashlib
import json
import secrets
import struct
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy

from minidiff import runs
from minidiff.data import images
from minidiff.data.split import check_synthetic, check_unseen, trained_on
from minidiff.data.table import Row, Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation.readers import keyed
from minidiff.root import Rooted

HERE = Path(__file__).parent
GAP = 50          # places between an image and its repeat, where the list is long enough
ATTENTIVE = 0.8   # share of the controls that a reader must call Bad to be pooled
HEAVY = 150e6     # bytes of a page at which a tablet struggles
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
RULES = (
    "Good-rates with Wilson's interval for each reader; difference synthetic − real with "
    "Newcombe's.",
    "Non-inferior if both lower limits of the pooled difference, over other images and over other "
    "images and readers, lie above −margin.",
    "Readers who call fewer than {attentive:.0%} of the controls Bad are shown and left out of "
    "pooled numbers; so are unfinished readers.",
    "Only the first of two showings counts for rates; both count for a reader's agreement with the "
    "first answer.",
    "Agreement: Cohen's kappa of two readers, Fleiss' of more, Gwet's AC1; real or generated: "
    "exact binomial against 1/2.",
)


@dataclass(frozen=True)
class Config(Rooted):
    data: tuple[str, ...] = ()     # real data sets; only their val and test images are shown
    samples: tuple[str, ...] = ("ROOT/samples",)  # folders of synthetic images
    out: str = "ROOT/readers"      # folder for the readers: index.html and nothing else
    key: str = "ROOT/readers-key"  # folder to keep: key.json and preregistration.json
    per_label: int = 34            # real images, and as many synthetic ones, of each label
    readers: int = 4               # orders on the page, one for each reader
    repeat: float = 0.15           # share shown twice, for agreement with the first answer
    controls: int = 10             # images spoilt on purpose, which an attentive reader calls Bad
    origin: bool = True            # a second part that asks "real or generated?"
    margin: float = 0.15           # by which the Good-rate of synthetic images may fall short
    show_label: bool = False       # print each image's label, and ask for good examples of it
    size: int = 0                  # side of all images, px; 0: that of the samples
    text: str = ""                 # JSON file with the page's words in another language
    seed: int = 0                  # of the patient split where the data bring none


def run(cfg: Config) -> None:
    """Make a reading study: a page to rate images on, and its key."""
    page, key = make(cfg, secrets.token_bytes(32))
    plan = json.loads((key / "preregistration.json").read_text())
    print(f"{plan['images']} images and {plan['shown'] - plan['images']} repeats and controls for "
          f"{cfg.readers} readers; repeats {plan['gap']} or more places apart")
    for remark in plan["notes"]:
        print(f"note: {remark}")
    print(f"{page}  give this to the readers ({page.stat().st_size / 1e6:.0f} MB); a link may end "
          "in ?reader=2")
    print(f"{key / 'preregistration.json'}  deposit this before anybody reads")
    print(f"{key / 'key.json'}  keep this from the readers")


def make(cfg: Config, secret: bytes) -> tuple[Path, Path]:
    """Write page, key and preregistration; returns the page and the folder of the key."""
    out, key = check(cfg)
    words = texts(cfg.text)
    real, made = read(cfg)
    items, notes = choose(cfg, secret, real, made)
    raw = [images.read(it["file"]) for it in items]
    sides = [min(image.shape[1:]) for image in raw]
    size = cfg.size or min(side for side, it in zip(sides, items) if it["kind"] == "synthetic")
    small = Counter(it["kind"] for side, it in zip(sides, items)
                    if side < size and "twin" not in it)
    notes += [f"{n} {kind} images, smaller than {size} px, were enlarged, which may "
              f"show" for kind, n in small.items()]
    pixels = render(raw, items, size, secret)
    ids = [keyed.name(secret, f"item {k}") for k in range(len(items))]
    # the page lists its items by their random names
    places = [int(k) for k in np.argsort(ids)]
    rank = {k: place for place, k in enumerate(places)}
    orders, gap = draw_orders(cfg, secret, items)
    orders = [{block: [rank[k] for k in order] for block, order in o.items()} for o in orders]
    listed = [{"id": ids[k], **{c: v for c, v in items[k].items() if c not in ("file", "twin")},
               **({"repeat_of": ids[items[k]["twin"]]} if "twin" in items[k] else {})}
              for k in places]
    design = {"size": size, "margin": cfg.margin, "attentive": ATTENTIVE, "gap": gap,
              "origin": cfg.origin,
              "show_label": cfg.show_label, "controls": cfg.controls, "readers": cfg.readers}
    sealed = json.dumps({"secret": secret.hex(), "design": design, "items": listed,
                         "orders": orders}, indent=1).encode()
    digest = hashlib.sha256(sealed).hexdigest()
    shown = [{"id": ids[k], "png": base64.b64encode(stored_png(pixels[k])).decode(),
              **({"label": items[k]["label"]} if cfg.show_label else {})} for k in places]
    html = build_page({"id": digest[:16], "key": digest, "labelled": cfg.show_label,
                       "orders": orders, "items": shown, "text": words})
    if len(html) > HEAVY:
        notes.append(f"the page has {len(html) / 1e6:.0f} MB, too many for a tablet; lower --size "
                     "or --per-label")
    kinds = Counter((i["kind"], i["label"]) for i in items
                    if "twin" not in i and i["kind"] != "control")
    plan = {"study": digest[:16], "key_sha256": digest,
            "page_sha256": hashlib.sha256(html).hexdigest(), **design,
            "images": sum(kinds.values()), "shown": len(items),
            "of": {f"{k} {label}": n for (k, label), n in kinds.items()},
            "question": {k: words[k] for k in (
                "quality_title", "definition_label" if cfg.show_label else "definition",
                *(("origin_title", "definition_origin") if cfg.origin else ()))},
            "rules": [rule.format(attentive=ATTENTIVE) for rule in RULES], "data": list(cfg.data),
            "samples": list(cfg.samples), "notes": notes,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "provenance": runs.provenance()}
    runs.write_atomic(key / "key.json", sealed)
    runs.write_json(key / "preregistration.json", plan)
    runs.write_atomic(out / "index.html", html)
    return out / "index.html", key


def check(cfg: Config) -> tuple[Path, Path]:
    """The two folders, after what can be refused before anything is read."""
    for name, low, high in (("per_label", 1, 10_000), ("readers", 1, 100), ("repeat", 0, 1),
                            ("controls", 0, 1000), ("margin", 0.01, 0.5)):
        if not low <= getattr(cfg, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is not allowed: "
                             f"{low:g} to {high:g}")
    if cfg.size and not 16 <= cfg.size <= 2048:
        raise InputError(f"--size {cfg.size} is not allowed: 16 to 2048, or 0 for that of the "
                         "samples")
    out, key = Path(cfg.out), Path(cfg.key)
    if runs.nested(out, key):
        raise InputError(f"--key {key} and --out {out}: the key must lie apart from what the "
                         "readers get")
    for folder in (out, key):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not empty; a study is never made over "
                             "another: give another folder")
    return out, key


def texts(path: str) -> dict[str, str]:
    """The page's words, from text.json or a translation that has each with the same {values}."""
    english = json.loads((HERE / "text.json").read_text())
    if not path:
        return english
    found = runs.read_json(path)
    found = found if isinstance(found, dict) else {}
    for key, text in english.items():
        values = {part.split("}")[0] for part in text.split("{")[1:]}
        if not isinstance(found.get(key),
                          str) or {p.split("}")[0] for p in found[key].split("{")[1:]} != values:
            wanted = f"with {', '.join(sorted(values))} in braces" if values else "without braces"
            raise InputError(f"{path}: {key!r} is missing or not as it should be; wanted is a text "
                             f"{wanted}")
    return {key: found[key] for key in english}


def read(cfg: Config) -> tuple[Table, list[Table]]:
    """Held-out real images and each set of samples, which may hold no real file, nor images of a
    generator that saw held-out ones."""
    table = read_table(cfg.data, seed=cfg.seed, split_dir=Path(cfg.root))
    real, made = table.select(split=("val", "test")), [read_table(folder, split=False)
                                                       for folder in cfg.samples]
    if not cfg.samples:
        raise InputError("--samples: no folder of synthetic images given")
    notes = list(table.notes)
    for folder, samples in zip(cfg.samples, made):
        check_synthetic(samples.rows, samples.hashes, table.hashes.values(), folder)
        notes += check_unseen(real.rows, real.hashes, trained_on(folder),
                              f"the generator of {folder}")
    return replace(real, notes=notes), made


def choose(cfg: Config, secret: bytes, real: Table,
           made: list[Table]) -> tuple[list[dict], list[str]]:
    """Equally many real and synthetic items of each label, then repeats, then controls; and notes.

    An item is {kind, label, set, file_name, sha256, file}; a repeat also has "twin", the place of
    its first showing.
    """
    rng = keyed.generator(secret, "draw")
    labels = sorted({label for table in made for label in table.labels})
    pools = {"real": [(real, "real", r) for r in real.rows], "synthetic":
             [(table, folder, r) for folder, table in zip(cfg.samples, made) for r in table.rows]}
    taken, spare = [], []
    for kind, pool in pools.items():
        for label in labels:
            own = spread([entry for entry in pool if entry[2]["label"] == label], rng,
                         patients=kind == "real")
            if len(own) < cfg.per_label:
                where = "held-out (val and test) images" if kind == "real" else "synthetic images"
                raise InputError(f"--per-label {cfg.per_label}: label {label!r} has only "
                                 f"{len(own)} {where}")
            taken += [item(kind, *entry) for entry in own[: cfg.per_label]]
            spare += [item(kind, *entry) for entry in own[cfg.per_label :]]
    repeats = []
    for kind in pools:
        places = [k for k, it in enumerate(taken) if it["kind"] == kind]
        repeats += [int(k) for k in rng.permutation(places)[: round(cfg.repeat * len(places))]]
    sources = [spare[int(k)] for k in rng.permutation(len(spare))] or taken
    spoilt = [{**sources[k % len(sources)], "kind": "control",
               "control": list(SPOIL)[k % len(SPOIL)]} for k in range(cfg.controls)]
    mine = {it["file"] for it in taken}
    patients = [r["patient"] for r in real.rows if r["file"] in mine]
    twice = len(patients) - len(set(patients))
    notes = [*real.notes, *([f"{twice} real images are further ones of a patient who has one "
                             f"already"] if twice else [])]
    return [*taken, *({**taken[k], "twin": k} for k in repeats), *spoilt], notes


def spread(pool: list[tuple[Table, str, Row]], rng: np.random.Generator, *, patients: bool) -> list:
    """In random order; real images of patients not yet seen first."""
    pool, seen, depth = [pool[k] for k in rng.permutation(len(pool))], Counter(), []
    for _, _, row in pool:
        depth.append(seen[row["patient"]] if patients else 0)
        seen[row["patient"]] += 1
    return [pool[k] for k in np.argsort(depth, kind="stable")]


def item(kind: str, table: Table, folder: str, row: Row) -> dict:
    return {"kind": kind, "label": row["label"], "set": folder, "file_name": row["file_name"],
            "sha256": table.hashes[row["file"]], "file": row["file"]}


def draw_orders(cfg: Config, secret: bytes,
                items: list[dict]) -> tuple[list[dict[str, list[int]]], int]:
    """Each reader's order of part 1 (everything) and of part 2 (real and synthetic images once),
    and the least gap between an image and its repeat."""
    pairs = [(it["twin"], k) for k, it in enumerate(items) if "twin" in it]
    once = [k for k, it in enumerate(items) if "twin" not in it and it["kind"] != "control"]
    orders, gaps = [], []
    for reader in range(1, cfg.readers + 1):
        order, gap = keyed.spaced_order(len(items), pairs, GAP,
                                        keyed.generator(secret, f"quality {reader}"))
        gaps.append(gap)
        again = keyed.generator(secret, f"origin {reader}").permutation(once)
        orders.append({"quality": order, **({"origin": again.tolist()} if cfg.origin else {})})
    return orders, min(gaps)


# --- pixels


def render(raw: list[np.ndarray], items: list[dict], size: int, secret: bytes) -> np.ndarray:
    """Every item as uint8 (N,size,size), grey; controls spoilt."""
    out = np.empty((len(raw), size, size), np.uint8)
    for k, (image, it) in enumerate(zip(raw, items)):
        square = images.square(image, size).astype(np.float64)
        grey = np.tensordot(LUMA, square, 1) if len(square) == 3 else square[0]
        if it["kind"] == "control":
            grey = SPOIL[it["control"]](grey, keyed.generator(secret, f"control {k}"))
        out[k] = np.clip(np.rint(grey), 0, 255)
    return out


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(0, 110, image.shape)


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(image, image.shape[0] / 14, mode="nearest")


def tiles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Its sixteen tiles, each in the place of another; the rest at the right and below stays."""
    side, out, order = image.shape[0] // 4, image.copy(), rng.permutation(16)
    for to, of in zip(order, np.roll(order, 1)):
        (y, x), (v, u) = (tuple(side * np.array(divmod(int(k), 4))) for k in (to, of))
        out[y : y + side, x : x + side] = image[v : v + side, u : u + side]
    return out


SPOIL = {"noise": noise, "blur": blur, "tiles": tiles}


def stored_png(image: np.ndarray) -> bytes:
    """The PNG of uint8 (H,W), stored without compression: of one length for all of one size."""
    height, width = image.shape
    # each row says "no filter" first
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image], 1).tobytes()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(
        ">I", zlib.crc32(kind + data)) for kind, data in chunks)


# --- the page


def build_page(study: dict) -> bytes:
    """The whole page; its policy allows this one script and style, and no request."""
    script, style = ((HERE / f"reader.{kind}").read_text() for kind in ("js", "css"))
    allowed = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
               for name, text in (("script", script), ("style", style))}
    policy = "; ".join(["default-src 'none'", "img-src data:", "base-uri 'none'",
                        "form-action 'none'",
                        *(f"{name}-src 'sha256-{digest}'" for name, digest in allowed.items())])
    data = json.dumps(study, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    escape = str.maketrans({"<": "&lt;", "&": "&amp;", '"': "&quot;"})
    html = (HERE / "reader.html").read_text()
    parts = {"lang": study["text"]["lang"].translate(escape),
             "title": study["text"]["title"].translate(escape),
             "policy": policy, "style": style, "script": script, "study": data}
    for name, part in parts.items():
        html = html.replace("{{" + name + "}}", part)
    return html.encode()
