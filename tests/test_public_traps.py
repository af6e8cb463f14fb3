"""Each trap of Stable Diffusion's networks, flipped alone on what was loaded, is seen by parity.

A parity test that is blind to one of them fails here.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_public import SD1, inputs, parts_and_peers, sd, tiny_architectures  # noqa: F401

from minidiff.diffusion import unet, vae


def every(kind, act):
    def flip(parts, monkeypatch):
        for net in (parts.unet, parts.vae):
            for module in net.modules():
                if isinstance(module, kind):
                    act(module)
    return flip


def change(name, value):
    def act(module):
        setattr(module, name, value)
    return act


def exchange(*names):
    def act(module):
        a, b = (getattr(module, name) for name in names)
        setattr(module, names[0], b), setattr(module, names[1], a)
    return act


def norm_eps(where, value):
    def flip(parts, monkeypatch):
        net = parts.vae if where == "vae" else parts.unet
        kind = torch.nn.LayerNorm if where == "layer" else torch.nn.GroupNorm
        for name, module in net.named_modules():
            if isinstance(module, kind) and (where != "transformer" or name.endswith(".norm")) and (
                    where != "resnets" or ".resnets." in name):
                module.eps = value
    return flip


def patch(module, name, new):
    return lambda parts, monkeypatch: monkeypatch.setattr(module, name, new)


def last_norm(parts, monkeypatch):
    parts.unet.conv_norm_out.eps = 1e-6


def sin_then_cos(t, width):
    return original_embedding(t, width).roll(width // 2, dims=1)


def half_minus_one(t, width):
    half = width // 2
    angles = t[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    return torch.cat([angles.cos(), angles.sin()], 1)


original_embedding, original_pad = unet.timestep_embedding, F.pad
original_gelu, original_up = F.gelu, F.interpolate


def symmetric_padding(parts, monkeypatch):
    monkeypatch.setattr(vae.F, "pad", lambda h,
                        pads: original_pad(h, (1, 0, 1, 0) if pads == (0, 1, 0, 1) else pads))


def one_sided_padding(parts, monkeypatch):
    for level in parts.unet.down_blocks[:-1]:
        conv = level.downsamplers[0].conv
        conv.padding = (0, 0)
        conv.register_forward_pre_hook(lambda module, args: (original_pad(args[0], (0, 1, 0, 1)),))


def gate_first(module):
    with torch.no_grad():
        weight, bias = module.net[0]["proj"].weight, module.net[0]["proj"].bias
        weight.copy_(weight.roll(len(weight) // 2, 0)), bias.copy_(bias.roll(len(bias) // 2, 0))


def heads(parts, monkeypatch):
    for module in parts.unet.modules():
        if isinstance(module, unet.Attention):
            module.heads = module.heads * 2 if module.to_q.in_features == 32 else module.heads


def time_after_silu(parts, monkeypatch):
    parts.unet.time_embedding["linear_2"].register_forward_hook(lambda m, a, out: out + 1e-6)


def tanh_after_decoder(parts, monkeypatch):
    parts.vae.decoder.register_forward_hook(lambda m, a, out: out.tanh())


def scale(parts, monkeypatch):
    parts.vae.scale.fill_(0.18)


def levels(parts, monkeypatch):
    a, b = parts.vae.decoder.up_blocks[0].resnets, parts.vae.decoder.up_blocks[1].resnets
    a[1], b[1] = b[1], a[1]


def skip_first(parts, monkeypatch):
    cat = torch.cat
    monkeypatch.setattr(unet.torch, "cat", lambda ts, dim=0: cat(
        ts[::-1] if len(ts) == 2 and dim == 1 and ts[0].ndim == 4 else ts, dim))


TRAPS = {
    "UNet ResBlock eps 1e-6": norm_eps("resnets", 1e-6), "UNet out eps 1e-6": last_norm,
    "transformer norm eps 1e-5": norm_eps("transformer", 1e-5),
    "LayerNorm eps 1e-6": norm_eps("layer", 1e-6), "VAE eps 1e-5": norm_eps("vae", 1e-5),
    "tanh GELU": patch(unet.F, "gelu", lambda x: original_gelu(x, approximate="tanh")),
    "quick GELU": patch(unet.F, "gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "gate before x": every(unet.FeedForward, gate_first),
    "sin before cos": patch(unet, "timestep_embedding", sin_then_cos),
    "half − 1 frequencies": patch(unet, "timestep_embedding", half_minus_one),
    "VAE padding on the other side": symmetric_padding,
    "UNet padding of the VAE": one_sided_padding,
    "norm1 ↔ norm3": every(unet.TransformerBlock, exchange("norm1", "norm3")),
    "norm1 ↔ norm2": every(unet.TransformerBlock, exchange("norm1", "norm2")),
    "q ↔ k (VAE)": every(vae.Attention, exchange("to_q", "to_k")),
    "k ↔ v (VAE)": every(vae.Attention, exchange("to_k", "to_v")),
    "k ↔ v": every(unet.Attention, exchange("to_k", "to_v")),
    "q ↔ k": every(unet.Attention, lambda m: exchange("to_q", "to_k")(m)
                   if m.to_k.in_features == m.to_q.in_features else 0),
    "heads": heads, "time embedding": time_after_silu, "tanh after the decoder": tanh_after_decoder,
    "latent scale": scale, "decoder levels": levels, "skip before h": skip_first,
    "bilinear upsampling": lambda parts, monkeypatch: monkeypatch.setattr(
        F, "interpolate", lambda h, scale_factor,
        mode: original_up(h, scale_factor=scale_factor, mode="bilinear")),
    "self- for cross-attention": every(unet.TransformerBlock, exchange("norm2", "norm3")),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_alone_is_seen(trap, tmp_path, monkeypatch):
    parts, peers = parts_and_peers("ldm safetensors", SD1, tmp_path)
    x, t, context, images = inputs(parts)
    with torch.no_grad():
        theirs = {"unet": peers[0](x, t, context).sample,
                  "encode": peers[1].encode(images).latent_dist.mean * 0.18215,
                  "decode": peers[1].decode(x / 0.18215).sample}
        TRAPS[trap](parts, monkeypatch)
        mine = {"unet": parts.unet(x, t, context), "encode": parts.vae.encode(images).mean,
                "decode": parts.vae.decode(x)}
    assert max(sd.relative(mine[k], theirs[k]) for k in mine) > 1e-7


def test_the_clamp_of_the_log_variance(tmp_path):
    parts, peers = parts_and_peers("ldm safetensors", SD1, tmp_path)
    images, peer = inputs(parts)[3], copy.deepcopy(peers[1])
    with torch.no_grad():
        for net in (parts.vae, peer):
            net.quant_conv.bias.view(2, 4)[1].copy_(torch.tensor([-60.0, -20.0, 15.0, 60.0]))
        assert sd.relative(parts.vae.encode(images).std,
                           peer.encode(images).latent_dist.std * 0.18215) <= 1e-7
