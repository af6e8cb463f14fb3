"""Make a reading study: a page for the readers, and apart from it the key that says what each image
is.

The page needs neither network nor server. All images have one size, are grey and are stored without
compression, so that all files are equally long: a generated image compresses better, and the length
would give it away.

Names, draws and orders come from a secret in the key file; the page and preregistration.json carry
the key's hash. With a public seed anybody could draw the same images and orders again and learn
which are real; so they could from the state of a generator, which its outputs reveal. Here every
purpose has its own generator, keyed by HMAC-SHA256.
"""

import base64
import hashlib
import hmac
import html
import itertools
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minidiff import runs
from minidiff.cells import in_units
from minidiff.data import images
from minidiff.data.split import trained_on
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation.readers.film import SPOIL, generator, render, stored_png
from minidiff.evaluation.sets import HELD_OUT, alike, check_origin, read_synthetic
from minidiff.root import Reading, Rooted

HERE = Path(__file__).parent
GAP = 50          # places between an image and its repeat, where the list is long enough
ATTENTIVE = 0.8   # share of the controls that a reader must call Bad to be pooled
TRIES = 200       # to keep that gap
HEAVY = 150e6     # bytes of a page at which a tablet struggles
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
class Config(Reading, Rooted):
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
    plan = runs.read_json(key / "preregistration.json")
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
    items, notes = choose(cfg, secret, *read(cfg))
    raw = [images.read(it["file"], deep=True) for it in items]
    # one depth, one scale: a difference would show what is real
    bits = min(8 * image.itemsize for image in raw)
    windows = {it.pop("window") for it in items}
    sides = [min(image.shape[1:]) for image in raw]
    size = cfg.size or min(side for side, it in zip(sides, items) if it["kind"] == "synthetic")
    small = Counter(it["kind"] for side, it in zip(sides, items)
                    if side < size and "twin" not in it)
    notes += [f"{n} {kind} images, smaller than {size} px, were enlarged, which may show"
              for kind, n in small.items()]
    pixels = render(raw, items, size, bits, secret)
    # the page lists its items by their random names
    ids = [hmac.digest(secret, f"item {k}".encode(), "sha256").hex()[:32]
           for k in range(len(items))]
    places = np.argsort(ids)
    orders, gap = draw_orders(cfg, secret, items, np.argsort(places))
    listed = [{"id": ids[k], **{c: v for c, v in items[k].items() if c not in ("file", "twin")},
               **({"repeat_of": ids[items[k]["twin"]]} if "twin" in items[k] else {})}
              for k in places]
    design = {"size": size, "bits": bits, "margin": cfg.margin, "attentive": ATTENTIVE, "gap": gap,
              "origin": cfg.origin, "show_label": cfg.show_label, "controls": cfg.controls,
              "readers": cfg.readers}
    sealed = json.dumps({"secret": secret.hex(), "design": design, "items": listed,
                         "orders": orders}, indent=1).encode()
    digest = hashlib.sha256(sealed).hexdigest()
    shown = [{"id": ids[k], "png": base64.b64encode(stored_png(pixels[k])).decode(),
              **({"label": items[k]["label"]} if cfg.show_label else {})} for k in places]
    page = build_page({"id": digest[:16], "key": digest, "labelled": cfg.show_label, "bits": bits,
                       "window": windows.pop() if len(windows) == 1 else "", "orders": orders,
                       "items": shown, "text": words})
    if len(page) > HEAVY:
        notes.append(f"the page has {len(page) / 1e6:.0f} MB, too many for a tablet; lower --size "
                     "or --per-label")
    kinds = Counter(f"{it['kind']} {it['label']}" for it in items
                    if "twin" not in it and it["kind"] != "control")
    runs.write_atomic(key / "key.json", sealed)
    runs.write_json(key / "preregistration.json", {
        "study": digest[:16], "key_sha256": digest,
        "page_sha256": hashlib.sha256(page).hexdigest(), **design,
        "images": sum(kinds.values()), "shown": len(items), "of": kinds,
        "question": {k: words[k] for k in (
            "quality_title", "definition_label" if cfg.show_label else "definition",
            *(("origin_title", "definition_origin") if cfg.origin else ()))},
        "rules": [rule.format(attentive=ATTENTIVE) for rule in RULES], "data": list(cfg.data),
        "samples": list(cfg.samples), "notes": notes,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": runs.provenance()})
    runs.write_atomic(out / "index.html", page)
    return out / "index.html", key


def check(cfg: Config) -> tuple[Path, Path]:
    """The two folders, after what can be refused before anything is read."""
    ranges = {"per_label": (1, 10_000), "readers": (1, 100), "repeat": (0, 1),
              "controls": (0, 1000), "margin": (0.01, 0.5), "size": (16 if cfg.size else 0, 2048)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(cfg, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is not allowed: "
                             f"{low:g} to {high:g}")
    if not cfg.samples:
        raise InputError("--samples: no folder of synthetic images given")
    out, key = Path(cfg.out), Path(cfg.key)
    if runs.nested(out, key):
        raise InputError(f"--key {key} and --out {out}: the key must lie apart from what the "
                         "readers get")
    for folder in (out, key):
        if runs.occupied(folder):
            raise InputError(f"{folder} exists and is not empty; a study is never made over "
                             "another: give another folder")
    return out, key


def texts(path: str) -> dict[str, str]:
    """The page's words, from text.json or a translation that has each with the same {values}."""
    english = runs.read_json(HERE / "text.json")
    found = runs.read_json(path) if path else english
    for key, text in english.items():
        given = found.get(key) if isinstance(found, dict) else None
        values = set(re.findall("{.*?}", text))
        if not isinstance(given, str) or set(re.findall("{.*?}", given)) != values:
            raise InputError(f"{path}: {key!r} is missing or not as it should be; wanted is a text "
                             f"with {', '.join(sorted(values)) or 'nothing'} in braces")
    return {key: found[key] for key in english}


def read(cfg: Config) -> tuple[Table, list[Table]]:
    """Held-out real images and each set of samples, which may hold no real file, nor images of a
    generator that saw held-out ones."""
    table = read_table(cfg.data, cfg, seed=cfg.seed, split_dir=Path(cfg.root))
    made = [read_synthetic(folder, table.labels, table.hashes.values()) for folder in cfg.samples]
    real = table.select(split=HELD_OUT)
    for samples in made:
        real = alike(real, samples)
    seen = {f"the generator of {folder}": trained_on(folder) for folder in cfg.samples}
    return replace(real, notes=[*table.notes, *check_origin(real, seen)]), made


def choose(cfg: Config, secret: bytes, real: Table,
           made: Sequence[Table]) -> tuple[list[dict], list[str]]:
    """Equally many real and synthetic items of each label, then repeats, then controls; and notes.

    An item is {kind, label, set, file_name, sha256, file, window}; a repeat also has "twin", the
    place of its first showing.
    """
    rng = generator(secret, "draw")
    labels = sorted({label for table in made for label in table.labels})
    pools = {"real": [("real", real.hashes, row) for row in real.rows],
             "synthetic": [(folder, table.hashes, row) for folder, table in zip(cfg.samples, made)
                           for row in table.rows]}
    taken, spare = [], []
    for kind, label in itertools.product(pools, labels):
        own = [{"kind": kind, "label": label, "set": folder, "file_name": row["file_name"],
                "sha256": hashes[row["file"]], "file": row["file"],
                "window": cell if in_units(cell := row.get("window", "")) else ""}
               for folder, hashes, row in spread(
                   [entry for entry in pools[kind] if entry[2]["label"] == label], rng)]
        if len(own) < cfg.per_label:
            where = "held-out (val and test)" if kind == "real" else "synthetic"
            raise InputError(f"--per-label {cfg.per_label}: label {label!r} has only {len(own)} "
                             f"{where} images")
        taken += own[: cfg.per_label]
        spare += own[cfg.per_label :]
    repeats = []
    for kind in pools:
        places = [k for k, it in enumerate(taken) if it["kind"] == kind]
        repeats += rng.permutation(places)[: round(cfg.repeat * len(places))].tolist()
    sources = [spare[k] for k in rng.permutation(len(spare))] or taken
    spoilt = [{**sources[k % len(sources)], "kind": "control",
               "control": list(SPOIL)[k % len(SPOIL)]} for k in range(cfg.controls)]
    mine = {it["file"] for it in taken}
    patients = [row["patient"] for row in real.rows if row["file"] in mine]
    twice = len(patients) - len(set(patients))
    notes = [*real.notes, *([f"{twice} real images are further ones of a patient who has one "
                             f"already"] if twice else [])]
    return [*taken, *({**taken[k], "twin": k} for k in repeats), *spoilt], notes


def spread(pool: Sequence[tuple], rng: np.random.Generator) -> list[tuple]:
    """Entries (…, row) in random order, those of patients not yet seen first."""
    pool, seen, depth = [pool[k] for k in rng.permutation(len(pool))], Counter(), []
    for *_, row in pool:
        depth.append(seen[row["patient"]])
        seen[row["patient"]] += 1
    return [pool[k] for k in np.argsort(depth, kind="stable")]


def draw_orders(cfg: Config, secret: bytes, items: Sequence[dict],
                rank: np.ndarray) -> tuple[list[dict[str, list[int]]], int]:
    """Each reader's order of part 1 (everything) and of part 2 (real and synthetic images once),
    and the least gap between an image and its repeat; `rank` is each item's place on the page."""
    pairs = [(it["twin"], k) for k, it in enumerate(items) if "twin" in it]
    once = [k for k, it in enumerate(items) if "twin" not in it and it["kind"] != "control"]
    orders, gaps = [], []
    for reader in range(1, cfg.readers + 1):
        order, gap = spaced_order(len(items), pairs, GAP, generator(secret, f"quality {reader}"))
        gaps.append(gap)
        again = generator(secret, f"origin {reader}").permutation(once)
        orders.append({"quality": rank[order].tolist(),
                       **({"origin": rank[again].tolist()} if cfg.origin else {})})
    return orders, min(gaps)


def spaced_order(n: int, pairs: Sequence[tuple[int, int]], gap: int,
                 rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(order, gap): 0 … n − 1 in random order, the two of each pair at least a gap apart.

    Pairs are placed first, each on two free places drawn at random. If that fails `TRIES` times, as
    it must in a short list, the gap shrinks by one.
    """
    for kept in range(min(gap, n - len(pairs)), -1, -1):
        for _ in range(TRIES if pairs else 1):
            order = np.full(n, -1)
            for k in rng.permutation(len(pairs)):
                free = np.flatnonzero(order < 0)
                first = rng.choice(free)
                far = free[(abs(free - first) >= kept) & (free != first)]
                if not len(far):
                    break
                order[first], order[rng.choice(far)] = rng.permutation(pairs[k])
            else:
                order[order < 0] = rng.permutation(np.setdiff1d(np.arange(n), order))
                return order, kept
    raise AssertionError("a gap of 0 is always possible")


# --- the page


def build_page(study: dict) -> bytes:
    """The whole page; its policy allows this one script and style, and no request."""
    script, style = ((HERE / f"reader.{kind}").read_text("utf-8") for kind in ("js", "css"))
    allowed = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
               for name, text in (("script", script), ("style", style))}
    policy = "; ".join(["default-src 'none'", "img-src data:", "base-uri 'none'",
                        "form-action 'none'",
                        *(f"{name}-src 'sha256-{digest}'" for name, digest in allowed.items())])
    data = json.dumps(study, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "reader.html").read_text("utf-8")
    parts = {**{name: html.escape(study["text"][name]) for name in ("lang", "title")},
             "policy": policy, "style": style, "script": script, "study": data}
    for name, part in parts.items():
        page = page.replace("{{" + name + "}}", part)
    return page.encode()
