"""Is a report still true? Walk from it to its samples, their model and its data, by the hashes that
each stage left.

    report ─ config, fingerprints, a few cells ─▶ samples ─ SHA-256 of every file, a few images made
    again ─▶ model
    model ─ SHA-256 of the weights, of its VAE, of the stage before ─▶ data ─ fingerprint of all
    rows and files

Every link of the chain either matches, differs (what was recorded is not what lies there) or is
missing (it cannot be followed). Paths in a config are meant from where its command ran; a tree of
runs that was moved as a whole still verifies. Nothing is written. What takes a diffusion model,
making images again, comes in as a callable.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff import runs
from minidiff.data import images
from minidiff.data.dataset import load_pixels, read_images
from minidiff.data.split import Row
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError, first_few
from minidiff.evaluation.pages.format import num
from minidiff.evaluation.recompute import CELLS
from minidiff.root import DEMO, Rooted

MATCHES, DIFFERS, MISSING = "matches", "differs", "missing"
# grey levels by which an image made again may differ: rounding, on other hardware or batch sizes
TOLERANCE = 1

Remake = Callable[[Path, Sequence[Row]], Tensor]  # folder of samples, rows → uint8 (n,C,S,S)


class Link(NamedTuple):
    """One link of the chain: its state, which it is, and what was found, files named."""

    state: str
    what: str
    text: str


@dataclass(frozen=True, eq=False)
class VerifyConfig(Rooted):
    folder: str = "ROOT/report"            # a report, matrix, folder of samples or model, or a folder of such
    k: int = 8                             # cells to compute again, and images to make again
    seed: int = 0                          # of the choice
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def walk(folder: str | Path, remake: Remake | None = None, *, k: int = 8,
         seed: int = 0) -> Iterator[Link]:
    """The links from this folder down, one by one; InputError where the folder is none of a kind
    that has any.
    """
    folder = Path(folder)
    way = Walk(remake, k, seed)
    found = [folder] if kind(folder) else sorted(f for f in folder.glob("*")
                                                 if kind(f)) if folder.is_dir() else []
    if not found:
        raise InputError(f"{folder} holds none of {', '.join(KINDS)}, nor does a folder in it: "
                         "there is nothing to verify")
    for top in found:
        yield from way.follow(top)


def kind(folder: Path) -> str | None:
    """The file that says what a folder is."""
    return next((name for name in KINDS if (folder / name).is_file()), None)


@dataclass(eq=False)
class Walk:
    """One way down; a run that is reached twice is looked at once."""

    remake: Remake | None
    k: int
    seed: int
    seen: set[Path] = field(default_factory=set)

    def follow(self, folder: Path) -> Iterator[Link]:
        """All links of one folder and of what it was made from; a fault in a file becomes a
        link.
        """
        name = kind(folder)
        if name is None:
            yield Link(MISSING, str(folder),
                       f"holds none of {', '.join(KINDS)}" if folder.is_dir() else "no such folder")
        elif folder.resolve() not in self.seen:
            self.seen.add(folder.resolve())
            try:
                yield from KINDS[name](self, folder)
            except InputError as error:
                yield Link(DIFFERS, str(folder), str(error))
            except (KeyError, TypeError) as error:
                yield Link(DIFFERS, str(folder),
                           f"its JSON files do not hold what they ought to: {error}")

    def result(self, folder: Path) -> Iterator[Link]:
        """A report or a matrix: its configs, the fingerprints in run.json, its cells; then its
        samples.
        """
        name, cfg, facts = kind(folder), runs.read_json(folder / "config.json"), run_facts(folder)
        result, root = runs.read_json(folder / name), root_of(folder)
        for other, then in (result.get("configs") or {}).items():
            if then:
                yield config_link(root / other, then)
        for text in ("data", "samples"):
            copies = {k: v for k, v in (result.get(text) or {}).items()
                      if k.endswith("fingerprint")}
            wrong = [k for k, v in copies.items() if v not in facts.values()]
            if copies:
                yield compared(folder / name, f"names the {text} of run.json", not wrong,
                               f"has other fingerprints than run.json: {', '.join(wrong)}")
        if "judge" in facts:
            file = root / cfg["classifier"] / "judge" / "predictor.safetensors"
            yield hash_link(file, facts["judge"], f"the judge of {folder}")
        try:
            yield from self.numbers(folder, cfg, facts)
        except InputError as error:  # of data or samples, which are looked at further down as well
            yield Link(DIFFERS, f"{folder}: its numbers", str(error))
        for samples in listed(cfg["samples"]):
            yield from self.follow(root / samples)

    def numbers(self, folder: Path, cfg: dict, facts: dict) -> Iterator[Link]:
        """The sets of a report or a matrix by their fingerprints, and some cells."""
        tables, name = again(folder, cfg, facts), kind(folder)
        for side in tables:
            then, now = facts[side], tables[side].fingerprint
            yield compared(f"{folder}: {side}", f"{len(tables[side])} rows and files", now == then,
                           f"fingerprint {then[:12]} in run.json, {now[:12]} now")
        for cell, then, now in CELLS[name](folder, root_of(folder), tables, self.k, self.seed):
            same = num(then) == num(now) or math.isclose(then, now, rel_tol=1e-6)
            yield compared(f"{folder}: {cell}", f"{num(now)} again", same,
                           f"{num(then)} there, {num(now)} now")

    def samples(self, folder: Path) -> Iterator[Link]:
        """Every file by its hash, the model that is named, a few images made again; then the
        model.
        """
        manifest = runs.read_json(folder / "manifest.json")
        hashes = manifest["sha256"]
        gone = [name for name in hashes if not (folder / name).is_file()]
        edited = [name for name in hashes
                  if name not in gone and runs.sha256(folder / name) != hashes[name]]
        more = sorted({str(path.relative_to(folder))
                       for path in (folder / "images").rglob("*.png")} - set(hashes))
        faults = [f"{len(names)} {what}: {first_few(names)}" for names, what in
                  ((gone, "gone"), (edited, "changed"), (more, "not in the manifest")) if names]
        yield compared(f"{folder}: files", f"{len(hashes)} as written", not faults,
                       "; ".join(faults))
        cfg, root = runs.read_json(folder / "config.json"), root_of(folder)
        run, then = root / cfg["run"], manifest["model"]
        recorded = run_facts(folder).get("model")
        yield compared(folder / "manifest.json", "names the model of run.json", recorded == then,
                       f"names model {then[:12]}, run.json {str(recorded)[:12]}")
        model = hash_link(run / "model.safetensors", then, f"the model of {folder}")
        yield model
        if model.state == MATCHES:
            seen = runs.read_json(run / "model.json").get("trained_on", [])
            yield compared(folder / "manifest.json", "lists what the model was trained on",
                           manifest["trained_on"] == seen, f"says that the model was trained on "
                           f"other images than {run / 'model.json'}")
            yield self.made_again(folder)
        else:
            yield Link(MISSING, f"{folder}: images made again",
                       f"not tried: {run} is not the model that made them")
        yield from self.follow(run)

    def made_again(self, folder: Path) -> Link:
        what = f"{folder}: images made again"
        if self.remake is None:
            return Link(MISSING, what, "not tried: there is no diffusion model at hand")
        rows = read_table(folder, split=False).rows
        rows = [rows[i]
                for i in np.sort(np.random.default_rng(self.seed).permutation(len(rows))[: self.k])]
        worst = {}
        for row, image in zip(rows, self.remake(folder, rows), strict=True):
            there = torch.tensor(images.read(row["file"])).int()
            worst[row["file_name"]] = (image.int() - there).abs().max().item()
        wrong = [f"{name} by {d}" for name, d in worst.items() if d > TOLERANCE]
        return compared(what, f"{len(rows)}, largest difference {max(worst.values())} of 255 grey "
                        f"levels", not wrong,
                        f"{len(wrong)} of {len(rows)} differ: {first_few(wrong)} grey levels")

    def model(self, folder: Path) -> Iterator[Link]:
        """A diffusion model: its data, its VAE, the stage before."""
        run = next((f for f in (folder, folder.parent, folder.parent.parent)
                    if (f / "run.json").is_file()), None)
        if run is None:
            yield Link(MISSING, str(folder), "has no run.json that says from what it was trained")
            return
        cfg, facts, described = runs.read_json(run / "config.json"), run_facts(run), runs.read_json(
            folder / "model.json")
        yield compared(folder / "model.json", "names the data of run.json",
                       described["data"] == facts["data"],
                       f"names data {described['data'][:12]}, run.json {facts['data'][:12]}")
        yield data_link(run, cfg, facts["data"], described["size"])
        if "vae" in facts:
            yield hash_link(run / "vae.safetensors", facts["vae"], f"the autoencoder of {run}")
            vae = root_of(run) / (cfg["vae"] or f"{cfg.get('root') or DEMO}/vae")
            if vae.is_dir():
                yield hash_link(vae / "vae.safetensors", facts["vae"], f"the autoencoder of {run}")
            yield from self.follow(vae)
        yield from self.before(run, facts, "model.safetensors")

    def vae(self, folder: Path) -> Iterator[Link]:
        """An autoencoder: its data and the stage before."""
        cfg, facts = runs.read_json(folder / "config.json"), run_facts(folder)
        yield data_link(folder, cfg, facts["data"], cfg["size"])
        yield from self.before(folder, facts, "vae.safetensors")

    def before(self, run: Path, facts: dict, weights: str) -> Iterator[Link]:
        """What a run began with: an earlier run, or public files."""
        init = facts.get("init") or {}
        if "run" in init:
            earlier = root_of(run) / init["run"]
            yield hash_link(earlier / weights, init["sha256"], f"what {run} began with")
            yield from self.follow(earlier)
        for file in init.get("files", ()):
            yield hash_link(root_of(run) / (file.get("file") or file["path"]), file["sha256"],
                            f"what {run} began with")


KINDS: dict[str, Callable[[Walk, Path], Iterator[Link]]] = {
    "report.json": Walk.result, "matrix.json": Walk.result, "manifest.json": Walk.samples,
    "model.json": Walk.model, "vae.json": Walk.vae,
}


def verify(cfg: VerifyConfig, remake: Remake | None = None) -> None:
    """Print every link, those that do not hold once more at the end; exit status 1 unless all
    match.
    """
    links = []
    for link in walk(cfg.folder, remake, k=cfg.k, seed=cfg.seed):
        links.append(link)
        print(f"{link.state:>8}  {link.what}: {link.text}", flush=True)
    broken = [link for link in links if link.state != MATCHES]
    counts = ", ".join(f"{sum(link.state == s for link in links)} {s}"
                       for s in (MATCHES, DIFFERS, MISSING))
    print(f"{cfg.folder}: {counts}" + "".join(f"\n{link.state:>8}  {link.what}: {link.text}"
                                              for link in broken))
    if broken:
        raise SystemExit(1)


def again(folder: Path, cfg: dict, facts: dict) -> dict[str, Table]:
    """The tables that the facts of a report (train, heldout, synthetic) or of a matrix (real,
    external, and each folder of samples by its name) give fingerprints of, read as they were; with
    --skip-bad, without the images left out then.
    """
    root, samples = root_of(folder), listed(cfg["samples"])
    real = read_as_then([str(root / f) for f in cfg["data"]], cfg["seed"], folder.parent)
    tables = {"train": real.select(split="train"), "heldout": real.select(split=("val", "test")),
              "real": real.select(split=("train", "val", "test"))}
    if cfg.get("external"):
        other = read_table([str(root / f) for f in cfg["external"]], split=False)
        tables["external"] = replace(other,
                                     rows=[{**row, "split": "external"} for row in other.rows])
    for name in samples:
        short = Path(name).name if len(samples) == 1 else os.path.normpath(name)
        tables["synthetic"] = tables[short] = read_table(root / name, split=False)
    tables = {name: tables[name] for name in tables if name in facts}
    return {name: load_pixels(t, 8, skip_bad=True)[0]
            for name, t in tables.items()} if cfg.get("skip_bad") else tables


def read_as_then(folders: Sequence[str], seed: int, split_dir: Path, prior: Sequence[str] = (),
                 size: int = 0, skip_bad: bool = False) -> Table:
    """A table with the splits that a run kept beside it, none of which is written; with a size,
    only rows of those splits that training reads."""
    with TemporaryDirectory() as scratch:
        for file in split_dir.glob("split-*.csv"):
            shutil.copy(file, scratch)
        if size:
            return read_images(folders, size, seed=seed, split_dir=Path(scratch), skip_bad=skip_bad,
                               prior=prior).table
        return read_table(folders, seed=seed, split_dir=scratch)


def data_link(run: Path, cfg: dict, then: str, size: int) -> Link:
    """The data that a run was trained on, by the fingerprint of all rows and files."""
    root, what = root_of(run), f"the data of {run}"
    folders, prior = ([str(root / f) for f in cfg.get(name, ())] for name in ("data", "prior"))
    gone = [f for f in (*folders, *prior) if not Path(f).is_dir()]
    if gone:
        return Link(MISSING, what, f"no such folder: {first_few(gone)}")
    try:
        now = read_as_then(folders, cfg["seed"], run.parent, prior, size,
                           cfg["skip_bad"]).fingerprint
    except InputError as error:
        return Link(DIFFERS, what, str(error))
    return compared(what, f"{' + '.join((*folders, *prior))} as it was", now == then,
                    f"fingerprint {then[:12]} in run.json, {now[:12]} now: "
                    f"{' + '.join((*folders, *prior))}")


def root_of(folder: Path) -> Path:
    """The folder from which the paths in a run's config are meant: its own place less `out`, else
    the working folder.
    """
    out = Path(runs.read_json(folder / "config.json")["out"])
    here, steps = folder.resolve().parts, [p for p in out.parts if p != "."]
    if out.is_absolute() or list(here[-len(steps):]) != steps:
        return Path()
    root = Path(*here[: -len(steps)])
    return Path() if root == Path.cwd() else root


def run_facts(folder: Path) -> dict[str, Any]:
    return runs.read_json(folder / "run.json").get("facts", {})


def config_link(folder: Path, then: dict) -> Link:
    file = next((folder / n for n in ("config.json", "manifest.json") if (folder / n).is_file()),
                folder / "config.json")
    if not file.is_file():
        return Link(MISSING, str(file), "no such file")
    now = runs.read_json(file)
    changed = sorted(k for k in {**then, **now} if then.get(k) != now.get(k))
    return compared(file, "as it was", not changed, f"changed since: {', '.join(changed)}")


def hash_link(file: Path, then: str, what: str) -> Link:
    if not file.is_file():
        return Link(MISSING, str(file), f"no such file: {what}")
    now = runs.sha256(file)
    return compared(file, f"{what}, sha256 {then[:12]}", now == then,
                    f"not {what} any more: sha256 {then[:12]} then, {now[:12]} now")


def compared(what: object, good: str, same: bool, bad: str) -> Link:
    return Link(MATCHES, str(what), good) if same else Link(DIFFERS, str(what), bad)


def listed(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value
