"""Edits of phantoms beside the images that they should be: what changed, what stayed, whose it is.

    python benchmarks/counterfactuals.py                     the demo's rows of counterfactuals.json
    python benchmarks/counterfactuals.py --run runs/long/diffusion/best --only label=covid
                                                             those of another model

The judge is the demo's, trained on its real phantoms. Originals are phantoms of
the demo's test patients, none of them a follow-up, whose age and sex the table tells. A phantom can
be drawn again with one factor forced and all else as it was, noise included: its true
counterfactual. Figures are [value, low, high] at 95 %: Wilson of shares, else normal, over
patients.

    pairs        asked    share in which the judge reads the value asked for; of age: years more
                 others   share of other conditions that the judge reads as the original has them
                 age      change of the age that the judge reads where age should stay, years
                 own      share whose nearest of all originals (pixels) is their own
                 own_true the same among all true counterfactuals
                 error    rms difference from the true counterfactual without noise, grey levels
                 lungs    Dice of the lungs found and the true counterfactual's
                 edges    px by which the lungs' apex, base and outer walls are off, on average
    inpainting   asked    share read as the label asked for; in the control as normal
                 outside  share of pixels outside the mask that are the original's
                 inside   rms difference from the true counterfactual within the mask, grey levels
                 seam     rms step across the mask's edge, less that of the true counterfactual
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff import runs  # noqa: E402
from minidiff.classification.predictor import Predictor  # noqa: E402
from minidiff.data.dialects import read_csv  # noqa: E402
from minidiff.data.phantom import Phantom, phantom  # noqa: E402
from minidiff.diffusion.generate import Pipeline, Recipe  # noqa: E402
from minidiff.pixels import to_grey, to_uint8  # noqa: E402
from minidiff.sampling import edits  # noqa: E402
from minidiff.sampling.finished_run import open_pipeline  # noqa: E402
from minidiff.sampling.plan import encode  # noqa: E402
from minidiff.statistics import wilson, z_value  # noqa: E402

SAVED, SIDE = Path(__file__).with_suffix(".json"), 64
INVERTED = Recipe("ddim", steps=16, invert=True)
METHODS = {
    **{f"SDEdit {s:g}": Recipe(strength=s) for s in (0.3, 0.5, 0.7)},
    **{f"inversion {s:g}": replace(INVERTED, strength=s) for s in (0.5, 0.7, 1.0)},
}
CHANGES = {"label=covid": "normal", "sex=other": "", "age=+30": ""}  # and labels of originals
PAINTED = {  # change, label of originals, what is made anew, label that is asked for
    "remove: opacity, label=normal": ("label=normal", "covid", "opacity", "normal"),
    "control: opacity, no change": ("", "covid", "opacity", "normal"),
    "put: a lung, label=pneumonia": ("label=pneumonia", "normal", "lung", "pneumonia"),
}
PAINTS = {f"strength {s:g}, resample {r}": Recipe(strength=s, resample=r)
          for s, r in ((0.5, 1), (1.0, 1), (1.0, 5))}
Figure = list[float]


def share(hits: np.ndarray) -> Figure:
    hits = np.asarray(hits).astype(bool).ravel()
    return [float(hits.mean()), *wilson(int(hits.sum()), len(hits))]


def mean(values: np.ndarray) -> Figure:
    values = np.asarray(values, float)
    half = z_value() * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def originals(table: Path) -> list[dict[str, str]]:
    rows = read_csv(table, ("split",))
    return [row | {"index": int(Path(row["file_name"]).stem)} for row in rows
            if row["split"] == "test" and row["age"] and row["sex"]
            and int(Path(row["file_name"]).stem) % 10 != 9]


def drawn(row: dict, noise: float = 0.02, **forced) -> Phantom:
    return phantom(0, row["index"], SIDE, noise=noise, **forced)


def pictures(phantoms: list[Phantom]) -> Tensor:
    return torch.stack([torch.from_numpy(p.image) for p in phantoms])[:, None]


def counterfactual(row: dict, noise: float = 0.02) -> Phantom:
    """The same patient, drawn with the row's changed values in place of the drawn ones."""
    forced = {name.removeprefix("before_"): row[name.removeprefix("before_")]
              for name in row if name.startswith("before_")}
    if "age" in forced:
        forced["age"] = float(forced["age"])
    return drawn(row, noise, **forced)


