"""A script's knobs: one flat frozen dataclass ⇄ command line ⇄ JSON. The comment beside a field is its --help.

    main({"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion)}, doc=__doc__)

A run saves its config, and the saved config of a run is the preset of the next: `--from runs/x/config.json`.
"""

from __future__ import annotations

import argparse
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


def main(verbs: Mapping[str, Verb], *, default: str | Sequence[str], doc: str, argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the verb; with no argument at all, run the default verb or verbs in order.

    The user's faults end with one line on stderr and status 2, Ctrl-C with 130; anything else is our bug: traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, even where that is ignored (`&`)
    try:
        if not argv and not isinstance(default, str):
            for verb in default:
                config_type, run = verbs[verb]
                threads.use()
                run(config_type())
        else:
            run, cfg = parse(verbs, default, doc, argv)
            if cfg is not None:
                threads.use()
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


def parse(verbs: Mapping[str, Verb], default: str | Sequence[str], doc: str, argv: list[str]) -> tuple[Callable, Any]:
    """argv → (function, Config); the Config is None after --dry-run, which prints it instead."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(verbs) + "}")
    for verb, (config_type, run) in verbs.items():
        summary = (run.__doc__ or verb).strip().splitlines()[0]
        sub = commands.add_parser(verb, help=summary, description=summary,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--from", dest="preset", metavar="CONFIG.json", help="take every knob from a saved config")
        sub.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
        _add_fields(sub, config_type)
    if " ".join(argv[:2]) in verbs:  # a verb of two words: readers make
        argv = [" ".join(argv[:2]), *argv[2:]]
    known = {"-h", "--help", *verbs, *(verb.split()[0] for verb in verbs)}
    if isinstance(default, str) and (not argv or argv[0] not in known):
        argv = [default, *argv]
    given = vars(parser.parse_args(argv))
    config_type, run = verbs[given.pop("verb")]
    preset, dry = given.pop("preset"), given.pop("dry_run")
    flags = {k: v for k, v in given.items() if v is not MISSING}
    cfg = from_dict(config_type, {**(load(preset) if preset else {}), **flags})
    if dry:
        print(json.dumps(asdict(cfg), indent=2))
        return run, None
    return run, cfg


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
        raise InputError(f"{config_type.__name__} has no knob {', '.join(unknown)}; it has {', '.join(hints)}")
    cfg = config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()})
    for name, hint in hints.items():
        value, kind = getattr(cfg, name), typing.get_origin(hint) or hint
        if kind in (bool, int, float, str, tuple) and not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{name} {value!r} is not of the type {kind.__name__}")
        low, high = BOUNDS.get(name, (-math.inf, math.inf))
        if kind in (int, float) and not (low <= value <= high and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} {value} is not allowed: {low:g} to {high:g}")
        if typing.get_origin(hint) is typing.Literal and getattr(cfg, name) not in typing.get_args(hint):
            raise InputError(f"{name} {getattr(cfg, name)!r} is not one of {', '.join(map(str, typing.get_args(hint)))}")
    return cfg


def reasons(config_type: type) -> dict[str, str]:
    """Field → the comment beside it in the source."""
    lines = inspect.getsource(config_type).splitlines()
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
            parser.add_argument(flag, action=_Split, item=item, nargs="*", metavar=field.name.upper(), **common)
        elif typing.get_origin(hint) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(hint), **common)
        else:
            parser.add_argument(flag, type=hint, metavar=hint.__name__.upper(), **common)
    parser.formatter_class = argparse.HelpFormatter


class _Split(argparse.Action):
    """`a,b c` → ("a", "b", "c")."""

    def __init__(self, *args, item: type = str, **kwargs):
        super().__init__(*args, **kwargs)
        self.item = item

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, tuple(self.item(x) for v in values for x in v.split(",") if x))
        except ValueError:
            parser.error(f"{option_string}: {' '.join(values)!r} is not a list of {self.item.__name__}")


def _show(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value) if value != "" else "none"


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
