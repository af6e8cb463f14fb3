import pytest
import torch

from minidiff.diffusion import clip
from minidiff.diffusion.clip import BOS, CLIP, EOS, empty_prompt

sd = pytest.importorskip("sd_peer")
CONFIGS = {"SD 1.x": clip.CLIPConfig(48, 2, 4, quick_gelu=True, pad=EOS, inner=80),
           "SD 2.x": clip.CLIPConfig(40, 3, 4, quick_gelu=False, pad=0, inner=64)}


@pytest.fixture(params=CONFIGS)
def pair(request) -> tuple[CLIP, torch.Tensor]:
    """Our tower with transformers' random weights, and what transformers makes of the empty prompt;
    float64.
    """
    peer = sd.peers(request.param)[2].double()
    net = CLIP(CONFIGS[request.param]).double()
    net.load_state_dict({name.removeprefix("text_model."): t.clone()
                         for name, t in peer.state_dict().items()})
    tokens = [BOS, *[EOS] * 76] if request.param == "SD 1.x" else [BOS, EOS, *[0] * 75]
    return net, peer(torch.tensor([tokens])).last_hidden_state[0]


def test_null_context_is_that_of_transformers(pair):
    net, theirs = pair
    assert theirs.shape == (77, net.config.width) and sd.relative(net.null_context(),
                                                                  theirs) <= 1e-12


def gelu(net):
    for layer in net.encoder["layers"]:
        layer.quick_gelu = not layer.quick_gelu


def eps(net):
    net.final_layer_norm.eps = 1e-6


def no_final_norm(net):
    net.final_layer_norm = torch.nn.Identity()


def one_layer_less(net):
    net.encoder["layers"] = net.encoder["layers"][:-1]


def norms_swapped(net):
    layer = net.encoder["layers"][0]
    layer.layer_norm1, layer.layer_norm2 = layer.layer_norm2, layer.layer_norm1


def q_and_k_swapped(net):
    attention = net.encoder["layers"][0].self_attn
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


def k_and_v_swapped(net):
    attention = net.encoder["layers"][0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def heads(net):
    net.encoder["layers"][1].self_attn.heads *= 2


TRAPS = [gelu, eps, no_final_norm, one_layer_less, norms_swapped, q_and_k_swapped, k_and_v_swapped,
         heads]


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_alone_is_seen(pair, trap):
    net, theirs = pair
    trap(net)
    assert sd.relative(net.null_context(), theirs) > 1e-6


def test_padding_and_mask_are_seen(pair, monkeypatch):
    net, theirs = pair
    other = net(empty_prompt(0 if net.config.pad else EOS)[None])[0]
    assert sd.relative(other, theirs) > 1e-3
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(clip.F, "scaled_dot_product_attention", lambda q, k, v,
                        is_causal: attend(q, k, v))
    assert sd.relative(net.null_context(), theirs) > 1e-3


def test_the_prompt_and_the_public_shapes():
    assert empty_prompt(EOS).tolist() == [49406,
                                          *[49407] * 76] and empty_prompt(0).tolist() == [49406,
                                                                                          49407,
                                                                                          *[0] * 75]
    for config, parameters in ((clip.CLIP_L, 123_060_480), (clip.OPENCLIP_H, 340_387_840)):
        with torch.device("meta"):
            assert sum(p.numel() for p in CLIP(config).parameters()) == parameters
