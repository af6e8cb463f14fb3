import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, nhypergeom, norm

from minidiff.counted import normal as noise_of
from minidiff.data.table import Table
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError
from minidiff.evaluation.metrics import pairwise
from minidiff.evaluation.metrics.membership import (
    ALPHA,
    FPR,
    LEAK,
    NEEDED,
    audit,
    denoising_errors,
    found_at,
    membership,
    most_found,
    of_one_mix,
)
from minidiff.sampling.counterfactuals import bits, perplexities
from minidiff.statistics import auroc


def errors(n, shift, seed, own=0.6, draws=8):
    """An image's own difficulty, the draw's, and chance; `shift` is what the model knows of
    training images.
    """
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.exp(rng.normal(-shift, own, (n, 1)) + rng.normal(0, 1, (1, draws))
                                   * 0 + np.arange(draws) + rng.normal(0, 0.3, (n, draws))))


def test_a_model_that_knows_its_images_is_found_and_one_that_does_not_is_not():
    known = membership(errors(200, 1.5, 0), errors(200, 0, 1))
    fresh = membership(errors(200, 0, 2), errors(200, 0, 3))
    assert known["low"] > 0.85 and known["p"] < 0.001
    assert known["tpr"] > 0.2 and known["tpr_p"] < 0.001 and known["tpr_most"] > known["tpr"]
    assert fresh["low"] < 0.5 < fresh["high"] and fresh["p"] > 0.05 and abs(
        fresh["auroc"] - 0.5) < fresh["chance"] and fresh["tpr"] < 0.06 < fresh["tpr_p"]
    assert (known["n_train"], known["n_heldout"], known["patients_train"]) == (200, 200, 200)


def test_the_numbers_by_hand():
    a, b = errors(37, 0.5, 4), errors(120, 0, 5)
    found = membership(a, b)
    s, t = -a.log().mean(1).numpy(), -b.log().mean(1).numpy()
    assert found["auroc"] == pytest.approx((s[:, None] > t).mean())
    assert found["auroc"] == pytest.approx(auroc([*s, *t], [True] * 37 + [False] * 120))
    assert found["false_alarms"] == 1 and found["tpr"] == pytest.approx((s > np.sort(t)[-2]).mean())
    assert found["chance"] == pytest.approx(1.96 * np.sqrt(158 / (12 * 37 * 120)), rel=1e-3)


def test_times_whose_errors_differ_by_orders_of_magnitude_weigh_alike():
    a, b = errors(60, 0.8, 6), errors(60, 0, 7)
    scale = 10.0 ** torch.arange(8)
    assert membership(a * scale, b * scale) == membership(a, b)


def test_images_of_one_patient_are_one_piece_of_evidence():
    a, b = (errors(30, s, k).repeat_interleave(6, 0) for s, k in ((0.4, 8), (0, 9)))
    patients = [[f"{name}{i // 6}" for i in range(180)] for name in "ab"]
    naive, honest = membership(a, b), membership(a, b, train_patients=patients[0],
                                                 heldout_patients=patients[1])
    width = lambda i: i[1] - i[0]  # noqa: E731
    assert width(honest["by_patient"]) > 1.7 * width(naive["by_patient"])
    assert honest["p"] > naive["p"]
    assert honest["patients_train"] == 30 and width(naive["by_patient"]) == pytest.approx(
        naive["high"] - naive["low"], rel=0.15)


def test_the_bound_is_exact_for_both_sides():
    """1 % of 200 held-out images are 2; 6 of them may be above the true score with 2.5 %."""
    heldout = np.arange(200.0)
    assert binom.cdf(5, 200, 0.01) >= 0.975 > binom.cdf(4, 200, 0.01)
    train = np.r_[np.full(190, -1.0), np.full(10, 194.5)]     # above the 6th highest, 194
    found = found_at(train, heldout)
    assert found["tpr"] == 0 and found["false_alarms"] == 2
    assert found["tpr_most"] == pytest.approx(beta.ppf(0.975, 11, 190))
    assert most_found(train, heldout + 1) == pytest.approx(beta.ppf(0.975, 1, 200))
    assert most_found(train, heldout[:1] - 2) == most_found(train, heldout[:4] - 9) == 1.0
    # ten training images above all of 100 held-out ones, by chance: C(100, 10) / C(200, 10)
    found = found_at(np.r_[np.zeros(90), np.full(10, 9.0)], np.linspace(1, 2, 99))
    assert found["false_alarms"] == 0 and found["tpr_p"] == pytest.approx(
        math.comb(100, 10) / math.comb(199, 10))


