"""Balance: shares of labels as the formula has them, of findings as asked, no more moved."""

from collections import Counter

import numpy as np
import pytest

from minidiff.balance import FINE, turns
from minidiff.data.dataset import Images, picker
from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.variables import present

TWO = {"none": 500, "a": 300, "b": 60, "a|b": 140}
NAMES = "abcd"


def shares(weights: dict[str, float]) -> dict[str, float]:
    """Of each finding, over all."""
    found = Counter()
    for cell, n in weights.items():
        found.update(dict.fromkeys(present("label", cell), n))
    return {name: n / sum(weights.values()) for name, n in found.items()}


def test_labels_that_exclude_each_other_follow_their_formula():
    counts = {"covid": 10, "normal": 1000}
    assert turns(counts, 0, False) == counts and turns(counts, 1, False) == {"covid": 1000,
                                                                             "normal": 1000}
    assert turns(counts, 0.5, False) == {"covid": 100, "normal": 1000}


@pytest.mark.parametrize("balance", [0, 0.3, 0.7, 1])
def test_findings_reach_their_shares_and_keep_their_association(balance):
    """Shares p^(1−b), scaled to their sum; raking leaves the odds ratio of a pair as it is."""
    made, p = turns(TWO, balance, True), shares(TWO)
    raised = {name: share ** (1 - balance) for name, share in p.items()}
    factor = sum(p.values()) / sum(raised.values())
    for name, share in shares(made).items():
        assert share == pytest.approx(factor * raised[name], abs=0.006)
    before, after = (w["none"] * w["a|b"] / (w["a"] * w["b"]) for w in (TWO, made))
    assert after == pytest.approx(before, rel=0.02)
    if not balance:
        assert made == {cell: FINE * n for cell, n in TWO.items()}


def test_many_findings_at_once():
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.2, 0.1, 0.04])
    cells = ["|".join(name for name, x in zip(NAMES, row) if x) or "none"
             for row in rng.random((4000, 4)) < p]
    got = shares(turns(Counter(cells), 1, True))
    assert set(got) == set(NAMES)
    assert all(share == pytest.approx(p.mean(), abs=0.015) for share in got.values())


def test_what_no_weights_reach_is_refused_by_name():
    with pytest.raises(InputError, match="--balance 1: no weights of these images make a as "
                       r"frequent as wanted, in 66\.7% of them \(it is in 100\.0%; reached: 100"):
        turns({"a": 50, "a|b|c": 50}, 1, True)


def test_training_images_take_turns_by_their_weights():
    rows = [{"file": f"{cell}{k}", "label": cell} for cell, n in TWO.items() for k in range(n)]
    train = Images(Table(rows), None)
    total = sum(turns(TWO, 1, True).values())
    took = picker(train, 0, 1.0)(range(total))
    got = shares(Counter(rows[i]["label"] for i in took))
    assert got["a"] == pytest.approx(got["b"], abs=0.01) == pytest.approx(0.32, abs=0.01)
    uses = Counter(took)
    assert len(uses) == len(rows)  # all are used, and those of a cell equally often
    for cell in TWO:
        own = [n for i, n in uses.items() if rows[i]["label"] == cell]
        assert max(own) - min(own) <= 1
