"""Pre-train elsewhere and fine-tune on few real images; show images in another hospital's style.

    python benchmarks/transfer.py phantom              all of phantoms
    python benchmarks/transfer.py phantom --only style   one part; what is finished is kept
    python benchmarks/transfer.py cxr --cxr DIR            the X-rays of docs/cxr.md

Declared before any figure was seen, kept in transfer.json; of the phantom curve's five seeds three
were run and published first:

    curve    balanced accuracy at 5, 10, 25 and 100 % of the real images, of networks that began at
             these, at generated ones, or at other real ones; primary is NAME-then-real@5% minus
             real-then-real@5%. X-rays: pneumonia against normal within NIH, without 10 %; the other
             real images, of the covid collections, ask for the view (--init). 5 seeds, X-rays 3
    style    SDEdit with the condition `source` and inversion, both ways, beside histogram matching
             and the VAE alone

Phantoms have two hospitals. `made` is generated for north by a model of both, trained on patients
of its own; `same` and `other` are the real images behind it, of north and of south. A phantom can
be drawn as either hospital shows it, so the true other image is known. Figures of style are [value,
low, high] at 95 %:

    named    share that the judge of hospitals reads as the other one
    told     AUROC with which its score tells the styled images from real ones of the other one; .5:
             not at all; null: ends that are not known, at 0 and 1
    disease  share whose label the judge reads as before
    right    share whose label it reads as it truly is
    error    rms difference from the true image without grain, grey levels
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.counterfactuals import INVERTED, made, mean, share, through_vae  # noqa: E402
from minidiff import runs  # noqa: E402
from minidiff.classification.predictor import Predictor  # noqa: E402
from minidiff.classification.scores import finite  # noqa: E402
from minidiff.data import images  # noqa: E402
from minidiff.data.dataset import load_pixels  # noqa: E402
from minidiff.data.dialects import read_csv  # noqa: E402
from minidiff.data.phantom import phantom, write  # noqa: E402
from minidiff.data.table import Table, read_table, write_table  # noqa: E402
from minidiff.diffusion.generate import Recipe  # noqa: E402
from minidiff.pixels import to_grey  # noqa: E402
from minidiff.sampling import edits  # noqa: E402
from minidiff.sampling.finished_run import open_pipeline  # noqa: E402
from minidiff.statistics import auroc, auroc_interval  # noqa: E402

SAVED, ROOT, SIDE = Path(__file__).with_suffix(".json"), Path(__file__).parents[1], 64
SEEDS = {"north": 11, "south": 13}
SPLITS = {"train": range(600), "val": range(600, 660), "test": range(660, 780)}
METHODS = {**{f"SDEdit {s:g}": Recipe(strength=s) for s in (0.3, 0.5, 0.7)},
           "inversion 1": INVERTED}


def arms(starts: str, shares: tuple[str, ...]) -> str:
    return " ".join(f"{start}{at}" for at in shares for start in starts.split())


MODEL = """
train.py vae --root R/model --data DATA --size 64
train.py diffusion --root R/model --data DATA --condition label,source --views 2 --snapshots 0
"""
JUDGES = """
classify.py --root R/judges --data DATA --arms real --seeds 1 --steps 150
    --condition label source --positive covid"""
STUDY = "--size 64 --steps 150 --batch 32 --condition label"
REAL = "--near-copies drop"  # X-rays
COMMANDS = {
    ("phantom", "curve"): f"""{MODEL}
sample.py --root R/model --given source=north --per-label 150 --out R/made
classify.py --root R/curve --data R/real --synthetic made=R/made --other same=R/north other=R/south
    {STUDY} --seeds 5 --positive covid
    --primary made-then-real@5%:real-then-real@5%@test:balanced_accuracy
    --arms {arms("real real-then-real made-then-real same-then-real other-then-real",
                 ("@5%", "@10%", "@25%", ""))}
""",
    ("phantom", "style"): MODEL + JUDGES,
    ("cxr", "curve"): f"""
