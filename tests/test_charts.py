"""The three forms of charts, by what matplotlib was asked to draw."""

import numpy as np
import pytest

from minidiff.evaluation.pages import charts


@pytest.fixture
def drawn(monkeypatch):
    """The figures of the charts, in place of their PNG."""
    figures = []
    monkeypatch.setattr(charts, "_png", lambda figure, transparent=True: figures.append(figure))
    yield figures
    for figure in figures:
        charts.pyplot().close(figure)


def texts(ticks):
    return [tick.get_text() for tick in ticks]


def test_rows_of_points_stand_together_by_group(drawn):
    row = {"value": 1.0, "ends": (0.5, 1.5), "band": (-0.1, 0.1)}
    panels = {title: [{"name": name, "group": group, **row} for group in "ab"
                      for name in ("synthetic", "real")] for title in ("x", "y")}
    charts.points(panels, "distance")
    left, right = drawn[0].axes
    assert texts(left.get_yticklabels()) == ["a  ·  synthetic", "real", "b  ·  synthetic", "real"]
    assert np.diff(left.get_yticks()) == pytest.approx([1, 1.7, 1])
    assert [left.get_title(loc="left"), right.get_title(loc="left")] == ["x", "y"]
    assert left.get_xscale() == "symlog"       # 1.5 lies far beyond the bands


def test_a_point_without_value_or_interval_is_left_out(drawn):
    charts.points({"x": [{"name": "a", "value": np.nan}, {"name": "b", "value": 2.0,
                                                          "ends": (None, None), "draws": [1, 3]}]})
    (axes,) = drawn[0].axes
    shown = [line.get_xdata() for line in axes.get_lines()]
    assert axes.get_xscale() == "linear" and [len(x) for x in shown] == [0, 1, 2, 1]


def test_lines_share_one_legend_and_bands(drawn):
    line = {"x": [1, 2], "y": [3.0, 4.0]}
    charts.lines([{"title": "a", "lines": [{"name": "synthetic", **line, "low": [2, 3],
                                            "high": [4, 5]}], "bands": {"floor": (0, 1)}},
                  {"title": "b", "lines": [{"name": "synthetic", **line}], "at": {"step 2": 2},
                   "levels": [1], "near": 0.1, "settings": {"xlabel": "step"}}])
    first, second = drawn[0].axes
    assert texts(drawn[0].legends[0].get_texts()) == ["floor", "synthetic", "step 2"]
    assert len(first.collections) == 1 and second.get_yscale() == "symlog"
    assert second.get_xlabel() == "step"


def test_a_heat_map_says_its_numbers_and_what_is_not_measured(drawn):
    charts.heat_map([[0.0, 12.34], [None, -150.0]], ["a", "b"], ["c", "d"], [["", "◂"], ["", "†"]])
    assert texts(drawn[0].axes[0].texts) == ["0.00", "12.3◂", "–", "−150†"]


def test_the_maps_of_a_matrix_mark_a_sets_own_label():
    sets = [{"name": f"{label} · held-out", "label": label, "part": "held-out", "kind": "real",
             "too_few": ""} for label in "ab"]
    made = {"name": "a · x", "label": "a", "part": "x", "kind": "synthetic", "too_few": ""}
    few = made | {"name": "b · x", "label": "b", "too_few": "n < 20"}
    cells = [{"extractor": "pixels", "row": r["name"], "column": "a · x", "KD": 1.0,
              "confounded": r["label"] == "b"} for r in sets]
    found = {"rows": sets, "columns": [made, few], "cells": cells,
             "extractors": [{"name": "pixels"}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "heat_map", lambda *given: given)
        assert charts.matrix_maps(found) == [("pixels", (
            [[1.0, 1.0]], ["a · x (synthetic)"], ["a · held-out", "b · held-out"], [["◂", "†"]]))]


def test_the_course_of_a_run_names_the_step_and_the_doubted_points(drawn):
    space = {"space": "pixels", "near_share": 0.1, "near_low": 0.0, "near_high": 0.2, "q50": 0.9}
    points = [{"step": step, "KD": {"pixels": {"value": 1.0, "low": 0.5, "high": 1.5}},
               "copying": {"suspected": suspected, "spaces": [space]}}
              for step, suspected in ((10, False), (20, None), (30, True))]
    result = {"points": points, "floors": {"pixels": {"low": -0.1, "high": 0.1}},
              "choice": {"step": 10}, "test": {"why": "no test images"}}
    charts.course_chart(result, [{"step": 10, "gap": 0.1, "gap_low": 0.05}])
    distance, near, ratio, gap = drawn[0].axes[:4]
    lines = {line.get_label(): list(line.get_xdata()) for line in distance.get_lines()}
    assert lines["copying not excluded"] == [20, 30] and lines["take step 10"] == [10, 10]
    assert near.get_lines()[-1].get_ydata() == pytest.approx([10, 10, 10])
    assert gap.get_lines()[-1].get_ydata() == pytest.approx([10])
