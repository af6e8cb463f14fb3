"""A hospital's DICOM files into a data set, and synthetic images out as DICOM.

    python -m minidiff.data.dicom import DIR --out DATA --label covid
    python -m minidiff.data.dicom import DIR --out DATA --label-from covid normal --accept-burned-in absent
    python -m minidiff.data.dicom import DIR --out DATA --label normal --window lung
    python -m minidiff.data.dicom export runs/demo/samples --out DIR --burn-in

Only pixels and five facts leave a file (docs/dicom.md). `import` ends with status 1 if files were
quarantined or skipped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from minidiff import config
from minidiff.data.dicom import folder, need_pydicom, writer
from minidiff.errors import InputError


@dataclass(frozen=True)
class ImportConfig:
    positional: ClassVar[str] = "source"
    source: str = ""                       # folder of DICOM files, or one; stands without its flag, first
    out: str = ""                          # new folder of the data set
    label: str = ""                        # label of all images
    label_from: tuple[str, ...] = ()       # or: folders right below the source whose names are labels; others stay out
    window: Literal["auto", "file", "percentile", "lung", "soft", "bone"] = "auto"  # grey values; CT needs one
    frame: int = 0                         # which frame of several, from 1; 0 leaves such files out
    bits: Literal["8", "16"] = "8"         # of the PNG; training reads 8
    accept_burned_in: tuple[str, ...] = ()  # absent, yes: also import files that do not rule out text in the pixels
    salt: str = ""                         # file of the secret that hides patient ids; none: ~/.config/minidiff/dicom.salt
    workers: int = 2                       # processes that decode
    seconds: float = 60                    # for one file


def import_(cfg: ImportConfig) -> None:
    """Make a data set of PNG and metadata.csv of a folder of DICOM files."""
    need_pydicom()
    if not cfg.source or not cfg.out:
        raise InputError("import needs a folder of DICOM files, and --out DATA")
    if cfg.frame < 0 or cfg.workers < 1 or cfg.seconds <= 0:
        raise InputError(f"--frame {cfg.frame} --workers {cfg.workers} --seconds {cfg.seconds}: "
                         "allowed are 0 or more, 1 or more, more than 0")
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    salt = Path(cfg.salt) if cfg.salt else home / "minidiff" / "dicom.salt"
    status = folder.import_folder(Path(cfg.source), Path(os.path.abspath(cfg.out)), label=cfg.label,
                                  label_from=cfg.label_from, salt_file=salt, window=cfg.window,
                                  frame=cfg.frame, bits=int(cfg.bits), accept=cfg.accept_burned_in,
                                  workers=cfg.workers, seconds=cfg.seconds)
    if status:
        sys.exit(status)


@dataclass(frozen=True)
class ExportConfig:
    positional: ClassVar[str] = "samples"
    samples: str = "runs/demo/samples"     # finished folder of samples; stands without its flag, first
    out: str = ""                          # new folder of DICOM files
    burn_in: bool = False                  # write the notice into the pixels' corner, too


def export(cfg: ExportConfig) -> None:
    """Write a folder of samples as DICOM Secondary Capture marked as synthetic."""
    need_pydicom()
    if not cfg.out:
        raise InputError("export needs --out DIR")
    n = writer.export(Path(cfg.samples), Path(cfg.out), burn_in=cfg.burn_in)
    print(f"{cfg.out}: {n} DICOM files, each marked {writer.NOTICE!r}")


VERBS = {"import": (ImportConfig, import_), "export": (ExportConfig, export)}

if __name__ == "__main__":
    config.main(VERBS, default="import", doc=__doc__)
