import math

import numpy as np
import pytest
from scipy import stats

from minidiff import rating
from minidiff.statistics import wilson

N = math.nan
KRIPPENDORFF = np.array([  # 12 units, 4 readers, 5 categories: Krippendorff 2011, Gwet 2014
    [1, 1, N, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
    [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [N, 5, 5, 5], [N, N, 1, 1], [N, N, 3, N]])


def two_readers(a, b, c, d):
    """Ratings of both Good, first only, second only, neither."""
    return np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [a, b, c, d], 0)


def test_newcombe_published():
    """Newcombe 1998, table II, method 10."""
    for k, n, k2, n2, low, high in ((56, 70, 48, 80, .0524, .3339), (9, 10, 3, 10, .1705, .8090),
                                    (6, 7, 2, 7, .0582, .8062),
                                    (5, 56, 0, 29, -.0381, .1926), (10, 10, 0, 20, .6791, 1.0)):
        assert rating.newcombe(k, n, k2, n2) == pytest.approx((low, high), abs=1e-4)
    assert all(math.isnan(x) for x in rating.newcombe(1, 2, 0, 0))


def test_newcombe_equals_statsmodels():
    peer = pytest.importorskip("statsmodels.stats.proportion").confint_proportions_2indep
    for counts in ((68, 100, 91, 100), (0, 20, 3, 17), (40, 40, 33, 60)):
        assert rating.newcombe(*counts) == pytest.approx(peer(*counts, method="newcomb"), abs=1e-9)


def test_wilson_and_binomial_equal_statsmodels():
    peer = pytest.importorskip("statsmodels.stats.proportion")
    for k, n in ((68, 100), (0, 9), (30, 31)):
        assert wilson(k, n) == pytest.approx(peer.proportion_confint(k, n, method="wilson"),
                                             abs=1e-9)
        assert rating.against_chance(k, n) == pytest.approx(peer.binom_test(k, n, 0.5))
    assert rating.against_chance(8, 10) == pytest.approx(2 * 56 / 1024)


def test_cohen_equals_statsmodels():
    peer = pytest.importorskip("statsmodels.stats.inter_rater")
    for cells in ((45, 15, 25, 15), (58, 7, 13, 22), (96, 2, 1, 1)):
        found, n = rating.agreement(two_readers(*cells), "cohen"), sum(cells)
        wanted = peer.cohens_kappa(np.array([[cells[0], cells[1]], [cells[2], cells[3]]]))
        assert found.value == pytest.approx(wanted.kappa, abs=1e-12)
        assert found.se * math.sqrt((n - 1) / n) == pytest.approx(wanted.std_kappa, abs=1e-12)
        assert found.low < found.value < found.high <= 1


def test_fleiss_equals_statsmodels_and_fleiss_1971():
    peer = pytest.importorskip("statsmodels.stats.inter_rater")
    rng = np.random.default_rng(0)
    ratings = (rng.random((50, 4)) < rng.random((50, 1))).astype(int)
    counts, _ = peer.aggregate_raters(ratings)
    assert rating.agreement(ratings, "fleiss").value == pytest.approx(peer.fleiss_kappa(counts),
                                                                      abs=1e-12)
    table = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0],
                      [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
                      [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])
    ratings = np.array([np.repeat(np.arange(5), row) for row in table])
    found = rating.agreement(ratings, "fleiss", 5)
    assert (found.value, found.observed, found.expected) == pytest.approx((.210, .378, .213),
                                                                          abs=1e-3)


def test_missing_ratings_as_published():
    """Values and standard errors of Gwet's own programs for these data: AC1 .775 (.143), Fleiss
    .761 (.153).
    """
    x = np.where(np.isnan(KRIPPENDORFF), -1, KRIPPENDORFF - 1)
    ac1, fleiss = (rating.agreement(x, name, 5) for name in ("ac1", "fleiss"))
    assert (ac1.value, ac1.se) == pytest.approx((.77544, .14295), abs=1e-5)
    assert (fleiss.value, fleiss.se) == pytest.approx((.76117, .15302), abs=1e-5)


def test_the_prevalence_paradox():
    """Feinstein & Cicchetti 1990: two pairs of readers agree on 85 of 100 images, with kappa .70
    and .32; AC1 by hand.
    """
    even, odd = (two_readers(*cells) for cells in ((40, 9, 6, 45), (80, 10, 5, 5)))
    assert [round(rating.agreement(x, "cohen").value, 2) for x in (even, odd)] == [.70, .32]
    assert rating.agreement(odd, "ac1").value == pytest.approx(
        (.85 - 2 * .875 * .125) / (1 - 2 * .875 * .125))
    assert rating.agreement(odd, "ac1").observed == rating.agreement(odd, "cohen").observed == .85
    even = rating.agreement(two_readers(58, 10, 10, 22), "cohen")
    assert (even.value, even.se) == pytest.approx((.54, .092), abs=.005)


def test_standard_errors_equal_the_jackknife():
    rng = np.random.default_rng(1)
    x = (rng.random((150, 3)) < rng.beta(1, 1, (150, 1))).astype(int)
    for name, ratings in (("cohen", x[:, :2]), ("fleiss", x), ("ac1", x)):
        left = [rating.agreement(np.delete(ratings, k, 0), name).value for k in range(150)]
        jackknife = math.sqrt(149 / 150 * ((np.array(left) - np.mean(left)) ** 2).sum())
        assert rating.agreement(ratings, name).se == pytest.approx(jackknife, rel=.01)


