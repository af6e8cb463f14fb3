import math

import pytest
import torch

from minidiff import variables as var
from minidiff.diffusion import unet
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.model import Model, from_scratch
from minidiff.errors import InputError
from minidiff.variables import Category, Number

VARIABLES = [Category("label", ("covid", "normal")), Category("sex", ("F", "M")), Number("age", 50.0, 15.0, 20.0, 90.0)]
ROWS = [{"label": "covid", "sex": "F", "age": "70"}, {"label": "normal", "sex": "", "age": ""}, {"label": "covid"}]


def conditioner(tokens=8, width=32) -> Conditioner:
    g = torch.Generator().manual_seed(0)
    return Conditioner(VARIABLES, torch.randn(tokens, width, generator=g), g)


def trained() -> Conditioner:
    c, g = conditioner(), torch.Generator().manual_seed(1)
    for projection in c.projections:
        torch.nn.init.normal_(projection.weight, generator=g)
    return c


def test_encode_keeps_value_unknown_and_null_apart():
    labels = var.encode(VARIABLES, ROWS)
    assert labels["label"].tolist() == [0, 1, 0] and labels["sex"].tolist() == [0, -1, -1]
    assert labels["age"][0] == 70 and labels["age"][1:].isnan().all()
    assert var.decode(VARIABLES, labels)[1] == {"label": "normal", "sex": "", "age": ""}
    dropped = var.drop(VARIABLES, labels, torch.tensor([[True] * 3, [False, True, False], [False] * 3]))
    assert dropped["label"].tolist() == [-2, 1, 0] and dropped["sex"].tolist() == [-2, -2, -1]
    assert dropped["age"][0] == -math.inf and dropped["age"][1:].isnan().all()


def test_at_step_0_every_label_gives_the_null_context_bit_for_bit():
    c = conditioner()
    labels = var.encode(VARIABLES, ROWS)
    assert torch.equal(c(labels), c.null_context.expand(3, -1, -1))


def test_null_adds_nothing_ever_and_bos_is_never_touched():
    c = trained()
    labels = var.encode(VARIABLES, ROWS)
    assert torch.equal(c(c.null(3)), c.null_context.expand(3, -1, -1))
    out = c(labels)
    assert torch.equal(out[:, 0], c.null_context[0].expand(3, -1))
    assert (out[:, 1:] != c.null_context[1:]).any(-1).all()


def test_unknown_is_learned_and_differs_from_null():
    c = trained()
    labels = var.encode(VARIABLES, [{"label": "covid", "sex": "", "age": ""}])
    for i, name in ((1, "sex"), (2, "age")):
        mask = torch.zeros(1, 3, dtype=torch.bool)
        mask[0, i] = True
        assert not torch.allclose(c(labels), c(var.drop(VARIABLES, labels, mask))), name


def test_gradients_reach_projections_at_step_0_and_embeddings_after():
    c, labels = conditioner(), var.encode(VARIABLES, ROWS)
    (c(labels) * torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert all(p.weight.grad.abs().max() > 0 for p in c.projections)
    assert all(p.grad.abs().max() == 0 for p in c.embeddings.parameters())
    c = trained()
    (c(labels) * torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in c.embeddings.parameters())


def test_numbers_are_told_apart_and_vary_smoothly():
    c = trained()
    ages = [{"label": "covid", "sex": "F", "age": str(a)} for a in (60, 61, 80)]
    a, b, far = c(var.encode(VARIABLES, ages))[:, 1]
    assert 0 < (a - b).norm() < 0.5 * (a - far).norm()


def test_model_at_step_0_does_not_depend_on_labels():
    model = from_scratch(unet.TINY, VARIABLES, seed=0)
    torch.nn.init.normal_(model.unet.conv_out.weight, generator=torch.Generator().manual_seed(0))
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10.0, 400.0, 900.0])
    assert isinstance(model, Model)
    assert torch.equal(model(x, t, var.encode(VARIABLES, ROWS)), model(x, t, model.conditioner.null(3)))


def test_from_scratch_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    a, b, c = (from_scratch(unet.TINY, VARIABLES, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["unet.conv_in.weight"], c["unet.conv_in.weight"])


def test_infer_tells_numbers_from_categories():
    age = var.infer("age", ["20", "30", "41", "52", "63", "74", ""])
    assert isinstance(age, Number) and (age.low, age.high) == (20, 74) and age.mean == pytest.approx(280 / 6)
    assert var.infer("icu", ["0", "1", "", "1"]) == Category("icu", ("0", "1"))
    assert var.infer("stage", ["10", "9", "2"]).values == ("2", "9", "10")
    assert var.infer("sex", ["M", "F", "M"]).values == ("F", "M")
    assert var.from_json(var.to_json(VARIABLES)) == VARIABLES


@pytest.mark.parametrize("cells, match", [
    (["", ""], "no known value"), ([str(i) + "x" for i in range(101)], "101 different values"),
])
def test_infer_refuses(cells, match):
    with pytest.raises(InputError, match=match):
        var.infer("x", cells)


def test_a_number_that_is_not_finite_is_unknown():
    labels = var.encode(VARIABLES, [{"label": "covid", "age": cell} for cell in ("-inf", "nan", "inf", "NaN")])
    assert labels["age"].isnan().all()  # and never -inf, which would mean dropped for guidance
    assert var.infer("crp", ["1", "2", "3", "4", "5", "6", "-inf"]).low == 1


def test_bad_cells_are_named_with_their_row():
    with pytest.raises(InputError, match=r"m.csv:7: age 'fifty' is not a number; training saw 20 to 90"):
        var.encode(VARIABLES, [{"label": "covid", "age": "fifty", "where": "m.csv:7"}])
    with pytest.raises(InputError, match="label 'covit' is not one of covid, normal; nearest: covid"):
        var.encode(VARIABLES, [{"label": "covit"}])
