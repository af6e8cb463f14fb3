"""The full public shapes in float32, in every dialect, against diffusers and transformers. Random
weights; 5.2 GB of disk.
"""

import gc
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from minidiff.diffusion.clip import EOS, empty_prompt
from minidiff.diffusion.public.load import load_sd

sd = pytest.importorskip("sd_peer")
pytestmark = pytest.mark.slow
TOLERANCE = {"unet": 5e-6, "encode": 1e-5, "decode": 3e-5, "context": 1e-5}
PARAMETERS = {"SD 1.x": 859_520_964, "SD 2.x": 865_910_724}


@pytest.fixture
def disk(tmp_path):
    """A folder for one test at a time, emptied at once: a dialect of the full shapes takes up to
    5.2 GB.
    """
    with FileLock(Path(tempfile.gettempdir()) / "minidiff-test-disk.lock"):
        if (free := shutil.disk_usage(tmp_path).free) < 8e9:
            pytest.skip(f"{tmp_path} has {free / 1e9:.1f} GB free, and this test writes files of "
                        "5.2 GB")
        yield tmp_path
        shutil.rmtree(tmp_path)


def inputs(width):
    generator = torch.Generator().manual_seed(9)
    shapes = (1, 4, 32, 32), (1, 77, width), (1, 3, 128, 128)
    x, context, images = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, torch.tensor([801.0]), context, images.tanh()


def peers(version) -> tuple:
    config = sd.FULL[version]
    return sd.make_unet(config["unet"]), sd.make_vae(sd.FULL["vae"]), sd.make_clip(config["clip"])


@torch.no_grad()
def outputs_of_peers(version) -> dict[str, torch.Tensor]:
    unet, vae, clip = peers(version)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[version]
    x, t, context, images = inputs(unet.config.cross_attention_dim)
    return {
        "unet": unet(x, t, context).sample, "encode": vae.encode(images).latent_dist.mean * 0.18215,
        "decode": vae.decode(x[:, :, :16, :16] / 0.18215).sample,
        "context": clip(empty_prompt(EOS if version == "SD 1.x" else 0)[None]).last_hidden_state[0],
    }


def write(path, version) -> None:
    """Write the peers' weights in the dialect that the path's name says."""
    # made anew from the same seeds, for both kinds of network at once do not fit into memory
    nets = peers(version)
    if path.name == "folder":
        sd.write_folder(path, *nets, max_shard_size="2GB")
    else:
        writer = sd.write_ckpt if path.suffix == ".ckpt" else sd.write_safetensors
        writer(path, sd.ldm_state(version, *nets))


@torch.no_grad()
def distances(path, theirs) -> dict[str, float]:
    parts = load_sd(path, prediction="eps")
    assert parts.certificate.parts["UNet"].tensors == 686 and parts.certificate.parts[
        "VAE"].tensors == 248
    x, t, context, images = inputs(parts.unet.config.context_dim)
    mine = {"unet": parts.unet(x, t, context), "encode": parts.vae.encode(images).mean,
            "decode": parts.vae.decode(x[:, :, :16, :16]), "context": parts.null_context}
    return {name: sd.relative(mine[name], theirs[name]) for name in mine}


@pytest.mark.parametrize("version", ["SD 1.x", "SD 2.x"])
def test_full_shapes_in_every_dialect(version, disk, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "cache"))
    theirs = outputs_of_peers(version)
    for file in ("folder", "ldm.ckpt", "ldm.safetensors"):
        for weights in (p for p in disk.rglob("*") if p.suffix in (".safetensors", ".ckpt")):
            weights.unlink()  # one dialect at a time, or two workers want 30 GB of disk
        write(disk / file, version)
        gc.collect()
        found = distances(disk / file, theirs)
        gc.collect()
        with capsys.disabled():
            print(f"\n{version} {file}: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
        assert all(found[name] <= TOLERANCE[name] for name in found), found
    from diffusers import UNet2DConditionModel

    peer = UNet2DConditionModel.from_single_file(  # diffusers, too, takes it for an LDM file
        str(disk / "ldm.safetensors"), config=str(disk / "folder"), subfolder="unet",
        local_files_only=True)
    x, t, context, _ = inputs(peer.config.cross_attention_dim)
    with torch.no_grad():
        assert sd.relative(peer.eval()(x, t, context).sample, theirs["unet"]) <= TOLERANCE["unet"]
