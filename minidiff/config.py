"""A script's knobs: one flat frozen dataclass ⇄ command line ⇄ JSON. The comment beside a field is
its --help.

    main({"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion)},
    doc=__doc__)

A run saves its config, and the saved config of a run is the preset of the next: `--from
runs/x/config.json`.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import inspect
import json
import math
import re
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from minidiff import threads
from minidiff.errors import InputError, TrainingFault
from minidiff.root import ANCHORS
from minidiff.runs import read_json

BOUNDS = {  # one range for a knob of one name, in all scripts; both ends are allowed
    **dict.fromkeys(("steps", "batch", "rank", "accumulate", "log_every", "save_every", "per_label", "k"), (1, math.inf)),
    **dict.fromkeys(("seeds", "repeats", "shown"), (1, math.inf)),
    **dict.fromkeys(("kl", "edges", "augment", "min_snr", "views"), (0, 1e6)),
    **dict.fromkeys(("drop", "drop_each", "eta", "balance"), (0, 1)),
    **dict.fromkeys(("lr", "clip", "alpha"), (1e-12, 1e6)),
    **dict.fromkeys(("sets", "snapshots"), (0, 1e6)),
    **dict.fromkeys(("strength", "rescale"), (0, 1)),
    "prior_share": (0.01, 0.99),
    "width": (8, math.inf),  # a stride-2 1×1 convolution of 4 channels corrupts the heap: see minidiff/convolution.py
    "guidance": (0, 100),
    "seed": (0, 2**31 - 1),
}
Verb = tuple[type, Callable[[Any], None]]  # a Config and the function that runs it
ONE_STAGE = ("out", "init", "preset")  # knobs that no two verbs can share, though both have them



def main(verbs: Mapping[str, Verb], *, default: str | Sequence[str], doc: str,
         argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the verb; without one, the default verb, or all default verbs
    in their order.

    The user's faults end with one line on stderr and status 2, Ctrl-C with 130; anything else is
    our bug: traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # like Ctrl-C, even where that is ignored (`&`)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for run, cfg in parse(verbs, default, doc, argv):
            threads.announce(threads.use())
            run(cfg)
    except (InputError, TrainingFault) as error:
        _exit(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS,
                               errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise
        _exit(f"{error.strerror}: {error.filename or 'while writing'}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(verbs: Mapping[str, Verb], default: str | Sequence[str], doc: str,
          argv: list[str]) -> list[tuple[Callable, Any]]:
    """argv → (function, Config) of each verb to run; none after --dry-run, which prints the configs
    instead.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="verb", required=True,
                                     metavar="{" + ",".join(verbs) + "}")
    for verb, (config_type, run) in verbs.items():
        summary = (run.__doc__ or verb).strip().splitlines()[0]
        sub = commands.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("--from", dest="preset", metavar="CONFIG.json",
                         help="take every knob from a saved config")
        sub.add_argument("--dry-run", action="store_true",
                         help="print the resolved config and stop")
        if hasattr(config_type, "positional"):
            sub.add_argument("words", nargs="*", metavar=config_type.positional.upper(),
                             help=argparse.SUPPRESS)
        _add_fields(sub, config_type)
    if argv and argv[0] in ("-h", "--help"):  # the verbs, and the knobs of what runs without one
        print("\n\n".join([parser.format_help(),
                           *(commands.choices[verb].format_help()
                             for verb in ([default] if isinstance(default, str) else default))]))
        sys.exit(0)
    if " ".join(argv[:2]) in verbs:  # a verb of two words: readers make
        argv = [" ".join(argv[:2]), *argv[2:]]
    wanted = [argv]
    if not argv or argv[0].startswith("-"):  # a mistyped verb stays where it is
        chosen = [default] if isinstance(default, str) else default
        wanted = [[verb, *argv] for verb in chosen]
        _refuse_unshared(argv, {verb: typing.get_type_hints(verbs[verb][0]) for verb in chosen})
    found = []
    for words in wanted:
        given = vars(parser.parse_args(words))
        config_type, run = verbs[given.pop("verb")]
        preset, dry = given.pop("preset"), given.pop("dry_run")
        if words := given.pop("words", []):  # of the one knob that stands without its flag
            given[config_type.positional] = _of_words(config_type, words)
        flags = {k: v for k, v in given.items() if v is not MISSING}
        cfg = from_dict(config_type, {**(moved(load(preset), flags) if preset else {}), **flags})
        if dry:
            print(json.dumps(asdict(cfg), indent=2))
        found += [] if dry else [(run, cfg)]
    return found


def _refuse_unshared(argv: Sequence[str], knobs: Mapping[str, Mapping]) -> None:
    """Without a verb, a flag goes to all of them: one that not all have is refused, and the verb
    that has it named.
    """
    for word in argv if len(knobs) > 1 else ():
        name = re.sub("^no_", "", word[2:].partition("=")[0].replace("-", "_")).replace("from",
                                                                                        "preset")
        having = [verb for verb in knobs if name in (*knobs[verb], "preset")]
        if word.startswith("--") and having and (len(having) < len(knobs) or name in ONE_STAGE):
            raise InputError(f"{word} goes to one stage alone: write `{Path(sys.argv[0]).name} "
                             f"{' or '.join(having)} {word} …`; without a stage, a flag goes to "
                             f"{' and '.join(knobs)}")


