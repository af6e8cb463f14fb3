"""Time and memory of each stage against the number of images: phantoms of 64 px.

    python benchmarks/scale.py                                 the table of docs/scale.md: hours
    python benchmarks/scale.py --n 1000 --stages map,loader    some of it; then more, into one table

A stage is a process of its own, of one thread, and its row is kept in OUT/scale.json: the same
command goes on where it stopped. CPU seconds are those of the process and of those it started;
memory is the most anonymous memory that it held, everything included (mapped files do not count).
Training takes STEPS steps. The samples are phantoms, for what is measured is all but the network:
plan, files, contact sheets, metadata.csv, manifest. Features of metrics are normal, 64 numbers an
image, as many on both sides.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from load import ROOT, Peak, anonymous

SIZES, SIDE, STEPS, BATCH, D = (1_000, 10_000, 100_000), 64, 10, 256, 64
LOADED, ROUNDS = 10_240, 5  # images that the loader gathers, so often: the best round counts
Facts = dict[str, float]


class Place:
    """The folder of one n: its phantoms (2 ms each to draw), maps, hashes and runs."""

    def __init__(self, out: Path, n: int):
        self.n, self.folder = n, out / str(n)
        self.data, self.root = self.folder / "data", self.folder / "run"
        os.environ |= {"XDG_CACHE_HOME": str(self.folder / "cache"),
                       "MINIDIFF_CACHE": str(self.folder / "maps")}

    def table(self):
        from minidiff.data.table import read_table
        return read_table(self.data)

    def reading(self) -> dict:
        return {"data": (str(self.data),), "root": str(self.root)}

    def images(self):
        """As a training reads them: table, splits, pixels, and pictures compared."""
        from minidiff.data.dataset import read_images
        return read_images([str(self.data)], SIDE, seed=0, split_dir=self.root, skip_bad=False)


    def draw(self) -> None:
        from minidiff.data import phantom
        phantom.write(self.data, n=self.n, size=SIDE)
        os.sync()  # pages that are not written yet cannot be dropped


def forget(*files: str | Path) -> None:
    """Let the system drop the pages of these files."""
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first(place: Place) -> Facts:
    """A first start without a map, nothing known, no page in memory."""
    shutil.rmtree(place.folder / "cache", ignore_errors=True)
    forget(*place.data.rglob("*.png"))
    return again(place)


def again(place: Place) -> Facts:
    os.environ.pop("MINIDIFF_CACHE")
    return {"pixels": place.images().pixels[:, 0].numel()}


def make_map(place: Place) -> Facts:
    shutil.rmtree(place.folder / "maps", ignore_errors=True)
    place.images()
    return {"bytes": sum(file.stat().st_size for file in place.folder.glob("maps/*.pixels"))}


def start(place: Place) -> Facts:
    begin = time.perf_counter()
    table = place.table()
    read = time.perf_counter() - begin
    from minidiff.data import pixel_map
    from minidiff.data.dataset import load_pixels
    from minidiff.data.split import check_pictures
    table, pixels = load_pixels(table, SIDE)
    found = time.perf_counter() - begin - read
    check_pictures(table.rows, pixel_map.contents(table, pixels))
    return {"table_s": read, "map_s": found,
            "compared_s": time.perf_counter() - begin - read - found}


def loader(place: Place) -> Facts:
    """Images a second in training's random order, as floats: of a map whose pages are in memory,
    and of one whose pages were dropped."""
    import gc

    import numpy as np
    import torch

    from minidiff.data.dataset import picker
    from minidiff.pixels import to_float
    data = place.images()
    pick, steps = picker(data, 0), LOADED // BATCH

    def rate(pixels: torch.Tensor, clock: Callable[[], float]) -> float:
        begin = clock()
        for step in range(steps):
            to_float(pixels[pick(range(step * BATCH, (step + 1) * BATCH))])
        return steps * BATCH / (clock() - begin)

    facts = {"images_per_cpu_s": max(rate(data.pixels, time.process_time) for _ in range(ROUNDS))}
    del data
    gc.collect()  # pages that are mapped cannot be dropped
    file, = place.folder.glob("maps/*.pixels")
    forget(file)
    cold = torch.from_numpy(np.memmap(file, np.uint8, "c")[: place.n * SIDE**2])
    cold = cold.view(-1, 1, SIDE, SIDE).expand(-1, 3, -1, -1)
    return facts | {"cold_images_per_s": rate(cold, time.perf_counter)}


def vae(place: Place) -> Facts:
    import train
    shutil.rmtree(place.root / "vae", ignore_errors=True)
    train.train_vae(train.VAEConfig(**place.reading(), steps=STEPS))
    return {}


def latents(place: Place) -> Facts:
    import train
    shutil.rmtree(place.root / "diffusion", ignore_errors=True)
    train.Stage(diffusion_of(place), train.FREE)
    return {"bytes": (place.root / "diffusion" / "latents.safetensors").stat().st_size}


def diffusion(place: Place) -> Facts:
    import train
    train.train_diffusion(diffusion_of(place))
    return {}


def diffusion_of(place: Place):
    import train
    return train.DiffusionConfig(**place.reading(), steps=STEPS, snapshots=0)


def second(place: Place) -> Facts:
    """From the command to the first batch of a diffusion training whose latents are there."""
    import train
    train.Stage(diffusion_of(place), train.FREE).batch(0)
    return {}


def samples(place: Place) -> Facts:
    """n samples, phantoms in the place of what the network would make."""
    import torch

    import sample
    pixels = place.images().pixels

    def make(cfg, pipeline, rows, seeds, progress) -> tuple[torch.Tensor, torch.Tensor]:
        index = [seed % len(pixels) for seed in seeds]
        return pixels[index] ^ 1, torch.ones(len(rows), dtype=torch.bool)  # no copies of phantoms

    sample.make = make
    shutil.rmtree(place.root / "samples", ignore_errors=True)
    return resume(place)


def resume(place: Place) -> Facts:
    import sample
    cfg = sample.SampleConfig(  # best/ names no data: without real images no quick numbers
        root=str(place.root), run=str(place.root / "diffusion" / "best"),
        out=str(place.root / "samples"), per_label=-(-place.n // 3))
    sample.sample(cfg)
    return {"bytes": (Path(cfg.out) / "manifest.json").stat().st_size}


def quick(place: Place) -> Facts:
    """What compares one set of 100 samples with the real images at hand."""
    from minidiff.evaluation.quick import Quick
    data = place.images()
    watch = Quick(data.part("train"), data.part("val", "test"))
    begin = time.process_time()
    watch(data.pixels[:100], data.table.column("label")[:100])
    return {"set_cpu_s": time.process_time() - begin}


def classifier(place: Place) -> Facts:
    """What classify.py reads and compares before it trains: n real and n synthetic images."""
    from minidiff.classification import inputs
    inputs.read([str(place.data)], {"synthetic": [str(place.root / "samples")]}, [], size=SIDE,
                seed=0, out=str(place.root / "classifier"))
    return {}


def features(place: Place) -> Facts:
    from minidiff.evaluation.features.extractor import PixelPCA, Spectrum
    pixels = place.images().pixels
    for extractor in (PixelPCA(), Spectrum()):
        extractor.fit(pixels)(pixels)
    return {}


def metric(name: str) -> Callable[[Place], Facts]:
    def measure(place: Place) -> Facts:
        import numpy as np

        from minidiff.evaluation.metrics import distances, neighbours
        real, fake = np.random.default_rng(0).standard_normal((2, place.n, D))
        found = getattr(neighbours if name in ("prdc", "c2st") else distances, name)(
            real=real, fake=fake)
        return {"value": float(found if isinstance(found, float) else found[0])}
    return measure


def nearest(place: Place) -> Facts:
    import torch

    from minidiff.evaluation.metrics.pairwise import nearest as of_all
    real, fake = torch.randn(2, place.n, D, generator=torch.Generator().manual_seed(0))
    return {"value": of_all(fake, real, 5).mean().item()}


def audit(place: Place) -> Facts:
    from minidiff.data import audit as audits
    from minidiff.data.table import read_table
    found, _ = audits.audit(read_table(place.data, split=False, check=False))
    return {"pairs": len(found["pairs"])}


STAGES: dict[str, tuple[str, Callable[[Place], Facts]]] = {
    "first": ("a first start: table, SHA-256, pixels into memory", first),
    "again": ("the same again", again),
    "map": ("the map made (--cache)", make_map),
    "start": ("a start with the map", start),
    "loader": ("the same, and images gathered", loader),
    "vae": (f"train.py vae, {STEPS} steps", vae),
    "latents": ("train.py diffusion until its latents are made", latents),
    "second": ("the same again: a second start, to the first batch", second),
    "diffusion": (f"train.py diffusion, {STEPS} steps, latents there", diffusion),
    "samples": ("sample.py, all but the network", samples),
    "resume": ("the same again: nothing is missing", resume),
    "quick": ("quick numbers of one set", quick),
    "classifier": ("classify.py until it trains, n synthetic images beside", classifier),
    "features": ("features: pixels, texture", features),
    "fid": ("FD", metric("fid")), "kid": ("KD", metric("kid")), "mind": ("MIND", metric("mind")),
    "prdc": ("precision, recall, density, coverage", metric("prdc")),
    "c2st": ("C2ST", metric("c2st")),
    "nearest": ("nearest of a page", nearest),
    "audit": ("evaluate.py audit", audit)}


def one(stage: str, place: Place) -> None:
    """A stage in this process; its row, as JSON, is the last line that it prints."""
    place.root.mkdir(parents=True, exist_ok=True)
    peak, base = Peak(), anonymous()
    peak.start()
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    with contextlib.redirect_stdout(sys.stderr):  # torch is imported in it, as by a command
        facts = STAGES[stage][1](place)
    row = {"n": place.n, "stage": stage, "wall_s": time.perf_counter() - wall,
           "cpu_s": sum(os.times()[:4]) - cpu, **facts}
    peak.done = True
    peak.join()
    print(json.dumps(row | {"anonymous_bytes": base + peak.peak}))


def table(rows: list[dict]) -> str:
    """Markdown: a line a stage, for each n CPU seconds and anonymous memory."""
    sizes, by = sorted({row["n"] for row in rows}), {(r["stage"], r["n"]): r for r in rows}
    lines = [["", *(f"{n:,}" for n in sizes)], ["---"] * (1 + len(sizes))]
    for stage, (text, _) in STAGES.items():
        cells = [by.get((stage, n)) for n in sizes]
        if any(cells):
            lines.append([text, *(f"{seconds(c['cpu_s'])} · {c['anonymous_bytes'] / 1e6:,.0f} MB"
                                  if c else "–" for c in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 10 else f"{s:,.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="phantoms [1000 10000 …]")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)} [all]")
    parser.add_argument("--out", default="runs/scale", help="folder of data, runs and rows")
    parser.add_argument("--record", action="store_true", help="keep the rows beside this script")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    out, wanted = Path(args.out).absolute(), args.stages.split(",")
    if strange := sorted({*wanted} - {*STAGES}):
        sys.exit(f"--stages {strange[0]}: there are {', '.join(STAGES)}")
    if args.one:
        return one(wanted[0], Place(out, args.n[0]))
    path, env = out / "scale.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for n in args.n:
        Place(out, n).draw()
    for stage, n in itertools.product([s for s in STAGES if s in wanted], args.n):
        if any((row["stage"], row["n"]) == (stage, n) for row in rows):
            continue
        words = [sys.executable, __file__, "--one", "--stages", stage, "--n", str(n), "--out", out]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=env)
        if done.returncode:
            sys.exit(f"{stage} of {n} images ended with status {done.returncode}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]))
        path.write_text(json.dumps({"machine": platform.machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    if args.record:
        shutil.copy(path, Path(__file__).with_suffix(".json"))


if __name__ == "__main__":
    main()
