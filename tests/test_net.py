"""The net: every documented command, run on tiny data, writes what benchmarks/net.json.xz says."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # at the end: it has a train.py, too
MODULES = {"train.py": "train", "sample.py": "sample", "classify.py": "classify",
           "evaluate.py": "evaluate",
           "minidiff.diffusion.public": "minidiff.diffusion.public.__main__",
           "minidiff.data.dicom": "minidiff.data.dicom.__main__"}


def test_every_verb_of_every_script_is_among_the_commands():
    from net import commands
    said = [" ".join(words) + " " for _, _, words in commands()]
    for name, module in MODULES.items():
        for verb in importlib.import_module(module).VERBS:
            # three run without
            start = f"{name} " if verb in ("sample", "study", "report") else f"{name} {verb} "
            assert any(line.startswith(start) or line.startswith(f"-m {start}")
                       for line in said), start


def test_differences_are_seen_and_deliberate_ones_are_not():
    from collections import defaultdict

    from net import compare
    before = {"a.json": {"x": 1.0, "old": [True, "yes"], "p": {"q": 3}},
              "b.png": {"mean": 100.0, "pixels": "0"}}
    after = {"c/a.json": {"x": 1.00005, "new": [True, "no"]},
             "b.png": {"mean": 101.0, "pixels": "1"}}
    found = compare(before, after, defaultdict(dict), True)
    assert len(found) == 9 and ("b.png#/pixels", "0", "1") in found and ("a.json#/p/q", 3,
                                                                         "absent") in found
    changes = defaultdict(dict,
                          {"moved files": {"a.json": "c/a.json"}, "renamed keys": {"old": "new"}})
    assert compare(before, after, changes,
                   True) == [("b.png#/mean", 100.0, 101.0), ("b.png#/pixels", "0", "1"),
                             ("c/a.json#/new/1", "yes", "no"), ("c/a.json#/p/q", 3, "absent")]
    # on another kind of machine
    assert compare(before, after, changes, False) == [("c/a.json#/p/q", 3, "absent")]
    changes |= {"gone": {"*#/p/*": "no use"}, "renamed words": {"yes": "no"},
                "changed": {"b.png#*": "another sampler"}}
    assert compare(before, after, changes, True) == []


@pytest.mark.slow
def test_every_figure_is_as_it_was():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "net.py"), "check"],
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