def moved(preset: dict, flags: Mapping[str, Any]) -> dict:
    """A saved config for another experiment: with --root its own paths go along; with another run
    named, its root goes.
    """
    def along(value: Any) -> Any:
        if isinstance(value, list):
            return [along(x) for x in value]
        return f"ROOT/{value[len(root) + 1:]}" if isinstance(value, str) and value.startswith(
            f"{root}/") else value

    root = preset.get("root", "")
    if not root or not {"root", *ANCHORS} & set(flags):
        return preset
    kept = {k: v for k, v in preset.items() if k != "root"}
    return {k: along(v) if k != "data" else v for k, v in kept.items()} if "root" in flags else kept


def _of_words(config_type: type, words: list[str]) -> Any:
    if typing.get_origin(typing.get_type_hints(config_type)[config_type.positional]) is tuple:
        return tuple(words)
    if len(words) > 1:
        raise InputError(f"{' '.join(words)}: one {config_type.positional} is asked for")
    return words[0]


def load(path: str | Path) -> dict:
    """The knobs in a saved config file."""
    knobs = read_json(path)
    if not isinstance(knobs, dict):
        raise InputError(f"{path}: not a config, which is one JSON object")
    return {k: v for k, v in knobs.items() if k != "kind"}


def from_dict(config_type: type, knobs: Mapping[str, Any]):
    """A Config from plain JSON values; a knob that it does not have is refused by name."""
    hints = typing.get_type_hints(config_type)
    unknown = sorted(set(knobs) - set(hints))
    if unknown:
        raise InputError(f"{config_type.__name__} has no knob {', '.join(unknown)}; it has "
                         f"{', '.join(hints)}")
    cfg = config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()})
    for name, hint in hints.items():
        value, kind = getattr(cfg, name), typing.get_origin(hint) or hint
        if kind in (bool, int, float, str,
                    tuple) and not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{name} {value!r} is not of the type {kind.__name__}")
        low, high = BOUNDS.get(name, (-math.inf, math.inf))
        if kind in (int, float) and not (low <= value <= high and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} {value} is not allowed: {low:g} to "
                             f"{high:g}")
        if typing.get_origin(hint) is typing.Literal and getattr(cfg,
                                                                 name) not in typing.get_args(hint):
            raise InputError(f"{name} {getattr(cfg, name)!r} is not one of "
                             f"{', '.join(map(str, typing.get_args(hint)))}")
    return cfg


def reasons(config_type: type) -> dict[str, str]:
    """Field → the comment beside it in the source."""
    lines = [line for base in reversed(config_type.__mro__[:-1])
             for line in inspect.getsource(base).splitlines()]
    return dict(m.groups() for line in lines if (m := re.match(r"\s+(\w+):[^#]*#\s*(.+)$", line)))


def _add_fields(parser: argparse.ArgumentParser, config_type: type) -> None:
    hints, why = typing.get_type_hints(config_type), reasons(config_type)
    for field in fields(config_type):
        hint, flag = hints[field.name], "--" + field.name.replace("_", "-")
        text = why.get(field.name, "").replace("%", "%%")
        common = {"default": MISSING, "help": f"{text} [{_show(field.default)}]"}
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            parser.add_argument(flag, action=_Split, item=item, nargs="*",
                                metavar=field.name.upper(), **common)
        elif typing.get_origin(hint) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(hint), **common)
        else:
            parser.add_argument(flag, type=hint, metavar=hint.__name__.upper(), **common)


class _Parser(argparse.ArgumentParser):
    """One line for a fault, that of argparse, with where to read on; near names for a flag that is
    not known.
    """

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            word = unknown[1].split()[0]
            verb = next((w for w in sys.argv[1:2] if not w.startswith("-")), "")
            near = difflib.get_close_matches(word.partition("=")[0], self.flags(verb), 1)
            message = f"{unknown[1]}: no such flag or value" + (f", nearest: {near[0]}" if near
                                                                else "")
        _exit(f"{message.removeprefix('argument ')}; {self.prog} --help lists what is allowed")

    def flags(self, verb: str) -> list[str]:
        subs = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        of = [p for a in subs for name, p in a.choices.items()
              if verb in ("", name.split()[0])] or [self]
        return [flag for p in of for action in p._actions for flag in action.option_strings]


class _Split(argparse.Action):
    """`a,b c` → ("a", "b", "c")."""

    def __init__(self, *args, item: type = str, **kwargs):
        super().__init__(*args, **kwargs)
        self.item = item

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest,
                    tuple(self.item(x) for v in values for x in v.split(",") if x))
        except ValueError:
            parser.error(f"{option_string}: {' '.join(values)!r} is not a list of "
                         f"{self.item.__name__}")


def _show(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(
        value) if value != "" else "none"


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
