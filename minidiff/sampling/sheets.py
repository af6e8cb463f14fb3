"""Sets of samples that are complete: their contact sheets and quick numbers, each made once."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minidiff import runs
from minidiff.data import images
from minidiff.errors import InputError
from minidiff.evaluation.quick import Quick
from minidiff.hashes import hashes_of
from minidiff.names import on_disk


def as_written(out: Path, rows: list[dict], rehash: bool) -> set[str]:
    """The names of images that are as the manifest says. Others that cannot be read were cut short
    and are removed: they are sampled anew before their set counts as complete."""
    written = runs.find_json(out / "manifest.json", {}).get("sha256", {})
    there = {name: str(out / name) for row in rows if (out / (name := row["file_name"])).exists()}
    found = hashes_of((file for name, file in there.items() if name in written), rehash)
    whole = {name for name in there if name in written and found[there[name]] == written[name]}
    doubtful = [file for name, file in there.items() if name not in whole]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it decodes
        for file, kept in zip(doubtful, pool.map(readable, doubtful)):
            if not kept:
                Path(file).unlink()
    return whole


def readable(path: str | Path) -> bool:
    try:
        return images.read(path) is not None
    except InputError:
        return False


def unfinished(out: Path, rows: list[dict], whole: set[str],
               watch: Quick | None) -> dict[str, list[dict]]:
    """Number → rows of each set, but for those whose sheets are there, of the same images; with a
    watch, also their numbers, of the same real images and judge."""
    sets: dict[str, list[dict]] = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    kept = _kept_numbers(out, sets, watch) if watch else {
        number for number, of_set in sets.items()
        if whole.issuperset(row["file_name"] for row in of_set)}
    return {number: of_set for number, of_set in sets.items()
            if number not in kept
            or not all((out / "sheets" / f"{kind}_{int(number):04d}.png").exists()
                       for kind in ("set", *["pairs"] * ("origin" in of_set[0])))}


def _kept_numbers(out: Path, sets: dict[str, list[dict]], watch: Quick) -> set[str]:
    """The sets whose quick numbers are there and would be the same again."""
    noted = {}
    for number in sets:
        with suppress(InputError):  # not there, or damaged
            noted[number] = runs.read_json(out / "sheets" / f"set_{int(number):04d}.json").get("of")
    files = {number: [str(out / row["file_name"]) for row in sets[number]] for number in noted}
    files = {number: own for number, own in files.items() if all(map(os.path.exists, own))}
    digests = hashes_of(file for own in files.values() for file in own)
    return {number for number, own in files.items()
            if noted[number] == watch.key([digests[file] for file in own])}


def finish_sets(cfg: Any, sets: dict[str, list[dict]], due: set[str],
                watch: Quick | None) -> None:
    """Contact sheets and quick numbers of those of the due sets that are complete, each once."""
    out = Path(cfg.out)
    for number in sorted(due & set(sets), key=int):
        if not all((out / row["file_name"]).exists() for row in sets[number]):
            continue
        of_set = sets.pop(number)
        name, labels = f"{int(number):04d}", [row["label"] for row in of_set]
        pixels = torch.stack([torch.tensor(images.read(out / row["file_name"])) for row in of_set])
        images.write(out / "sheets" / f"set_{name}.png", images.grid(pixels, columns=10),
                     quick=True)
        if cfg.origin:  # generated beside original
            origins = (images.read(on_disk(row["origin"])) for row in of_set)
            start = torch.stack([torch.tensor(images.square(origin, pixels.shape[-1]))[:1]
                                 for origin in origins])
            pairs = torch.stack([start.expand_as(pixels), pixels], 1).flatten(0, 1)
            images.write(out / "sheets" / f"pairs_{name}.png", images.grid(pairs, columns=10),
                         quick=True)
        if watch:
            numbers = {name: value  # a filter's own share would be 100 %
                       for name, value in watch(pixels.expand(-1, 3, -1, -1), labels).items()
                       if name not in cfg.keep}
            digests = [runs.sha256(out / row["file_name"]) for row in of_set]
            runs.write_json(out / "sheets" / f"set_{name}.json",
                            {**numbers, "of": watch.key(digests)})
            tqdm.write(f"set {number}: " + ", ".join(f"{k} {v:.3g}" for k, v in numbers.items()))
