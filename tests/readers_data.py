"""Small sets and simulated readers for the tests of the reading study."""

import hashlib
import json
from pathlib import Path

import numpy as np

from minidiff.data import images
from minidiff.data.table import write_table
from minidiff.evaluation.readers.answers import Key, Reading


def write_sets(root: Path, n: int = 10, size: int = 48, labels=("a", "b"),
               made_size: int | None = None) -> None:
    """root/real (n held-out and n training images of each label, rough) and root/made (smooth), PNG
    files.
    """
    rng = np.random.default_rng(0)
    for name, splits in (("real", ("train", "test")), ("made", ("",))):
        rows = []
        for split in splits:
            for label in labels:
                for k in range(n):
                    side = (made_size or size) if name == "made" else size
                    pixels = rng.integers(0, 256, (1, side, side))
                    pixels = pixels // 8 * 8 if name == "made" else pixels
                    file = f"images/{label}{split}{k}.png"
                    (root / name / "images").mkdir(parents=True, exist_ok=True)
                    images.write(root / name / file, pixels.astype(np.uint8))
                    rows.append({"file_name": file, "label": label, **(
                        {"split": split, "patient": f"{label}{split}{k}"} if split else {})})
        write_table(root / name / "metadata.csv", rows)


def key_of(n: int, readers: int, repeats: int = 0, controls: int = 0) -> Key:
    """A key of n real and n synthetic images without files; orders as they come."""
    kinds = ["synthetic"] * n + ["real"] * n
    items = [{"id": f"{k:032x}", "kind": kind, "label": "a", "set": kind, "file_name": f"{k}.png"}
             for k, kind in enumerate(kinds)]
    items += [{**items[k % 2 * n + k // 2], "id": f"{2 * n + k:032x}",
               "repeat_of": f"{k % 2 * n + k // 2:032x}"} for k in range(repeats)]
    items += [{"id": f"{2 * n + repeats + k:032x}", "kind": "control", "control": "noise",
               "label": "a", "set": "real", "file_name": "x.png"} for k in range(controls)]
    order = {"quality": list(range(len(items))), "origin": list(range(2 * n))}
    design = {"margin": 0.15, "attentive": 0.8, "gap": 50, "origin": True, "size": 8}
    return Key("0" * 16, "0" * 64, design, items, [order] * readers)


def reading(reader: int, quality: np.ndarray, origin: np.ndarray,
            confidence: np.ndarray | None = None) -> Reading:
    """Answers in the order of the key's items."""
    n = len(quality)
    sure = {"quality": np.full(n, 2), "origin": np.full(n, 2) if confidence is None else confidence}
    answer = {"quality": quality.astype(np.int64), "origin": origin.astype(np.int64)}
    return Reading(reader, f"{reader}.jsonl", answer, sure, np.arange(1, n + 1),
                   np.full(2 * n, 5.0), [()] * n, 0)


def rows_of(key: Key, reader: int, rng: np.random.Generator) -> list[dict]:
    """The rows that the page would export for a reader who answers at random."""
    rows = []
    for block, order in key.orders[reader - 1].items():
        for k in order:
            answer = ("good", "bad")[rng.integers(2)] if block == "quality" else (
                "real", "generated")[rng.integers(2)]
            if key.items[k]["kind"] == "control":
                answer = "bad"
            rows.append({"study": key.study, "reader": reader, "block": block,
                         "position": len(rows) + 1, "item": key.items[k]["id"], "answer": answer,
                         "confidence": int(rng.integers(1, 5)), "reasons": ["anatomy"]
                         if answer == "bad" else [], "ms": int(rng.integers(500, 9000)),
                         "time": "2026-01-01T00:00:00.000Z", "undone": 0})
    return rows


def export(path: Path, rows: list[dict]) -> str:
    """Write rows as the page does, JSONL with its checksum."""
    body = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    end = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "rows": len(rows)}
    path.write_text(body + json.dumps(end) + "\n")
    return str(path)


def knn_accuracy(x, y):
    """Leave-one-out accuracy of the nearest neighbour, means of classes and a ridge; the best of
    the three.
    """
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    n, hits = len(y), np.zeros(3)
    folds = np.random.default_rng(0).permutation(n) % 10
    for k in range(10):
        own, out = folds != k, folds == k
        d = ((x[out][:, None] - x[own][None]) ** 2).sum(-1)
        hits[0] += (y[own][d.argmin(1)] == y[out]).sum()
        means = np.stack([x[own & (y == c)].mean(0) for c in (0, 1)])
        hits[1] += (((x[out][:, None] - means) ** 2).sum(-1).argmin(1) == y[out]).sum()
        a = np.c_[x[own], np.ones(own.sum())]
        w = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ (2.0 * y[own] - 1))
        hits[2] += ((np.c_[x[out], np.ones(out.sum())] @ w > 0) == y[out]).sum()
    return hits / n