class Lungs(nn.Sequential):
    """Finds the lungs of phantoms, also of smooth ones: trained on 400 training patients."""

    def __init__(self):
        convs = [nn.Conv2d(1 if not k else 16, 16, 3, padding=2**k, dilation=2**k)
                 for k in range(5)]
        super().__init__(*[layer for conv in convs for layer in (conv, nn.ReLU())],
                         nn.Conv2d(16, 1, 1))

    def find(self, pixels: Tensor) -> np.ndarray:
        with torch.no_grad():
            return (self(pixels.float() / 127.5 - 1) > 0).numpy()[:, 0]

    @classmethod
    def trained(cls, pipeline: Pipeline, rows: list[dict], steps: int = 250) -> "Lungs":
        phantoms = [drawn(row) for row in rows[:400]]
        x, y = pictures(phantoms), torch.stack([torch.from_numpy(p.lungs) for p in phantoms])
        x = torch.cat([x, through_vae(pipeline, x)]).float() / 127.5 - 1
        y = y[:, None].float().repeat(2, 1, 1, 1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = cls()
        g, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(net.parameters(), 3e-3)
        for _ in tqdm(range(steps), "training a finder of lungs"):
            i = torch.randint(len(x), (16,), generator=g)
            loss = F.binary_cross_entropy_with_logits(net(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return net


def through_vae(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    """What the VAE makes of images, for no edit can be finer."""
    with torch.no_grad():
        return to_grey(torch.cat([to_uint8(pipeline.vae.decode(pipeline.encode(part)))
                                  for part in pixels.split(50)]))


def made(pipeline: Pipeline, rows: list[dict], recipe: Recipe, pixels: Tensor,
         mask: Tensor | None = None) -> Tensor:
    variables = pipeline.conditioner.variables
    return to_grey(torch.cat(list(pipeline.images(
        encode(variables, rows), [row["index"] for row in rows], recipe, mask=mask,
        origin=pixels.expand(-1, 3, -1, -1).contiguous(),
        before=encode(variables, [edits.before(row) for row in rows])))))


def nearest_is_own(found: Tensor, pool: Tensor) -> np.ndarray:
    return (torch.cdist(found.flatten(1).float(), pool.flatten(1).float()).argmin(1)
            == torch.arange(len(found))).numpy()


def edges(mask: np.ndarray) -> np.ndarray:
    """Rows of the lungs' apex and base, columns of their outer walls."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([rows[0], rows[-1], columns[0], columns[-1]] if len(rows) else [0] * 4)


def read(judge: Predictor, pixels: Tensor) -> dict[str, np.ndarray]:
    seen = judge.predict(pixels)
    return {v.name: np.array(v.values)[seen[v.name].argmax(1)] if v.values
            else seen[v.name].numpy() for v in judge.variables}


def measured(found: Tensor, rows: list[dict], judge: Predictor, lungs: Lungs,
             pixels: Tensor) -> dict[str, Figure]:
    name = next(name for name in rows[0] if name.startswith("before_")).removeprefix("before_")
    true = [counterfactual(row, noise=0) for row in rows]
    seen, was = read(judge, found), read(judge, pixels)
    masks, dice = lungs.find(found), []
    for mask, p in zip(masks, true):
        dice.append(2 * (mask & p.lungs).sum() / (mask.sum() + p.lungs.sum()))
    others = [v.name for v in judge.variables if v.values and v.name != name]
    error = (found - 0.0 - pictures(true)).square().flatten(1).mean(1).sqrt()
    return {
        "asked": (mean(seen["age"] - was["age"]) if name == "age" else
                  share(seen[name] == np.array([row[name] for row in rows]))),
        "others": share([seen[k] == np.array([row[k] for row in rows]) for k in others]),
        **({} if name == "age" else {"age": mean(seen["age"] - was["age"])}),
        "own": share(nearest_is_own(found, pixels)),
        "own_true": share(nearest_is_own(found, pictures(true))),
        "error": mean(error.numpy()), "lungs": mean(dice),
        "edges": mean([abs(edges(m) - edges(p.lungs)).mean() for m, p in zip(masks, true)]),
    }


def picked(rows: list[dict], change: str, label: str, variables, n: int) -> list[dict]:
    """The first n originals of this label that have something to change, at ages that are drawn."""
    changes = edits.read_changes([change] if change else [], variables)
    rows = [row for row in rows if not label or row["label"] == label]
    found = [edits.changed(variables, changes, row)[0] for row in rows] if change else rows
    return [row for row in found if row and float(row["age"]) <= 90][:n]


def pairs(pipeline: Pipeline, judge: Predictor, lungs: Lungs, rows: list[dict], n: int,
          only: list[str]) -> list:
    table = []
    for change, label in ((k, v) for k, v in CHANGES.items() if k in only):
        chosen = picked(rows, change, label, pipeline.conditioner.variables, n)
        pixels = pictures([drawn(row) for row in chosen])
        done = {"none: the original": pixels,
                "none: the original through the VAE": through_vae(pipeline, pixels),
                "the true one through the VAE": through_vae(
                    pipeline, pictures([counterfactual(row) for row in chosen]))}
        for method in tqdm([*done, *METHODS], change):
            found = done[method] if method in done else made(pipeline, chosen, METHODS[method],
                                                             pixels)
            table.append({"change": change, "method": method, "n": len(chosen),
                          **measured(found, chosen, judge, lungs, pixels)})
    return table


def step_across(pixels: Tensor, mask: Tensor) -> np.ndarray:
    """Root mean square of the steps between neighbours of which one is in the mask (N,)."""
    x, total, n = pixels.double(), 0, 0
    for dim in (2, 3):
        crossing = mask.diff(dim=dim) != 0
        total = total + (x.diff(dim=dim).square() * crossing).flatten(1).sum(1)
        n = n + crossing.flatten(1).sum(1)
    return (total / n.clamp(min=1)).sqrt().numpy()


def inpainting(pipeline: Pipeline, judge: Predictor, rows: list[dict], n: int,
               only: list[str]) -> list:
    table = []
    for task, (change, label, region, asked) in (
            (k, v) for k, v in PAINTED.items() if k in only):
        chosen = picked(rows, change, label, pipeline.conditioner.variables, 2 * n)
        before, true = [drawn(row) for row in chosen], [counterfactual(row) for row in chosen]
        if region == "opacity":
            masks = [p.opacity for p in before]
        else:  # the lung that will have it
            half = np.arange(SIDE) < SIDE // 2
            masks = [p.lungs & (half if p.factors["side"] == "right" else ~half) for p in true]
        kept = [k for k, mask in enumerate(masks) if mask.any()][:n]
        chosen, before, true = ([some[k] for k in kept] for some in (chosen, before, true))
        mask = torch.stack([torch.from_numpy(masks[k]) for k in kept])[:, None]
        pixels, aim = pictures(before), pictures(true)
        done = {"none: the original": pixels, "the true one, in the mask": torch.where(mask, aim,
                                                                                       pixels)}
        for method in tqdm([*done, *PAINTS], task):
            found = done[method] if method in done else made(pipeline, chosen, PAINTS[method],
                                                             pixels, mask)
            off = (found - 0.0 - aim).square() * mask
            table.append({
                "change": task, "method": method, "n": len(chosen),
                "asked": share(read(judge, found)["label"] == asked),
                "outside": share(((found == pixels) | mask)[~mask].numpy()),
                "inside": mean((off.flatten(1).sum(1) / mask.flatten(1).sum(1)).sqrt().numpy()),
                "seam": mean(step_across(found, mask.int()) - step_across(aim, mask.int()))})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/demo/diffusion", help="or its best/")
    parser.add_argument("--table", default="runs/demo/phantom/metadata.csv", help="of the demo")
    parser.add_argument("--judge", default="runs/demo/classifier/judge")
    parser.add_argument("--only", nargs="*", default=[*CHANGES, *PAINTED], help="what to measure")
    parser.add_argument("--n", type=int, default=100, help="originals of each change")
    args = parser.parse_args()
    pipeline, facts = open_pipeline(args.run, "cpu")
    judge = Predictor.load(args.judge)
    training = [row | {"index": int(Path(row["file_name"]).stem)}
                for row in read_csv(args.table, ("split",)) if row["split"] == "train"]
    lungs, rows = Lungs.trained(pipeline, training), originals(Path(args.table))
    name = args.run.split("/diffusion")[0]
    found = [{"model": name, "step": facts.get("step"), **row} for row in (
        *pairs(pipeline, judge, lungs, rows, args.n, args.only),
        *inpainting(pipeline, judge, rows, args.n, args.only))]
    kept = runs.read_json(SAVED)["rows"] if SAVED.is_file() else []
    measured = {(row["model"], row["change"]) for row in found}
    runs.write_json(SAVED, {"rows": [row for row in kept
                                     if (row["model"], row["change"]) not in measured] + found})


if __name__ == "__main__":
    main()
