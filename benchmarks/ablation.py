"""What each knob of the diffusion model is worth: one factor at a time from the demo's defaults.

    python benchmarks/ablation.py --root runs/ablation --out runs/ablation.json   all rows
    python benchmarks/ablation.py --root runs/few --out few.json --steps 100 --rows default
    python benchmarks/ablation.py --plot                    the table and docs/ablation.png

Declared before anything was trained: data, autoencoder, steps, batch and rate are the demo's for
all rows, and differences are taken seed by seed from `default`, three seeds each. A row's figures:

    KD          kernel distance to 300 fresh phantoms in the features of a classifier of 2,400
                others, of 100 images of each label; [KD, low, high] over images of each set, and
                the floor is the 95 % quantile of fresh phantoms against as many others
    pixels      the same on the principal components of pixels
    recognised  share of these images in which that classifier reads the label asked for, and of
                the fresh phantoms
    error       held-out images: squared error of D in units of v's, (1 + σ²)/σ² of it, so that all
                rows are comparable; 512 levels and noises that never change, by quarter of the
                default schedule's t from little noise to much. null: the row's own schedule ends
                below the quarter's last level

Rows "EMA …" are the default's three runs with their weights averaged over another width after
training (`train.py average`); the plain EMA of `default` is over a tenth of the steps. Everything
is kept in --root, and the same command goes on; ablation.json has a part for each row.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample  # noqa: E402
import train  # noqa: E402
from benchmarks.rare import draw, oracle, pixels  # noqa: E402
from minidiff import runs  # noqa: E402
from minidiff.data import phantom  # noqa: E402
from minidiff.data.dataset import load_pixels  # noqa: E402
from minidiff.data.table import read_table  # noqa: E402
from minidiff.diffusion import store  # noqa: E402
from minidiff.diffusion.generate import Pipeline  # noqa: E402
from minidiff.diffusion.schedule import Schedule  # noqa: E402
from minidiff.diffusion.watch import Probe, by_quarter  # noqa: E402
from minidiff.evaluation.features.extractor import PixelPCA, PredictorFeatures  # noqa: E402
from minidiff.evaluation.metrics.distances import floor, kd_with_interval, kid  # noqa: E402
from minidiff.stages.average import AverageConfig, average  # noqa: E402
from minidiff.statistics import wilson  # noqa: E402
from minidiff.variables import encode  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FILE, ROOT = Path(__file__).with_suffix(".json"), Path(__file__).parents[1]
ROWS = {"default": {"post_hoc": True, "snapshots": 16},  # both change nothing in the training
        "prediction eps": {"prediction": "eps"}, "prediction x0": {"prediction": "x0"},
        "prediction flow": {"prediction": "flow"}, "times lognormal": {"times": "lognormal"},
        "min-SNR none": {"min_snr": 0.0}, "schedule zero-snr": {"schedule": "zero-snr"},
        "shift .25": {"shift": 0.25}}
WIDTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)
EACH, SLOTS, FRESH = 100, 512, (8, 10)  # images a label; slots of a probe; seeds of fresh phantoms


def prepare(root: Path) -> None:
    """The demo's data and its autoencoder."""
    phantom.write(root / "data", scarce=phantom.SCARCE)
    if not (root / "vae/vae.json").exists():
        train.train_vae(train.VAEConfig(data=(str(root / "data"),), root=str(root)))


def trained(root: Path, name: str, seed: int, steps: int) -> Path:
    """The finished diffusion run of a row."""
    out = root / name.replace(" ", "-") / str(seed)
    if not (out / "model.json").exists():
        train.train_diffusion(train.DiffusionConfig(
            root=str(root), data=(str(root / "data"),), vae=str(root / "vae"), out=str(out),
            seed=seed, steps=steps, **{"snapshots": 0, **ROWS[name]}))
    return out


