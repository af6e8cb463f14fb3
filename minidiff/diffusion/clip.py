"""CLIP's text tower, for one purpose: the context of the empty prompt, Stable Diffusion's null.

    SD 1.x   CLIP ViT-L     12 layers,        768 wide, 12 heads, QuickGELU    [BOS, EOS × 76]
    SD 2.x   OpenCLIP-H     23 of 24 layers, 1024 wide, 16 heads, exact GELU   [BOS, EOS, 0 × 75]
    both: causal attention, pre-LayerNorm, a final LayerNorm; SD 2.x applies it to the penultimate
    layer's output. There is no tokenizer.

Attribute names are those of transformers' CLIPTextModel. Sources: Radford et al. 2021, Ilharco et
al. 2021 (OpenCLIP).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

BOS, EOS, TOKENS = 49406, 49407, 77


@dataclass(frozen=True)
class CLIPConfig:
    width: int
    layers: int                   # that are run; OpenCLIP's file holds one more
    heads: int
    quick_gelu: bool              # x·σ(1.702x) in place of GELU, as OpenAI trained
    pad: int                      # token that fills the empty prompt up to 77
    inner: int                    # width inside the MLP
    vocabulary: int = 49408


CLIP_L = CLIPConfig(768, 12, 12, quick_gelu=True, pad=EOS, inner=3072)
OPENCLIP_H = CLIPConfig(1024, 23, 16, quick_gelu=False, pad=0, inner=4096)


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = c = config
        self.embeddings = nn.ModuleDict({
            "token_embedding": Table(c.vocabulary, c.width),
            "position_embedding": Table(TOKENS, c.width),
        })
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([Layer(c) for _ in range(c.layers)])})
        self.final_layer_norm = nn.LayerNorm(c.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (N, 77) → (N, 77, width)."""
        h = self.embeddings["token_embedding"].weight[tokens] + self.embeddings[
            "position_embedding"].weight
        for layer in self.encoder["layers"]:
            h = layer(h)
        return self.final_layer_norm(h)

    @torch.no_grad()
    def null_context(self) -> Tensor:
        """What the public model is fed for the empty prompt: (77, width)."""
        return self(empty_prompt(self.config.pad)[None])[0]


class Table(nn.Module):
    """One vector a row. (nn.Embedding on the meta device would import a compiler: 2 s.)"""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))


class Layer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.quick_gelu = c.quick_gelu
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.self_attn = Attention(c)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.width, c.inner),
                                  "fc2": nn.Linear(c.inner, c.width)})

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.layer_norm1(h))
        x = self.mlp["fc1"](self.layer_norm2(h))
        x = x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x)
        return h + self.mlp["fc2"](x)


class Attention(nn.Module):
    """Causal; all four projections have biases."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width)
                                                                for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (rearrange(project(h), "n t (heads d) -> n heads t d", heads=self.heads)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(out, "n heads t d -> n t (heads d)"))


def empty_prompt(pad: int) -> Tensor:
    """The token ids of "": (77,)."""
    tokens = torch.full((TOKENS,), pad)
    tokens[0], tokens[1] = BOS, EOS
    return tokens
