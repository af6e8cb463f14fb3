"""Training the classifier side by side with a plain torchvision loop: resnet18, the same size,
batch and optimiser.

    python benchmarks/classify.py   64 and 128 px, batch 64, on the GPU if there is one
    python benchmarks/classify.py --pixels 224 --batch 32 --dtype bf16

Ours is `predictor.fit`, all of it: counted order, augmentation, loss, finite check, clipping,
AdamW. The peer's loop is the usual one: Dataset, DataLoader, torchvision.transforms.v2 on each
image's tensor (RandomAffine and ColorJitter of the same strength), cross entropy, AdamW; what it
lacks (clipping, schedule, check) makes it faster. "As it comes" it has three equal channels and
torch's default format, optimiser and allocator; "its best settings" are one channel, channels_last,
the fused optimiser and memory kept; "one draw a batch" moves all images of a batch alike, which is
cheap and not the same; "no augmentation" is the network's step alone, on both sides.

Each row has a process of its own, and they work in turn; a ratio is the median of those within each
turn. On a CPU both processor time and wall time are printed; other programs lengthen the first
less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peers import Parts, Row  # puts minidiff on the path, too
from torch import Tensor

# isort: split
from minidiff.classification.predictor import DECAY, Predictor, fit
from minidiff.data.augmentation import BIAS, GAIN, ROTATION, SCALE, SHIFT
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision
from minidiff.variables import Category

IMAGES, CLASSES = 1500, 3   # in the data set that is drawn from
LR = 1e-3


@dataclass(frozen=True)
class Task:
    pixels: int
    batch: int
    width: int
    steps: int              # of a turn
    precision: Precision

    @property
    def device(self) -> torch.device:
        return self.precision.device


def data(task: Task) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (IMAGES, 1, task.pixels, task.pixels), generator=g,
                          dtype=torch.uint8), torch.randint(0, CLASSES, (IMAGES,), generator=g))


def ours(task: Task, augment: str = "classic") -> Parts:
    pixels, labels = data(task)
    label = Category("label", tuple("abc"))
    predictor = Predictor([label], width=task.width, size=task.pixels).to(task.device)
    return timed(task, lambda: fit(predictor, pixels, {"label": labels}, steps=task.steps,
                                   batch=task.batch, lr=LR,
                                   augment=augment, precision=task.precision.name))


def theirs(task: Task, best: bool = True, augment: str = "each") -> Parts:
    """augment: "each" image, the whole "batch" at once, or "none"."""
    import torchvision
    from torchvision.transforms import v2
    pixels, labels = data(task)
    pixels = pixels if best else pixels.expand(-1, 3, -1, -1)
    move = v2.Compose([v2.RandomAffine(ROTATION, translate=(SHIFT, SHIFT),
                                       scale=(1 - SCALE, 1 + SCALE),
                                       interpolation=v2.InterpolationMode.BILINEAR),
                       v2.ColorJitter(brightness=2 * BIAS, contrast=GAIN)])
    scale = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.449], [0.226])])

    class Set(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return scale(move(pixels[i]) if augment == "each" else pixels[i]), labels[i]

    net = torchvision.models.resnet18(num_classes=CLASSES)
    assert task.width == 64, "torchvision's resnet18 has no width"
    if best:
        net.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    last = torch.channels_last if best else torch.contiguous_format
    net = net.to(task.device, memory_format=last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY, fused=best or None)
    loader = torch.utils.data.DataLoader(Set(), task.batch, shuffle=True, drop_last=True)
    batches, scaler = iter(()), task.precision.scaler

    def step() -> None:
        nonlocal batches
        x, y = next(batches, (None, None))
        if x is None:
            batches = iter(loader)
            x, y = next(batches)
        x = (move(x) if augment == "batch" else x).to(task.device).contiguous(memory_format=last)
        with task.precision.autocast():
            loss = F.cross_entropy(net(x), y.to(task.device))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return timed(task, lambda: [step() for _ in range(task.steps)])


def timed(task: Task, run: Callable) -> Parts:
    """One part, which runs and gives the seconds a step: of the process, by the clock."""
    wait = torch.cuda.synchronize if task.device.type == "cuda" else lambda: None

    def part() -> Tensor:
        begin = wait() or (time.process_time(), time.perf_counter())
        run()
        end = wait() or (time.process_time(), time.perf_counter())
        return torch.tensor([b - a for a, b in zip(begin, end)], dtype=torch.float64) / task.steps

    return {"train": part}


ROWS = {"minidiff": ours,
        "torchvision as it comes": partial(theirs, best=False),
        "torchvision, its best settings": theirs,
        "the same, one draw a batch": partial(theirs, augment="batch"),
        "minidiff, no augmentation": partial(ours, augment="plain"),
        "torchvision, best settings, no augmentation": partial(theirs, augment="none")}
BESIDE = {name: "minidiff, no augmentation" if "no augmentation" in name
          else "minidiff" for name in ROWS}


def side_by_side(task: Task, args: argparse.Namespace) -> None:
    rows = {name: Row(name, build, task, ()) for name, build in ROWS.items()}
    for row in rows.values():
        row.output("train")  # allocations
    turns = [{name: row.output("train").tolist() for name, row in rows.items()}
             for _ in range(args.repeats)]
    clock = int(task.device.type == "cuda" or torch.get_num_threads() > 1)
    print(f"\nresnet18, batch {task.batch}, {task.pixels} px, {task.precision.name}; median of "
          f"{args.repeats} × {task.steps} steps, images/s by "
          f"{'the clock' if clock else 'processor time'}")
    print(f"{'':<46}{'images/s':>10}{'memory, GB':>12}{'minidiff is':>13}{'by the clock':>14}"
          f"{'lowest … highest':>19}")
    for name, row in rows.items():
        ratios, by_clock = ([turn[name][k] / turn[BESIDE[name]][k] for turn in turns]
                            for k in (clock, 1))
        rate = task.batch / statistics.median(turn[name][clock] for turn in turns)
        print(f"{name:<46}{rate:>10.1f}{row.memory():>12.2f}{statistics.median(ratios):>12.2f}×"
              f"{statistics.median(by_clock):>13.2f}×{min(ratios):>12.2f} … {max(ratios):.2f}",
              flush=True)
        row.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 128],
                        help="sides of the images [64 128]")
    parser.add_argument("--batch", type=int, default=64, help="images a step [64]")
    parser.add_argument("--steps", type=int, default=0, help="of a turn [4; on a GPU 50]")
    parser.add_argument("--repeats", type=int, default=7, help="turns [7]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … [auto]")
    parser.add_argument("--dtype", default="", choices=["", "fp32", "bf16", "fp16"],
                        help="[bf16 on a GPU, fp32 on a CPU]")
    args = parser.parse_args()
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    print(torch.cuda.get_device_name(device) if gpu else f"CPU with "
          f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} "
          f"threads", flush=True)
    for pixels in args.pixels:
        precision = Precision(args.dtype or ("bf16" if gpu else "fp32"), device)
        side_by_side(Task(pixels, args.batch, 64, args.steps or (50 if gpu else 4), precision),
                     args)


if __name__ == "__main__":
    main()
