import pytest
import torch
import torch.nn.functional as F

from minidiff.counted import DROPOUT, dropout, generators
from minidiff.diffusion import unet, vae
from minidiff.diffusion.model import vae_from_scratch
from minidiff.diffusion.norm import GroupNorm


@pytest.mark.parametrize("config, parameters", [(unet.SD15, 859_520_964), (unet.SD21, 865_910_724)])
def test_public_unet_architectures(config, parameters):
    with torch.device("meta"):
        net = unet.UNet(config)
    assert len(net.state_dict()) == 686
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_public_vae_architecture():
    with torch.device("meta"):
        net = vae.VAE(vae.SD)
    assert len(net.state_dict()) == 248
    assert sum(p.numel() for p in net.parameters()) == 83_653_863


@pytest.mark.parametrize("config", [unet.TINY, unet.SMALL])
def test_unet_shapes_and_independence_of_the_batch(config):
    torch.manual_seed(0)
    net = unet.UNet(config).double().eval()
    x, t = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1.0, 500.0, 999.0],
                                                                      dtype=torch.float64)
    context = torch.randn(3, 8, config.context_dim, dtype=torch.float64)
    with torch.no_grad():
        whole = net(x, t, context)
        one = net(x[1:2], t[1:2], context[1:2])
    assert whole.shape == x.shape and torch.allclose(whole[1:2], one, atol=1e-10)


def test_context_is_required_and_matters():
    torch.manual_seed(0)
    net = unet.UNet(unet.TINY)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([300.0])
    with pytest.raises(TypeError):
        net(x, t)
    assert not torch.allclose(net(x, t, torch.zeros(1, 8, 64)), net(x, t, torch.ones(1, 8, 64)))


def gradients(net, x, t, context, checkpointing, *keep):
    """Gradients of all parameters, and the bytes that are held for the way back (weights aside)."""
    net.checkpointing, held = checkpointing, {}
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x, t, context, *keep).square().mean()
    size = sum(held.values())  # before the way back, which saves again what it computes again
    return torch.autograd.grad(loss, list(net.parameters())), size


@pytest.mark.parametrize("config", [unet.TINY, unet.SMALL])
def test_checkpointing_gives_the_same_gradients_and_holds_less(config):
    torch.manual_seed(0)
    net = unet.UNet(config)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([20.0, 700.0]), torch.randn(
        2, 8, config.context_dim)
    plain, much = gradients(net, x, t, context, False)
    again, little = gradients(net, x, t, context, True)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(plain, again))
    assert little < much / 4, (little, much)
    with torch.no_grad():
        shown = net(x, t, context)
        net.checkpointing = False
        assert torch.equal(net(x, t, context), shown)


@pytest.mark.parametrize("config", [unet.TINY, unet.SMALL])
def test_dropout_leaves_out_counted_channels_also_under_checkpointing(config):
    torch.manual_seed(0)
    net, inputs = unet.UNet(config), {}
    x, t, context = torch.randn(3, 4, 8, 8), torch.tensor([20.0, 700.0, 700.0]), torch.randn(
        3, 8, config.context_dim)
    blocks = [block for block in net.modules() if isinstance(block, unet.ResBlock)]
    assert sorted(net.widths) == sorted(block.conv2.in_channels for block in blocks)
    keep = dropout(generators(0, [5, 6, 7], DROPOUT), sum(net.widths), 0.25)
    assert keep.unique().tolist() == [0, pytest.approx(4 / 3)] and 0.2 < (keep == 0).float(
        ).mean() < 0.3
    plain, _ = gradients(net, x, t, context, False, keep)
    again, _ = gradients(net, x, t, context, True, keep)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(plain, again))
    net.checkpointing = False
    for block in blocks:
        block.conv2.register_forward_pre_hook(lambda conv, args: inputs.update({conv: args[0]}))
    with torch.no_grad():
        out = net(x, t, context, keep)
        places = torch.cat([(h == 0).flatten(2).all(2) for h in inputs.values()], 1)
        assert torch.equal(places, keep == 0) and len(inputs) == len(blocks)
        assert torch.allclose(net(x, t, context, torch.ones_like(keep)), net(x, t, context))
        assert torch.allclose(net(x[1:], t[1:], context[1:], keep[1:]), out[1:], atol=1e-5)


