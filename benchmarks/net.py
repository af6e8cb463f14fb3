"""A net under a refactoring: every documented command on tiny data, all figures that it writes.

    python benchmarks/net.py record benchmarks/net.json.xz   run all, keep the figures
    python benchmarks/net.py check                  run all again, print each difference; status 1
    python benchmarks/net.py check --work DIR       in DIR, which is kept; --reuse: run nothing

net_commands.txt (185 s of one core) runs on phantoms of 32 px (net_fixtures.py), seeds fixed, one
thread, as if the CPU had AVX2 and no more. Kept are each status, the names of all files, and of
    JSON, JSONL, CSV, DICOM    {file: {json/pointer: value}}; a table is /column/row
    PNG            size, axes, mean grey, SHA-256 of the pixels; of CHARTS only that they are
                   there; of a folder that is FOLDED or has MANY one entry
    safetensors    how many tensors, of how many elements
    a command      with = in that list: the figures that it prints
By rule are left out SKIP (time, machine, provenance); hashes and sentences (TEXT keys, values of
four words or more), but that there is one; the middle of more than LONG numbers, but their means.

Numbers may differ by RELATIVE of their size, pixels not at all. On another kind of machine (as
recorded: torch, numpy, CPU) a few steps of training go elsewhere: there only names, keys, types
and the size of pictures are held, and mean grey to GREY levels.

Deliberate changes stand in net_changes.json; patterns are fnmatch's, of "file#/pointer":
    "renamed keys" {old: new} or {file#old: new}; "renamed words" {old: new}, whole values
    "moved files" {old: new}, a file or the beginning of a path that ends in /
    "changed", "gone", "new" {pattern: reason}
"""

import argparse
import collections
import csv
import fnmatch
import hashlib
import json
import lzma
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
       "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell", "PYTHONHASHSEED": "0",
       "CUDA_VISIBLE_DEVICES": "",
       **{f"{x}_NUM_THREADS": "1" for x in ("OMP", "MKL", "OPENBLAS")}}
RELATIVE, ABSOLUTE, GREY, LONG, MANY = 1e-4, 1e-7, 2.0, 100, 24
CHARTS = ("*/loss.png", "*/monitor.png", "*/way.png")  # drawn by matplotlib
FOLDED = ("data/*", "hospital/*", "runs/small/*")      # phantoms
SKIP = {"started", "written", "time", "command", "commit", "minidiff", "python", "torch", "machine",
        "threads", "sessions"}
TEXT = {"verdict", "text", "question", "note", "notes", "sentence", "remark", "why", "title"}


def commands() -> list[tuple[str, bool, list[str]]]:
    """(name, is what it prints held, words) of each command."""
    text = (ROOT / "benchmarks" / "net_commands.txt").read_text()
    found = re.findall(r"(?m)^(\w+)([:=]) (.*)$", text)
    return [(name, sign == "=", shlex.split(words)) for name, sign, words in found]


def run(work: Path) -> None:
    """Run every command in `work`, and leave its status and what it says in said/."""
    (work / "said").mkdir(parents=True)
    env = {**ENV, "PYTHONPATH": f"{work / 'site'}:{ROOT}",
           **{f"XDG_{x}_HOME": str(work / "home") for x in ("CACHE", "CONFIG")}}
    begun = time.monotonic()
    for name, _, words in commands():
        words = [sys.executable, *(str(ROOT / w) if w.endswith(".py") else w for w in words)]
        done = subprocess.run(words, cwd=work, env=env, text=True, capture_output=True)
        (work / "said" / f"{name}.out").write_text(done.stdout)
        (work / "said" / f"{name}.rc").write_text(str(done.returncode))
        print(f"{time.monotonic() - begun:6.1f} s  {name}", flush=True)
        if done.returncode:
            print(f"    status {done.returncode}: {done.stderr.strip()[-300:]}", flush=True)


