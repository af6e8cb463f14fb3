import math

import pytest
import torch

from minidiff import variables as var
from minidiff.diffusion import unet
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.model import Model, from_model, from_scratch
from minidiff.errors import InputError
from minidiff.variables import Category, Number

VARIABLES = [Category("label", ("covid", "normal")), Category("sex", ("F", "M")),
             Number("age", 50.0, 15.0, 20.0, 90.0)]
ROWS = [{"label": "covid", "sex": "F", "age": "70"}, {"label": "normal", "sex": "", "age": ""},
        {"label": "covid"}]


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
    dropped = var.drop(VARIABLES, labels,
                       torch.tensor([[True] * 3, [False, True, False], [False] * 3]))
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
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0
               for p in c.embeddings.parameters())


def test_numbers_are_told_apart_and_vary_smoothly():
    c = trained()
    ages = [{"label": "covid", "sex": "F", "age": str(a)} for a in (60, 61, 80)]
    a, b, far = c(var.encode(VARIABLES, ages))[:, 1]
    assert 0 < (a - b).norm() < 0.5 * (a - far).norm()


def test_model_at_step_0_does_not_depend_on_labels():
    model = from_scratch(unet.TINY, VARIABLES, seed=0)
    torch.nn.init.normal_(model.unet.conv_out.weight, generator=torch.Generator().manual_seed(0))
    x, t = torch.randn(
        3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10.0, 400.0, 900.0])
    assert isinstance(model, Model)
    assert torch.equal(model(x, t, var.encode(VARIABLES, ROWS)),
                       model(x, t, model.conditioner.null(3)))


