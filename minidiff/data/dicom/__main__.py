"""A hospital's DICOM files into a data set, and synthetic images out as DICOM.

    python -m minidiff.data.dicom import DIR --out DATA --label covid
    python -m minidiff.data.dicom import DIR --out DATA --label-from covid normal
    python -m minidiff.data.dicom import DIR --out DATA --label covid --accept-burned-in absent
    python -m minidiff.data.dicom import DIR --out DATA --label normal --window lung
    python -m minidiff.data.dicom export runs/demo/samples --out DIR --burn-in

Only pixels and five facts leave a file (docs/dicom.md). `import` ends with status 1 if files were
quarantined or skipped.
"""

import sys

from minidiff import config
from minidiff.data.dicom.folder import ImportConfig, import_folder
from minidiff.data.dicom.writer import ExportConfig, export_samples


def import_(cfg: ImportConfig) -> None:
    """Make a data set of PNG and metadata.csv of a folder of DICOM files."""
    status = import_folder(cfg)
    if status:
        sys.exit(status)


VERBS = {"import": (ImportConfig, import_), "export": (ExportConfig, export_samples)}

if __name__ == "__main__":
    config.main(VERBS, default="import", doc=__doc__)
