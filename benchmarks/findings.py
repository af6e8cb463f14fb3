"""Findings that stand together: are they shown where they were asked for, and only there?

    python benchmarks/findings.py data      phantoms with four findings, each drawn by itself; PAIR
                                            stands together in none that is trained on
    python train.py vae --root runs/findings --data runs/findings/data --steps 800
    python train.py diffusion --root runs/findings --steps 400 --snapshots 0
    python benchmarks/findings.py judge     trained on other phantoms, plenty of them
    python benchmarks/findings.py sample    each of ASKED, by each of GUIDANCE
    python benchmarks/findings.py read      the rows of findings.json

With --features the findings are AP, woman and old instead of diseases: features of the whole image,
which a short training learns; root runs/features, --vae runs/findings/vae, --condition label.

Rows: a set of images, one combination that was asked for, and of each finding [share read by the
judge, low, high] (Wilson, 95 %). The sets: drawn phantoms that have what was asked for (how well
the judge reads), the same through the VAE (how much it keeps), samples by each way of guidance.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff import runs  # noqa: E402
from minidiff.classification.predictor import Predictor, fit  # noqa: E402
from minidiff.data import images, phantom  # noqa: E402
from minidiff.data.dialects import read_csv  # noqa: E402
from minidiff.data.table import write_table  # noqa: E402
from minidiff.pixels import to_uint8  # noqa: E402
from minidiff.sampling.finished_run import open_pipeline  # noqa: E402
from minidiff.statistics import wilson  # noqa: E402
from minidiff.variables import Findings, encode, present  # noqa: E402

SAVED = Path(__file__).with_suffix(".json")
FEATURES = "--features" in sys.argv
PREVALENCE = ({"AP": 0.4, "woman": 0.4, "old": 0.4} if FEATURES else
              {"nodule": 0.4, "pneumothorax": 0.4, "covid": 0.3, "pneumonia": 0.3})
PAIR, SEEN = ("AP|woman", "AP|old") if FEATURES else ("nodule|pneumothorax", "covid|nodule")
ASKED = ("No Finding", *PAIR.split("|"), SEEN, PAIR)
GUIDANCE = {"all by 1.5": [],
            **{f"the pair composed by {w:g}": [
                "--scales", *(f"{name}={w:g}" for name in PAIR.split("|"))] for w in (1.5, 4)}}
LABEL = Findings("label", tuple(sorted(PREVALENCE)))
JUDGES, TRUE = 1, 2       # seeds of the phantoms that the judge learns from, and that it reads
N, EACH = 3200, 40
LEARN, STEPS = (1500, 250) if FEATURES else (3000, 500)  # of the judge


def data(root: Path) -> None:
    if FEATURES:
        found = []
        for k, label in enumerate(combinations(0, 1600)):
            split = "test" if k % 4 == 3 else "val" if k % 8 == 0 else "train"
            if split == "test" or not present("label", label) >= present("label", PAIR):
                found.append({"file_name": f"images/{k:06d}.png", "label": label, "split": split,
                              "patient": f"p{k}"})
                images.write(root / "data" / found[-1]["file_name"], drawn(3, [label], k)[0, 0])
        return write_table(root / "data/metadata.csv", found)
    folder = phantom.write(root / "data", n=N, findings=PREVALENCE)
    rows = read_csv(folder / "metadata.csv", ("label", "split", "file_name"))
    gone = [row for row in rows if row["split"] != "test"
            and present("label", row["label"]) >= present("label", PAIR)]
    for row in gone:
        (folder / row["file_name"]).unlink(missing_ok=True)
    write_table(folder / "metadata.csv", [row for row in rows if row not in gone])


def combinations(seed: int, n: int) -> list[str]:
    u = np.random.default_rng(seed).random((n, len(PREVALENCE)))
    return ["|".join(name for name, x in zip(PREVALENCE, row) if x < PREVALENCE[name])
            or "No Finding" for row in u]


def drawn(seed: int, labels: list[str], start: int = 0) -> torch.Tensor:
    """Phantoms of these labels, one a patient: uint8 (n, 1, 64, 64)."""
    found = []
    for k, label in enumerate(labels, start):
        forced = {"label": "normal" if label == "No Finding" else label}
        if FEATURES:
            forced = {"label": "normal", "view": "AP" if "AP" in label else "PA",
                      "sex": "F" if "woman" in label else "M", "age": 80 if "old" in label else 35}
        found.append(torch.from_numpy(phantom.phantom(seed, 10 * k, **forced).image))
    return torch.stack(found)[:, None]


def judge(root: Path) -> None:
    labels = combinations(JUDGES, LEARN)
    predictor = Predictor([LABEL])
    fit(predictor, drawn(JUDGES, labels), encode([LABEL], [{"label": x} for x in labels]),
        steps=STEPS, batch=32, progress="judge")
    predictor.save(root / "judge")


def sample(root: Path) -> None:
    for name, options in GUIDANCE.items():
        subprocess.run([sys.executable, "sample.py", "--root", str(root), "--label", *ASKED,
                        "--per-label", str(EACH), "--steps", "8", *options,
                        "--out", str(root / name.replace(" ", "-"))], check=True)


def row(which: str, asked: str, pixels: torch.Tensor, reader: Predictor) -> dict:
    seen = LABEL.seen(reader.predict(pixels)["label"]).numpy()
    return {"set": which, "asked": asked, "n": len(pixels),
            **{name: [float(own.mean()), *wilson(int(own.sum()), len(own))]
               for name, own in zip(LABEL.values, seen.T)}}


def rows(root: Path) -> list[dict]:
    reader, (pipeline, _) = Predictor.load(root / "judge"), open_pipeline(root / "diffusion", "cpu")
    found = []
    for asked in ASKED:
        true = drawn(TRUE, [asked] * 200)
        with torch.no_grad():
            kept = torch.cat([to_uint8(pipeline.vae.decode(pipeline.encode(part)))
                              for part in true.split(20)])
        found += [row("phantoms", asked, true, reader),
                  row("phantoms through the VAE", asked, kept, reader)]
    for name in GUIDANCE:
        folder = root / name.replace(" ", "-")
        table = read_csv(folder / "metadata.csv", ("label", "file_name"))
        for asked in ASKED:
            pixels = torch.stack([torch.tensor(images.read(folder / r["file_name"])) for r in table
                                  if present("label", r["label"]) == present("label", asked)])
            found.append(row(f"samples, {name}", asked, pixels, reader))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("data", "judge", "sample", "read"))
    parser.add_argument("--root", type=Path)
    parser.add_argument("--features", action="store_true")
    args = parser.parse_args()
    args.root = args.root or Path("runs/features" if FEATURES else "runs/findings")
    if args.what == "read":
        kept = runs.read_json(SAVED) if SAVED.is_file() else {}
        runs.write_json(SAVED, kept | {"features" if FEATURES else "diseases": rows(args.root)})
    else:
        {"data": data, "judge": judge, "sample": sample}[args.what](args.root)


if __name__ == "__main__":
    main()
