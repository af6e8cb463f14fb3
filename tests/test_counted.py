from collections import Counter

import pytest
import torch

from minidiff import counted
from minidiff.data import latents
from minidiff.pixels import to_float


def test_a_slot_draws_the_same_whoever_asks():
    whole = counted.normal(0, range(8), counted.NOISE, (4, 2, 2))
    parts = [counted.normal(0, range(rank, 8, 2), counted.NOISE, (4, 2, 2)) for rank in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    assert not torch.equal(whole, counted.normal(0, range(8), counted.DROP, (4, 2, 2)))
    assert not torch.equal(whole, counted.normal(1, range(8), counted.NOISE, (4, 2, 2)))


def test_draws_of_many_slots_are_independent_standard_normals():
    x = counted.normal(3, range(4000), counted.NOISE, (4,))
    assert x.mean().abs() < 0.03 and abs(x.std() - 1) < 0.03
    assert torch.corrcoef(torch.stack([x[:-1, 0], x[1:, 0]]))[0, 1].abs() < 0.06
    assert len(x[:, 0].unique()) == 4000


def test_every_epoch_is_a_permutation_and_any_slot_can_be_asked_for():
    n = 7
    first, second = counted.order(n, 5, range(n)), counted.order(n, 5, range(n, 2 * n))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    assert counted.order(n, 5, [9]) == [second[2]] and counted.order(n, 6, range(n)) != first


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_stratified_times_put_one_in_every_stratum(batch):
    for step in range(5):
        u = counted.stratified(0, step, batch)
        assert (u >= 0).all() and (u < 1).all()
        assert sorted((u * batch).long().tolist()) == list(range(batch))
    assert not torch.equal(counted.stratified(0, 0, batch), counted.stratified(0, 1, batch))


def test_keys_are_places_not_sums():
    draws = {torch.rand((), generator=counted.seeded(*key)).item()
             for key in [(1, 2), (2, 1), (3,), (3, 0), (0, 3)]}
    assert len(draws) == 5


def test_moments_do_not_depend_on_the_batch_and_view_0_is_the_image():
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    encode = lambda x: (x[:, :1, ::8, ::8], x[:, 1:2, ::8, ::8].abs())  # noqa: E731
    a, b = (latents.moments(pixels, encode, 3, seed=1, batch=n) for n in (2, 5))
    assert a.shape == (2, 3, 5, 1, 4, 4) and torch.equal(a, b)
    assert torch.equal(a[0, 0], to_float(pixels)[:, :1, ::8, ::8])
    assert not torch.equal(a[0, 1], a[0, 0]) and not torch.equal(a[0, 1], a[0, 2])
    assert latents.moments(pixels[:0], encode).shape == (2, 1, 0, 1, 4, 4)


def test_the_cache_is_kept_by_its_key(tmp_path):
    encoded, path = [], tmp_path / "cache.safetensors"
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    def encode(x):
        encoded.append(1)
        return torch.full((len(x), 1, 1, 1), float(len(encoded))), torch.ones(len(x), 1, 1, 1)

    def means(key):
        return latents.encoded(path, key, encode, pixels, pixels, views=1, strength=1.0,
                               seed=0)[1].unique().tolist()

    assert [means(key) for key in ("a", "a", "b", "b", "a")] == [[2], [2], [4], [4], [6]]
    path.write_bytes(b"torn")
    assert means("a") == [8]


def test_groups_fill_their_shares_and_their_images_take_turns():
    groups, shares = [[0, 1, 2, 3, 4, 5], [6, 7]], [6, 6]
    first = counted.order_of_groups(groups, shares, 3, range(12))
    assert sorted(first)[:6] == [0, 1, 2, 3, 4, 5] and sum(i >= 6 for i in first) == 6
    picked = Counter(counted.order_of_groups(groups, [6, 5], 3, range(11 * 4)))
    # 4 epochs × 5 places, in turns
    assert {picked[i] for i in range(6)} == {4} and {picked[6], picked[7]} == {10}
    # a function of the slot alone
    assert counted.order_of_groups(groups, shares, 3, range(7, 12)) == first[7:]


def test_drops_come_together_or_alone():
    null = counted.drops(0, range(4000), 3, 0.2, 0.1)
    assert null.all(1).float().mean() == pytest.approx(0.2, abs=0.03)
    alone = null[~null.all(1)].float().mean(0)
    assert all(a == pytest.approx(0.1, abs=0.03) for a in alone.tolist())
    assert torch.equal(counted.drops(0, range(90, 100), 3, 0.2, 0.1), null[90:100])
