import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import variables as var
from minidiff.diffusion import lora, unet
from minidiff.diffusion.model import Model, from_scratch
from minidiff.errors import InputError
from minidiff.variables import Category, Number

VARIABLES = [Category("label", ("covid", "normal")), Number("age", 50.0, 15.0, 20.0, 90.0)]
LABELS = var.encode(VARIABLES,
                    [{"label": "covid", "age": "70"}, {"label": "normal"}, {"age": "31"}])
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """Those of the adapters."""
    return {name: p.detach() for name, p in net.named_parameters() if ".lora_" in name}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model() -> Model:
    """As after some training: the last convolution and the conditioner's projections are not
    zero.
    """
    made = from_scratch(unet.TINY, VARIABLES, seed=0)
    for weight in (made.unet.conv_out.weight, *(p.weight for p in made.conditioner.projections)):
        nn.init.normal_(weight, std=0.1, generator=seeded(1))
    return made


def adapted(random: bool = False) -> Model:
    """The same with adapters, as they are at step 0 or random."""
    made = model()
    lora.set_trainable(made, "lora", 4, 8.0, seeded(2))
    if random:
        for tensor in tensors(made).values():
            nn.init.normal_(tensor, std=0.1, generator=seeded(3))
    return made


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 8, 8, generator=seeded(4),
                       dtype=dtype), torch.tensor([10.0, 400.0, 900.0])


def loss(made: nn.Module) -> Tensor:
    return F.mse_loss(made(*inputs(), LABELS).float(), torch.randn(3, 4, 8, 8, generator=seeded(5)))


def of_attention(made: Model, tensors: tuple[str, ...],
                 modules: tuple[str, ...] = ("attn1", "attn2")) -> set[str]:
    """Full names of the named tensors of every attention, found by type."""
    blocks = [name for name, m in made.named_modules() if isinstance(m, unet.TransformerBlock)]
    # TINY attends at its lower level: 1 on the way down, 1 in the middle, 2 up
    assert len(blocks) == 4
    return {f"{block}.{module}.{tensor}" for block in blocks for module in modules
            for tensor in tensors}


def of_adapted(made: Model, tensors: tuple[str, ...]) -> set[str]:
    """Full names of these tensors of every adapted Linear."""
    attention = {name for linear in LINEARS
                 for name in of_attention(made, tuple(f"{linear}.{t}" for t in tensors))}
    forward = of_attention(made, tuple(f"{linear}.{t}" for linear in ("net.0.proj", "net.2")
                                       for t in tensors), ("ff",))
    return attention | forward


def of_conditioner(made: Model) -> set[str]:
    return {f"conditioner.{name}" for name, _ in made.conditioner.named_parameters()}


def trained(made: Model) -> set[str]:
    return {name for name, p in made.named_parameters() if p.requires_grad}


