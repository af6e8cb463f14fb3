"""A cell of the reference matrix and ρ against what is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from minidiff.evaluation.matrix import cells
from minidiff.evaluation.matrix.cells import Subset
from minidiff.evaluation.metrics.distances import kid


def made(features, label="a", sources=("x",), kind="real", part="held-out", patients=None):
    """A subset of which only the features matter."""
    n = len(features)
    names = [f"{label}{part}{features.sum()}{i}"
             for i in range(n)] if patients is None else patients
    return Subset(kind, label, part, sources, torch.zeros(n, 3, 1, 1, dtype=torch.uint8),
                  np.array(names), "0" * 64, features={"s": features})


def normal(seed, n=60, shift=0.0, d=8):
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def none(n):
    """No real against real."""
    return {}


def test_a_cell_says_what_its_parts_say():
    row, column = made(normal(0)), made(normal(1, 45), part="train")
    found, draws = cells.cell(row, column, "s",
                              cells.real_against_real([row, column], "s", repeats=10),
                              permutations=100, resamples=100)
    assert (found["n_r"], found["n_s"], found["n"]) == (60, 45, 45) and len(draws) == 100
    assert found["KD"] == pytest.approx(kid(real=row.features["s"],
                                                  fake=column.features["s"]))
    assert found["FD"] == pytest.approx(cells.fid(real=row.features["s"][:45],
                                                  fake=column.features["s"]))
    assert found["KD_low"] < 0 < found["KD_high"] and 0 < found["KD_p"] <= 1 and found[
        "null_n"] == 45
    assert found["FD_null_low"] < found["FD_null"] < found["FD_null_high"]
    assert found["data"] == ["0" * 12] * 2 and "too_few" not in found


@pytest.mark.parametrize("row, column, why", [
    (made(normal(0, 19)), made(normal(1)), "19 images; 20 are needed"),
    (made(normal(0)), made(normal(1, 5)), "5 images; 20 are needed"),
    (made(normal(0), patients=["p"] * 60), made(normal(1)), "all images of one patient"),
    (made(normal(0)), made(normal(0)), "0 images of other patients; 20 are needed"),  # the same
])
def test_cells_with_too_few_images_say_why(row, column, why):
    found, draws = cells.cell(row, column, "s", none)
    assert found["too_few"] == why and draws is None and "KD" not in found


def test_images_of_patients_in_the_row_are_left_out():
    row = made(normal(0), patients=[f"p{i}" for i in range(60)])
    column = made(normal(1), label="b",
                  patients=[f"p{i}" for i in range(30)] + [f"q{i}" for i in range(30)])
    found, _ = cells.cell(row, column, "s", none, permutations=100, resamples=100)
    assert found["n_s"] == 30


def test_cells_are_confounded_where_label_and_source_differ_both():
    row = made(normal(0), "a", ("x",))
    for label, sources, expected in (("a", "y", False), ("b", "x", False), ("b", "y", True),
                                     ("b", ("x", "y"), False)):
        assert cells.confounded(row, made(normal(1), label, tuple(sources))) is expected
    # under a false name
    assert cells.confounded(row, replace(made(normal(1), "a", ("y",)), truth="b")) is True


def scored(seed, shift, far=1.0, n=60):
    """ρ of a set shifted by `shift` from held-out images, the yardstick shifted by `far`."""
    held = made(normal((seed, 0), n))
    both = [cells.cell(held, made(normal((seed, k), n, s), part=p), "s", none, permutations=100,
                       resamples=300) for k, s, p in ((1, shift, "s"), (2, far, "o"))]
    return cells.rho(*both)


def test_rho_of_the_yardstick_itself_is_one():
    held, far = made(normal(0)), made(normal(1, shift=0.7), part="o")
    value = cells.cell(held, far, "s", none, permutations=100, resamples=200)
    found = cells.rho(value, value)
    assert found["rho"] == found["rho_low"] == found["rho_high"] == 1 and found[
        "within"] is False and found["resolved"]


# The numbers of a few seeds are looked at in the fast tests; how often they cover, in the slow
# ones.

def few(n):
    """8 seeds in the fast tests, n in the slow ones."""
    return pytest.mark.parametrize("seeds", [8, pytest.param(n, marks=pytest.mark.slow)])


@few(60)
def test_rho_of_another_sample_of_the_same_hospital_covers_zero(seeds):
    found = [scored(seed, 0.0) for seed in range(seeds)]
    covered = sum(f["rho_low"] <= 0 <= f["rho_high"] for f in found)
    assert all(f["resolved"] for f in found) and covered >= (52 if seeds == 60 else 6)
    assert sum(f["within"] is True for f in found) >= seeds - 3 and not any(f["within"] is False
                                                                            for f in found)


@few(60)
def test_rho_covers_its_true_value(seeds):
    kd = kid(real=normal((9, 0), 2000), fake=normal((9, 1), 2000, 0.6))
    truth = kd / kid(real=normal((9, 0), 2000), fake=normal((9, 2), 2000, 1.0))
    found = [scored(100 + seed, 0.6) for seed in range(seeds)]
    assert sum(f["rho_low"] <= truth <= f["rho_high"] for f in found) >= (51 if seeds == 60
                                                                          else 6), truth
    assert all(0 < f["rho_low"] < f["rho"] < f["rho_high"] < 1 for f in found)


@few(20)
def test_without_a_resolved_yardstick_there_is_no_rho_but_what_is_far_is_far(seeds):
    found = [scored(seed, 0.0, far=0.0) for seed in range(seeds)]
    open_ = [f for f in found if not f["resolved"]]
    assert len(open_) >= seeds - 3 and all("rho" not in f and f["within"] is None for f in open_)
    assert all(scored(seed, 2.0, far=0.0)["within"] is False for seed in range(seeds // 4))


@pytest.mark.slow
def test_p_of_real_against_real_is_uniform():
    values = []
    for seed in range(200):
        column = made(normal((seed, 1), 40), part="train")
        values.append(cells.cell(made(normal((seed, 0), 40)), column, "s", none, permutations=200,
                                 resamples=100)[0]["KD_p"])
    assert stats.kstest(values, "uniform").pvalue > 0.01
