"""The benchmark of guidance by a classifier: the marker is found where it is, a known log p draws
it, and what docs/internals.md says is what was measured.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from minidiff.sampling.finished_run import open_pipeline
from minidiff.statistics import wilson

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
from benchmarks import classifier_guidance as bench  # noqa: E402

KEPT = json.loads(bench.FILE.read_text())
CELLS = {(cell["guide"], cell["scale"]): cell for cell in KEPT["cells"]}


def test_the_json_is_of_this_protocol_and_its_intervals_are_wilsons():
    assert KEPT["protocol"] == json.loads(json.dumps(bench.PROTOCOL))
    scales = bench.PROTOCOL["scales"]
    assert list(CELLS) == [("none", 0.0), *((guide, scale) for guide in ("clean", "shortcut")
                                            for scale in scales)]
    n, plain = bench.PROTOCOL["images"], CELLS["none", 0.0]["marked"][0]
    for cell in KEPT["cells"]:
        for name in {"marked", "covid", "own"} & cell.keys():
            k = round(cell[name][0] * n)
            assert cell[name] == pytest.approx([k / n, *wilson(k, n)])
        if "gained" in cell:
            assert cell["gained"] - cell["lost"] == round(n * (cell["marked"][0] - plain))


def test_the_figures_of_the_page_are_those_of_the_json():
    text = (ROOT / "docs/internals.md").read_text()
    for (guide, scale), cell in CELLS.items():
        figures = [f"{100 * cell[name][0]:.0f} % ({100 * cell[name][1]:.0f} to "
                   f"{100 * cell[name][2]:.0f})" if name in cell else ""
                   for name in ("marked", "covid", "own")]
        start = f"| {guide} | {scale:g} |" if scale else "| none | |"
        row = next(line for line in text.splitlines() if line.startswith(start))
        assert [f in row for f in figures] == [True] * 3, (row, figures)
    assert (bench.SHEET).stat().st_size < 200_000


def test_the_detector_errs_on_no_real_phantom():
    found = bench.detector()
    assert found == {"unmarked": 0.0, "marked": 1.0} and found.items() <= KEPT["detector"].items()


@pytest.mark.slow
def test_a_log_p_of_the_corner_brightens_it_and_no_seed_changes(tiny):
    """A few images of a barely trained model: the first without guidance are the first of more."""
    pipeline, _ = open_pipeline(tiny / "diffusion", "cpu")

    def corner(z):
        return pipeline.vae.decode(z)[..., bench.MARK, bench.MARK].mean((1, 2, 3))

    plain, again = (bench.sampled(pipeline, n, steps=4) for n in (6, 3))
    guided = bench.sampled(pipeline, 6, corner, 3.0, steps=4)
    assert plain.shape == (6, 1, 32, 32) and (plain[:3].int() - again).abs().max() <= 1
    bright = [x[..., bench.MARK, bench.MARK].double().mean((1, 2, 3)) for x in (plain, guided)]
    assert (bright[1] > bright[0]).all()
    unmoved = bench.sampled(pipeline, 6, lambda z: z.flatten(1).sum(1) * 0, 3.0, steps=4)
    assert torch.equal(unmoved, plain)