ADAPTERS = ("lora_down", "lora_up")
WEIGHTS = (*(f"{linear}.weight" for linear in LINEARS), "to_out.0.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_step_0_the_output_is_the_bases_bit_for_bit(dtype):
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(adapted()(*inputs(), LABELS), model()(*inputs(), LABELS))


def test_the_layer_is_equation_3():
    base = nn.Linear(6, 5, dtype=torch.float64)
    layer = lora.LoRALinear(base, 3, 6.0, seeded())
    assert layer.weight is base.weight and layer.bias is base.bias
    assert 0.8 < layer.lora_down.abs().max() * math.sqrt(6) <= 1 and (layer.lora_up == 0).all()
    nn.init.normal_(layer.lora_up, generator=seeded(1))
    h = torch.randn(2, 7, 6, dtype=torch.float64, generator=seeded(2))
    weight = base.weight + 6 / 3 * torch.einsum("or,ri->oi", layer.lora_up, layer.lora_down)
    assert (layer(h) - (torch.einsum("nti,oi->nto", h, weight) + base.bias)).abs().max() < 1e-14


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_merged_adapters_give_the_same_output(dtype, bound):
    net, base = adapted(random=True).unet.to(dtype), model().unet.to(dtype)
    context = torch.randn(3, 8, 64, generator=seeded(6), dtype=dtype)
    with torch.no_grad():
        merged, apart, without = (n(*inputs(dtype), context) for n in (lora.merge(net), net, base))
    assert (merged - apart).abs().max() < bound < 1e-3 < (apart - without).abs().max()


def test_a_merged_model_is_a_plain_one_that_shares_what_is_not_adapted():
    made = adapted(random=True)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    merged, plain = lora.merge(made), model()
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(m, lora.LoRALinear) for m in merged.modules())
    # and still has its adapters
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    mine = made.state_dict()
    new = {name for name, tensor in merged.state_dict().items()
           if tensor.data_ptr() != mine[name].data_ptr()}
    assert new == of_adapted(plain, ("weight",))
    plain.load_state_dict(merged.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(*inputs(), LABELS), merged(*inputs(), LABELS))
    averaged = lora.merge(copy.deepcopy(made).eval().requires_grad_(False))  # as of an EMA
    assert torch.equal(averaged.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert not averaged.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.training


def test_a_merged_weight_is_the_sum_rounded_once():
    layer = lora.LoRALinear(nn.Linear(64, 64), 4, 1.0, seeded())
    nn.init.normal_(layer.lora_up, generator=seeded(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        delta = layer.lora_up.detach().numpy().astype(
            "f8") @ layer.lora_down.detach().numpy().astype("f8") / 4
        merged = layer.merged().weight.detach()
    expected = (layer.weight.detach().numpy() + delta).astype("f4")
    assert merged.dtype == torch.float32 and (merged != torch.from_numpy(expected)).sum() <= 1


def test_gradients_reach_up_at_step_0_and_down_after():
    made = adapted()
    loss(made).backward()
    up, down = ([p.grad for n, p in made.named_parameters() if n.endswith(f"lora_{side}")]
                for side in ("up", "down"))
    assert all(g.abs().max() > 0 for g in up) and all((g == 0).all() for g in down)
    torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.1).step()
    made.zero_grad()
    loss(made).backward()
    assert all(p.grad.abs().max() > 0 for n, p in made.named_parameters() if ".lora_" in n)


def test_three_steps_change_the_adapters_and_the_conditioner_alone():
    made = model()
    parameters = lora.set_trainable(made, "lora", 4, 8.0, seeded(2))
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    optimizer, losses = torch.optim.AdamW(parameters, 1e-2), []
    for _ in range(3):
        losses.append(loss(made))
        losses[-1].backward()
        optimizer.step(), optimizer.zero_grad()
    changed = {name for name, tensor in made.state_dict().items()
               if not torch.equal(tensor, before[name])}
    assert changed == of_adapted(made, ADAPTERS) | of_conditioner(made)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("part", ["all", "attention", "cross-attention", "lora"])
def test_each_part_is_exactly_what_it_says(part):
    made = model()
    parameters = lora.set_trainable(made, part, 4, 8.0, seeded())
    of_unet = {
        "all": {f"unet.{name}" for name, _ in made.unet.named_parameters()},
        "attention": of_attention(made, WEIGHTS),
        "cross-attention": of_attention(made, WEIGHTS, ("attn2",)),
        "lora": of_adapted(made, ADAPTERS),
    }[part]
    assert trained(made) == of_unet | of_conditioner(made)
    assert {id(p) for p in parameters} == {id(p) for p in made.parameters() if p.requires_grad}
    assert set(tensors(made)) == (of_unet if part == "lora" else set())


@pytest.mark.parametrize("rank", [4, 8])
def test_the_number_of_adapter_parameters_of_sd15(rank):
    with torch.device("meta"):
        net = unet.UNet(unet.SD15)
    lora.add(net, rank, rank, seeded())
    # of the 16 attentions: 2 a level down, 3 up, 1 in the middle
    widths = 5 * [320] + 5 * [640] + 6 * [1280]
    # attn1: four (c, c); attn2: two (c, c), two (c, 768); ff: (c, 8c) and (4c, c); each costs r·(in
    # + out)
    expected = rank * sum(6 * 2 * c + 2 * (c + 768) + 9 * c + 5 * c for c in widths)
    assert sum(p.numel() for p in tensors(net).values()) == expected == {4: 1_496_064,
                                                                               8: 2_992_128}[rank]
    assert len(tensors(net)) == 2 * 16 * 10


@pytest.mark.parametrize("rank, alpha, match", [
    (0, 8.0, r"rank 0 is not allowed: 1 to 64"), (65, 8.0, "rank 65 is not allowed: 1 to 64"),
    (4, 0.0, "alpha 0 is not"), (4, math.nan, "alpha nan is not"),
])
def test_bad_ranks_are_named_with_what_is_allowed(rank, alpha, match):
    made = model()
    with pytest.raises(InputError, match=match):
        lora.add(made.unet, rank, alpha, seeded())
    assert not tensors(made)


def test_adapters_are_seeded_and_leave_the_global_generator_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    a, b = (from_scratch(unet.TINY, VARIABLES, 0) for _ in range(2))
    lora.add(a.unet, 4, 4.0, seeded(0)), lora.add(b.unet, 4, 4.0, seeded(0))
    lora.merge(a)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y)
               for x, y in zip(tensors(a).values(), tensors(b).values()))
    with pytest.raises(AssertionError, match="adapters already"):
        lora.add(a.unet, 4, 4.0, seeded())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_products_and_keeps_float32_gradients(dtype):
    made = adapted(random=True)
    layer, seen = made.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k, []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype):
        low = made(*inputs(), LABELS)
    (1024 * F.mse_loss(low.float(), torch.zeros_like(low.float()))).backward()
    assert seen == [dtype]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in made.parameters()
               if p.requires_grad)
    assert (low - made(*inputs(), LABELS)).abs().max() < 0.02 * low.abs().max()