classify.py --root R/view --data R/elsewhere --target view --arms real --seeds 1 {STUDY} {REAL}
classify.py --root R/curve --data R/nih --synthetic phantoms=R/phantoms {STUDY} {REAL} --seeds 3
    --init R/view/classifier/arms/real/0 --positive pneumonia
    --primary phantoms-then-real-scratch@5%:real-then-real-scratch@5%@test:balanced_accuracy
    --arms {arms("real-scratch real-then-real-scratch phantoms-then-real-scratch real",
                 ("@5%", "@25%", ""))}
""",
    ("cxr", "style"): f"{MODEL}{JUDGES} {REAL}"}
SOURCES = {"phantom": (("north", "south"), ("south", "north")),
           "cxr": (("ieee8023", "hannover"), ("hannover", "ieee8023"),
                   ("ieee8023", "nih-chestxray14"), ("nih-chestxray14", "ieee8023"))}


def drawn(seed: int, index: int, hospital: str, grain: bool = True,
          label: str | None = None) -> np.ndarray:
    """A phantom as this hospital shows it, uint8 (S,S). South has steeper and fainter greys, twice
    the noise, and a black frame of 3 px."""
    if hospital == "north":
        return phantom(seed, index, SIDE, noise=0.02 * grain, label=label).image
    x = phantom(seed, index, SIDE, noise=0, label=label).image / 255
    noise = np.random.default_rng((seed, index, 2)).standard_normal((SIDE, SIDE))
    y = np.clip(0.15 + 0.7 * x**1.6 + 0.04 * grain * noise, 0, 1)
    y[:3] = y[-3:] = y[:, :3] = y[:, -3:] = 0
    return (255 * y + 0.5).astype(np.uint8)


def write_phantoms(folder: Path, hospital: str, labels=("normal", "pneumonia", "covid")) -> None:
    rows, seed = [], SEEDS[hospital]
    for split, index in ((split, i) for split, indices in SPLITS.items() for i in indices):
        row = phantom(seed, index, SIDE).row
        if row["label"] in labels:
            name = f"images/{row['label']}/{index:06d}.png"
            images.write(folder / name, drawn(seed, index, hospital))
            rows.append({"file_name": name, "split": split, "source": hospital, **row})
    write_table(folder / "metadata.csv", rows)


def write_part(folder: Path, tables: list[Path], keep) -> None:
    """The rows of real data sets that `keep` takes, with copies of their files."""
    rows = []
    for table in tables:
        for row in filter(keep, read_csv(table, ())):
            name = f"images/{table.parent.name}/{row['file_name']}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(table.parent / row["file_name"], folder / name)
            rows.append({**row, "file_name": name})
    write_table(folder / "metadata.csv", rows)


def prepare(world: str, root: Path, cxr: Path) -> str:
    """Write the data sets; returns those of the models of two hospitals."""
    if world == "phantom":
        for name in SEEDS:
            if not (root / name).exists():
                write_phantoms(root / name, name)
        write(root / "real", n=1200, size=SIDE)
        return f"{root}/north {root}/south"
    if not (root / "phantoms").exists():
        both = [cxr / "metadata.csv", cxr / "hannover/metadata.csv"]
        write_part(root / "nih", both, lambda row: row["source"].startswith("nih"))
        write_part(root / "elsewhere", both, lambda row: row["label"] == "covid" and row["view"])
        write_phantoms(root / "phantoms", "north", ("normal", "pneumonia"))
    return f"{cxr} {cxr}/hannover"


def curve(root: Path) -> dict:
    summary = runs.read_json(root / "curve/classifier/summary.json")
    keys = ("arm", "against", "difference", "interval", "by_seed", "patients", "answer",
            "primary")
    return {"points": [row for row in summary["learning"] if row["metric"] == "balanced_accuracy"],
            "differences": [{key: d[key] for key in keys} for d in summary["differences"]["test"]
                            if d["metric"] == "balanced_accuracy"]}


def matched(pixels: Tensor, target: Tensor) -> Tensor:
    """Each image with the grey levels of all images of the other hospital, rank by rank."""
    flat, levels = pixels.flatten(1), target.flatten().sort().values
    ranks = flat.argsort(dim=1, stable=True).argsort(dim=1).double() / (flat.shape[1] - 1)
    return levels[(ranks * (len(levels) - 1)).round().long()].view_as(pixels)


def of_source(table: Table, source: str, split: str, most: int | None = None) -> Table:
    rows = [row for row in table.select(split=split).rows if row["source"] == source]
    return replace(table, rows=rows[:most])


def style(world: str, root: Path, data: str, n: int = 100) -> list[dict]:
    pipeline, _ = open_pipeline(root / "model/diffusion", "cpu")
    judge = Predictor.load(root / "judges/classifier/judge")
    table, found = read_table(data.split()), []
    for here, there in SOURCES[world]:
        (own, x), (_, real), (_, known) = (load_pixels(part, SIDE) for part in (
            of_source(table, here, "test", n), of_source(table, there, "test"),
            of_source(table, there, "train")))
        x, real, known = (to_grey(pixels[:]) for pixels in (x, real, known))
        variables = pipeline.conditioner.variables
        rows = [{**edits.changed(variables, {"source": there}, row)[0], "index": k}
                for k, row in enumerate(own.rows)]
        done = {"none: the original": x, "the VAE alone": through_vae(pipeline, x),
                "histogram matching": matched(x, known)}
        truth = None
        if world == "phantom":
            at = [(SEEDS[here], int(Path(row["file_name"]).stem)) for row in rows]
            done["the true image"], truth = (torch.from_numpy(np.stack(
                [drawn(*one, there, grain) for one in at]))[:, None] for grain in (True, False))
            done["the true image through the VAE"] = through_vae(pipeline, done["the true image"])
        before = labels_of(judge, x)
        for method in tqdm([*done, *METHODS], f"{here} as {there}"):
            y = done[method] if method in done else made(pipeline, rows, METHODS[method], x)
            found.append({"from": here, "to": there, "method": method, "n": len(rows),
                          **measured(judge, y, real, there, before, rows, truth)})
    return found


def asked(root: Path) -> list[float]:
    """Share of the generated images in which the judge reads the label that was asked for."""
    table, pixels = load_pixels(read_table(str(root / "made"), split=False), SIDE)
    judge = Predictor.load(root / "judges/classifier/judge")
    return share(labels_of(judge, to_grey(pixels[:])) == np.array(table.column("label")))


def labels_of(judge: Predictor, pixels: Tensor) -> np.ndarray:
    values = next(v.values for v in judge.variables if v.name == "label")
    return np.array(values)[judge.predict(pixels)["label"].argmax(1)]


def measured(judge: Predictor, y: Tensor, real: Tensor, there: str, before: np.ndarray,
             rows: list[dict], truth: Tensor | None) -> dict:
    place = next(v.values for v in judge.variables if v.name == "source").index(there)
    ours, theirs = (judge.logits(pixels)["source"].log_softmax(1)[:, place].numpy()
                    for pixels in (y, real))
    scores, positive = np.r_[ours, theirs], np.arange(len(ours) + len(theirs)) >= len(ours)
    after = labels_of(judge, y)
    return {"named": share(judge.predict(y)["source"].argmax(1).numpy() == place),
            "told": list(map(finite, (auroc(scores, positive), *auroc_interval(scores, positive)))),
            "disease": share(after == before),
            "right": share(after == np.array([row["label"] for row in rows])),
            **({} if truth is None else {"error": mean(
                (y - 0.0 - truth).square().flatten(1).mean(1).sqrt().numpy())})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=SOURCES)
    parser.add_argument("--cxr", default="cxr", help="the X-rays of docs/cxr.md")
    parser.add_argument("--root", help="folder of the runs; none: runs/transfer/WORLD")
    parser.add_argument("--only", choices=("curve", "style"), help="one part")
    args = parser.parse_args()
    root = Path(args.root or f"runs/transfer/{args.world}").resolve()
    data = prepare(args.world, root, Path(args.cxr).resolve())
    for part in (args.only,) if args.only else ("curve", "style"):
        text = COMMANDS[args.world, part].replace("\n    ", " ")
        for line in filter(None, text.splitlines()):
            words = shlex.split(line.replace("DATA", data).replace("R/", f"{root}/"))
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        found = curve(root) if part == "curve" else style(args.world, root, data)
        kept = runs.read_json(SAVED) if SAVED.is_file() else {}
        if (args.world, part) == ("phantom", "style"):
            kept["phantom, made"] = {"asked": asked(root)}
        runs.write_json(SAVED, {**kept, f"{args.world}, {part}": found})


if __name__ == "__main__":
    main()
