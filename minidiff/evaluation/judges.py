"""The judges of a report: the own one of the classifier run, and an independent one beside it.

A judge cannot test images that it has filtered. An independent judge can: `--judge RUN` names a run
of `classify.py` on other images, or from another seed. With another seed alone it has learnt the
same as the own judge from the same images, mistakes included.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minidiff.classification.predictor import Predictor
from minidiff.data.table import Table
from minidiff.errors import refuse
from minidiff.evaluation import selection, sets
from minidiff.evaluation.metrics.agreement import asked
from minidiff.runs import find_json
from minidiff.training.device import pick_device
from minidiff.variables import Labels

OWN, INDEPENDENT = "own", "independent"


class Judge(NamedTuple):
    """A predictor, the cells that it reads (`agreement.asked`), what it cannot read, and facts.

    Facts: folder, sha256; trained_on: how many images, and shared: how many of these the own judge
    was trained on, too; None where that is not written down.
    """

    predictor: Predictor
    asked: dict[str, Labels]      # cells of held-out and of synthetic rows
    unreadable: dict[str, str]    # attribute → why
    facts: dict[str, Any]


def of(cfg: sets.Config, tables: Mapping[str, Table]) -> dict[str, Judge]:
    """The own judge, if there is one that reads labels, then the independent one, if asked for."""
    folders = {OWN: Path(cfg.classifier) / "judge"}
    if cfg.judge:
        folders[INDEPENDENT] = sets.judge_folder(cfg.judge)
    own, found = sets.seen_by(cfg.classifier), {}
    for name, folder in folders.items():
        if name == OWN and not folder.is_dir():
            continue
        target = find_json(folder.parent / "config.json", {}).get("target", "label")
        if name == OWN and target != "label":
            print(f"{folder} reads {target} in place of the label: the page has no judge")
            continue
        predictor = Predictor.load(folder).to(pick_device(cfg.device))
        seen = sets.seen_by(folder)
        facts = {"folder": str(folder), "sha256": selection.fingerprint(folder),
                 "trained_on": None if seen is None else len(seen),
                 "shared": None if None in (seen, own) else len(seen & own)}
        if name == INDEPENDENT:
            _refuse(cfg.judge, facts["sha256"], seen, cfg.samples, tables["synthetic"],
                    [j.facts["sha256"] for j in found.values()])
        found[name] = Judge(predictor, *asked(predictor, tables), facts)
    return found


def _refuse(flag: str, sha256: str, seen: set[str] | None, samples: str, made: Table,
            own: list[str]) -> None:
    """InputError unless a judge is independent of the samples, their filter and the own judge."""
    filters = [f["judge"] for f in selection.of(samples)["filters"] if f["by"] == "recognised"]
    synthetic = len((seen or set()) & set(made.hashes.values()))
    refuse({
        "does not say what it was trained on: name a run of classify.py, whose judge/ has "
        "trained_on.json": seen is None,
        f"was trained on {synthetic} of the synthetic images": synthetic,
        "is the judge of --classifier": sha256 in own,
        f"filtered the images of {samples}": sha256 in filters,
        f"may have filtered the images of {samples}, which do not say who did": None in filters,
    }, f"--judge {flag} ", "; an independent judge is needed")
