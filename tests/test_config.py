import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from minidiff import config
from minidiff.errors import InputError


@dataclass(frozen=True)
class Knobs:
    out: str = "runs/x"                     # run folder
    steps: int = 10                         # optimiser steps; 100 % of them
    lr: float = 1e-3                        # peak rate
    names: tuple[str, ...] = ("a", "b")     # some names
    fast: bool = False                      # hurry
    mode: Literal["eps", "v"] = "v"         # what is predicted


seen = []
VERBS = {"go": (Knobs, seen.append), "stop": (Knobs, lambda cfg: None)}


@pytest.fixture(autouse=True)
def clear(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen.clear()


def run(*argv, default="go"):
    config.main(VERBS, default=default, doc="doc", argv=argv)
    return seen


def test_no_argument_is_the_default():
    assert run() == [Knobs()]


def test_flags_of_every_type():
    assert run("--steps", "3", "--lr", "0.5", "--names", "x,y", "z", "--fast", "--mode", "eps") == [
        Knobs(steps=3, lr=0.5, names=("x", "y", "z"), fast=True, mode="eps")]


def test_json_round_trip_and_flags_win_over_the_preset(tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"kind": "x", **asdict(Knobs(steps=7, names=()))}))
    assert run("--from", str(saved), "--lr", "2") == [Knobs(steps=7, names=(), lr=2.0)]


def test_dry_run_prints_and_does_nothing(capsys):
    assert run("--steps", "5", "--dry-run") == []
    assert json.loads(capsys.readouterr().out)["steps"] == 5


def test_help_shows_the_comment_beside_the_field(capsys):
    with pytest.raises(SystemExit) as stop:
        run("go", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "what is predicted [v]" in text
    assert "optimiser steps; 100 % of them [10] 1 or more" in text


def test_several_defaults_run_in_order_and_a_flag_goes_to_all():
    assert run("--steps", "3", default=["go", "go"]) == [Knobs(steps=3)] * 2


@pytest.mark.parametrize("argv, said", [
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--mode", "q"], "invalid choice: 'q'"),
    (["--stepz", "3"], "--stepz 3: no such flag or value, nearest: --steps"),
    (["--step", "3"], "--step 3: no such flag"),  # a later flag might take an abbreviation
    (["--mode", "q"], "--help lists what is allowed"),
])
def test_bad_flags_exit_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("content, said", [
    ("{", "damaged, not JSON"), ('{"stepz": 1}', "no knob stepz; it has out"),
    ('{"mode": "q"}', "mode 'q' is not one of eps, v"), ("[1]", "one JSON object"),
    ('{"steps": "many"}', "steps 'many' is not of the type int")])
def test_bad_presets_are_one_sentence(tmp_path, content, said, capsys):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        run("--from", str(tmp_path / "c.json"))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("argv, said", [(["--steps", "0"], "--steps 0 is not allowed: 1 to inf"),
                                        (["--lr", "nan"], "--lr nan is not"),
                                        (["--lr", "-1"], "--lr -1.0 is not allowed")])
def test_numbers_out_of_range_are_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2 and said in capsys.readouterr().err and not seen


def test_sigterm_ends_like_ctrl_c(capsys):
    with pytest.raises(SystemExit) as stop:
        config.main({"go": (Knobs, lambda cfg: os.kill(os.getpid(), signal.SIGTERM))}, default="go",
                    doc="", argv=[])
    assert stop.value.code == 130 and "the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_ends_a_script_that_was_started_with_ctrl_c_ignored(tmp_path):
    """As nohup and a shell's `&` start it: Python then has no handler of SIGINT, and SIGTERM must
    not need one.
    """
    code = """
import os, signal
from dataclasses import dataclass
from minidiff import config

@dataclass(frozen=True)
class Knobs:
    steps: int = 1   # steps

def go(cfg):
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never here")

config.main({"go": (Knobs, go)}, default="go", doc="", argv=[])
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    words = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, str(script)]
    done = subprocess.run(words,
                          env={**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])},
                          capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "still here\n", done.stderr
    assert "the same command resumes" in done.stderr


@pytest.mark.parametrize("error, said", [(InputError("a: wrong"), "error: a: wrong"), (
    OSError(28, "No space left on device", "/x/y"), "No space left on device: /x/y")])
def test_faults_of_the_user_are_one_line_and_status_2(error, said, capsys):
    def fail(cfg):
        raise error
    with pytest.raises(SystemExit) as stop:
        config.main({"go": (Knobs, fail)}, default="go", doc="", argv=[])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback():
    def fail(cfg):
        raise ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        config.main({"go": (Knobs, fail)}, default="go", doc="", argv=[])


def test_a_verb_of_two_words(capsys):
    verbs = {**VERBS, "go far": (Knobs, lambda cfg: seen.append(("far", cfg.steps))),
             "look up": VERBS["stop"]}
    config.main(verbs, default="go", doc="", argv=["go", "far", "--steps", "3"])
    config.main(verbs, default="go", doc="", argv=["go", "--steps", "4"])
    config.main(verbs, default="go", doc="", argv=["--steps", "5"])
    assert seen == [("far", 3), Knobs(steps=4), Knobs(steps=5)]
    # half a verb is none, and not the default's
    for argv in (["look"], ["look", "--steps", "3"], ["look", "down"]):
        with pytest.raises(SystemExit) as stop:
            config.main(verbs, default="go", doc="", argv=argv)
        assert stop.value.code == 2 and "look up" in capsys.readouterr().err


def test_output_that_cannot_show_a_character_is_no_fault(tmp_path):
    """On a Western Windows code page, and for a file name that is no UTF-8."""
    program = ("import sys\nfrom dataclasses import dataclass\nfrom minidiff import config\n"
               "@dataclass(frozen=True)\nclass Config:\n    k: int = 1  # σ → …\n"
               "def go(cfg):\n    print('σ → × …', '\\udce9')\n"
               "config.main({'go': (Config, go)}, default='go', doc='ᾱ', argv=sys.argv[1:])\n")
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    root = Path(config.__file__).parents[1]
    for words in ([], ["--help"]):
        ended = subprocess.run([sys.executable, tmp_path / "program.py", *words],
                               capture_output=True, env={**os.environ, "PYTHONPATH": str(root),
                                                         "PYTHONIOENCODING": "cp1252"})
        assert ended.returncode == 0, ended.stderr
        assert b"\\u03c3 \\u2192" in ended.stdout


@pytest.mark.parametrize("script", ["train", "sample", "classify", "evaluate"])
def test_ctrl_c_while_a_script_loads_its_modules_ends_it_without_a_word(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
                                       "import time; time.sleep(60)\n")
    root = Path(config.__file__).parents[1]
    ended = subprocess.run([sys.executable, root / f"{script}.py"], capture_output=True,
                           cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert ended.returncode == -signal.SIGINT and not ended.stderr
