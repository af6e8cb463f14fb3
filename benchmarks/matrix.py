"""How long the cells of a reference matrix take: rows × columns at n images a set, from features
that are computed already.

    python benchmarks/matrix.py   20 × 20 at n = 125, 1,000 permutations and resamples, two spaces
    python benchmarks/matrix.py --rows 20 --columns 20 --n 125 --widths 64 2048

Every cell is the whole of `cells.cell`: KD with p and interval, FD, MIND, density and coverage,
C2ST, and, for each row, what real scores against real. Features are normal numbers of these widths;
the time does not depend on their values. The last line is what a shared matrix of kernel values
could save: the time of the products alone.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff.evaluation.matrix.cells import Subset, cell, real_against_real  # noqa: E402
from minidiff.evaluation.metrics.pairwise import kernel  # noqa: E402


def subset(k: int, n: int, widths: list[int]) -> Subset:
    rng = np.random.default_rng(k)
    features = {f"{d} wide": rng.standard_normal((n, d)) + 0.02 * k for d in widths}
    pixels = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    return Subset("real", f"set {k}", "", ("x",), pixels, np.array([f"{k} {i}" for i in range(n)]),
                  "", features=features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 20), ("columns", 20), ("n", 125), ("permutations", 1000),
                          ("resamples", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128])
    a = parser.parse_args()
    rows = [subset(k, a.n, a.widths) for k in range(a.rows)]
    columns = [subset(1000 + k, a.n, a.widths) for k in range(a.columns)]
    for space in rows[0].features:
        wall, busy = time.perf_counter(), time.process_time()
        for row in rows:
            kin = [row, columns[0]]
            null = real_against_real(kin, space, repeats=40)
            for column in columns:
                cell(row, column, space, null, permutations=a.permutations, resamples=a.resamples)
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        begin = time.process_time()
        for row in rows:
            for column in columns:
                for x, y in ((row, row), (column, column), (row, column)):
                    kernel(x.features[space], y.features[space])
        products = time.process_time() - begin
        each = 1000 * busy / len(rows) / len(columns)
        print(f"{a.rows} × {a.columns} cells, n = {a.n}, {space}: {wall:.0f} s, {busy:.0f} s of "
              f"processor time ({each:.0f} ms a cell); all kernel products: {products:.1f} "
              f"s", flush=True)


if __name__ == "__main__":
    main()
