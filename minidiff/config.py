"""A script's knobs: one flat frozen dataclass ⇄ command line ⇄ JSON.

    main({"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion)}, …)

The comment beside a field is its --help. A run saves its config, and the next run may begin with
it: `--from runs/x/config.json`.
"""

import argparse
import difflib
import errno
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from minidiff import distributed, lock, threads
from minidiff.download import CACHE
from minidiff.errors import InputError, TrainingFault
from minidiff.root import ANCHORS
from minidiff.runs import read_json

BOUNDS = {  # a knob of one name has one range in all scripts; both ends are allowed
    **dict.fromkeys(("steps", "batch", "rank", "accumulate", "log_every", "save_every", "per_label",
                     "k", "seeds", "repeats", "shown", "resample"), (1, math.inf)),
    **dict.fromkeys(("kl", "edges", "augment", "min_snr", "views", "sets", "snapshots",
                     "bands", "offset"), (0, 1e6)),
    **dict.fromkeys(("drop", "drop_each", "eta", "balance", "rescale"), (0, 1)),
    **dict.fromkeys(("lr", "clip", "alpha"), (1e-12, 1e6)),
    "prior_share": (0.01, 0.99),
    "dropout": (0, 0.9),
    "folds": (2, math.inf),
    "strength": (0.01, 1),  # at 0 no step is run
    "width": (8, math.inf),  # see minidiff/convolution.py
    "guidance": (0, 100),
    "seed": (0, 2**31 - 1),
}
Verb = tuple[type, Callable[[Any], None]]  # a Config and the function that runs it
ONE_STAGE = ("out", "init", "preset")  # knobs that stages have in common but cannot share
USER_FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
               errno.ENOTDIR, errno.EISDIR)


