"""What selected the images of a folder of samples, and what they can no longer test.

`sample.py --keep` draws an image again that a filter rejects. What the filter checked then holds of
all images, whatever the model makes:

    recognised   the judge reads the label that was asked for: labels can no longer be tested by
                 this judge, nor nearness in its features
    new          the image is no near-copy of a training image: copies can no longer be tested

And a checkpoint that was chosen on validation images (best/, snapshots/) is judged on test images
alone.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minidiff import runs
from minidiff.evaluation.features.extractor import PredictorFeatures
from minidiff.evaluation.quick import Quick

REASONS = {"recognised": "not recognised", "new": "a near-copy of a training image"}
FINISHED = ("val", "test")   # splits that judge a finished model, and one that was chosen on val:
PICKED = ("test",)
UNRECORDED = {"judge": None, "rejects": None}


def record(keep: Iterable[str], rejects: Mapping[str, int], classifier: str,
           watch: Quick | None) -> list[dict[str, Any]]:
    """What a manifest says of its filters: how many images they knew, their gate, their rejects."""
    found = []
    for by in keep:
        own = {"by": by, "rejects": rejects.get(REASONS[by], 0)}
        if by == "recognised":
            judge = Path(classifier) / "judge"
            known = judge / "trained_on.json"
            own |= {"judge": fingerprint(judge), "classifier": classifier,
                    "gate": "the most probable label is the one asked for", "held_out": 0,
                    "train": len(runs.read_json(known)) if known.is_file() else None}
        else:
            own |= {"judge": None, "gate": watch.near_limit,
                    "train": len(watch.tables[0]), "held_out": len(watch.patients)}
        found.append(own)
    return found


def fingerprint(predictor: str | Path) -> str:
    """SHA-256 of the weights in a predictor's folder."""
    return runs.sha256(Path(predictor) / "predictor.safetensors")


def of(samples: str | Path) -> dict[str, Any]:
    """The filters of a folder of samples, its yield and rejects, and the checkpoint that made it.

    The config of an older folder says only that it was filtered. Checkpoint: the step of a model of
    best/ or snapshots/, None for a finished one.
    """
    manifest, config = (runs.find_json(Path(samples) / name, {})
                        for name in ("manifest.json", "config.json"))
    filters = manifest.get("filters",
                           [{"by": by, **UNRECORDED} for by in config.get("keep", ())])
    return {"filters": filters, "yield": manifest.get("yield"),
            "rejects": manifest.get("rejects", {}), "checkpoint": manifest.get("checkpoint")}


def decided(filters: Iterable[Mapping], judge: str | None) -> dict[str, Mapping]:
    """Subject → the filter that decided it: copies, label and the features of this judge.

    judge: its fingerprint. A filter whose judge is not on record may have been this one.
    """
    found: dict[str, Mapping] = {}
    for f in filters:
        if f["by"] == "new":
            found["copies"] = f
        elif judge and f["judge"] in (None, judge):
            found |= {"label": f, PredictorFeatures.name: f}
    return found


def held_out(samples: Iterable[str | Path],
             model: str | Path = "") -> tuple[tuple[str, ...], list[str]]:
    """The splits that these sets and this model are judged on; a note for each that has fewer."""
    steps = {str(folder): of(folder)["checkpoint"] for folder in samples}
    if model and (path := Path(model) / "model.json").is_file():
        steps[str(model)] = runs.read_json(path).get("step")
    notes = [f"{folder}: its model is the checkpoint of step {step}, which may have been chosen on "
             "validation images; so held-out images are those of test alone"
             for folder, step in steps.items() if step is not None]
    return (PICKED if notes else FINISHED), notes