def plain(value, key: str = ""):
    """A value as it is held: without what SKIP names, sentences, hashes, more digits than six."""
    if isinstance(value, dict):
        return {k: plain(v, k) for k, v in value.items() if k not in SKIP}
    if isinstance(value, (list, tuple)):
        numbers = [x for x in value if type(x) in (int, float) and math.isfinite(x)]
        if len(value) > LONG and len(numbers) == len(value):
            square = sum(x * x for x in numbers) / len(numbers)
            return plain({"n": len(numbers), "first": numbers[0], "last": numbers[-1],
                          "mean": sum(numbers) / len(numbers), "mean square": square})
        found = [plain(v, key) for v in value]
        return f"<{len(found)} hashes>" if set(map(str, found)) == {"<hash>"} else found
    if isinstance(value, str):
        text = key in TEXT or value.count(" ") > 2
        return "<hash>" if re.fullmatch(r"[0-9a-f]{12,}", value) else "<text>" if text else value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def number(cell: str):
    """The cell of a table as a number, if it is one."""
    try:
        return int(cell) if re.fullmatch(r"-?\d+", cell) else float(cell)
    except ValueError:
        return cell


def content(path: Path, work: Path):
    """What is held of a file that is no picture."""
    if path.suffix in (".json", ".jsonl", ".csv"):
        text = path.read_text().replace(f"{work}/", "")
    if path.suffix in (".json", ".jsonl"):
        return json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]
    if path.suffix == ".csv":
        head, *rows = list(csv.reader(text.splitlines(keepends=True))) or [[]]
        return {name: {str(i): number(row[k]) for i, row in enumerate(rows)}
                for k, name in enumerate(head)}
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        return {"tensors": len(shapes), "elements": sum(math.prod(shape) for shape in shapes)}
    if path.suffix == ".dcm":
        ds = pydicom.dcmread(path)
        return {e.keyword: str(e.value) for e in ds if e.VR not in ("UI", "DA", "TM", "OB", "OW")}
    return "<file>"


def picture(path: Path) -> dict:
    """What is held of a picture."""
    with Image.open(path) as image:
        x, size = np.asarray(image), image.size
    return {"size": [*size, len(x.shape)], "mean": float(f"{x.mean():.6g}"),
            "pixels": hashlib.sha256(x.tobytes()).hexdigest()[:16]}


def collect(work: Path) -> dict:
    """{file: what is held of it} of a folder in which the commands have run."""
    found, folders = {}, collections.defaultdict(list)
    for path in sorted(p for top in ("data", "hospital", "runs") for p in (work / top).rglob("*")):
        if path.suffix == ".png":
            folders[path.parent].append(path)
        elif path.is_file():
            found[str(path.relative_to(work))] = plain(content(path, work))
    for paths in folders.values():
        names = [str(path.relative_to(work)) for path in paths]
        if len(paths) > MANY or any(fnmatch.fnmatch(names[0], p) for p in FOLDED):
            each = [picture(path) for path in paths]
            found[f"{os.path.dirname(names[0])}/*.png"] = {
                "n": len(each), "mean": plain(sum(x["mean"] for x in each) / len(each)),
                "size": each[0]["size"],
                "pixels": hashlib.sha256(str(each).encode()).hexdigest()[:16]}
            continue
        for n, path in zip(names, paths):
            found[n] = "<chart>" if any(fnmatch.fnmatch(n, p) for p in CHARTS) else picture(path)
    for name, held, _ in commands():
        said = {"status": int((work / "said" / f"{name}.rc").read_text())}
        if held:
            out = re.sub(r"\b[0-9a-f]{12,}\b", "", (work / "said" / f"{name}.out").read_text())
            figures = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", out)
            said["figures"] = [number(x) for x in figures]
        found[f"command {name}"] = said
    return found