def test_a_half_precision_base_has_float32_adapters():
    net = model().unet.bfloat16()
    lora.add(net, 4, 4.0, seeded())
    assert all(tensor.dtype == torch.float32 for tensor in tensors(net).values())
    assert all(p.dtype == torch.bfloat16 for p in lora.merge(net).parameters())
    context = torch.randn(3, 8, 64, generator=seeded(6))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(*inputs(torch.bfloat16), context).isfinite().all()


def test_it_works_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    plain, again = adapted(random=True), adapted(random=True)
    plain(*inputs(), LABELS).square().mean().backward()
    checkpoint(again, *inputs(), LABELS, use_reentrant=False).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), again.parameters())
               if a.requires_grad)


def test_it_compiles_into_one_graph():
    attention = adapted(random=True).unet.mid_block.attentions[0].transformer_blocks[0].attn2
    h, context = torch.randn(3, 16, 128, generator=seeded(6)), torch.randn(3, 8, 64,
                                                                           generator=seeded(7))
    results = []
    for run in (attention, torch.compile(attention, backend="aot_eager", fullgraph=True)):
        out = run(h, context)
        out.square().mean().backward()
        results.append([out, *(p.grad.clone() for p in attention.parameters() if p.requires_grad)])
        attention.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*results))


def test_it_works_under_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    plain = adapted(random=True)
    loss(plain).backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        made = adapted(random=True)
        loss(nn.parallel.DistributedDataParallel(made)).backward()
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), made.parameters())
               if a.requires_grad)
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)


def test_the_same_as_peft():
    pytest.importorskip("sd_peer")  # it lets transformers, which peft imports, have its torchvision
    peft = pytest.importorskip("peft")
    mine, net = adapted(random=True).unet, model().unet
    theirs = peft.get_peft_model(net,
                                 peft.LoraConfig(r=4, lora_alpha=8, target_modules=[
                                     *LINEARS, "ff.net.0.proj", "ff.net.2"]))
    own = tensors(mine)
    rename = {"lora_down": "lora_A.default.weight", "lora_up": "lora_B.default.weight"}
    state = {"base_model.model." + n.replace(s, rename[s]): t for n, t in own.items()
             for s in rename if s in n}
    assert {n for n in theirs.state_dict() if "lora_" in n} == set(state)
    theirs.load_state_dict(state, strict=False)
    context = torch.randn(3, 8, 64, generator=seeded(6))
    with torch.no_grad():
        assert (mine(*inputs(), context) - theirs(*inputs(), context)).abs().max() < 1e-6
        merged = theirs.merge_and_unload().state_dict()
    assert all(torch.allclose(t, merged[n], rtol=0, atol=1e-6)
               for n, t in lora.merge(mine).state_dict().items())
