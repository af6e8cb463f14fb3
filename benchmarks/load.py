"""From a full-size SD 1.5 safetensors file to the end of one forward of the UNet: minidiff beside
diffusers.

    python benchmarks/load.py   writes a file with random weights (4.3 GB) and measures on it
    python benchmarks/load.py --file v1-5-pruned-emaonly.safetensors

Both read the UNet and the VAE; minidiff is also timed with the text tower, run once for the null
context. diffusers is timed without `accelerate`, as `pip install diffusers` gives it, and with it,
when it maps the file as minidiff does. Each run is its own process, all in turn, the file in the
page cache. SHA-256 is timed separately: it is computed once for each file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# side of the latents of the one forward, the least that SD takes: reading is what is measured
CELLS = 8
ROWS = ("minidiff", "minidiff + text tower", "diffusers", "diffusers + accelerate")


def anonymous() -> int:
    """Anonymous resident memory of this process, bytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines()
                    if line.startswith("RssAnon")).split()[1]) << 10


class Peak(threading.Thread):
    """The highest anonymous memory above that at the start, sampled every 10 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_value, self.peak, self.done = anonymous(), 0, False

    def run(self) -> None:
        while not self.done:
            self.peak = max(self.peak, anonymous() - self.start_value)
            time.sleep(0.01)


def one(which: str, file: str) -> None:
    """One measurement in this process, printed as JSON."""
    import torch
    if which.startswith("minidiff"):
        from minidiff.diffusion.public.load import cached_sha256, load_sd
        cached_sha256(Path(file))
    else:
        sys.path.insert(0, str(ROOT / "tests"))
        try:
            from torchvision_peer import torchvision
            torchvision()  # transformers imports it, and it may have been built for another torch
        except BaseException:  # noqa: BLE001, S110 (without torchvision, a skip of pytest's)
            pass
        from diffusers.utils import import_utils
        if which == "diffusers":
            import_utils._accelerate_available = False
        elif not import_utils.is_accelerate_available():
            return print("{}")
        from diffusers import AutoencoderKL, UNet2DConditionModel
    x, t, context = torch.zeros(1, 4, CELLS, CELLS), torch.tensor([500.0]), torch.zeros(1, 77, 768)
    peak = Peak()
    peak.start()
    begin = time.perf_counter()
    with torch.no_grad():
        if which.startswith("minidiff"):
            parts = load_sd(file, prediction="eps",
                            null_context="tower" if "tower" in which else "zeros")
            loaded = time.perf_counter()
            parts.unet(x, t, context)
            networks = [parts.unet, parts.vae]
        else:
            folder = str(Path(file).parent / "config")
            options = {"config": folder, "local_files_only": True}
            networks = [UNet2DConditionModel.from_single_file(file, subfolder="unet",
                                                              **options).eval(),
                        AutoencoderKL.from_single_file(file, subfolder="vae", **options).eval()]
            loaded = time.perf_counter()
            networks[0](x, t, context)
    end = time.perf_counter()
    peak.done = True
    peak.join()
    size = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    print(json.dumps({"load_s": loaded - begin, "total_s": end - begin,
                      "anonymous_of_parameters": peak.peak / size}))


def write(folder: Path) -> Path:
    """A whole SD 1.5 file with random weights, and the configs that diffusers wants beside it."""
    import torch

    from minidiff.diffusion import clip, unet, vae
    from minidiff.diffusion.public import folder as layout
    from minidiff.diffusion.public import keys
    from minidiff.runs import save_tensors, write_json
    torch.manual_seed(0)
    nets = unet.UNet(unet.SD15), vae.VAE(vae.SD), clip.CLIP(clip.CLIP_L)
    tensors = {keys.UNET + ldm: nets[0].state_dict()[ours]
               for ours, ldm in keys.unet_to_ldm(nets[0].state_dict()).items()}
    for ours, ldm in keys.vae_to_ldm(nets[1].state_dict()).items():
        tensor = nets[1].state_dict()[ours]
        tensors[keys.VAE
                + ldm] = tensor[:, :, None,
                                None] if ".attentions." in ours and tensor.ndim == 2 else tensor
    tensors |= {keys.CLIP_L + "text_model." + name: tensor
                for name, tensor in nets[2].state_dict().items()}
    save_tensors(folder / "sd15.safetensors", tensors)
    configs = folder / "config"
    write_json(configs / "unet" / "config.json", layout.unet_json(nets[0].config, 64))
    write_json(configs / "vae" / "config.json", layout.vae_json(nets[1].config, 0.18215, 512))
    return folder / "sd15.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="",
                        help="SD 1.x safetensors file; none: one with random weights is written")
    parser.add_argument("--repeats", type=int, default=3, help="runs each, in turn [3]")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args.one, args.file)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(args.file) if args.file else write(Path(folder))
        from minidiff.runs import sha256
        begin = time.perf_counter()
        sha256(file)
        print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB; SHA-256 "
              f"{time.perf_counter() - begin:.1f} s, once a file")
        results: dict[str, list[dict]] = {row: [] for row in ROWS}
        for _ in range(args.repeats):
            for which, runs in results.items():
                words = [sys.executable, __file__, "--one", which, "--file", str(file)]
                got = subprocess.run(words, capture_output=True, text=True,
                                     env={**os.environ, "XDG_CACHE_HOME": folder})
                if got.returncode:
                    sys.exit(f"{which}: {got.stderr[-2000:]}")
                runs.append(json.loads(got.stdout.strip().splitlines()[-1]))
        print(
            f"median of {args.repeats:<13}{'load, s':>10}{'+ one forward, s':>18}"
            f"{'anonymous memory / parameters':>32}{'minidiff is':>14}")
        own = statistics.median(r["total_s"] for r in results["minidiff"])
        for which, runs in results.items():
            if not all(runs):
                print(f"{which:<23} is not installed")
                continue
            load, total, memory = (statistics.median(column)
                                   for column in zip(*(r.values() for r in runs)))
            print(f"{which:<23}{load:>10.2f}{total:>18.2f}{memory:>32.2f}{total / own:>13.2f}×")


if __name__ == "__main__":
    main()