def test_ends():
    same = rating.agreement(two_readers(30, 0, 0, 20), "cohen")
    # a width, though all agree
    assert same.value == same.high == 1 and 0.7 < same.low < 0.95
    # chance alone would do
    assert math.isnan(rating.agreement(two_readers(30, 0, 0, 0), "cohen").value)
    assert rating.agreement(two_readers(30, 0, 0, 0), "ac1").value == 1
    assert rating.agreement([[0, -1], [-1, 1]], "ac1").n == 0
    swapped = rating.agreement(1 - two_readers(40, 5, 9, 30), "ac1")
    assert swapped.value == pytest.approx(rating.agreement(two_readers(40, 5, 9, 30), "ac1").value)


def test_intraclass_kappa():
    """The interval's ends are kappas that the chi-square of one degree of freedom just allows."""
    first, second = two_readers(14, 3, 2, 11).T
    kappa, low, high = rating.intraclass(first, second)
    p = (2 * 14 + 5) / 60
    assert kappa == pytest.approx(1 - 5 / (2 * 30 * p * (1 - p)))
    for k in (low, high):
        wanted = 30 * np.array([p * p + k * p * (1 - p), 2 * p * (1 - p) * (1 - k),
                                (1 - p) ** 2 + k * p * (1 - p)])
        assert ((np.array([14, 5, 11]) - wanted) ** 2 / wanted).sum() == pytest.approx(
            stats.chi2.ppf(.95, 1), rel=1e-6)
    assert rating.intraclass(second, first) == pytest.approx((kappa, low, high))
    assert rating.agreement(np.stack([first, second], 1),
                            "fleiss").value == pytest.approx(kappa, abs=1e-12)
    perfect = rating.intraclass([1, 0, 1, 0] * 7, [1, 0, 1, 0] * 7)
    assert perfect[0] == perfect[2] == 1 and 0.6 < perfect[1] < 0.95
    assert all(math.isnan(x) for x in rating.intraclass([1, 1], [1, 1]))
    opposite = rating.intraclass([1, 0] * 10, [0, 1] * 10)
    assert opposite[0] == opposite[1] == -1 and opposite[2] < -0.5


def test_effective_wilson_is_wilson_for_one_reader():
    x = (np.arange(100) < 68).astype(float)
    assert rating.effective_wilson(.68, x.var() / 100, 100) == pytest.approx(wilson(68, 100))
    assert rating.effective_wilson(.68, x.var() / 50, 100) == pytest.approx(wilson(34, 50))
    assert rating.effective_wilson(1.0, 0.0, 100) == pytest.approx(wilson(100, 100))


def test_two_way_random_interval_against_drawing_readers_and_images_again():
    """With many of both, the standard deviation over two-way resamples (Owen 2007)."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=300) + .5 * rng.normal(size=(40, 1)) + .6 * rng.normal(size=(40, 300))
    made, real = (z[:, :150] < .4).astype(float), (z[:, 150:] < 1.2).astype(float)
    readers = rng.multinomial(40, np.full(40, 1 / 40), 4000) / 40
    means = [((readers @ t) * (rng.multinomial(150, np.full(150, 1 / 150), 4000) / 150)).sum(1)
             for t in (made, real)]
    value, (low, high) = rating.two_way_random_interval(made)
    assert value == made.mean() and (high - low) / 3.92 == pytest.approx(means[0].std(), rel=.08)
    value, (low, high) = rating.two_way_random_interval(made, real)
    assert value == made.mean() - real.mean()
    assert (high - low) / 3.92 == pytest.approx((means[0] - means[1]).std(), rel=.08)
    assert rating.two_way_random_interval(np.ones((3, 20)))[1] == pytest.approx(wilson(20, 20))
    low, high = rating.two_way_random_interval(np.ones((3, 20)), np.ones((3, 20)))[1]
    assert low < 0 < high


@pytest.mark.slow
def test_intervals_hold_what_they_should_in_93_to_97_percent_of_runs():
    """Intraclass kappa of 60 repeats; rates over new readers and images, of six readers who differ
    by 0.3 probits.
    """
    rng, hits = np.random.default_rng(3), np.zeros(3)
    rate, slope = stats.norm.ppf(.68) * math.sqrt(1.09), math.sqrt(.5)
    for _ in range(1000):
        # same answer again, or drawn anew: kappa .6
        good = rng.random(60) < .7
        again = np.where(rng.random(60) < .6, good, rng.random(60) < .7)
        _, low, high = rating.intraclass(good.astype(int), again.astype(int))
        hits[0] += low <= .6 <= high
        noise = slope * rng.normal(size=240) + slope * rng.normal(size=(6, 240)) - .3 * rng.normal(
            size=(6, 1))
        made, real = noise[:, :120] < rate, noise[:, 120:] < stats.norm.ppf(.9) * math.sqrt(1.09)
        _, (low, high) = rating.two_way_random_interval(made.astype(float))
        hits[1] += low <= .68 <= high
        _, (low, high) = rating.two_way_random_interval(made.astype(float), real.astype(float))
        hits[2] += low <= -.22 <= high
    assert all(930 <= h <= 970 for h in hits), hits
