"""CT and MRI in: NIfTI files and DICOM series → slices, a data set like any other.

    files ─ folder ─▶ guard (a process with limits) ─ nifti | series ─▶ Volume ─ slices ─▶ PNG, row

A Volume lies in the patient's axes, whatever the file's: (x, y, z) to the patient's left, back and
head (LPS, as in DICOM). Slices are cut as radiologists look at them: the patient's right on the
left of the image, front or head on top. Nothing leaves a file but pixels and the facts of `Volume`.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from minidiff.data.dicom import Refused

MAX_VOXELS = 2**29     # 2 GiB in float32
TILT = 0.02            # sine of the angle by which axes may miss a right angle: 1.1 degrees
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis along which slices follow each other
MODALITIES = ("CT", "MR")


class Volume(NamedTuple):
    values: np.ndarray                   # (x, y, z) float32, in LPS; CT in Hounsfield units
    spacing: tuple[float, float, float]  # mm
    facts: dict[str, str]                # patient, volume, modality; sex and age where known
    only: int | None = None              # the axis across which alone it may be cut; None: any


def in_lps(values: np.ndarray, steps: np.ndarray
           ) -> tuple[np.ndarray, tuple[float, float, float], list[int]]:
    """An array in any orientation → one in LPS, its spacing in mm, and the array axis that each of
    the patient's was.

    steps (3, 3): column k is the way in mm, in LPS, from one cell to the next of array axis k. Axes
    are turned to the patient's nearest; nothing is resampled. Raises Refused for axes that are not
    at right angles, and for a way of no length.
    """
    spacing = np.linalg.norm(steps, axis=0)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise Refused("geometry", "a spacing of 0 or not a number")
    directions = steps / spacing
    if np.abs(directions.T @ directions - np.eye(3)).max() > TILT:
        raise Refused("tilted")
    _, order = linear_sum_assignment(-np.abs(directions))  # patient axis → array axis
    backwards = [axis for axis, k in enumerate(order) if directions[axis, k] < 0]
    turned = np.flip(values.transpose(order), backwards)
    return turned, tuple(float(spacing[k]) for k in order), order.tolist()
