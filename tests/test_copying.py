"""Each score against its published definition, written out anew as loops over single images."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from minidiff.evaluation.metrics.copying import (
    authentic,
    calibrated,
    cells,
    data_copying,
    rank_z,
    train_heldout_permutation_test,
)
from minidiff.evaluation.metrics.pairwise import distances, nearest_other_distance


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRAIN, HELDOUT, FRESH = normal(90, 3, 0), normal(70, 3, 1), normal(80, 3, 2)


def nearest(x, pool):
    return min(math.dist(x.tolist(), t.tolist()) for t in pool)


def z_by_hand(generated, heldout, train):
    """Meehan et al. 2020: U counts pairs in which the held-out distance is the smaller one."""
    q, p = [nearest(x, train) for x in generated], [nearest(x, train) for x in heldout]
    u = sum((a > b) + 0.5 * (a == b) for a in q for b in p)
    n, m = len(q), len(p)
    return (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def test_c_t_of_one_cell_is_the_published_z():
    made = torch.cat([FRESH[:60], TRAIN[:20] + 0.01])
    c = data_copying(distances(made, TRAIN), distances(HELDOUT, TRAIN))
    assert c.z == pytest.approx(z_by_hand(made, HELDOUT, TRAIN)) and c.cells == 1
    assert c.p == pytest.approx(stats.norm.cdf(c.z)) and c.z < -1.64
    p = stats.mannwhitneyu(*(distances(x, TRAIN).amin(1) for x in (made, HELDOUT)),
                           alternative="less", method="asymptotic", use_continuity=False).pvalue
    assert c.p == pytest.approx(p, rel=2e-3)    # scipy corrects the variance for the ties


def test_c_t_by_cells_weighs_by_held_out_images_and_leaves_sparse_cells_out():
    shift = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 9, 0]], dtype=torch.float64)
    which = [torch.arange(len(x)) % 3 for x in (FRESH, HELDOUT, TRAIN)]
    made, held, train = (x + shift[k] for x, k in zip((FRESH, HELDOUT, TRAIN), which))
    # cell 2 has no synthetic image
    made, which[0] = made[which[0] < 2][:45], which[0][which[0] < 2][:45]
    parts = cells(train, made, held)
    for found, k in zip(parts, which):
        # the cells are the clumps
        assert all(len(set(found[(k == c).numpy()])) == 1 for c in set(k.tolist()))
    c = data_copying(distances(made, train), distances(held, train), tuple(parts), at_least=20)
    weights = [(which[1] == k).sum().item() for k in (0, 1)]
    zs = [z_by_hand(made[which[0] == k], held[which[1] == k], train[which[2] == k]) for k in (0, 1)]
    assert c.cells == 2 and c.z == pytest.approx(np.average(zs, weights=weights))
    assert c.p == pytest.approx(
        stats.norm.cdf(c.z / math.hypot(*(w / sum(weights) for w in weights))))
    assert math.isnan(data_copying(distances(made, train), distances(held, train), tuple(parts),
                                   at_least=50).z)


def test_c_t_finds_copying_in_one_cell_alone():
    """Half of the space is copied, the other half lies farther off: two cells tell (Meehan et al.
    2020, figure 1).
    """
    far = torch.tensor([20.0, 0, 0], dtype=torch.float64)
    train, held = (torch.cat([normal(150, 3, k), normal(150, 3, k + 1) + far]) for k in (10, 12))
    made = torch.cat([train[:150] + 0.05, 1.6 * normal(150, 3, 14) + far])
    parts = [(x[:, 0] > 10).long().numpy() for x in (made, held, train)]
    d = distances(made, train), distances(held, train)
    assert data_copying(*d).z > -8 and data_copying(*d, tuple(parts)).cells == 2
    own = [rank_z(d[0][:150, :150].amin(1).numpy(), d[1][:150, :150].amin(1).numpy())]
    assert own[0] < -10


def share(made, train):
    free = authentic(distances(made, train), nearest_other_distance(train))
    return free.double().mean().item()


def test_auth_pct_is_the_published_share_and_its_null_is_not_half():
    gaps = [min(math.dist(a.tolist(), b.tolist()) for j, b in enumerate(TRAIN) if j != i)
            for i, a in enumerate(TRAIN)]
    assert np.allclose(nearest_other_distance(TRAIN), gaps)
    beyond = 0
    for x in FRESH:
        d = [math.dist(x.tolist(), t.tolist()) for t in TRAIN]
        beyond += min(d) > gaps[int(np.argmin(d))]
    assert share(FRESH, TRAIN) == pytest.approx(beyond / 80)
    assert share(TRAIN + 1e-6, TRAIN) == 0
    grown = [np.mean([share(normal(400, 16, s), normal(n, 16, s + 50)) for s in range(5)])
             for n in (30, 1500)]
    # rises with the training set: only like against like
    assert grown[1] > grown[0] + 0.03 and grown[0] > 0.55
    assert authentic(distances(FRESH, TRAIN), nearest_other_distance(TRAIN)).dtype == torch.bool


def test_calibrated_is_carlinis():
    value, index = calibrated(distances(FRESH, TRAIN))
    for i, x in enumerate(FRESH[:10]):
        d = sorted(math.dist(x.tolist(), t.tolist()) for t in TRAIN)
        assert value[i] == pytest.approx(d[0] / (0.5 * sum(d[:50]) / 50))
        assert index[i] == distances(FRESH, TRAIN)[i].argmin()


def close(made, train, heldout):
    return calibrated(distances(made, torch.cat([train, heldout])))


def closest(near, patients=range(140), **more):
    (found,) = train_heldout_permutation_test([near], 70, patients=patients, **more)
    return found


def test_closest_finds_copies_and_says_how_many_it_looked_at():
    made = torch.cat([FRESH, TRAIN[:12] + 0.01])
    e = closest(close(made, TRAIN[:70], HELDOUT))
    assert e.p < 0.02 and 8 <= e.top <= 20 and e.inside >= e.top - 2
    assert e.expected == pytest.approx(e.top / 2, rel=0.15)
    e = closest(close(torch.cat([FRESH, HELDOUT[:12] + 0.01]), TRAIN[:70], HELDOUT))
    assert e.p > 0.3


def test_closest_deals_out_patients_whole_and_within_labels():
    """Ten copies of ten images of one patient are one piece of evidence, not ten."""
    made = torch.cat([FRESH, TRAIN[:10] + 0.01])
    near = close(made, TRAIN[:70], HELDOUT)
    alone, one = closest(near), closest(near, [0] * 10 + list(range(1, 131)))
    assert alone.p < 0.02 < 0.2 < one.p
    # label a is training images alone: says nothing
    label = ["a"] * 10 + ["b"] * 130
    assert closest(near, labels=label).p > 0.2


@pytest.mark.slow
def test_closest_is_exact_over_several_spaces_and_for_odd_images():
    """P(any p ≤ α) ≤ α without copies: fresh images, and ones that lie nearer to everything, in
    three spaces at once.
    """
    rng = np.random.default_rng(0)
    for shrink in (1.0, 0.5):
        least = []
        for r in range(400):
            x = torch.from_numpy(rng.normal(size=(160, 12)))
            made = shrink * x[120:]
            spaces = [close(made[:, part], x[:60][:, part], x[60:120][:, part])
                      for part in (slice(0, 12), slice(0, 6), slice(6, 12))]
            found = train_heldout_permutation_test(spaces, 60, patients=np.arange(120) // 2,
                                                   permutations=200, seed=r)
            least.append(min(e.p for e in found))
        for alpha in (0.05, 0.2):
            assert np.mean(np.array(least) <= alpha) <= alpha + 2 * math.sqrt(
                alpha * (1 - alpha) / 400)
