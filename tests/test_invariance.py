"""invariance: the ratio is its formula, only values within a label are compared, and with it a
source is told less."""

import numpy as np
import pytest
import torch

from minidiff.classification.invariance import STRENGTH, Invariance
from minidiff.classification.predictor import Predictor, fit
from minidiff.data.baselines import out_of_fold
from minidiff.errors import InputError
from minidiff.statistics import auroc
from minidiff.variables import Category

ROWS = [{"label": label, "source": source} for label, source in (
    ("covid", "a"), ("covid", "a"), ("covid", "b"), ("covid", "b"), ("normal", "c"),
    ("normal", "c"), ("covid", ""))]


def test_the_ratio_is_its_formula_and_0_where_means_are_equal():
    net = Invariance(ROWS, "source")
    x = torch.tensor([[0.0, 1], [2, 1], [4, 5], [6, 5], [9, 9], [7, 7], [100, 100]])
    # means 1 and 5, 1 and 5; variances 2, 2 and 0, 0
    assert net(x, range(7)).item() == pytest.approx(STRENGTH * (16 + 16) / 4)
    assert net(10 * x + 3, range(7)).item() == pytest.approx(STRENGTH * 8)
    assert net(x[[0, 1, 1, 0]], range(4)) == 0


def test_descending_it_draws_the_means_together():
    net, g = Invariance(ROWS, "source"), torch.Generator().manual_seed(0)
    x = (torch.randn(4, 3, generator=g) + torch.tensor([0, 0, 5, 5])[:, None]).requires_grad_()
    net(x, range(4)).backward()
    slope = x.grad[2:].mean(0) - x.grad[:2].mean(0)
    assert (slope * (x[2:].mean(0) - x[:2].mean(0))).sum() > 0


def test_a_label_of_one_source_an_unknown_one_and_a_single_image_say_nothing():
    net, x = Invariance(ROWS, "source"), torch.randn(7, 3, requires_grad=True)
    net(x, range(7)).backward()
    assert (x.grad[4:] == 0).all() and (x.grad[:4] != 0).any(1).all()
    assert net(x[:4], [4, 5, 6, 0]) == 0


@pytest.mark.parametrize("column, there", [("source", "covid: a; normal: c"),
                                           ("view", "covid: none; normal: none")])
def test_a_column_with_nothing_to_compare_is_refused(column, there):
    with pytest.raises(InputError, match=f"--invariant {column}: no label .*there are {there}"):
        Invariance([ROWS[0], ROWS[4]], column)


@pytest.mark.slow
def test_a_source_is_told_less_with_it():
    """Two sources differ in brightness, two labels in stripes: a regression on the features told
    sources of fresh images with AUROC .92 without the term, .51 with it."""
    g, told = torch.Generator().manual_seed(0), []
    labels, source = torch.arange(320) % 2, torch.arange(320) // 2 % 2
    x = torch.randint(0, 100, (320, 1, 32, 32), generator=g) + 25 * source.view(-1, 1, 1, 1)
    x[labels == 1, :, ::4] += 60
    x, fresh = x.to(torch.uint8), np.arange(320) >= 160
    rows = [{"label": str(a), "source": str(b)} for a, b in zip(labels.tolist(), source.tolist())]
    for term in (None, Invariance(rows[:160], "source")):
        net = Predictor([Category("label", ("0", "1"))], width=8, size=32)
        fit(net, x[:160], {"label": labels[:160]}, steps=60, batch=32, lr=2e-3, augment="plain",
            invariant=term)
        f = net.features(x).numpy()
        scores = out_of_fold((f - f.mean(0)) / (f.std(0) + 1e-6), source.numpy() == 1, fresh)
        told.append(auroc(scores[fresh], source.numpy()[fresh] == 1))
        p = net.predict(x[160:])["label"].argmax(1)
        assert (p == labels[160:]).float().mean() > 0.95
    assert told[0] > 0.8 and told[1] < 0.65, told
