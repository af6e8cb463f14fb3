"""A hospital's DICOM files into a data set, and synthetic images out as DICOM.

    python -m minidiff.data.dicom import DIR --out DATA --label covid
    python -m minidiff.data.dicom import DIR --out DATA --label-from covid normal
    python -m minidiff.data.dicom import DIR --out DATA --labels labels.csv
    python -m minidiff.data.dicom import DIR --out DATA --label covid --accept-burned-in absent
    python -m minidiff.data.dicom import DIR --out DATA --label normal --window lung
    python -m minidiff.data.dicom export runs/demo/samples --out DIR --burn-in

Only pixels and five facts leave a file (docs/dicom.md). `import` ends with status 1 if files were
quarantined or skipped.
"""

from minidiff import config
from minidiff.data.dicom.folder import ImportConfig, import_folder
from minidiff.data.dicom.writer import ExportConfig, export_samples

VERBS = {"import": (ImportConfig, import_folder), "export": (ExportConfig, export_samples)}

if __name__ == "__main__":
    config.main(VERBS, default="import", doc=__doc__)
