"""Is a report still true? Walk from it to its samples, their model and its data, by the hashes that
each stage left.

    report ─ configs, fingerprints, every number computed again ─▶ samples
    matrix ─ fingerprints, a few cells computed again ─▶ samples
    samples ─ SHA-256 of every file, a few batches sampled anew ─▶ model
    model ─ SHA-256 of the weights, of its VAE, of the stage before ─▶ data
    data ─ fingerprint of all rows and files

Every link of the chain either matches, differs (what was recorded is not what lies there) or is
missing (it cannot be followed). Paths in a config are relative to where its command ran; a tree of
runs that was moved as a whole still verifies. Nothing is written into it. A report or a matrix that
another version wrote is refused, for its keys and words may be others.
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from minidiff import __version__, config, runs
from minidiff.data.dataset import read_images
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError, first_few
from minidiff.evaluation.format import num
from minidiff.evaluation.matrix import cells
from minidiff.evaluation.matrix import run as matrices
from minidiff.root import DEMO, Reading, Rooted, reading_of

MATCHES, DIFFERS, MISSING = "matches", "differs", "missing"
EVALUATE = Path(__file__).parents[2] / "evaluate.py"
OF_THE_RUN = ("provenance", "commands", "configs")  # what a report says of its own making


class Link(NamedTuple):
    """One link of the chain: its state, which it is, and what was found, files named."""

    state: str
    what: str
    text: str


class Again(NamedTuple):
    """Images made again beside those of a folder of samples."""

    apart: dict[str, float]      # file name → grey levels of 255, the largest of the image
    limit: int                   # of what rounding explains
    where: str                   # how and where they were made and are checked


@dataclass(frozen=True, eq=False)
class VerifyConfig(Rooted):
    folder: str = "ROOT/report"  # a report, matrix, samples or model, or a folder of such
    k: int = 8                   # cells of a matrix, and images in whole batches, to make again
    seed: int = 0                # of the choice
    device: str = "auto"         # auto: samples on the kind that made them; cpu, cuda, cuda:1 …


Remake = Callable[[Path, VerifyConfig], Again]  # of a folder of samples


def verify(cfg: VerifyConfig, remake: Remake) -> None:
    """Print every link, those that do not hold again at the end; status 1 unless all match."""
    links = []
    for link in walk(cfg, remake):
        links.append(link)
        print("{:>8}  {}: {}".format(*link), flush=True)
    counts = ", ".join(f"{sum(link.state == state for link in links)} {state}"
                       for state in (MATCHES, DIFFERS, MISSING))
    print(f"{cfg.folder}: {counts}")
    if broken := [link for link in links if link.state != MATCHES]:
        print(*("{:>8}  {}: {}".format(*link) for link in broken), sep="\n")
        raise SystemExit(1)


def walk(cfg: VerifyConfig, remake: Remake) -> Iterator[Link]:
    """The links from a folder down, one by one; InputError where it has none.

    A stage yields its links and the folders that it was made from, which are walked after it.
    """
    top, seen = Path(cfg.folder), set()
    queue = [folder for folder in (top, *sorted(top.glob("*"))) if kind(folder)]
    if not queue:
        raise InputError(f"{top} holds none of {', '.join(STAGES)}, nor does a folder in it: "
                         "there is nothing to verify")
    queue = queue[:1] if queue[0] == top else queue
    for folder in queue:
        if kind(folder) in ("report.json", "matrix.json"):
            refuse_older(folder)
    for folder in queue:  # which grows
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        if not (stage := STAGES.get(kind(folder))):
            yield Link(MISSING, str(folder), f"holds none of {', '.join(STAGES)}"
                       if folder.is_dir() else "no such folder")
            continue
        try:
            for found in stage(folder, cfg, remake):
                if isinstance(found, Link):
                    yield found
                else:
                    queue.append(found)
        except InputError as error:
            yield Link(DIFFERS, str(folder), str(error))
        except (KeyError, TypeError) as error:
            yield Link(DIFFERS, str(folder), f"its JSON files lack what they should hold: {error}")


def kind(folder: Path) -> str | None:
    """The file that says what a folder is."""
    return next((name for name in STAGES if (folder / name).is_file()), None)


def refuse_older(folder: Path) -> None:
    """InputError for a report or matrix of another version: its keys and words may be others."""
    made = runs.read_json(folder / kind(folder)).get("provenance", {})
    version = made.get("minidiff", "of an unknown version")
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise InputError(f"{folder / kind(folder)} was written by minidiff {version}, and this is "
                         f"{__version__}, which names things otherwise: verify it with that "
                         f"version, or make it again, in another --out, with this one")


def report(folder: Path, cfg: VerifyConfig, _: Remake) -> Iterator[Link | Path]:
    """The configs that a report quotes, and all that its command gives today."""
    result, root = runs.read_json(folder / "report.json"), root_of(folder)
    yield root / runs.read_json(folder / "config.json")["samples"]
    for other, then in result["configs"].items():
        files = [root / other / name for name in ("config.json", "manifest.json")]
        now = next((runs.read_json(file) for file in files if file.is_file()), None)
        if then:
            yield compared(f"{root / other}: config", then, now)
    now, facts = run_again(folder, cfg.device)  # a judge that is gone is a fact that is missing
    yield from facts_compared(folder, {**dict.fromkeys(run_facts(folder)), **facts})
    for part in [name for name in result if name not in OF_THE_RUN]:
        yield compared(f"{folder / 'report.json'}: {part}", *({part: x.get(part)}
                                                              for x in (result, now)))


def matrix(folder: Path, cfg: VerifyConfig, _: Remake) -> Iterator[Link | Path]:
    """The sets of a matrix by their fingerprints, and some of its cells."""
    saved = config.from_dict(matrices.MatrixConfig, config.load(folder / "config.json"))
    result, root = runs.read_json(folder / "matrix.json"), root_of(folder)
    yield from (root / samples for samples in saved.samples)
    yield from facts_compared(folder, result["data"]["fingerprints"], "in matrix.json")
    with splits_of(folder.parent) as splits, inside(root):
        saved = replace(saved, root=str(splits), device=cfg.device)
        sets = matrices.read(saved)
        judge = matrices.load_judge(saved, sets["real"].table)
        spaces = {e.name: e for e in matrices.spaces_of(saved, sets["real"], judge)}
    yield from facts_compared(folder, {name: s.table.fingerprint for name, s in sets.items()})
    rows, _, columns = matrices.arrange(saved, sets)
    rows, columns = ({s.name: s for s in reversed(each)} for each in (rows, columns))
    for then in chosen([c for c in result["cells"] if c.get("KD") is not None], cfg):
        both, space = (rows.get(then["row"]), columns.get(then["column"])), then["extractor"]
        now = {}
        if None not in both and space in spaces:
            for s in both:
                s.features[space] = spaces[space](s.pixels).double().numpy()
            now, _ = cells.cell(*both, space, lambda n: {}, permutations=1, resamples=2,
                                seed=saved.seed)
        yield compared(f"{folder}: {space}, {then['row']} × {then['column']}",
                       *({name: c.get(name) for name in ("KD", "FD")} for c in (then, now)))


def samples(folder: Path, cfg: VerifyConfig, remake: Remake) -> Iterator[Link | Path]:
    """Every file by its hash, the model by its own, and a few batches sampled anew."""
    manifest = runs.read_json(folder / "manifest.json")
    run = root_of(folder) / runs.read_json(folder / "config.json")["run"]
    yield run
    present = {str(path.relative_to(folder)) for path in (folder / "images").rglob("*.png")}
    yield compared(f"{folder}: files", manifest["sha256"], {
        name: sha256(folder / name) for name in sorted({*manifest["sha256"], *present})})
    yield from facts_compared(folder, {"model": manifest["model"]}, "in manifest.json")
    model = hash_link(run / "model.safetensors", manifest["model"], f"the model of {folder}")
    yield model
    what = f"{folder}: images made again"
    if model.state == MATCHES:
        yield compared(f"{folder / 'manifest.json'}: trained on", manifest["trained_on"],
                       runs.read_json(run / "model.json").get("trained_on", []))
        again = remake(folder, cfg)
        far = {name: f"{d:g} levels" for name, d in again.apart.items() if d > again.limit}
        yield compared(what, dict.fromkeys(far, f"at most {again.limit}"), far,
                       f"{len(again.apart)}, largest difference {max(again.apart.values()):g} of "
                       f"255 grey levels, allowed {again.limit} ({again.where})")
    else:
        yield Link(MISSING, what, f"not tried: {run} is not the model that made them")


def model(folder: Path, *_) -> Iterator[Link | Path]:
    """A VAE, a diffusion model or a snapshot of one: what it began with, its VAE, its data."""
    run = next((f for f in (folder, *folder.resolve().parents[:2]) if (f / "run.json").is_file()),
               folder)
    facts, saved, root = run_facts(run), runs.read_json(run / "config.json"), root_of(run)
    init = facts.get("init") or {}
    files = list(init.get("files", ()))  # public ones
    if "run" in init:
        yield root / init["run"]
        weights = Path(init["run"], kind(folder)).with_suffix(".safetensors")
        files.append({"path": weights, "sha256": init["sha256"]})
    for file in files:
        yield hash_link(root / (file.get("file") or file["path"]), file["sha256"],
                        f"what {run} began with")
    described = runs.read_json(folder / kind(folder))
    if "data" in described:
        yield from facts_compared(run, {"data": described["data"]}, f"in {folder / 'model.json'}")
    if "vae" in facts:
        vae = root / (saved["vae"] or f"{saved.get('root') or DEMO}/vae")
        yield vae
        for place in (run, vae) if vae.is_dir() else (run,):
            yield hash_link(place / "vae.safetensors", facts["vae"], f"the autoencoder of {run}")
    yield data_link(run, described.get("size") or saved["size"])


STAGES: dict[str | None, Callable[..., Iterator[Link | Path]]] = {
    "report.json": report, "matrix.json": matrix, "manifest.json": samples,
    "model.json": model, "vae.json": model,
}


def run_again(folder: Path, device: str) -> tuple[dict, dict]:
    """report.json and the facts of run.json that the saved config gives now, in a new process."""
    threads = runs.read_json(folder / "run.json")["sessions"][0].get("threads", 1)
    with splits_of(folder.parent) as scratch:
        saved = {**config.load(folder / "config.json"), "device": device, "root": str(scratch),
                 "out": str(scratch / "again")}
        runs.write_json(scratch / "config.json", saved)
        ended = subprocess.run(
            [sys.executable, EVALUATE, "report", "--from", scratch / "config.json"],
            cwd=root_of(folder), env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip().splitlines() or ["it ended without a message"]
            raise InputError(f"its command fails now, with status {ended.returncode}: {said[-1]}")
        return runs.read_json(scratch / "again/report.json"), run_facts(scratch / "again")


def compared(what: str, then: Any, now: Any, text: str = "as it was") -> Link:
    """A link between what was recorded and what is there; None where there is nothing."""
    if now is None:
        return Link(MISSING, what, "not there")
    wrong = list(differences(then, now))
    return Link(DIFFERS, what, f"{len(wrong)} changed: {first_few(wrong)}") if wrong else Link(
        MATCHES, what, text)


def differences(then: Any, now: Any, at: str = "") -> Iterator[str]:
    """Where JSON values differ; numbers are equal if their printed digits are."""
    if isinstance(then, list) and isinstance(now, list):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        for name in {**then, **now}:
            yield from differences(then.get(name), now.get(name), f"{at}.{name}".lstrip("."))
    elif isinstance(then, (int, float)) and isinstance(now, (int, float)):
        if num(then) != num(now) and not math.isclose(then, now, rel_tol=1e-6):
            yield f"{at} {num(then)} then, {num(now)} now"
    elif then != now:
        yield f"{at} {str(then)[:12]} then, {str(now)[:12]} now".lstrip()


def facts_compared(folder: Path, now: dict, where: str = "now") -> Iterator[Link]:
    """Fingerprints and hashes beside those in run.json."""
    for name in now:
        yield compared(f"{folder}: {name} {where}", run_facts(folder).get(name, ""), now[name])


def hash_link(file: Path, then: str, what: str) -> Link:
    return compared(f"{file}, {what}", then, sha256(file))


def sha256(file: Path) -> str | None:
    return runs.sha256(file) if file.is_file() else None


def data_link(run: Path, size: int) -> Link:
    """The data that a run was trained on, by the fingerprint of all rows and files."""
    cfg, root, now = runs.read_json(run / "config.json"), root_of(run), None
    folders, prior = ([str(root / f) for f in cfg.get(name, ())] for name in ("data", "prior"))
    if all(Path(folder).is_dir() for folder in (*folders, *prior)):
        with splits_of(run.parent) as splits:
            reading = replace(reading_of(cfg), rehash=True)
            now = read_images(folders, size, reading, seed=cfg["seed"], split_dir=splits,
                              skip_bad=cfg["skip_bad"], prior=prior).table.fingerprint
    return compared(f"the data of {run}, {' + '.join((*folders, *prior))}", run_facts(run)["data"],
                    now)


@contextmanager
def splits_of(folder: Path) -> Iterator[Path]:
    """A temporary copy of the splits that are kept in a folder: nothing is written into that."""
    with TemporaryDirectory() as scratch:
        for file in folder.glob("split-*.csv"):
            shutil.copy(file, scratch)
        yield Path(scratch)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, to which the paths of a config are relative."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def read_as_then(folders: Sequence[str], reading: Reading, seed: int, split_dir: Path) -> Table:
    """A table with the splits that were kept; nothing is written."""
    with splits_of(split_dir) as splits:
        return read_table(folders, reading, seed=seed, split_dir=splits)


def root_of(folder: Path) -> Path:
    """The folder to which the paths in a run's config are relative: its own place less `out`, else
    the working folder."""
    here = folder.resolve().parts
    out = Path(runs.read_json(folder / "config.json")["out"]).parts
    root = Path(*here[: -len(out)]) if here[-len(out) :] == out else Path()
    return Path() if root == Path.cwd() else root


def run_facts(folder: Path) -> dict[str, Any]:
    return runs.read_json(folder / "run.json").get("facts", {})


def chosen(rows: Sequence, cfg: VerifyConfig) -> list:
    """k of the rows, drawn by the seed, in their order."""
    drawn = np.random.default_rng(cfg.seed).permutation(len(rows))[: cfg.k]
    return [rows[i] for i in np.sort(drawn)]
