"""What the commands of benchmarks/net_commands.txt start from: data | answers | api."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import minidiff
from minidiff.data import images, phantom
from minidiff.data.table import write_table
from minidiff.diffusion import vae
from minidiff.evaluation.readers.answers import read_key

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def data() -> None:
    """Two data sets, tables of wishes, DICOM files of two labels, random weights, secrets that are
    none.
    """
    from dicom_files import encode, make
    from test_inception import random_state

    phantom.write("data", n=280, size=32, masks=True)
    phantom.write("hospital", n=120, size=32, seed=1, noise=0.05)
    for k, name in enumerate(("data", "hospital")):
        path = Path(name, "metadata.csv")
        rows = list(csv.DictReader(path.open()))
        for i, row in enumerate(rows):
            row["source"] = "ab"[int(row["patient"].rpartition("-")[2]) // 3 % 4 == k]
            row["findings"] = row["label"] + "|odd" * (i % 3 == 0)
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    few = [phantom.phantom(2, 10 * k, 32, label="nodule") for k in range(4)]  # a rare label
    for k, one in enumerate(few):
        images.write(f"rare/images/{k}.png", one.image)
    write_table(Path("rare/metadata.csv"),
                [{"file_name": f"images/{k}.png", **one.row} for k, one in enumerate(few)])
    Path("wanted.csv").write_text("label,sex,age,n\ncovid,F,63,2\nnormal,,,1\n")
    Path("asked.csv").write_text("label,sex,age\ncovid,F,63\nnormal,,\n")
    Path("salt").write_text("ab" * 32 + "\n")
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(
        "import secrets\nsecrets.token_bytes = lambda n=32: bytes(range(n))\n")
    g = np.random.default_rng(0)
    for k in range(6):
        path = Path("dicom", ("covid", "normal")[k % 2], f"{k}.dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(make(
            g.integers(0, 4096, (40, 32)), 12, SOPInstanceUID=f"2.25.{k + 9}", PatientAge="061Y",
            PatientID=str(k // 2), PatientSex="FM"[k // 2 % 2], ViewPosition="AP")))
    torch.save(random_state(), "inception.pth")
    torch.manual_seed(0)
    state = vae.VAE(vae.SD).state_dict()
    save_file({name: x for name, x in state.items() if name != "scale"}, "vae.safetensors")


def answers() -> None:
    """Three readers who answer at random, as the page would export them."""
    from readers_data import export, rows_of

    key = read_key(Path("runs/x/readers-key/key.json"))
    for k in (1, 2, 3):
        export(Path(f"answers-{k}.jsonl"), rows_of(key, k, np.random.default_rng(k)))


def api() -> None:
    """README's lines of Python."""
    model = minidiff.load("runs/x")
    x = np.asarray(model.sample(label="covid", sex="F", age=70, n=4, seed=0, steps=3))
    found = minidiff.fid("data", "runs/x/samples", extractor="pixels", draws=3)
    kid = minidiff.kid("data", "runs/x/samples", extractor="pixels", draws=3)
    Path("runs/api.json").write_text(json.dumps({
        "shape": x.shape, "dtype": str(x.dtype), "sum": int(x.sum(dtype=np.int64)),
        "fid": str(found).split(), "kid": str(kid).split(), "names": minidiff.__all__}))


if __name__ == "__main__":
    {"data": data, "answers": answers, "api": api}[sys.argv[1]]()