def widened(root: Path, seed: int, steps: int, width: float) -> Path:
    run = trained(root, "default", seed, steps)
    if not (run / f"averaged/std_{width:g}/model.json").exists():
        average(AverageConfig(root=str(root), run=str(run), std=width))
    return run / f"averaged/std_{width:g}"


def errors(pipeline: Pipeline, z: torch.Tensor, labels: dict) -> dict[str, float | None]:
    """Held-out error of D by quarter of t, in units of v's."""
    usual, own = Schedule.scaled_linear(), pipeline.denoiser.schedule
    probe, losses = Probe.of(z, labels, SLOTS, len(usual)), []
    for k in torch.arange(SLOTS).split(64):
        z, sigma = probe.z[k], usual.sigma(probe.t[k])
        s = sigma[:, None, None, None].float()
        guess = pipeline.denoiser(z + s * probe.noise[k], sigma,
                                  {name: v[k] for name, v in probe.labels.items()})
        losses.append(((guess - z).square() * (1 + s**-2)).flatten(1).mean(1))
    found = by_quarter(torch.cat(losses), probe.t, len(usual), "error")
    ends = usual.sigma(torch.tensor([len(usual) * (q + 1) // 4 - 1 for q in range(4)]))
    return {key: value if end <= own.sigmas_table[-1] * 1.01 else None
            for (key, value), end in zip(found.items(), ends)}


class Measure:
    """What all rows are measured with, and by."""

    def __init__(self, root: Path):
        labels = phantom.LABELS
        one, two = (draw(root / f"fresh-{k}", k, dict.fromkeys(labels, range(EACH)))
                    for k in FRESH)
        read, self.accuracy = oracle(root, labels, one)
        table, train_pixels = load_pixels(read_table(str(root / "data")).select(split="train"), 64)
        spaces = {"KD": PredictorFeatures(read), "pixels": PixelPCA().fit(train_pixels[:])}
        self.read, self.root = read, root
        self.fresh = {name: (e, *(e(pixels(f)).double().numpy() for f in (one, two)))
                      for name, e in spaces.items()}
        self.held = load_pixels(read_table(str(root / "data")).select(split=("val", "test")), 64)

    def floors(self) -> dict:
        found = {}
        for name, (_, x, y) in self.fresh.items():
            both = np.concatenate([x, y])
            found[name] = floor(kid, real=both, patients=range(len(both)),
                                n=len(x), m=len(y), repeats=200, seed=0)._asdict()
        return {"oracle": self.accuracy, "images": len(x), "floors": found, "apart": {
            name: kid(real=x, fake=y) for name, (_, x, y) in self.fresh.items()}}

    @torch.no_grad()
    def of(self, run: Path, seed: int) -> dict:
        """A row's figures of one seed; the samples lie in the run."""
        out = run / "samples"
        if not (out / "metadata.csv").exists():
            sample.sample(sample.SampleConfig(run=str(run), out=str(out), root=str(self.root),
                                              per_label=EACH, seed=10_000 * seed))
        table, made = load_pixels(read_table(str(out), split=False), 64)
        said = self.read.predict(made[:])["label"].argmax(1)
        right = int((said == encode(self.read.variables, table.rows)["label"]).sum())
        pipeline, _ = store.load_pipeline(run)
        rows, images = self.held
        z = pipeline.encode(images)
        found = {name: [values[key] for key in ("KD", "KD_low", "KD_high")]
                 for name, (e, x, _) in self.fresh.items()
                 for values, _ in [kd_with_interval(
                     real=x, fake=e(made[:]).double().numpy())]}
        return {"seed": seed, "n": len(made), **found,
                "recognised": [right / len(made), *wilson(right, len(made))],
                **errors(pipeline, z, encode(pipeline.conditioner.variables, rows.rows))}


def of_seeds(row: list[dict], key: str) -> np.ndarray:
    return np.array([r[key][0] if isinstance(r[key], list) else r[key] for r in
                     sorted(row, key=lambda r: r["seed"])], float)


def short(x: float, form: str) -> str:
    """A figure as the pages write it: −.03."""
    text = f"{x:{form}}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


def table(kept: dict) -> str:
    """Markdown: mean of the seeds, and of KD its difference from `default`, seed by seed, with the
    95 % interval of t over seeds."""
    default, lines = kept["default"], []
    names = [name for name in kept if name != "facts"]
    for name in names:
        row, cells = kept[name], [name]
        for key in ("KD", "pixels"):
            d = of_seeds(row, key) - of_seeds([r for r in default if r["seed"] in
                                               {own["seed"] for own in row}], key)
            half = student.ppf(.975, len(d) - 1) * d.std(ddof=1) / len(d)**.5 if len(d) > 1 else 0
            cells.append(short(of_seeds(row, key).mean(), ".2f"))
            mid, low, high = (short(d.mean() + x, "+.2f") for x in (0, -half, half))
            cells.append("" if name == "default" else f"{mid} ({low} to {high})")
        cells.append(f"{100 * of_seeds(row, 'recognised').mean():.0f} %")
        cells += ["–" if np.isnan(x) else short(x, ".3f")
                  for x in (of_seeds(row, f"error_t{q}").mean() for q in range(4))]
        lines.append("| " + " | ".join(cells) + " |")
    head = ("row", "KD", "less default's", "pixels", "less default's", "recognised",
            "error, 1st quarter", "2nd", "3rd", "4th")
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def plot(kept: dict) -> None:
    """docs/ablation.png: KD of each row, a dot a seed; and against the width of the EMA."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for k, name in enumerate(ROWS):  # of a file with all rows
        values = of_seeds(kept[name], "KD")
        left.plot(values, np.full(len(values), k), "o", color="tab:blue", alpha=.6)
        left.plot(values.mean(), k, "|", color="black", markersize=16)
    left.set(yticks=range(len(ROWS)), yticklabels=ROWS, xlabel="kernel distance", xlim=(0, None))
    left.invert_yaxis()
    kd = np.array([of_seeds(kept[f"EMA {w:g}"], "KD") for w in WIDTHS])
    right.plot(WIDTHS, kd, color="tab:blue", alpha=.4)
    right.plot(WIDTHS, kd.mean(1), color="black", label="mean of three seeds")
    right.axhline(of_seeds(kept["default"], "KD").mean(), color="tab:orange",
                  label="default: the last tenth of steps")
    right.set(xlabel="standard deviation of the average, share of the run",
              ylabel="kernel distance", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs/ablation.png", dpi=90, metadata={"Software": None})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, default=Path("runs/ablation"))
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--widths", nargs="*", type=float, default=list(WIDTHS), help="of the EMA")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=train.DiffusionConfig.steps)
    p.add_argument("--out", type=Path, default=FILE)
    p.add_argument("--plot", action="store_true", help="print the table, draw docs/ablation.png")
    a = p.parse_args()
    if a.plot:
        kept = runs.read_json(a.out)
        print(table(kept))
        plot(kept)
        return
    train.draw_pictures = lambda *_, **__: None  # nobody looks at them
    kept = runs.find_json(a.out, {})
    if kept.get("facts", {"steps": a.steps})["steps"] != a.steps:
        raise SystemExit(f"{a.out} is of {kept['facts']['steps']} steps; another --out, --root")
    prepare(a.root)
    measure = Measure(a.root)
    kept = {**kept, "facts": {"steps": a.steps, **measure.floors()}}
    runs.write_json(a.out, kept)
    for seed in range(a.seeds):
        runs_of = dict.fromkeys(a.rows) | {f"EMA {w:g}": w for w in a.widths}
        for name, width in runs_of.items():
            rows = kept.setdefault(name, [])
            if seed not in [row["seed"] for row in rows]:
                run = (trained(a.root, name, seed, a.steps) if name in ROWS else
                       widened(a.root, seed, a.steps, width))
                rows.append(measure.of(run, seed))
                runs.write_json(a.out, kept)


if __name__ == "__main__":
    main()
