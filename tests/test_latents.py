"""data.latents: moments are written as they are made, into the file that they always were."""

import pytest
import torch
from safetensors.torch import load_file, save

from minidiff.data import latents
from minidiff.pixels import at_once
from minidiff.runs import json_key

N, HELD, SIDE, VIEWS = 70, 5, 16, 2  # batches of 32: three of each view, and one held out
KNOBS = {"views": VIEWS, "strength": 0.5, "seed": 3}


def pictures(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(n))


def encode(x):
    return x[:, :2, ::8, ::8], x[:, 1:, ::8, ::8].abs() / 10 + 0.01


def whole(key: str) -> bytes:
    """The file, as it was written when all of it was held in memory."""
    train = latents.moments(pictures(N), encode, VIEWS, strength=0.5, seed=3)
    val = latents.moments(pictures(HELD), encode)
    return save({"train": train, "val": val}, {"key": json_key(key=key, **KNOBS)})


def write(path, encode=encode, key="ä \"b\"", held=HELD):
    return latents.encoded(path, key, encode, pictures(N), pictures(held), **KNOBS)


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    assert at_once(SIDE) == 32
    source, means = write(tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == whole("ä \"b\"")
    assert source.mean.shape == (VIEWS, N, 2, 2, 2) and means.shape == (HELD, 2, 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert write(tmp_path / "y.safetensors", held=0)[1].shape == (0, 2, 2, 2)


def test_a_kill_loses_one_shard_and_the_file_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    path, calls = tmp_path / "x.safetensors", []

    def dying(x):
        calls.append(len(x))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(x)

    with pytest.raises(KeyboardInterrupt):
        write(path, dying)
    assert not path.exists()
    write(path, dying)
    assert len(calls) == 6 + 7 - 4  # of 7 batches, four were safe when the sixth began
    assert path.read_bytes() == whole("ä \"b\"")
    calls = [0] * 6
    write(path, dying)
    assert len(calls) == 6  # none again


def test_what_is_left_of_other_data_is_begun_anew(tmp_path):
    path = tmp_path / "x.safetensors"
    for name in (".x.safetensors.part", "x.safetensors"):
        (tmp_path / name).write_bytes(whole("other") + bytes(7))
    write(path)
    assert path.read_bytes() == whole("ä \"b\"")


@pytest.mark.parametrize("std, half", [(1e-2, True), (1e-4, False)])
def test_many_are_float16_where_that_rounds_below_the_posterior(tmp_path, monkeypatch, std, half):
    def steady(x):
        return encode(x)[0], torch.full_like(encode(x)[1], std)

    exact, _ = write(tmp_path / "exact.safetensors", steady)
    monkeypatch.setattr(latents, "LARGE", 1000)
    source, _ = write(tmp_path / "x.safetensors", steady)
    kept = load_file(tmp_path / "x.safetensors")["train"]
    assert kept.dtype == (torch.float16 if half else torch.float32)
    assert (kept[0].float() - exact.mean).abs().max() <= std / 4
    index = list(range(N))
    (z, noise), (same, again) = (s.draw(index, index) for s in (source, exact))
    assert z.dtype == torch.float32 and torch.equal(noise, again)
    assert (z - same).abs().max() < std
