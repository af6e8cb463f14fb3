"""Fréchet and kernel distance of two arrays of images, each beside its floor.

    python examples/fid.py                     phantoms against phantoms, in pixel components
    python examples/fid.py --extractor inception-clean-fid=FILE    FID proper
"""

import argparse

import numpy as np

import minidiff
from minidiff.data.phantom import phantom

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--extractor", default="pixels")
args = parser.parse_args()
one, two = (np.stack([phantom(seed, index).image for index in range(150)])
            for seed in (0, 1))  # uint8 (N, H, W)
blurred = (two // 2 + np.roll(two, 2, 1) // 2).astype(np.uint8)
for name, other in (("other phantoms", two), ("the same, blurred", blurred)):
    print(name, "", minidiff.fid(one, other, extractor=args.extractor),
          minidiff.kid(one, other, extractor=args.extractor), sep="\n  ")
