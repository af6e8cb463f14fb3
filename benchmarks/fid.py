"""The Fréchet distance beside pytorch-fid: seconds and memory, from two sets of features and from
two folders.

    python benchmarks/fid.py   the distance: n = 500 and 5,000, d = 2,048, three runs each
    python benchmarks/fid.py --n 500 --repeats 7            one size
    python benchmarks/fid.py --folders --n 128 --side 512   folders of PNG, Inception

The step is mean, covariance and distance, which pytorch-fid does with np.cov and SciPy's sqrtm.
Features are normal with a 1/k spectrum, float64, the same for all. Each run is its own process, all
in turn; CPU seconds are those of all threads together, and depend less on what else the machine
does than seconds by the clock. Memory is the peak above that at the start, features included there.

Folders hold noisy phantoms, and the Inception network, the same for both, random weights in the
true shapes. pytorch-fid reads with as many workers as there are threads, as it does unless told;
minidiff reads in the process itself.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
D = 2048


def features(seed: int, n: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, D))
    x /= np.sqrt(1 + np.arange(D))
    x += 0.05 * seed
    return x


def whole() -> Callable[[np.ndarray, np.ndarray], float]:
    from minidiff.evaluation.metrics.distances import fid
    return lambda x, y: fid(real=x, fake=y)


def pytorch_fid() -> Callable[[np.ndarray, np.ndarray], float]:
    try:
        importlib.import_module("torchvision_peer").torchvision()   # pytorch-fid imports it
        distance = importlib.import_module("pytorch_fid.fid_score").calculate_frechet_distance
    except BaseException as missing:  # noqa: BLE001 (without torchvision, a skip of pytest's)
        sys.exit(f"pip install pytorch-fid: {missing}")
    return lambda x, y: distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0),
                                 np.cov(y, rowvar=False))


def folder_own(folder: Path) -> Callable[[], float]:
    from minidiff.evaluation.fid import measure
    spec = f"inception-pytorch-fid={folder / 'inception.pth'}"
    return lambda: measure(folder / "a", folder / "b", extractor=spec, draws=0, metrics=["FID"])[0]


def folder_theirs(folder: Path) -> Callable[[], float]:
    import torch
    pytorch_fid()
    score, inception = (importlib.import_module(f"pytorch_fid.{name}")
                        for name in ("fid_score", "inception"))
    inception.load_state_dict_from_url = lambda *_, **__: torch.load(folder / "inception.pth",
                                                                     weights_only=True)
    workers = min(torch.get_num_threads(), 8)
    return lambda: score.calculate_fid_given_paths([str(folder / "a"), str(folder / "b")], 50,
                                                   "cpu", D, workers)


def prepare(folder: Path, n: int, side: int) -> None:
    """Two folders of PNG and random weights in which the features have some spread."""
    import torch

    from minidiff.data import images, phantom
    from minidiff.evaluation.features.inception import Inception
    torch.manual_seed(0)
    net = Inception()
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith("running_var"):
            tensor.fill_(1.0)
    torch.save(net.state_dict(), folder / "inception.pth")
    for seed, name in enumerate("ab"):
        (folder / name).mkdir()
        for k in range(n):
            images.write(folder / name / f"{k:06d}.png",
                         phantom.phantom(seed, k, side, noise=0.02).image)


ROWS = {"minidiff": whole, "pytorch-fid": pytorch_fid}
FOLDERS = {"minidiff": folder_own, "pytorch-fid": folder_theirs}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def one(which: str, n: int, folder: str) -> None:
    """One measurement in this process, printed as JSON."""
    if folder:
        step, given = FOLDERS[which](Path(folder)), ()
    else:
        step, given = ROWS[which](), (features(0, n), features(1, n))
    memory, cpu, begin = peak(), time.process_time(), time.perf_counter()
    value = step(*given)
    print(json.dumps({"value": float(value), "seconds": time.perf_counter() - begin,
                      "cpu": time.process_time() - cpu, "memory": peak() - memory}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[500, 5000],
                        help="images on each side [500 5000]")
    parser.add_argument("--repeats", type=int, default=3, help="runs each, in turn [3]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(),
                        help="of BLAS, for all alike [all cores]")
    parser.add_argument("--folders", action="store_true",
                        help="from two folders of images to the number")
    parser.add_argument("--side", type=int, default=512,
                        help="of the images in the folders, px [512]")
    parser.add_argument("--one", nargs=2, default=("", ""), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one[0]:
        return one(args.one[0], args.n[0], args.one[1])
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    threads = {**os.environ, **dict.fromkeys(names, str(args.threads))}
    what = f"folders of {args.side} px, " if args.folders else ""
    print(f"{what}d = {D}, {args.threads} threads, median of {args.repeats}; load average "
          f"{os.getloadavg()[0]:.1f} before")
    for n in args.n:
        folder = tempfile.mkdtemp() if args.folders else ""
        if folder:
            prepare(Path(folder), n, args.side)
        runs: dict[str, list[dict]] = {row: [] for row in (FOLDERS if folder else ROWS)}
        for _ in range(args.repeats):
            for which, found in runs.items():
                words = [sys.executable, __file__, "--one", which, folder, "--n", str(n)]
                got = subprocess.run(words, capture_output=True, text=True, env=threads)
                if got.returncode:
                    sys.exit(f"{which}: {got.stderr[-2000:]}")
                found.append(json.loads(got.stdout.strip().splitlines()[-1]))
        print(
            f"n = {n:<19,}{'FD':>14}{'seconds':>10}{'CPU s':>8}{'MB':>7}{'minidiff is':>13}"
            f"{'by CPU s':>10}")
        middle = {which: {k: statistics.median(r[k] for r in found) for k in found[0]}
                  for which, found in runs.items()}
        for which, m in middle.items():
            ratio, by_cpu = (m[k] / middle["minidiff"][k] for k in ("seconds", "cpu"))
            print(f"{which:<23}{m['value']:>14.8f}{m['seconds']:>10.3f}{m['cpu']:>8.3f}"
                  f"{m['memory'] / 1e6:>7.0f}{ratio:>12.2f}×{by_cpu:>9.2f}×", flush=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
