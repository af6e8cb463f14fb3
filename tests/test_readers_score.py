"""Readers' answers in numbers, by hand, by other ways and by simulation; and how many images a
study needs.
"""

import dataclasses
import math

import numpy as np
import pytest
from readers_data import key_of, reading
from scipy import stats

from minidiff.errors import InputError
from minidiff.evaluation import verdicts
from minidiff.evaluation.format import jsonable
from minidiff.evaluation.readers import plan, score
from minidiff.rating import newcombe, short_by
from minidiff.statistics import wilson

# --- scoring


def test_numbers_by_hand():
    """Reader 1: 68 of 100 synthetic, 91 of 100 real; of 20 repeats 3 differ; 9 of 10 controls; 113
    of 200 told right.
    """
    key = key_of(100, 1, repeats=20, controls=10)
    quality = np.r_[np.arange(100) < 68, np.arange(100) < 91, np.full(20, True),
                    np.arange(10) < 1].astype(int)
    # of images that were Good at first
    quality[200:203] = 0
    origin = np.full(230, -1)
    origin[:200] = np.r_[np.arange(100) < 60, np.arange(100) >= 53]
    found = score.summary(key, [reading(1, quality, origin)])
    row = found["readers"][0]
    low, high = wilson(68, 100)
    assert (round(low, 3), round(high, 3)) == (.583, .763)
    assert (row["synthetic"]["value"], row["synthetic"]["low"],
            row["synthetic"]["high"]) == (.68, low, high)
    assert row["real"]["k"] == 91 and row["difference"]["value"] == pytest.approx(-.23)
    assert (row["difference"]["low"], row["difference"]["high"]) == newcombe(68, 100, 91, 100)
    assert row["intra"]["n"] == 20 and row["intra"]["same"] == .85 and row[
        "controls_bad"] == 9 and row["attentive"]
    right = 60 + 53
    assert row["origin"]["k"] == right and row["origin"]["p"] == pytest.approx(
        stats.binomtest(right, 200).pvalue)
    assert row["origin"]["said_synthetic"] == .6 and row["origin"]["said_real"] == pytest.approx(
        .47)
    pooled = found["pooled"]
    assert pooled["synthetic"]["low"] == pytest.approx(low)
    assert pooled["difference"]["low"] == pytest.approx(short_by(.68, 100, .91, 100)[0])
    assert math.isnan(pooled["difference"]["wide_low"]) and found["agreement"] == []


def test_the_first_showing_counts_whichever_item_it_was():
    key = key_of(2, 1, repeats=1)
    r = reading(1, np.array([1, 1, 1, 1, 0]), np.full(5, -1))
    assert r.first(key, [0]) == 1
    earlier = dataclasses.replace(r, position=np.array([5, 2, 3, 4, 1]))
    assert earlier.first(key, [0]) == 0


def test_inattentive_and_unfinished_readers_are_shown_and_not_pooled():
    key = key_of(40, 3, repeats=4, controls=10)
    rng = np.random.default_rng(3)
    fine, blind = (np.r_[rng.integers(0, 2, 84), np.full(10, controls)] for controls in (0, 1))
    origin = np.r_[rng.integers(0, 2, 80), np.full(14, -1)]
    part = fine.copy()
    part[50:] = -1
    unfinished = dataclasses.replace(reading(3, part, origin), missing=44)
    found = score.summary(key, [reading(1, fine, origin), reading(2, blind, origin), unfinished])
    assert [r["pooled"] for r in found["readers"]] == [True, False,
                                                       False] and found["pooled"]["readers"] == [1]
    assert [r["attentive"] for r in found["readers"]] == [True, False, True]
    assert score.summary(key, [unfinished])["pooled"] is None


