"""Does it learn, and does it say when it copies? Short trainings on the demo's phantoms, judged by
the demo's classifier.
"""

from pathlib import Path

import pytest
import torch

import train
from minidiff import runs
from minidiff import variables as var
from minidiff.data import phantom
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table
from minidiff.diffusion import store
from minidiff.diffusion.generate import Recipe
from minidiff.evaluation.metrics.pairwise import distances, equalised

pytestmark = pytest.mark.slow
STEPS, EACH = 700, 40


def trained(demo, out, **knobs) -> Path:
    given = {"data": (str(demo / "phantom"),), "vae": str(demo / "vae"), "steps": STEPS,
             "save_every": STEPS, **knobs}
    train.train_diffusion(train.DiffusionConfig(out=str(out), **given))
    return out


def samples(run: Path, condition: str, values: list[str], guidance: float = 1.5) -> torch.Tensor:
    """EACH images of each value of one condition, the others unknown."""
    pipeline, _ = store.load_pipeline(run)
    variables = pipeline.conditioner.variables
    rows = [{**{v.name: "" for v in variables}, condition: value} for value in values
            for _ in range(EACH)]
    return torch.cat(list(pipeline.images(var.encode(variables, rows), range(len(rows)),
                                          Recipe(guidance=guidance))))


def recognised(judge, images: torch.Tensor, condition: str) -> float:
    names = next(v.values for v in judge.variables if v.name == condition)
    found = judge.predict(images)[condition].argmax(1)
    return (found == torch.arange(len(names)).repeat_interleave(EACH)).float().mean().item()


@pytest.mark.parametrize("prediction, min_snr", [("v", 0.0), ("eps", 5.0), ("flow", 0.0)])
# v with 5 is the demo itself
def test_conditions_are_learned(demo, judge, tmp_path, capsys, prediction, min_snr):
    run = trained(demo, tmp_path / "run", prediction=prediction, min_snr=min_snr,
                  times="logit-normal" if prediction == "flow" else "uniform")
    shares = {name: recognised(judge, samples(run, name, values), name)
              for name, values in (("view", ["AP", "PA"]), ("sex", ["F", "M"]))}
    with capsys.disabled():
        print(f"\n{prediction}, min-SNR γ {min_snr:g}, {STEPS} steps: recognised {shares}")
    assert min(shares.values()) >= 0.8  # one in two is chance


def test_adapters_teach_a_model_a_condition_that_it_did_not_know(demo, judge, tmp_path, capsys):
    base = trained(demo, tmp_path / "base", condition=("label",))
    run = trained(demo, tmp_path / "adapted", vae="", init=str(base), condition=("label", "view"),
                  rank=16, alpha=32.0, lr=4e-3)
    shares = {g: recognised(judge, samples(run, "view", ["AP", "PA"], g), "view")
              for g in (1.0, 1.5, 3.0)}
    with capsys.disabled():
        shown = ", ".join(f"{share:.1%} at guidance {guidance:g}"
                          for guidance, share in shares.items())
        print(f"\nLoRA of rank 16 on a model without views, {STEPS} steps, {2 * EACH} views "
              f"recognised: {shown}")
    assert shares[3.0] >= 0.8  # one in two is chance


def test_thirty_images_for_far_too_long_are_copied_and_the_run_says_so(demo, tmp_path, capsys):
    data = phantom.write(tmp_path / "few", n=90, size=64, seed=5,
                         splits={"train": 1 / 3, "val": 2 / 3})
    run = trained(demo, tmp_path / "run", data=(str(data),), steps=1500, batch=16, save_every=250,
                  condition=("label",))
    said = capsys.readouterr().out
    log = [line for line in runs.read_log(run / "log.jsonl") if line["val_loss"] is not None]
    assert "begun to copy" in said and log[-1]["gap_low"] > 0.1 and log[-1]["gap"] > log[0]["gap"]
    assert runs.read_json(run / "best" / "model.json")["step"] < 1500
    table, pixels = load_pixels(read_table(data), 64)
    train_pixels, held_out = (pixels[[i for i, r in enumerate(table.rows) if r["split"] == s]]
                              for s in ("train", "val"))
    made = samples(run, "label", table.labels, guidance=1.0)
    to_train, usual = (distances(equalised(x), equalised(train_pixels)).min(1).values.median()
                       for x in (made, held_out))
    with capsys.disabled():
        gaps = ", ".join(f"{line['step']}: {line['gap']:+.0%} (≥ {line['gap_low']:+.0%})"
                         for line in log)
        print(f"\n30 images: gap {gaps}; nearest training image at {to_train / usual:.2f} of a "
              "held-out one's distance")
    assert to_train < 0.8 * usual
