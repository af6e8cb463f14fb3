"""What the judge reads off held-out real and synthetic images, beside what they are or were asked
to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from minidiff import variables as var
from minidiff.classification.judge_agreement import judge_agreement
from minidiff.classification.predictor import Predictor
from minidiff.data.table import Table
from minidiff.evaluation.metrics.within import within_label
from minidiff.variables import Labels


def asked(judge: Predictor | None, tables: dict[str, Table]) -> dict[str, Labels]:
    """Cells of held-out real and synthetic rows, of the variables that the samples were asked for
    and the judge reads.
    """
    wanted = [v for v in judge.variables
              if any(tables["synthetic"].column(v.name))] if judge else []
    return {name: var.encode(wanted, tables[name].rows) for name in ("heldout", "synthetic")}


def agree(judge: Predictor | None, labels: dict[str, Labels], tables: dict[str, Table],
          pixels: dict[str, Tensor]) -> list[dict]:
    """The judge on held-out real and on synthetic images, each attribute also within label."""
    rows = []
    for name, shown in (("heldout", "held-out real"), ("synthetic", "synthetic")) if judge else ():
        judged = judge.predict(pixels[name])
        read_once = SimpleNamespace(variables=judge.variables, predict=lambda _,
                                    judged=judged: judged)
        within = within_label(judge.variables, judged, labels[name], tables[name].column("label"))
        found = judge_agreement(read_once, pixels[name], labels[name], shown)
        rows += [{**row, **within.get(row["variable"], {})} for row in found]
    return rows


def certainty(judge: Predictor | None, labels: Sequence[str], pixels: Tensor) -> np.ndarray | None:
    """The judge's probability of the label that each image was asked for, (n,); None where it does
    not read them all.
    """
    names = next((v.values for v in judge.variables if v.name == "label"), ()) if judge else ()
    if not names or not set(labels) <= set(names):
        return None
    index = torch.tensor([names.index(label) for label in labels])
    return judge.predict(pixels)["label"].gather(1, index[:, None])[:, 0].double().numpy()