def test_verdicts():
    key = key_of(200, 3)

    def answer(synthetic, real, told):
        rng = np.random.default_rng(4)
        rs = [reading(k, np.r_[rng.random(200) < synthetic, rng.random(200) < real],
                      (rng.random(400) < told) == np.repeat([True, False], 200)) for k in (1, 2, 3)]
        found = jsonable({**score.summary(key, rs), "design": key.design})
        return [v["answer"] for v in verdicts.of_readers(found)]
    assert answer(.8, .8, .5) == ["yes", "not resolved"]
    assert answer(.4, .9, .9) == ["no", "yes"]
    assert answer(.72, .85, .5)[0] == "not resolved"
    ends = dict.fromkeys(("low", "high", "wide_low", "wide_high"))
    unknown = {"pooled": {"difference": ends}, "design": {"margin": 0.1}}
    assert [v["answer"] for v in verdicts.of_readers(unknown)] == ["not resolved"]


def test_against_numbers(tmp_path):
    key, rng = key_of(60, 3), np.random.default_rng(5)
    values = rng.normal(size=60)
    rs = [reading(k, np.r_[values + rng.normal(size=60) * .5 > 0, np.ones(60)], np.zeros(120))
          for k in (1, 2, 3)]
    rows = [f"{k}.png,{values[k]},{rng.normal()},x" for k in range(60) if k]
    (tmp_path / "n.csv").write_text("file_name,likeness,chance,words\n" + "\n".join(rows) + "\n")
    numbers = score.read_numbers(str(tmp_path / "n.csv"), key)
    assert list(numbers) == ["likeness", "chance"] and math.isnan(numbers["likeness"][0])
    like, chance = score.summary(key, rs, numbers)["numbers"]
    assert like["n"] == 59 and like["r_low"] > .6 and like["auroc_low"] > .8
    assert chance["r_low"] < 0 < chance["r_high"] and chance["auroc_low"] < .5 < chance[
        "auroc_high"]
    for text, message in (("a,b\n1,2\n", "no column 'file_name'"),
                          ("file_name,x\nno.png,3\n", "no row has a number"),
                          ("file_name,x\n1.png,3\n1.png,4\n", "two rows"),
                          ("file_name,x\n1.png,3\n2.png,1.234.5\n", "n.csv:3: x '1.234.5' is not"),
                          ("file_name,x\n1.png,NaN\n2.png,<5\n3.png,3\n", "n.csv:3: x '<5'")):
        (tmp_path / "n.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            score.read_numbers(str(tmp_path / "n.csv"), key)


# --- planning


def test_plan_by_other_ways(capsys):
    assert -np.subtract(*wilson(.68 * 81, 81)) <= .2 < -np.subtract(*wilson(.68 * 80, 80))
    assert plan.n_for_width(.68, .2) == 81
    assert plan.n_for_width(.5, .001) is None
    # of the normal approximation
    for p, approximate in ((.6, 194), (.65, 85), (.7, 47)):
        n = plan.n_for_told(p, .8)
        assert approximate <= n <= 1.2 * approximate
        assert all(plan.told_power(m, p) >= .8
                   for m in range(n, n + 50)) and plan.told_power(n - 1, p) < .8
    outcomes = np.arange(48)
    rejected = np.array([stats.binomtest(int(k), 47).pvalue <= .05 for k in outcomes])
    assert plan.told_power(47, .7) == pytest.approx((stats.binom.pmf(outcomes, 47,
                                                                     .7) * rejected).sum())
    # SE .092 at 100
    n = plan.n_for_kappa(.8, .68, .36)
    assert 95 <= n <= 106
    plan.run(plan.Config())
    assert "minutes a reader" in capsys.readouterr().out


def test_margin_power_equals_simulation():
    rng = np.random.default_rng(7)
    k, m = rng.binomial(60, .7, 2000), rng.binomial(60, .72, 2000)
    hits = np.mean([short_by(a / 60, 60, b / 60, 60)[0] > -.15 for a, b in zip(k, m)])
    assert plan.margin_power(60, .7, .72, .15) == pytest.approx(hits, abs=.035)
    n = plan.n_for_margin(.68, .68, .15, .8)
    assert plan.margin_power(n, .68, .68, .15) >= .8 > plan.margin_power(n - 8, .68, .68, .15)


@pytest.mark.parametrize("knobs,message", [({"told": .4}, "--told"), ({"agree": .2}, "--agree"),
                                           ({"good": .5, "good_real": .7}, "no number of images"),
                                           ({"interval": 0}, "--interval")])
def test_what_plan_refuses(knobs, message):
    with pytest.raises(InputError, match=message):
        plan.plan(plan.Config(**knobs))


# --- simulated readers


RATES, REAL, TOLD, RHO, AGAIN = (.6, .68, .76), (.8, .86, .9), (.5, .58, .66), .55, .8


def simulated(rng, key, n, repeats):
    """Three readers of known Good-rates and known kappas: what they see in an image is partly
    shared, partly their own, and partly of the moment; each has his own threshold."""
    shared, out = rng.normal(size=2 * n), []
    for r, (made, real, told) in enumerate(zip(RATES, REAL, TOLD), 1):
        own = math.sqrt(RHO) * shared + math.sqrt(AGAIN - RHO) * rng.normal(size=2 * n)
        limit = np.repeat(stats.norm.ppf([made, real]), n)
        looks = [own + math.sqrt(1 - AGAIN) * rng.normal(size=2 * n) < limit for _ in range(2)]
        second = np.array([k % 2 * n + k // 2 for k in range(repeats)])
        quality = np.r_[looks[0], looks[1][second]]
        right = rng.random(2 * n) < told
        origin = np.where(right, np.repeat([1, 0], n), np.repeat([0, 1], n))
        out.append(reading(r, quality, np.r_[origin, np.full(repeats, -1)]))
    return out


def both(p, q, rho):
    """P(both Good) of two thresholds on normals with this correlation."""
    return stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([stats.norm.ppf(p),
                                                                        stats.norm.ppf(q)])


def truths():
    """What `simulated` was made with, worked out from the normal distribution."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    observed = np.mean([1 - RATES[a] - RATES[b] + 2 * both(RATES[a], RATES[b], RHO)
                        for a, b in pairs])
    p = np.mean(RATES)
    fleiss, ac1 = p * p + (1 - p) ** 2, 2 * p * (1 - p)
    two = 1 - RATES[0] - RATES[1] + 2 * both(RATES[0], RATES[1], RHO)
    chance = RATES[0] * RATES[1] + (1 - RATES[0]) * (1 - RATES[1])
    # of repeats: half of each kind
    mixed = (RATES[1] + REAL[1]) / 2
    same = np.mean([1 - 2 * q + 2 * both(q, q, AGAIN) for q in (RATES[1], REAL[1])])
    intra = 1 - (1 - same) / (2 * mixed * (1 - mixed))
    return {"rate": RATES[1], "real": REAL[1], "difference": RATES[1] - REAL[1], "told": TOLD[1],
            "pooled": p, "pooled difference": p - np.mean(REAL), "pooled told": np.mean(TOLD),
            "fleiss": (observed - fleiss) / (1 - fleiss), "ac1": (observed - ac1) / (1 - ac1),
            "cohen": (two - chance) / (1 - chance), "intra": intra}


@pytest.mark.slow
def test_simulated_readers_are_recovered_in_93_to_97_percent_of_1000_runs():
    rng, n, repeats = np.random.default_rng(8), 150, 90
    key, truth = key_of(n, 3, repeats), truths()
    hits, sums = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0.0)
    for _ in range(1000):
        rs = simulated(rng, key, n, repeats)
        three, two = score.summary(key, rs), score.summary(key, rs[:2])
        row, pooled = three["readers"][1], three["pooled"]
        found = {"rate": row["synthetic"], "real": row["real"], "difference": row["difference"],
                 "told": row["origin"], "pooled": pooled["synthetic"],
                 "pooled difference": pooled["difference"], "pooled told": pooled["origin"],
                 "fleiss": three["agreement"][0]["kappa"], "ac1": three["agreement"][0]["ac1"],
                 "cohen": two["agreement"][0]["kappa"], "intra": row["intra"]}
        for name, x in found.items():
            hits[name] += x["low"] <= truth[name] <= x["high"]
            sums[name] += x["value"] / 1000
    print({name: (h, round(sums[name], 3), round(float(truth[name]), 3))
           for name, h in hits.items()})
    assert all(abs(sums[name] - truth[name]) < .012 for name in truth), sums
    assert all(930 <= h <= 970 for h in hits.values()), hits
