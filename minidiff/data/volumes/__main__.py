"""CT and MRI into a data set of slices.

    python -m minidiff.data.volumes CTS --out DATA --label-from covid normal --window lung \\
        --modality CT
    python -m minidiff.data.volumes BRAINS --out DATA --label tumour --modality MR --slices 20 \\
        --between .3 .7
    python -m minidiff.data.volumes CTS --out DATA --label normal --window soft --modality CT \\
        --plane coronal
    python -m minidiff.data.volumes phantom --out CTS --n 40

A source is a folder, of any depth, of NIfTI files (.nii, .nii.gz) and DICOM series, mixed or not.
Only pixels and a few facts leave a file (docs/volumes.md).
"""

from minidiff import config
from minidiff.data.volumes.folder import VolumesConfig, import_volumes
from minidiff.data.volumes.phantom import PhantomConfig, write

VERBS = {"import": (VolumesConfig, import_volumes), "phantom": (PhantomConfig, write)}

if __name__ == "__main__":
    config.main(VERBS, default="import", doc=__doc__)
