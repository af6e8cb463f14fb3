"""The end of an autoencoder's training: its latent scale, its reconstructions, and its files."""

from pathlib import Path

import torch
from torch import Tensor

from minidiff import runs
from minidiff.data import latents
from minidiff.data.dataset import Images
from minidiff.diffusion import store
from minidiff.diffusion.vae import VAE, Moments, encoder, latent_scale
from minidiff.evaluation.features.extractor import grey, pca_psnr, psnr
from minidiff.pixels import at_once, to_pixels, within
from minidiff.stages.pictures import draw_reconstructions

ENOUGH = 4096  # images, evenly picked: for the latent scale, which they give within a thousandth,
               # and of the held-out ones for the reconstructions


@torch.no_grad()
def finish_vae(run: Path, vae: VAE, train: Images, held_out: Images, seen: list[str],
               frozen: bool) -> None:
    """Measure the latent scale, unless the encoder came with it, and the reconstructions; save.

    A run that is finished keeps its scale: diffusion models may have been trained with it.
    """
    device = vae.scale.device
    if (saved := run / "vae.json").exists():
        vae.scale.fill_(runs.read_json(saved)["scale"])
    elif not frozen:
        vae.scale.fill_(1.0)
        moments = latents.moments(_some(train.pixels), encoder(vae), text="latent scale",
                                  device=device)
        vae.scale.fill_(latent_scale(Moments(*moments[:, 0])))
    qualities, looked_at = [], _some(held_out.pixels)
    for real in looked_at.split(within(train.size)):
        means = latents.moments(real, encoder(vae), text="held-out images", device=device)
        decoded = torch.cat([to_pixels(vae.decode(part.to(device)), real.dtype).cpu()
                             for part in means[0, 0].split(at_once(train.size))])
        if not qualities:
            draw_reconstructions(run, real, decoded)
        qualities.append(psnr(grey(real), grey(decoded)))
    quality = torch.cat(qualities).mean().item()
    baseline = pca_psnr(train.pixels, looked_at)
    store.save_vae(run, vae, trained_on=sorted({*seen, *train.hashes}), psnr=quality,
                   psnr_pca64=baseline, n_held_out=len(looked_at), size=train.size)
    print(f"{run}: PSNR {quality:.2f} dB on {len(looked_at)} held-out images (64 principal "
          f"components: {baseline:.2f} dB); latent scale {vae.scale.item():.4f}")


def _some(pixels: Tensor) -> Tensor:
    return pixels[:: -(-len(pixels) // ENOUGH)]
