"""Does a public VAE fit these images? Their latents against its scale, and what it loses."""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.diffusion.vae import VAE
from minidiff.pixels import to_float, to_uint8


@torch.no_grad()
def report(vae: VAE, pixels: Tensor, batch: int = 4,
           progress: Callable[[int], object] = lambda n: None) -> tuple[dict, Tensor]:
    """uint8 (N, 3, H, W) → numbers, and the first eight images above their reconstructions, uint8
    (2·n, 3, H, W).

    Per channel of the unscaled latents: the mean, the std between latents (of means and noise
    together), and the share of its variance that is the encoder's own noise. 1/std of all should be
    near the scale of the weights.
    """
    means, variances, again = [], [], []
    for part in pixels.split(batch):
        moments = vae.encode(to_float(part).to(vae.scale.device))
        means.append((moments.mean / vae.scale).double().cpu())
        variances.append((moments.std / vae.scale).double().square().cpu())
        again.append(to_uint8(vae.decode(moments.mean)).cpu())
        progress(len(part))
    mean, variance, again = torch.cat(means), torch.cat(variances), torch.cat(again)
    noise = variance.mean((0, 2, 3))
    total = mean.var((0, 2, 3), unbiased=False) + noise
    whole = (mean.var(unbiased=False) + noise.mean()).sqrt()
    error = (again.double() - pixels.double()) / 255
    psnr = -10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10()
    facts = {
        "images": len(pixels), "size": list(pixels.shape[-2:]), "scale": round(vae.scale.item(), 6),
        "scale_of_these_images": (1 / whole).item(),
        "std_scaled": (whole * vae.scale.item()).item(), "mean": mean.mean((0, 2, 3)).tolist(),
        "std": total.sqrt().tolist(), "noise_share": (noise / total).tolist(),
        "mean_absolute_error": error.abs().mean().item(), "psnr_mean": psnr.mean().item(),
        "psnr_min": psnr.min().item(),
        "chroma": (again.amax(1) - again.amin(1)).double().mean().item(),
    }
    return facts, torch.cat([pixels[:8], again[:8]])
