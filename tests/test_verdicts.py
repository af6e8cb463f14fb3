"""How often each word is wrong: simulations, at the rates that docs/metrics.md states.

The answers themselves: tests/test_answers.py.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, mannwhitneyu, norm
from test_answers import AUDIT, cloud, joined

from benchmarks import memorisation as bench
from benchmarks import realism
from minidiff.classification.fairness import gaps, pairs
from minidiff.evaluation.metrics.distances import disjoint_draws, kid
from minidiff.evaluation.metrics.membership import FPR, found_at
from minidiff.evaluation.metrics.named import named
from minidiff.evaluation.metrics.neighbours import prdc
from minidiff.evaluation.metrics.pairwise import distances, small
from minidiff.evaluation.metrics.report_rows import ALL, Side, _at_equal_n, by_label
from minidiff.evaluation.verdicts import (
    MARGIN,
    no_worse,
    variety,
    verdicts,
)
from minidiff.rating import effective_n, mover, short_by
from minidiff.runs import read_json
from minidiff.statistics import clopper_pearson

# --- gain, harm, no gain of interest: benchmarks/verdicts.json

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def simulated():
    return json.loads((BENCHMARKS / "verdicts.json").read_text())


@pytest.fixture(scope="module")
def simulation():
    spec = importlib.util.spec_from_file_location("simulation", BENCHMARKS / "verdicts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bar(rate, n):
    """The rate, and two standard errors of a simulation of n."""
    return rate + 2 * math.sqrt(rate * (1 - rate) / n)


def test_the_words_of_a_study_are_as_rarely_wrong_as_they_say(simulated, simulation):
    """Every design of the script, 2,000 studies each."""
    for table, designs in simulation.DESIGNS.items():
        assert len(simulated[table]) == len(designs)
        for design, row in zip(designs, simulated[table]):
            assert row["n"] >= 2000 and json.loads(json.dumps(design)).items() <= row.items()
    for row in simulated["false"]:
        assert row["rate"] <= bar(0.05, row["n"]) * (row["seeds"] > 2), row
    for row in simulated["worth"]:
        assert row["rate"] <= bar(0.025, row["n"]), row
    for row in simulated["sees"]:
        assert 0.7 <= row["rate"] <= 0.9, row
    (power,) = (row["rate"] for row in simulated["true"] if row["patients"] == 300
                and row.get("generators") == 3 and row["generator_sd"] == 0)
    assert power >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("table,design", [
    ("false", {"seeds": 3, "seed_sd": 0.05, "pairs": 4, "patients": 60}),
    ("false", {"seeds": 5, "seed_sd": 0.0, "pairs": 4, "patients": 300, "primary": True}),
    ("false", {"seeds": 3, "seed_sd": 0.0, "pairs": 4, "patients": 60, "metric": "auroc"}),
    ("false", {"seeds": 15, "generators": 3, "generator_sd": 0.02, "seed_sd": 0.02, "pairs": 1,
               "patients": 300}),
    ("true", {"seeds": 15, "generators": 3, "generator_sd": 0.0, "seed_sd": 0.02, "patients": 300,
              "gain": 0.06}),
    ("sees", {"seeds": 5, "seed_sd": 0.02, "patients": 150}),
    ("worth", {"seeds": 10, "seed_sd": 0.02, "patients": 300, "gain": 0.04})])
def test_the_committed_rates_of_a_study_are_found_again(simulated, simulation, table, design):
    (row,) = (row for own, row in zip(simulation.DESIGNS[table], simulated[table])
              if own == design)
    again = simulation.measure(table, design, row["n"])
    assert again.pop("gain", 0) == pytest.approx(row.get("gain", 0))
    assert json.loads(json.dumps(again)).items() <= row.items()


# --- what selection does to a figure and to a word: benchmarks/selection.json


@pytest.fixture(scope="module")
def selected():
    from benchmarks import selection
    return selection, json.loads(Path(selection.__file__).with_suffix(".json").read_text())


def test_the_checkpoint_taken_is_flattered_by_what_chose_it_and_not_by_test_images(selected):
    found = selected[1]["choices"]
    val, test, truth, n = found["val"], found["test"], found["true KD"], found["n"]
    assert n >= 1000 and val["KD"] < truth - 10 * val["se"]
    assert abs(test["KD"] - truth) < 3 * test["se"]
    two_in_a_hundred = 0.025 + 2 * math.sqrt(0.025 * 0.975 / n)
    assert val["below"] > 2 * two_in_a_hundred
    assert test["below"] <= two_in_a_hundred and test["above"] <= two_in_a_hundred


def test_the_true_distance_of_the_simulation(selected):
    simulation, rng = selected[0], np.random.default_rng(0)
    shape = 3000, simulation.D
    drawn = [kid(real=rng.normal(size=shape), fake=rng.normal(simulation.SHIFT, 1, shape))
             for _ in range(4)]
    assert np.mean(drawn) == pytest.approx(simulation.true_kd(), rel=0.1)


def test_a_filter_never_tests_and_an_independent_judge_is_seldom_deceived(selected):
    rows = selected[1]["filtered"]
    assert sum(row["sets"] for row in rows if not row["strength"]) >= 800
    for row in rows:
        assert row["answers"]["own, filter unknown"] == {"yes": 1}
        assert row["answers"]["own"] == {"not tested": 1}
    chance = [row["answers"]["independent"] for row in rows if not row["strength"]]
    assert np.mean([said.get("yes", 0) for said in chance]) <= 0.025
    assert np.mean([said.get("no", 0) for said in chance]) >= 0.95


@pytest.mark.slow
def test_the_simulations_of_selection_give_what_is_on_record(selected):
    simulation, found = selected
    again = simulation.choices(found["first choices"]["n"])
    for split in ("val", "test"):
        assert again[split] == pytest.approx(found["first choices"][split], rel=1e-6), split
    # training differs by machine; what is said must not
    by_chance, as_asked = simulation.filtered(0, sets=40)
    assert by_chance["answers"]["own"] == as_asked["answers"]["own"] == {"not tested": 1}
    assert by_chance["answers"]["independent"] == {"no": 1}
    kds = again["val"]["KD"], again["test"]["KD"], again["true KD"]
    print("n = {}: KD on val {:.3f}, on test {:.3f}, true {:.3f}".format(again["n"], *kds))
    print(f"n = {by_chance['sets']} filtered sets: {by_chance['answers']}")


# Simulations: copies and membership. Rates of the words, with their n.


@pytest.mark.slow
def test_membership_says_yes_and_no_wrongly_in_5_percent_at_most():
    """400 audits a row. A model that betrays 5 % of its training images is called private in no
    more than 5 %, one that knows nothing is accused in no more than 5 %, and the bound covers.
    With the second attack, too, whose scores tell nothing of the first one's: the worst case."""
    rates = {}

    def attack(rng, n, m, known):
        train, heldout = rng.normal(size=n) + 8 * (np.arange(n) < known * n), rng.normal(size=m)
        return found_at(train, heldout) | {"p": mannwhitneyu(train, heldout,
                                                             alternative="greater").pvalue}

    for n, m, second in ((100, 100, 0), (200, 200, 0), (500, 500, 0), (1000, 1000, 0),
                         (500, 200, 0), (100, 100, 50), (500, 500, 100), (500, 500, 500)):
        for known in (0.0, 0.05):
            truth = known + FPR * (1 - known)
            words, covered, runs = [], 0, 400
            for seed in range(runs):
                rng = np.random.default_rng(seed)
                found = AUDIT | attack(rng, n, m, known)
                if second:
                    found["likelihood"] = AUDIT | attack(rng, second, second, known)
                words.append(verdicts({"distances": [], "membership": found})[0]["answer"])
                covered += found["tpr_most"] >= truth
            rates[n, m, second, known] = [words.count("yes") / runs, words.count("no") / runs,
                                  covered / runs]
    print("n, m, n of the second, memorised: yes, no, covered (400 audits each)", rates)
    error = 2 * math.sqrt(0.05 * 0.95 / 400)
    for (*_, known), (yes, no, covered) in rates.items():
        assert covered >= 0.95 - error
        assert (yes if known else no) <= 0.05 + error
    assert rates[500, 500, 0, 0.0][0] >= 0.75 and rates[200, 200, 0, 0.05][1] >= 0.95
    assert rates[500, 500, 100, 0.0][0] >= 0.75   # the second attack leaves the yes possible
    assert rates[100, 100, 0, 0.0][0] < 0.2           # so few resolve nothing