def main(verbs: Mapping[str, Verb], *, default: str | Sequence[str], doc: str,
         argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run its verb; without a verb, the default verbs in their order.

    A fault of the user ends with one line on stderr and status 2, Ctrl-C with status 130; any
    other exception is a bug and keeps its traceback.
    """
    # SIGTERM ends like Ctrl-C, also where Ctrl-C is ignored (a shell's `&`).
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, signal.default_int_handler)}
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see `threads`
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # a character that they cannot write is no fault
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for run, cfg in parse(verbs, default, doc, list(sys.argv[1:] if argv is None else argv)):
            threads.announce(threads.use())
            with _alone(cfg):
                run(cfg)
    except (InputError, TrainingFault) as error:
        _exit(str(error))
    except OSError as error:
        if error.errno not in USER_FAULTS:
            raise
        _exit(f"{error.strerror}: {error.filename or 'while writing'}")
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _alone(cfg: Any):
    """Context of a command: the lock of the folder that it writes, which is named by `out` unless
    its Config `writes` another or none; rank 0 has it for all."""
    folder = getattr(cfg, getattr(cfg, "writes", "out"), "")
    return nullcontext() if not folder or distributed.announced()[0] else lock.alone(folder)


def parse(verbs: Mapping[str, Verb], default: str | Sequence[str], doc: str,
          argv: list[str]) -> list[tuple[Callable, Any]]:
    """argv → (function, Config) of each verb to run; --dry-run prints the configs and runs none."""
    defaults = [default] if isinstance(default, str) else list(default)
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="verb", required=True,
                                     metavar="{" + ",".join(verbs) + "}")
    for verb, (config_type, run) in verbs.items():
        summary = (run.__doc__ or verb).strip().splitlines()[0]
        _add_knobs(commands.add_parser(verb, help=summary, description=summary,
                                       allow_abbrev=False), config_type)
    if argv and argv[0] in ("-h", "--help"):  # the verbs, and the knobs of the default ones
        print("\n\n".join(p.format_help() for p in (parser, *map(commands.choices.get, defaults))))
        sys.exit(0)
    if " ".join(argv[:2]) in verbs:  # a verb of two words: readers make
        argv = [" ".join(argv[:2]), *argv[2:]]
    lines = [argv]
    if not argv or argv[0].startswith("-") or (
            argv[0] not in verbs and hasattr(verbs[defaults[0]][0], "positional")):
        _refuse_unshared(argv, {verb: typing.get_type_hints(verbs[verb][0]) for verb in defaults})
        lines = [[verb, *argv] for verb in defaults]
    chosen = []
    for line in lines:
        given, unknown = parser.parse_known_args(line)
        if unknown:
            knobs = commands.choices[given.verb]
            near = difflib.get_close_matches(unknown[0].partition("=")[0],
                                             knobs._option_string_actions, 1)
            knobs.error(f"{' '.join(unknown)}: no such flag or value"
                        + "".join(f", nearest: {flag}" for flag in near))
        config_type, run = verbs[given.verb]
        if given.cache:  # of this computer, not of the run: no knob
            os.environ[CACHE] = os.path.abspath(given.cache)
        cfg = _config(config_type, vars(given))
        if given.dry_run:
            print(json.dumps(asdict(cfg), indent=2))
        else:
            chosen.append((run, cfg))
    return chosen


def _config(config_type: type, given: dict[str, Any]) -> Any:
    """The Config of a parsed command line: flags, else the preset of --from, else defaults."""
    flags = {field.name: given[field.name] for field in fields(config_type)
             if given[field.name] is not MISSING}
    flags = {name: tuple(chain(*value)) if isinstance(value, list) else value
             for name, value in flags.items()}
    words = tuple(given.get("words", ()))
    if words:  # they belong to the one knob that needs no flag
        name = config_type.positional
        is_list = typing.get_origin(typing.get_type_hints(config_type)[name]) is tuple
        if len(words) > 1 and not is_list:
            raise InputError(f"{' '.join(words)}: only one {name} is allowed")
        flags[name] = words if is_list else words[0]
    preset = moved(load(given["preset"]), flags) if given["preset"] else {}
    return from_dict(config_type, {**preset, **flags})


def _refuse_unshared(argv: Sequence[str], knobs: Mapping[str, Mapping]) -> None:
    """Refuse a flag that only one of the default verbs can take, and name that verb."""
    if len(knobs) < 2:
        return
    for word in argv:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_").removeprefix("no_")
        name = "preset" if name == "from" else name
        having = [verb for verb in knobs if name in (*knobs[verb], "preset")]
        if word.startswith("--") and having and (len(having) < len(knobs) or name in ONE_STAGE):
            raise InputError(f"{word} goes to one stage alone: write `{Path(sys.argv[0]).name} "
                             f"{' or '.join(having)} {word} …`; without a stage, a flag goes to "
                             f"{' and '.join(knobs)}")


def moved(preset: dict, flags: Mapping[str, Any]) -> dict:
    """A saved config for another experiment.

    With --root, paths in the old root become paths in the new one, except --data. With another run
    named, only the old root is dropped.
    """
    root = preset.get("root", "")
    if not root or not {"root", *ANCHORS} & set(flags):
        return preset
    rest = {name: value for name, value in preset.items() if name != "root"}
    if "root" in flags:
        old = json.dumps(f"{root}/").removesuffix('"')
        moved = json.loads(json.dumps(rest).replace(old, '"ROOT/'))
        rest = {**moved, "data": rest["data"]} if "data" in rest else moved
    return rest


def load(path: str | Path) -> dict:
    """The knobs in a saved config file."""
    knobs = read_json(path)
    if not isinstance(knobs, dict):
        raise InputError(f"{path}: not a config, which is one JSON object")
    return {k: v for k, v in knobs.items() if k != "kind"}


def from_dict(config_type: type, knobs: Mapping[str, Any]):
    """A Config from plain JSON values; unknown knobs and forbidden values are refused."""
    names = [field.name for field in fields(config_type)]
    unknown = sorted(set(knobs) - set(names))
    if unknown:
        raise InputError(f"{config_type.__name__} has no knob {', '.join(unknown)}; it has "
                         f"{', '.join(names)}")
    hints = typing.get_type_hints(config_type)
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}
    plain |= {k: "yes" if v else "no" for k, v in plain.items()  # a switch of an earlier version
              if isinstance(v, bool) and "yes" in typing.get_args(hints[k])}
    cfg = config_type(**plain)
    for name, hint in hints.items():
        value, kind = getattr(cfg, name), typing.get_origin(hint) or hint
        if kind is Literal and value not in typing.get_args(hint):
            raise InputError(f"{name} {value!r} is not one of "
                             f"{', '.join(map(str, typing.get_args(hint)))}")
        if kind in (bool, int, float, str, tuple) and not isinstance(
                value, (int, float) if kind is float else kind):
            raise InputError(f"{name} {value!r} is not of the type {kind.__name__}")
        low, high = BOUNDS.get(name, (-math.inf, math.inf))
        if kind in (int, float) and not (low <= value <= high and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} {value} is not allowed: {low:g} to "
                             f"{high:g}")
    return cfg


def reasons(config_type: type) -> dict[str, str]:
    """Field → the comment beside it in the source."""
    source = "\n".join(map(inspect.getsource, reversed(config_type.__mro__[:-1])))
    return dict(re.findall(r"^\s+(\w+):[^#\n]*#\s*(.+)$", source, re.MULTILINE))


def _add_knobs(parser: argparse.ArgumentParser, config_type: type) -> None:
    parser.add_argument("--from", dest="preset", metavar="CONFIG.json",
                        help="take every knob from a saved config")
    parser.add_argument("--dry-run", action="store_true", help="print the config and stop")
    parser.add_argument("--cache", metavar="DIR", help="map pixels from files in this folder, which"
                        " all commands share; if none, from 1 GB on in ~/.cache/minidiff/pixels")
    if hasattr(config_type, "positional"):
        parser.add_argument("words", nargs="*", metavar=config_type.positional.upper(),
                            help=argparse.SUPPRESS)
    hints, comments = typing.get_type_hints(config_type), reasons(config_type)
    for field in fields(config_type):
        hint, kind = hints[field.name], typing.get_origin(hints[field.name])
        if hint is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            how = {"type": _split(typing.get_args(hint)[0]), "nargs": "*",
                   "metavar": field.name.upper()}
        elif kind is Literal:
            how = {"choices": typing.get_args(hint)}
        else:
            how = {"type": hint, "metavar": hint.__name__.upper()}
        text = f"{comments.get(field.name, '')} [{_show(field.default)}]".replace("%", "%%")
        if field.name in BOUNDS:
            low, high = BOUNDS[field.name]
            text += f" {low:g} or more" if high >= 1e6 else f" {low:g} to {high:g}"
        parser.add_argument("--" + field.name.replace("_", "-"), default=MISSING, help=text, **how)


class _Parser(argparse.ArgumentParser):
    """Reports a fault in one line that says where to read on."""

    def error(self, message: str):
        _exit(f"{message.removeprefix('argument ')}; {self.prog} --help lists what is allowed")


def _split(item: type) -> Callable[[str], list]:
    """argparse's type of a list: `a,b c` gives ["a", "b"] and ["c"]."""
    def split(word: str) -> list:
        return [item(part) for part in word.split(",") if part]

    split.__name__ = f"list of {item.__name__}"
    return split


def _show(value: Any) -> str:
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "none"


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
