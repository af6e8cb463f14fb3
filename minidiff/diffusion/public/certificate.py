"""The load certificate: every tensor of a public file, and the source of every choice."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from minidiff import runs
from minidiff.download import cache
from minidiff.errors import InputError

# SHA-256: name, version, prediction; each hash was found in five public places or more. Names
# disappear, hashes do not.
KNOWN: dict[str, tuple[str, str, str | None]] = {
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa":
    ("v1-5-pruned-emaonly.safetensors", "SD 1.x", "eps"),
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": ("v1-5-pruned-emaonly.ckpt",
                                                                         "SD 1.x", "eps"),
    "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053": ("v1-5-pruned.ckpt",
                                                                         "SD 1.x", "eps"),
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": ("sd-v1-4.ckpt", "SD 1.x",
                                                                         "eps"),
    "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a": ("sd-v1-4-full-ema.ckpt",
                                                                         "SD 1.x", "eps"),
    "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0": ("v2-1_768-ema-pruned.ckpt",
                                                                         "SD 2.x", "v"),
    "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac":
    ("v2-1_768-ema-pruned.safetensors", "SD 2.x", "v"),
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75":
    ("vae-ft-mse-840000-ema-pruned.safetensors", "VAE", None),
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab":
    ("vae-ft-mse-840000-ema-pruned.ckpt", "VAE", None),
}


@dataclass(frozen=True)
class Part:
    """One network: where it was read, how many tensors and numbers, in which types."""

    source: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Certificate:
    files: list[dict]                # path, bytes, sha256, known (its public name, or null)
    dialect: str
    version: str
    ema: str
    parts: dict[str, Part]
    not_used: dict[str, int]         # why: how many tensors
    source_tensors: int              # in all files; the sum of the rows above
    prediction: str
    prediction_from: str
    schedule_from: str
    alphas_cumprod: tuple[float, float]  # first and last
    null_context: str

    def json(self) -> dict:
        return asdict(self)

    def text(self) -> str:
        rows = [("file", f"{f['path']}  {f['bytes']:,} bytes  SHA-256 {f['sha256']}  "
                 f"{f['known'] or 'not a known file'}") for f in self.files]
        rows += [("dialect", self.dialect), ("version", self.version), ("EMA", self.ema)]
        rows += [(name, f"{p.tensors:,} tensors, {p.parameters:,} parameters, "
                        f"{' + '.join(f'{n} {d}' for d, n in p.dtypes.items())}, from {p.source}")
                 for name, p in self.parts.items()]
        rows += [("not used", f"{n:,} tensors: {why}") for why, n in self.not_used.items()]
        rows += [("in all", f"{self.source_tensors:,} tensors, each accounted for once"),
                 ("prediction", f"{self.prediction}, from {self.prediction_from}"),
                 ("schedule", f"ᾱ {self.alphas_cumprod[0]:.8f} … {self.alphas_cumprod[1]:.8f}, "
                  f"from {self.schedule_from}"), ("null context", self.null_context)]
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


def describe_file(path: Path) -> dict:
    digest = cached_sha256(path)
    name = KNOWN.get(digest, (None,))[0]
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest, "known": name}


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file, kept under its path, size and time of change: 4 GB are read once."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    store = cache() / "sha256.json"
    try:
        known = json.loads(store.read_text())
        if isinstance(known.get(key), str):
            return known[key]
    except (OSError, ValueError, AttributeError):
        known = {}
    digest = runs.sha256(path)
    with contextlib.suppress(OSError):  # a read-only home: it is computed again next time
        runs.write_json(store, dict([*known.items(), (key, digest)][-1000:]))
    return digest


def refuse(path: Path, missing: Iterable[str], unexpected: Iterable[str],
           shapes: Iterable[str]) -> None:
    """Raise one InputError that counts each kind of fault and names its first ten."""
    faults = []
    for what, names in (("missing", missing), ("unexpected", unexpected),
                        ("of another shape", shapes)):
        if names := sorted(names):
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            faults.append(f"{len(names)} {what}: {', '.join(names[:10])}{more}")
    if faults:
        raise InputError(f"{path}: the tensors are not those of this model; {'; '.join(faults)}")
