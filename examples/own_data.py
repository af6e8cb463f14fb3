"""Train the denoiser on your own tensor and sample from it: 300 rings of 8 × 8 cells, in seconds.

    python examples/own_data.py
"""

import torch

from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.samplers import SAMPLERS, SeededNoise
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet, UNetConfig

torch.manual_seed(0)
y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
radius = torch.linspace(1.5, 3.5, 300)[:, None, None]
data = torch.exp(-(((x - 3.5) ** 2 + (y - 3.5) ** 2).sqrt() - radius) ** 2)[:, None]
mean, std = data.mean(), data.std()
z = (data - mean) / std  # (N, C, h, w) of about unit variance: that is all a network asks for

config = UNetConfig((24, 48), (False, True), 8, heads=4, latent_channels=1, groups=8, blocks=1)
net, context = UNet(config), torch.zeros(1, 1, 8)  # without conditions, one constant token
denoiser = Denoiser(lambda x, t, labels: net(x, t, context), Schedule.scaled_linear(), "v")
optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
for step in range(200):
    batch = z[torch.randint(300, (16,))]
    loss = denoiser.loss(batch, torch.randint(1000, (16,)), torch.randn_like(batch)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss:.3f}")

sigmas = denoiser.schedule.ladder(12, "logsigma")
start = SeededNoise(range(4), (1, 8, 8))() * sigmas[0].item()
with torch.no_grad():
    *_, (made, _) = SAMPLERS["dpmpp_2m"](denoiser, start, sigmas)
for row in (made[:, 0] * std + mean).transpose(0, 1):
    print("   ".join("".join(" .:*#"[int(v.clamp(0, 0.99) * 5)] * 2 for v in line) for line in row))