def machine() -> dict[str, str]:
    """What has to be equal for pixels and numbers to be."""
    code = "import torch as t; print(t.__version__, t.backends.cpu.get_cpu_capability())"
    said = subprocess.check_output([sys.executable, "-c", code], env=ENV, text=True).split()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vendor = "".join(re.findall(r"vendor_id\s*: (\w+)", info)[:1])
    return dict(zip(("torch", "cpu", "numpy", "vendor"), (*said, np.__version__, vendor)))


def flat(value, at: str, changes: dict):
    """(pointer, leaf) of everything below; keys renamed as the changes say."""
    if not isinstance(value, (dict, list)) or not value:
        words = changes["renamed words"]
        yield at, words.get(value, value) if isinstance(value, str) else value
        return
    for k, v in value.items() if isinstance(value, dict) else enumerate(value):
        file, keys = at.partition("#")[0], changes["renamed keys"]
        k = next((to for of, to in keys.items() if fnmatch.fnmatchcase(f"{file}#{k}", of)),
                 str(keys.get(k, k))).replace("~", "~0").replace("/", "~1")
        yield from flat(v, f"{at}/{k}", changes)


def moved(name: str, changes: dict) -> str:
    return next((new + name[len(old):] for old, new in changes["moved files"].items()
                 if name == old or (old.endswith("/") and name.startswith(old))), name)


def same(pointer: str, a, b, alike: bool) -> bool:
    """Are two leaves the same, on one kind of machine (alike) or on two?"""
    numbers = [type(x) in (int, float) for x in (a, b)]
    strict = alike or (".png#/" in pointer and not pointer.endswith("/pixels"))
    if all(numbers):
        grey = GREY if pointer.endswith(".png#/mean") and not alike else ABSOLUTE
        return not strict or abs(a - b) <= max(grey, RELATIVE * max(abs(a), abs(b)))
    cell = any(numbers) and str in (type(a), type(b)) and not strict  # "nan", an empty cell
    return cell or (type(a) is type(b) and (a == b or not strict))


def compare(before: dict, after: dict, changes: dict, alike: bool) -> list[tuple]:
    """(pointer, before, after) of each difference that no deliberate change accounts for."""
    none = collections.defaultdict(dict)
    old = dict(x for f, v in before.items() for x in flat(v, moved(f, changes) + "#", changes))
    new = dict(x for f, v in after.items() for x in flat(v, f + "#", none))
    differ = {"gone": old.keys() - new, "new": new.keys() - old, "changed": [
        p for p in old.keys() & new if not same(p, old[p], new[p], alike)]}
    return sorted((p, old.get(p, "absent"), new.get(p, "absent")) for kind, found in differ.items()
                  for p in found if not any(fnmatch.fnmatchcase(p, x) for x in changes[kind]))


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("verb", choices=["record", "check"])
    parser.add_argument("file", nargs="?", default=f"{ROOT}/benchmarks/net.json.xz")
    parser.add_argument("--work", help="folder that is kept; none: a temporary one")
    parser.add_argument("--reuse", action="store_true", help="run nothing, read --work")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or f"{temporary}/work").resolve()
        if not args.reuse:
            run(work)
        found, here = collect(work), machine()
    figures = len(list(flat(found, "", collections.defaultdict(dict))))
    print(f"{len(found)} files and commands, {figures} values")
    if args.verb == "record":
        text = json.dumps({"machine": here, "files": found}, sort_keys=True)
        Path(args.file).write_bytes(lzma.compress(text.encode()))
        return 0
    kept = json.loads(lzma.decompress(Path(args.file).read_bytes()))
    changes = json.loads((ROOT / "benchmarks" / "net_changes.json").read_text())
    if not (alike := kept["machine"] == here):
        print(f"recorded on {kept['machine']}, here {here}: figures are not compared")
    differences = compare(kept["files"], found, changes, alike)
    for pointer, a, b in differences:
        print(f"{pointer.replace('#', '  ', 1)}  before {a!r}  after {b!r}")
    print(f"{len(differences)} differences")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