@pytest.mark.slow
def test_five_exact_copies_among_300_are_always_found_at_700_to_300():
    """Each of 60 exact copies, plain and mirrored, is named alone, so five are named always."""
    pixels, patients = bench.phantoms(1100)
    train, heldout = bench.draw(patients, (700, 300), np.random.default_rng(0))
    x, y = small(pixels[train], 64), small(pixels[heldout], 64)
    copies = torch.cat([x[:30], x[30:60].flip(-1)])
    found = named(distances(copies, x), distances(y, x), x)
    print(f"{found['found']} of 60 exact copies named, {found['heldout']} of 300 held-out")
    assert found["found"] == 60 and found["heldout"] <= 1
    assert {i["fake"] == i["train"] for i in found["images"]} == {True}


@pytest.mark.slow
def test_the_fixed_part_of_the_table_of_copies_is_what_the_benchmark_wrote():
    """160 phantoms, 60 training, 45 held-out and 40 synthetic; 40 repeats, 80 of the innocent."""
    rows, kept = bench.fixed(), json.loads(bench.FILE.read_text())["fixed"]
    print(rows)
    for row, before in zip(rows, kept, strict=True):
        assert all(row[k] == pytest.approx(before[k], abs=0.051) for k in row
                   if isinstance(row[k], float)), (row, before)


