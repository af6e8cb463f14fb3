"""The images of a training stage, and their summary for the user."""

from pathlib import Path
from typing import Any

from minidiff import distributed
from minidiff.data import phantom
from minidiff.data.dataset import Images, read_images
from minidiff.data.glance import by_split, glance
from minidiff.root import DEMO

PHANTOM = f"{DEMO}/phantom"  # the demo's data, drawn if they are not there


def read_training_set(cfg: Any, size: int, prior: tuple[str, ...] = ()) -> Images:
    """The images that a stage's config names, `size` px wide; rank 0 makes a split if need be."""
    with distributed.rank0_first():
        if cfg.data == (PHANTOM,):
            phantom.write(PHANTOM, scarce=phantom.SCARCE)
        data = read_images(cfg.data, size, seed=cfg.seed, split_dir=Path(cfg.root),
                           skip_bad=cfg.skip_bad, prior=prior, grey=cfg.grey)
    if distributed.rank() == 0:
        print(glance((*cfg.data, *prior), by_split(data.table), grey=data.grey, size=size,
                     root=cfg.root))
    return data
