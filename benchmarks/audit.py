"""How long an audit takes and how much memory, how much it finds of what was planted, and how many
false alarms it raises.

    python benchmarks/audit.py --part scale --n 20000   phantoms of 128 px: seconds and peak memory
    python benchmarks/audit.py --part copies [--data DIR]   planted copies: recall, precision
    python benchmarks/audit.py --part text [--data DIR]   planted letters: hits, false alarms

Copies are mirrored, compressed again (JPEG, quality 40), cropped by 5 % a side, or brightened
(gamma 0.7, 20 grey values), written as files, and found again by `audit.copies`. Letters are of 8
to 20 px in a corner of images of 320 px or more.
"""

import argparse
import io
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff.data import audit, images, phantom  # noqa: E402
from minidiff.data.files import read_facts, text, typical_side  # noqa: E402
from minidiff.data.table import read_table  # noqa: E402

WORDS = ("PORTABLE", "SMITH JOHN", "12.03.1951", "AP SUPINE", "ID 4471029")


def altered(picture: np.ndarray, kind: str) -> Image.Image:
    """A copy (H,W) of a kind."""
    image = Image.fromarray(picture)
    if kind == "mirrored":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind == "compressed":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=40)
        return Image.open(buffer)
    if kind == "cropped":
        w, h = image.size
        return image.crop((round(0.05 * w), round(0.05 * h), round(0.95 * w), round(0.95 * h)))
    return Image.fromarray((255 * (picture / 255) ** 0.7 + 20).clip(0, 255).astype(np.uint8))


def grey(file: str) -> np.ndarray:
    picture = images.read(file)
    return picture[0] if len(picture) == 1 else picture.mean(0).astype(np.uint8)


def scale(folder: Path) -> None:
    before, start, cpu = resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss / 1024, time.time(), time.process_time()
    result, _ = audit.audit(read_table(folder, split=False, check=False))
    print(f"{result['images']} images: {time.time() - start:.0f} s "
          f"({time.process_time() - cpu:.0f} s of processor), {len(result['pairs'])} pairs, peak "
          f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB "
          f"({before:.0f} before)")


def copies(folder: Path, sources: list[str], each: int) -> None:
    """Plant `each` copies of every kind among the originals; pairs of originals are listed, to be
    looked at.
    """
    kinds, planted, files = ("mirrored", "compressed", "cropped", "brightened"), {}, list(sources)
    chosen = np.random.default_rng(0).permutation(len(sources))[: each * len(kinds)]
    for k, i in enumerate(chosen.tolist()):
        kind = kinds[k % len(kinds)]
        altered(grey(sources[i]), kind).save(folder / f"{k:04d}.png")
        planted[i, len(files)] = kind
        files.append(str(folder / f"{k:04d}.png"))
    start = time.time()
    pairs = audit.copies(*read_facts(files, typical_side(files, audit.SIDE)))
    hit = [planted[i, j] for i, j, _ in pairs if (i, j) in planted]
    rest = [(i, j, d) for i, j, d in pairs if (i, j) not in planted]
    print(f"{len(sources)} images and {len(planted)} copies, {time.time() - start:.0f} "
          f"s: " + ", ".join(f"{kind} {hit.count(kind)}/{list(planted.values()).count(kind)}"
                             for kind in kinds) + f"; other pairs reported: {len(rest)}")
    for i, j, d in rest:
        print(f"  {d:.4f} {files[i]} {files[j]}")


def letters(sources: list[np.ndarray], name: str) -> None:
    rng, hit, false = np.random.default_rng(0), {}, 0
    for picture in tqdm(sources, name):
        before = set(text(picture))
        false += bool(before)
        high = int(rng.choice([8, 10, 12, 16, 20]))
        image = Image.fromarray(picture)
        # capitals are .72 of the nominal size
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(high / 0.72)
        word = WORDS[rng.integers(len(WORDS))]
        w, h = image.size
        x = int(rng.integers(4, max(5, w - 8 - draw.textlength(word, font))))
        y = 6 if rng.random() < 0.5 else h - 10 - 2 * high
        dark = picture[y : y + 2 * high, x : x + int(draw.textlength(word, font))].mean() < 140
        draw.text((x, y), word, fill=255 if dark else 0, font=font)  # so that a person can read it
        hit.setdefault(high, []).append(bool(set(text(np.asarray(image))) - before))
    print(f"{name}: {len(sources)} images, {false} with letters before any were planted; found " +
          ", ".join(f"{sum(some)}/{len(some)} of {high} px" for high, some in sorted(hit.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("scale", "copies", "text"), required=True)
    parser.add_argument("--data", default="", help="real X-rays; none: phantoms")
    parser.add_argument("--n", type=int, default=1000, help="phantoms")
    parser.add_argument("--size", type=int, default=128, help="their side, px")
    parser.add_argument("--each", type=int, default=50, help="planted copies of each kind")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = Path(args.data) if args.data else phantom.write(folder / "data", n=args.n,
                                                               size=args.size)
        if args.part == "scale":
            return scale(data)
        sources = read_table(data, split=False, check=False).column("file")
        if args.part == "copies":
            return copies(folder, sources, args.each)
        letters([grey(file) for file in sources], args.data or f"phantoms of {args.size} px")


if __name__ == "__main__":
    main()