# --- estimators: margins, coverage, the mix of labels, gaps of a page; rates that docs/metrics.md
# states. What is random may exceed a rate by two standard errors of the simulation.


def at_most(found, rate, n):
    print(f"{found:.3f} of {n}, stated {rate}")
    return found <= rate + 2 * math.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize("n,m", [(45, 45), (45, 150), (300, 45), (150, 150), (300, 300)])
def test_no_worse_errs_at_its_margin_in_one_of_forty(n, m):
    """Exact: over all outcomes, for real shares of .15 to 1, the synthetic one 10 points lower."""
    p, q = np.arange(n + 1) / n, np.arange(m + 1) / m
    ends = (np.array([clopper_pearson(k, size) for k in range(size + 1)]).T[:, :, None]
            for size in (n, m))
    (a, b), (c, d) = ends
    low, high = mover(p[:, None], (a, b), q, (c.T, d.T))
    assert low[n // 2, m // 2] == short_by(p[n // 2], n, q[m // 2], m)[0]
    errors = []
    for real in np.arange(0.15, 1.001, 0.01):
        chance = np.outer(binom.pmf(np.arange(n + 1), n, real - MARGIN),
                          binom.pmf(np.arange(m + 1), m, min(real, 1)))
        errors.append([(chance * (low > -MARGIN)).sum(), (chance * (high < -MARGIN)).sum()])
    print(n, m, np.max(errors, 0))
    assert np.max(errors) <= 0.025


@pytest.mark.slow
def test_no_worse_counts_patients():
    """Real images of 20 to 100 patients, three of each, that agree more than images do."""
    for patients in (20, 50, 100):
        rng, runs, yes = np.random.default_rng(patients), 1000, 0
        level, who = norm.ppf(0.85), np.repeat(np.arange(patients), 3)
        for _ in range(runs):
            easy = rng.standard_normal(patients)[who] + rng.standard_normal(3 * patients)
            real = easy < level * math.sqrt(2)
            made = rng.random(100) < 0.75
            yes += no_worse(made.mean(), 100, real.mean(), effective_n(real, who))[0] == "yes"
        assert at_most(yes / runs, 0.025, runs)


def reach(rng, n, kind, amount):
    """Held-out, other real and synthetic images: too wide, or without a share of the real ones."""
    real, other = rng.standard_normal((n, 16)), rng.standard_normal((2 * n, 16))
    made = rng.standard_normal((n, 16)) * (amount if kind == "wide" else 1)
    if kind == "missing":
        for x in (real, other):
            x[rng.random(len(x)) < amount, 0] += 12
    return real, other, made


@pytest.mark.slow
@pytest.mark.parametrize("n,runs,kind,amount", [(45, 80, "wide", 1.16), (45, 80, "missing", 0.14),
                                                (120, 40, "missing", 0.11)])
def test_as_varied_errs_in_one_of_forty_and_coverage_has_its_interval(n, runs, kind, amount):
    """At coverages 10 points below those of real images, by these amounts on average."""
    rng, found = np.random.default_rng(n), []
    for _ in range(runs):
        real, other, made = reach(rng, n, kind, amount)
        sides = {name: Side(x, np.array(["a"] * len(x)), np.array([f"{name}{i}" for i in range(
            len(x))])) for name, x in (("heldout", real), ("train", other), ("synthetic", made))}
        row = _at_equal_n(sides["heldout"], sides["synthetic"], 0)
        pool = joined(sides["heldout"], sides["train"])
        draws, _, _ = disjoint_draws(pool.patients, n, n, 20, 0)
        floor = np.median([prdc(real=pool.features[a], fake=pool.features[b]).coverage
                           for a, b in draws])
        found.append({**row, "extractor": "x", "label": ALL, "set": "synthetic",
                      "coverage_floor": {"median": floor}})
    truth = np.mean([row["coverage"] for row in found])
    missed = np.mean([not row["coverage_low"] <= truth <= row["coverage_high"] for row in found])
    said = [variety([row])[0]["answer"] for row in found]
    assert at_most(said.count("yes") / runs, 0.025, runs) and at_most(missed, 0.05, runs)


def test_a_perfect_generator_of_another_mix_of_labels_is_at_the_floor():
    """50/50 against 90/10, labels 2 standard deviations apart: no distance for the mix alone."""
    def world(seed, normal, covid):
        return joined(cloud(seed, "normal", normal), cloud(seed + 50, "covid", covid, 2.0))

    made, heldout = world(1, 60, 60), world(2, 108, 12)
    found = by_label("x", synthetic=made, train=world(3, 270, 30), heldout=heldout,
                     labels=["normal", "covid"], repeats=40)
    row = next(r for r in found if (r["label"], r["set"]) == (ALL, "synthetic"))
    assert (row["n"], row["m"]) == (120, 66) and row["KD_low"] < 0 < row["KD_high"]
    assert row["KD"] < row["KD_floor"]["high"] and row["KD_p"] > 0.05
    assert kid(real=heldout.features, fake=made.features) > 3 * row["KD_floor"]["high"]
    real = next(r for r in found if (r["label"], r["set"]) == (ALL, "real"))
    assert real["KD_low"] < 0 < real["KD_high"]


@pytest.mark.slow
def test_a_page_of_gaps_has_a_mark_by_chance_in_one_of_twenty():
    """Three arms of scores that know no group, 400 images, three columns, all figures."""
    runs, marked, cut = 60, 0, 0.8
    columns = {"sex": "FM", "view": ("AP", "PA"), "age": ("30", "50", "70")}
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        positive, shared = rng.random(400) < 0.4, rng.standard_normal(400)
        rows = [{name: rng.choice(list(cells)) for name, cells in columns.items()}
                for _ in range(400)]
        tests = 3 * pairs(positive, rows, list(columns))
        pages = [gaps(positive + shared + rng.standard_normal(400), positive, rows, range(400),
                      columns=list(columns), threshold=cut, tests=tests, n_boot=200)
                 for _ in range(3)]
        marked += any(gap["resolved"] for page in pages for gap in page["gaps"])
    assert at_most(marked / runs, 0.05, runs)


# Can they be told from real ones?


@pytest.mark.slow
@pytest.mark.parametrize("source", ["phantom", "cxr"])
def test_real_images_are_rarely_told_from_real_ones_and_spoilt_ones_nearly_always(source, request):
    """Yes in 5 % of draws at most where all are real, in 95 % or more where they are blurred,
    noisy, coloured or textured: in benchmarks/realism.json, and in its first draws made again.
    """
    kept = {(r["n"], r["change"]): r for r in read_json(realism.SAVED)["rows"]
            if r["data"] == source}
    for n in realism.SIZES:
        assert kept[n, "real"]["draws"] >= 100 and kept[n, "real"]["yes"] <= 5
        assert kept[n, "real"]["named"] == {}
        for change in ("blur", "noise", "colour", "texture", "nothing but noise"):
            assert kept[n, change]["yes"] >= 0.95 * kept[n, change]["draws"] > 0
    pool = realism.phantoms() if source == "phantom" else realism.of_folder(
        str(request.getfixturevalue("cxr")))
    for n, changes in ((100, {"real": 20, "blur": 2, "noise": 2, "colour": 2, "texture": 2}),
                       (300, {"real": 3, "blur": 1, "noise": 1, "colour": 1})):
        for change, draws in changes.items():
            found = realism.shares(pool, n, realism.CHANGES[change], draws)
            assert found["yes"] == (0 if change == "real" else draws), (n, change, found)
            assert found["no"] <= kept[n, change]["no"]