def test_from_scratch_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    a, b, c = (from_scratch(unet.TINY, VARIABLES, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["unet.conv_in.weight"], c["unet.conv_in.weight"])


def test_infer_tells_numbers_from_categories():
    age = var.infer("age", ["20", "30", "41", "52", "63", "74", ""])
    assert isinstance(age, Number) and (age.low,
                                        age.high) == (20, 74) and age.mean == pytest.approx(280 / 6)
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
    labels = var.encode(VARIABLES,
                        [{"label": "covid", "age": cell} for cell in ("-inf", "nan", "inf", "NaN")])
    assert labels["age"].isnan().all()  # and never -inf, which would mean dropped for guidance
    assert var.infer("crp", ["1", "2", "3", "4", "5", "6", "-inf"]).low == 1


def test_bad_cells_are_named_with_their_row():
    with pytest.raises(InputError,
                       match=r"m.csv:7: age 'fifty' is not a number; training saw 20 to 90"):
        var.encode(VARIABLES, [{"label": "covid", "age": "fifty", "where": "m.csv:7"}])
    with pytest.raises(InputError,
                       match="label 'covit' is not one of covid, normal; nearest: covid"):
        var.encode(VARIABLES, [{"label": "covit"}])


def old_model() -> Model:
    """A model after some training: neither its last convolution nor its projections are zero."""
    model, g = from_scratch(unet.TINY, VARIABLES, seed=0), torch.Generator().manual_seed(1)
    for weight in (model.unet.conv_out.weight, *(p.weight for p in model.conditioner.projections)):
        torch.nn.init.normal_(weight, std=0.1, generator=g)
    return model.eval().requires_grad_(False)


NEW_VIEW, FEWER = Category("view", ("AP", "PA")), [VARIABLES[2], VARIABLES[0]]
MORE_VALUES = [Category("label", ("abscess", "covid", "normal", "pneumonia")),
               Category("sex", ("M", "X", "F")), VARIABLES[2]]


@pytest.mark.parametrize("new", [VARIABLES, MORE_VALUES, VARIABLES[::-1], [NEW_VIEW, *VARIABLES],
                                 FEWER, [NEW_VIEW, *FEWER]])
def test_going_on_begins_with_the_old_output_bit_for_bit(new):
    old, merged = old_model(), var.merge(VARIABLES, new)
    model = from_model(old, merged, seed=7)
    rows = [{"view": view, **row} for row, view in zip(ROWS, ("PA", "", "AP"))]
    labels, before = var.encode(merged, rows), var.encode(VARIABLES, rows)
    for v in VARIABLES:
        if v.name not in labels:
            before[v.name] = old.conditioner.null(3)[v.name]
    x, t = torch.randn(
        3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([10.0, 400.0, 900.0])
    with torch.no_grad():
        assert torch.equal(model.conditioner(labels), old.conditioner(before))
        assert torch.equal(model(x, t, labels), old(x, t, before))
        assert torch.equal(model(x, t, model.conditioner.null(3)),
                           old(x, t, old.conditioner.null(3)))
        assert not torch.equal(model(x, t, labels), model(x, t, model.conditioner.null(3)))
    assert model.training and model.unet is old.unet and all(p.requires_grad
                                                             for p in model.parameters())
    assert {v.name for v in model.conditioner.variables} == {v.name for v in new}


def test_a_new_value_begins_as_null_and_is_learned():
    old, merged = old_model(), var.merge(VARIABLES, MORE_VALUES)
    model = from_model(old, merged, seed=7)
    rows = [{"label": "abscess", "sex": "X", "age": "30"},
            {"label": "pneumonia", "sex": "", "age": ""}]
    before = var.encode(VARIABLES, [{"age": "30"}, {}])
    before["label"][:], before["sex"][0] = var.NULL, var.NULL
    context = model.conditioner(var.encode(merged, rows))
    assert torch.equal(context, old.conditioner(before))
    (context * torch.randn(context.shape,
                           generator=torch.Generator().manual_seed(2))).sum().backward()
    gradient = dict(zip(merged[0].values, model.conditioner.embeddings[0].weight.grad))
    assert gradient["abscess"].abs().max() > 0 and gradient["pneumonia"].abs().max() > 0
    assert (gradient["covid"] == 0).all()


def test_a_new_variable_learns_from_step_0():
    model = from_model(old_model(), [NEW_VIEW, *VARIABLES], seed=7)
    rows = [{"view": view, **row} for row, view in zip(ROWS, ("PA", "", "AP"))]
    context = model.conditioner(var.encode(model.conditioner.variables, rows))
    (context * torch.randn(context.shape,
                           generator=torch.Generator().manual_seed(2))).sum().backward()
    assert [v.name for v in model.conditioner.variables] == ["label", "sex", "age", "view"]
    assert all(p.weight.grad.abs().max() > 0 for p in model.conditioner.projections)
    # not zero: a zero product would never move
    assert len(model.conditioner.embeddings[-1].weight.unique()) > 2


def test_going_on_is_seeded_and_may_be_done_again():
    a, b = (from_model(old_model(), [*VARIABLES, NEW_VIEW], seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    first = from_model(old_model(), [NEW_VIEW], seed=3)
    again = from_model(first, var.merge(first.conditioner.variables, VARIABLES), seed=4)
    null = again.conditioner(again.conditioner.null(2))
    # forgotten by the first, new in the second
    assert torch.equal(again.conditioner(var.encode(VARIABLES, ROWS[:2])), null)


def test_merge_keeps_places_and_standardisation():
    new = [Number("age", 40.0, 10.0, 5.0, 80.0), NEW_VIEW,
           Category("label", ("pneumonia", "normal", "abscess"))]
    age, view, label = var.merge(VARIABLES, new)
    assert age == Number("age", 50.0, 15.0, 5.0, 90.0)
    assert view == NEW_VIEW
    assert label.values == ("covid", "normal", "pneumonia", "abscess")
    assert var.merge(VARIABLES, VARIABLES) == VARIABLES and var.merge([], new) == new
    model = from_model(old_model(), [age], seed=0)
    assert (model.conditioner.embeddings[0].mean, model.conditioner.embeddings[0].std) == (50.0,
                                                                                           15.0)
    with pytest.raises(AssertionError, match="variables.merge keeps the old one"):
        from_model(old_model(), new[:1], seed=0)


def test_merge_refuses_another_type():
    with pytest.raises(InputError, match="condition 'age' is of kind category here and of kind "
                       "number in the model to go on from"):
        var.merge(VARIABLES, [Category("age", ("young", "old"))])
    with pytest.raises(InputError,
                       match="condition 'sex' is of kind number here and of kind category"):
        var.merge(VARIABLES, [Number("sex", 0.5, 0.5, 0.0, 1.0)])


def test_infer_asks_less_of_a_column_that_the_model_knows():
    label, _, age = VARIABLES
    cases = [(label, ["covid", "covid"], label), (label, ["", ""], label), (age, ["", ""], age),
             (age, ["30", "95", ""], Number("age", 50.0, 15.0, 20.0, 95.0))]
    for old, cells, expected in cases:
        assert var.merge([old], [var.infer(old.name, cells, old)]) == [expected]
    assert var.infer("label", ["a", "b"], label) == Category("label", ("a", "b"))
    with pytest.raises(InputError, match="one value only"):
        var.infer("label", ["covid", "covid"])


def test_adopting_takes_over_the_null_context_too():
    old, new = trained(), Conditioner(VARIABLES, torch.zeros(8, 32),
                                      torch.Generator().manual_seed(5))
    new.adopt(old)
    labels = var.encode(VARIABLES, ROWS)
    assert torch.equal(new(labels), old(labels)) and torch.equal(new(new.null(3)), old(old.null(3)))
    # a copy, not a share: the old model may go on being sampled
    old.projections[0].weight.data.zero_()
    assert not torch.equal(new(labels), old(labels))


def test_words_for_one_value_are_one_and_no_far_value_is_called_near():
    sex = var.Category("sex", ("F", "M"))
    assert [sex.encode(cell) for cell in ("F", "f", "female", "Female", "male", "m")] == [0, 0, 0,
                                                                                          0, 1, 1]
    assert var.Category("label", ("COVID", "normal")).encode("covid") == 0
    with pytest.raises(InputError) as fault:
        sex.encode("unknown")
    assert str(fault.value) == "sex 'unknown' is not one of F, M"
    assert var.Category("x", ("f", "F")).encode("F") == 1  # where both are values, each is itself


def test_conditions_of_one_value_drop_out(capsys):
    rows = [{"label": "a", "view": "PA"}, {"label": "b", "view": "PA", "age": "3"},
            {"label": "b", "sex": "F"}]
    assert var.usable(var.USUAL, rows) == (
        "label",) and "no condition: sex, age, view" in capsys.readouterr().out
    # named: refused later, where it is missed
    assert var.usable(("label", "weight"), rows) == ("label", "weight")
    # of one value: there is nothing to tell, of the label neither, named or not
    assert var.usable(var.USUAL, rows[:1]) == var.usable(("label", "view"), rows[:1]) == ()
    assert var.usable(("findings",), [{"findings": "b|a"}, {"findings": "a|b"}]) == ()
    # an earlier stage knows it
    assert var.usable(var.USUAL, rows[:1], ("label", "sex")) == ("label", "sex")