def test_how_many_patients_a_yes_needs():
    def bound(n):   # of a model that knows nothing, in four of five audits
        rank = int(binom.ppf(1 - ALPHA / 2, n, FPR)) + 1
        k = int(nhypergeom.ppf(0.8, 2 * n, n, rank))
        return beta.ppf(1 - ALPHA / 2, k + 1, n - k)

    assert bound(NEEDED) < LEAK <= min(bound(n) for n in range(100, NEEDED, 20))


def test_one_image_of_each_patient_counts_at_one_percent():
    a, b = errors(200, 0.5, 4), errors(120, 0, 5)
    patients = {"train_patients": [i // 2 for i in range(200)],
                "heldout_patients": [f"h{i // 3}" for i in range(120)]}
    found, alone = membership(a, b, **patients), membership(a[::2], b[::3])
    assert (found["patients_train"], found["patients_heldout"]) == (100, 40)
    assert [found[k] for k in ("tpr", "tpr_most", "tpr_p")] == [
        alone[k] for k in ("tpr", "tpr_most", "tpr_p")]


def test_a_reference_takes_the_difficulty_of_each_image_out():
    """The ratio of two models' errors finds what the errors of one hide."""
    rng = np.random.default_rng(0)
    hard = np.exp(rng.normal(0, 2, (400, 1)))
    first = hard * np.exp(rng.normal(0, 0.1, (400, 8)) - 0.3 * (np.arange(400) < 200)[:, None])
    second = hard * np.exp(rng.normal(0, 0.1, (400, 8)))
    one, ratio = map(torch.from_numpy, (first, first / second))
    plain, calibrated = (membership(x[:200], x[200:]) for x in (one, ratio))
    assert plain["by_patient"][0] < 0.5 and calibrated["auroc"] > 0.95
    assert calibrated["tpr"] > 10 * plain["tpr"]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_errors_that_are_none(bad):
    x = errors(5, 0, 12)
    x[3, 2] = bad
    with pytest.raises(InputError, match="1 of 5 held-out images have an error"):
        membership(errors(5, 0, 13), x)
    with pytest.raises(InputError, match="2 or more training patients; there is 1"):
        membership(errors(5, 0, 13), errors(5, 0, 12), train_patients=["a"] * 5)


def test_every_image_gets_the_same_times_and_noise_whatever_the_batch():
    """A denoiser that remembers its training images: its guess is the nearest of them."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 4, 4), generator=g, dtype=torch.uint8)
    memory = pixels[:20].flatten(1).double() / 255

    def losses(x, t, seed):
        x = x.flatten(1).double() / 255
        seen = x + t / 1000 * noise_of(seed, [0], 0, (16,)).double()
        guess = memory[torch.cdist(seen, memory).argmin(1)]
        return (guess - x).square().mean(1) + 1e-3

    one, other = (denoising_errors(losses, pixels, batch=batch) for batch in (40, 7))
    assert torch.equal(one, other) and one.shape == (40, 8) and one.dtype == torch.float64
    assert not torch.equal(one[:, 0], one[:, 1])
    found = membership(one[:20], one[20:])
    assert found["auroc"] > 0.95 and found["p"] < 0.001


class Mixture:
    """The denoiser of an equal mixture of N(centre, spread²·1): E[z | x]."""

    net, schedule = None, Schedule.scaled_linear()

    def __init__(self, centres, spread):
        self.centres, self.spread = centres.flatten(1), spread

    def __call__(self, x, sigma, labels=None):
        y, s, noise = x.flatten(1), self.spread**2, float(sigma) ** 2
        near = (-torch.cdist(y, self.centres).square() / (2 * (s + noise))).softmax(1)
        return ((noise * near @ self.centres + s * y) / (s + noise)).view_as(x)


def likelihoods(denoiser, z):
    return perplexities(SimpleNamespace(denoiser=denoiser, size=64), z, {}, 0)


def test_the_likelihood_of_a_gaussian_is_its_closed_form():
    """A standard normal is exact in any number of steps; along other axes the flow only stretches,
    which takes more of them."""
    z = noise_of(0, range(40), 0, (4, 3, 2)).double()
    nats = -(z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    unit = Mixture(torch.zeros(1, 24).double(), 1.0)
    torch.testing.assert_close(likelihoods(unit, z).log2()[:, 0], -nats / (24 * math.log(2)))
    narrow, s = Mixture(torch.zeros(1, 24).double(), 0.5), Schedule.scaled_linear().sigmas_table
    first, last = ((0.25 + s[k] ** 2) / (1 + s[k] ** 2) for k in (0, -1))
    y = z * (last / first).sqrt()
    nats = (12 * (last / first).log()
            - (y.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2)
    found = bits(SimpleNamespace(denoiser=narrow), z, {}, torch.ones_like(z), steps=160)
    torch.testing.assert_close(found, -nats / (24 * math.log(2)), atol=2e-3, rtol=0)


def test_the_likelihood_finds_a_model_that_remembers_and_no_other():
    """Its density has a peak at every training image; or it is that of the population."""
    z = noise_of(1, range(120), 0, (4, 3, 2)).double()
    patients = {"train_patients": [*range(60)], "heldout_patients": [*range(60, 120)]}
    remembers, knows = (membership(*likelihoods(model, z).split(60), **patients) for model in (
        Mixture(z[:60], 0.5), Mixture(torch.zeros(1, 24).double(), 1.0)))
    assert remembers["auroc"] > 0.95 and remembers["p"] < 0.001 and remembers["tpr"] > 0.5
    assert knows["low"] < 0.5 < knows["high"] and knows["p"] > 0.05 and knows["tpr_p"] > 0.05


def test_both_sides_have_labels_in_the_same_shares_however_many_are_taken():
    """A rare label that is harder would else be taken for memory."""
    def side(**counts):
        labels = [label for label, n in counts.items() for _ in range(n)]
        return Table([{"file": f"{label}{i}", "label": label} for i, label in enumerate(labels)])

    sides = {"train": side(a=500, b=500, c=60, d=3), "heldout": side(a=100, b=300, c=200)}
    drawn = of_one_mix(sides, 0)
    # smaller shares: a 1/6, b 500/1063, c 60/1063, d 0; all of a held out, of b and c in training
    ended = {name: [table.column("label").count(label) for label in "abcd"]
             for name, table in drawn.items()}
    assert ended["heldout"] == [100, 282, 34, 0] and ended["train"] == [177, 500, 60, 0]
    for k in (20, 100, 300):
        for label in "abc":
            a, b = (table.column("label")[:k].count(label) for table in drawn.values())
            assert abs(a - b) <= 1
    rows = [row["file"] for row in drawn["train"].rows]
    assert len({*rows}) == len(rows) and rows == [
        row["file"] for row in of_one_mix(sides, 0)["train"].rows]
    assert rows != [row["file"] for row in of_one_mix(sides, 1)["train"].rows]
    apart = {"train": side(a=30, b=5), "heldout": side(b=30)}
    apart = {name: replace(table, hashes={file: name + file for file in table.column("file")})
             for name, table in apart.items()}
    trained_on = {*apart["train"].hashes.values()}
    assert audit(apart, trained_on, {}, images={}, run="runs/x")["why"].startswith(
        "5 train images of runs/x can be drawn so that both sides have labels in the same shares")
    alike = of_one_mix({"train": side(a=40), "heldout": side(a=30)}, 0)
    assert [len(table) for table in alike.values()] == [40, 30]


@pytest.mark.slow
def test_intervals_by_patient_cover():
    """120 images of 40 patients on each side; DeLong's interval, for images, does not and need
    not.
    """
    rng, covered, p, n = np.random.default_rng(0), 0, [], 400

    def side(shift):
        of_patient = np.repeat(rng.normal(-shift, 1, 40), 3)
        return torch.from_numpy(np.exp(of_patient + rng.normal(0, 0.5, 120)))[:, None]

    patients = [[f"{k}{i // 3}" for i in range(120)] for k in "ab"]


    # of two normal scores that lie 1 apart
    truth = norm.cdf(1 / np.sqrt(2 * 1.25))
    for _ in range(n):
        found = membership(side(1), side(0), train_patients=patients[0],
                           heldout_patients=patients[1], n_boot=300)
        covered += found["by_patient"][0] <= truth <= found["by_patient"][1]
        p.append(membership(side(0), side(0), train_patients=patients[0],
                            heldout_patients=patients[1], n_boot=2)["p"])
    assert covered / n > 0.9 and np.mean(np.array(p) < 0.05) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / n)


def test_blocks_of_training_images_equal_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    train, heldout = (torch.from_numpy(rng.lognormal(size=(n, 2))) for n in (50, 40))
    patients = {"train_patients": np.arange(50) // 2, "heldout_patients": np.arange(40) // 3}
    whole = membership(train, heldout, **patients, n_boot=50)
    monkeypatch.setattr(pairwise, "CELLS", 7 * 40)
    assert membership(train, heldout, **patients,
                      n_boot=50)["by_patient"] == pytest.approx(whole["by_patient"], rel=1e-12)
