import math

import pytest
import torch

from minidiff.classification.judge_agreement import judge_agreement
from minidiff.variables import Category, Number

LABEL = Category("label", ("normal", "pneumonia", "covid"))
SEX = Category("sex", ("F", "M"))
AGE = Number("age", 50.0, 15.0, 20.0, 90.0)


class Judge:
    """Reads its answers off the first pixels: label, sex and age of each image."""

    variables = [LABEL, SEX, AGE]

    def predict(self, images):
        label, sex, age = images[:, 0, 0, :3].T
        p = 0.1 + 0.8 * sex.float()
        return {"label": torch.eye(3)[label.long()], "sex": torch.stack([1 - p, p], 1),
                "age": age.float()}


def images(label, sex, age):
    x = torch.zeros(len(label), 3, 4, 4, dtype=torch.uint8)
    x[:, 0, 0, :3] = torch.stack([torch.tensor(c) for c in (label, sex, age)], 1).to(torch.uint8)
    return x


def test_rows():
    shown = images([0, 1, 2, 2, 0, 1], [0, 1, 1, 0, 1, 0], [30, 40, 50, 60, 70, 80])
    labels = {"label": torch.tensor([0, 1, 2, 0, 0, -1]), "sex": torch.tensor([0, 1, 1, 0, 0, -2]),
              "age": torch.tensor([20.0, 40.0, 60.0, 80.0, math.nan, -math.inf])}
    rows = {r["variable"]: r for r in judge_agreement(Judge(), shown, labels, "synthetic")}

    assert rows["label"]["n"] == 5 and rows["label"]["accuracy"] == pytest.approx(0.8)
    assert rows["label"]["low"] == pytest.approx(0.3755, abs=1e-3)
    assert {r["value"]: (r["n"], r["accuracy"]) for r in rows["label"]["by_value"]} == {
        "normal": (3, pytest.approx(2 / 3)), "pneumonia": (1, 1.0), "covid": (1, 1.0)}
    assert "auroc" not in rows["label"]
    assert rows["sex"]["n"] == 5 and rows["sex"]["auroc"] == pytest.approx(5 / 6)
    assert rows["age"]["n"] == 4 and rows["age"]["slope"] == pytest.approx(0.5)
    assert rows["age"]["r"] == pytest.approx(1) and rows["age"]["mae"] == pytest.approx(10)
    assert all(r["set"] == "synthetic" for r in rows.values())


def test_absent_and_unknown_columns():
    shown = images([0, 1], [0, 1], [30, 40])
    rows = judge_agreement(Judge(), shown,
                     {"sex": torch.tensor([-1, -1]), "age": torch.tensor([50.0, 50.0])}, "real")
    assert [r["variable"] for r in rows] == ["sex", "age"]
    assert rows[0]["n"] == 0 and "accuracy" not in rows[0]
    assert math.isnan(rows[1]["r"]) and math.isnan(rows[1]["slope"]) and rows[1]["mae"] == 15