def test_memory_format_changes_neither_names_nor_values():
    torch.manual_seed(0)
    net = unet.UNet(unet.TINY).double()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([20.0, 700.0],
                                                                      dtype=torch.float64)
    context = torch.randn(2, 8, 64, dtype=torch.float64)
    with torch.no_grad():
        plain = net(x, t, context)
        last = net.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last), t, context)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain, last, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_gpus_errs_no_more_than_torchs(dtype):
    """Also where means are large beside the spread, and groups differ."""
    g = torch.Generator().manual_seed(0)
    spread, mean = torch.rand(2, 1, 64, 1, 1, generator=g)
    x = (8 * mean + spread * torch.randn(2, 64, 16, 16, generator=g)).to(
        dtype, memory_format=torch.channels_last)
    norm = GroupNorm(32, 64).to(dtype).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.normal_(generator=g)
    native, made = norm(x), norm.in_place(x)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    theirs, ours = ((y.double() - exact).norm() / exact.norm() for y in (native, made))
    assert made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    assert ours < 1.1 * theirs + 1e-7


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("cells", [1, 4, 9])  # the last takes the convolution's own way
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_matrix_product_in_place_of_a_convolution_is_the_same(stride, cells, memory_format):
    torch.manual_seed(0)
    own = unet.Conv3x3(256, 8, stride).double().to(memory_format=memory_format)
    x = torch.randn(2, 256, cells, cells,
                    dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    assert (8 * x[:, 0].numel() <= 256) == (cells < 9)
    expected = torch.nn.functional.conv2d(x, own.weight, own.bias, stride, padding=1)
    found = own(x)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-12)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * weights).sum(), [x, *own.parameters()], retain_graph=True)
             for y in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads))


def test_timestep_embedding_is_cos_then_sin():
    emb = unet.timestep_embedding(torch.tensor([0.0, 7.0]), 320)
    assert torch.equal(emb[0], torch.cat([torch.ones(160), torch.zeros(160)]))
    assert emb[1, 0] == torch.tensor(7.0).cos() and emb[1, 160] == torch.tensor(7.0).sin()


def test_vae_shapes_scale_and_padding():
    net = vae_from_scratch(vae.TINY, seed=0).eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain = net.encode(x)
        image = net.decode(plain.mean)
        net.scale.fill_(0.25)
        scaled = net.encode(x)
        # callers never see the factor
        assert torch.allclose(net.decode(scaled.mean), image, atol=1e-5)
    assert plain.mean.shape == plain.std.shape == (
        2, 4, 16, 16) and image.shape == x.shape and net.factor == 4
    assert torch.allclose(scaled.mean, 0.25 * plain.mean) and torch.allclose(scaled.std,
                                                                             0.25 * plain.std)
    assert torch.allclose(scaled.kl(net.scale), plain.kl(torch.tensor(1.0)), rtol=1e-4)


def test_kl_of_the_standard_normal_is_zero():
    m = vae.Moments(torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
    assert m.kl(torch.tensor(1.0)).item() == 0
    shifted = vae.Moments(torch.full((1, 4, 2, 2), 2.0), torch.ones(1, 4, 2, 2))
    assert shifted.kl(torch.tensor(1.0)).item() == pytest.approx(16 * 2.0)  # ½·2² each


def test_the_latent_scale_is_1_over_the_std_of_what_the_encoder_draws():
    """Means of variance 4 with noise of variance 5 are latents of std 3."""
    mean = 7 + 2 * torch.randn(9, 4, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    scale = vae.latent_scale(vae.Moments(mean, torch.full_like(mean, 5.0).sqrt()))
    assert scale == pytest.approx(1 / 3, rel=0.01)
    still = torch.full_like(mean, 7.0)  # an encoder that tells no images apart
    assert vae.latent_scale(vae.Moments(still, torch.full_like(mean, 0.5))) == pytest.approx(2)


def test_the_vae_between_tiny_and_sd():
    with torch.device("meta"):
        net = vae.VAE(vae.SMALL)
    assert sum(p.numel() for p in net.parameters()) == 20_945_575 and net.factor == 8


def test_a_term_of_the_vaes_loss_is_a_mean_over_images():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 6, 3, 32, 32, generator=g, dtype=torch.float64).float()
    kl = torch.rand(6, generator=g)

    def lpips(a, b):
        return (a - b).square().flatten(1).mean(1)

    whole = torch.stack(vae.training_terms(y.bfloat16(), x, kl, lpips))
    parts = torch.stack([torch.stack(vae.training_terms(y[i:i + 2].bfloat16(), x[i:i + 2],
                                                        kl[i:i + 2], lpips)) for i in (0, 2, 4)])
    assert whole.shape == (len(vae.TERMS),) and whole.dtype == torch.float32
    assert torch.allclose(parts.mean(0), whole, rtol=1e-5) and whole.min() > 0
    assert vae.training_terms(y, x, kl, None)[vae.TERMS.index("lpips")] == 0


def test_edge_error_sees_edges_and_not_brightness():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert vae.edge_error(x, x) == 0
    assert vae.edge_error(x + 0.3, x).item() == pytest.approx(0, abs=1e-6)
    assert vae.edge_error(torch.zeros_like(x), x) > 0.05
