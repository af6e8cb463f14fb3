"""The examples run as they stand, say what they promise, and are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *words) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", *map(str, words)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_forty_lines_at_most(path):
    assert len(path.read_text().splitlines()) <= 40


def test_own_data_learns_rings():
    shown = run("own_data")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[-1] < 0.8 * losses[0]
    rings = shown.splitlines()[-8:]
    assert any("#" in row or "*" in row for row in rings) and len(rings[0]) == 4 * 16 + 3 * 3


def test_own_sampler_is_of_second_order():
    rows = [[float(cell) for cell in line.split()] for line in run("own_sampler").splitlines()[1:]]
    assert [row[0] for row in rows] == [10, 20, 40, 80]
    for before, after in zip(rows, rows[1:]):
        assert 3.6 < before[1] / after[1] < 4.6 and before[2] / after[2] < 2.2


def test_own_guidance_moves_the_brightness(tiny):
    dark, bright = (run("own_guidance", "--run", tiny / "diffusion", "--brightness", wanted)
                    for wanted in (0.1, 0.9))
    assert [len(re.findall(r"[\d.]+", shown)) for shown in (dark, bright)] == [4, 4]
    dark, bright = (sum(map(float, re.findall(r"[\d.]+", shown))) / 4 for shown in (dark, bright))
    assert dark < bright - 0.1


def test_attention_is_shared_among_the_tokens(tiny):
    lines = run("attention", "--run", tiny / "diffusion").splitlines()
    assert len(lines) == 3 * 4
    for line in lines:
        assert sum(map(float, line.split()[3:])) == pytest.approx(1, abs=0.05)


def test_fid_of_two_arrays_tells_blurred_ones():
    alike, blurred = (float(value) for value in re.findall(r"Fréchet distance ([\d.]+)",
                                                           run("fid")))
    assert blurred > 2 * alike
