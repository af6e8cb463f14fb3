import pytest
import torch

from minidiff.evaluation.neighbours import distances, equalised, memorisation, moved, pixel_spaces


def phantoms(n, seed, side=48, noise=0.02):
    """Smooth random pictures: two soft ovals whose places and sizes vary."""
    g = torch.Generator().manual_seed(seed)
    v, u = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    a = torch.rand(n, 8, 1, 1, generator=g)
    x = 0.8
    for side_of, (dx, wide, dy, high) in ((-1, a.unbind(1)[:4]), (1, a.unbind(1)[4:])):
        across = (u - side_of * (0.3 + 0.4 * dx)) / (0.2 + 0.3 * wide)
        x = x - 0.5 * torch.exp(-across**2 - ((v - 0.6 * dy) / (0.4 + 0.4 * high)) ** 2)
    x = x + noise * torch.randn(n, side, side, generator=g)
    return (255 * x.clamp(0, 1)).to(torch.uint8)[:, None].expand(n, 3, side, side)


def near_copies(images, seed):
    """Other brightness and fresh noise."""
    g = torch.Generator().manual_seed(seed)
    x = 0.8 * images.float() + 30 + 6 * torch.randn(len(images), 1, *images.shape[2:], generator=g)
    return x.clamp(0, 255).to(torch.uint8)


TRAIN, HELDOUT = phantoms(450, 0), phantoms(150, 1)
REAL = {"train": pixel_spaces(TRAIN, query=False), "heldout": pixel_spaces(HELDOUT, query=True)}


def judge(fake):
    return memorisation(fake=pixel_spaces(fake, query=True), **REAL)


def test_distances():
    x, y = torch.randn(600, 30), torch.randn(40, 30)
    assert torch.allclose(distances(x, y), torch.cdist(x.double(), y.double()), atol=1e-9)
    assert distances(x, x).diagonal().max() < 1e-6


def test_the_nearest_version_counts():
    x, y = torch.randn(5, 7, 3), torch.randn(4, 3)
    assert torch.allclose(distances(x, y), torch.cdist(x, y).amin(1).double(), atol=1e-5)
    assert torch.allclose(distances(y, x), torch.cdist(y, x[:, 0]).double(), atol=1e-5)


def test_a_moved_copy_is_found_again():
    x = phantoms(6, 2)
    shifted = x.roll((1, 1), (2, 3))
    plain = distances(equalised(shifted, 24), equalised(x, 24)).diagonal()
    assert (distances(moved(shifted), equalised(x, 24)).diagonal() < 0.7 * plain).all()
    assert torch.equal(moved(x)[:, 0], equalised(x, 24)) and moved(x).shape == (6, 81, 576)


def test_equalised_ignores_any_rising_change_of_grey_values():
    x = phantoms(4, 3)
    brighter = (255 * (x.float() / 255) ** 0.5).round().to(torch.uint8)
    other = phantoms(4, 4)
    assert (equalised(brighter) - equalised(x)).norm(dim=1).max() < 0.1 * distances(equalised(x), equalised(other)).min()
    assert equalised(x).shape == (4, 48 * 48) and equalised(x, 16).shape == (4, 256)
    assert equalised(torch.full((2, 3, 8, 8), 9, dtype=torch.uint8)).abs().max() == 0   # a constant image, no NaN
    assert equalised(torch.zeros(1, 3, 100, 100, dtype=torch.uint8)).shape == (1, 64 * 64)


def test_near_copies_are_caught_and_shown():
    planted = near_copies(TRAIN[40:70], 5)
    result = judge(torch.cat([phantoms(170, 6), planted]))                   # 15 % copies
    assert result["suspected"] and result["verdict"].startswith("copies suspected")
    pixels = result["spaces"][0]
    assert pixels["near_share"] > 0.1 > pixels["near_heldout_share"]
    for pair in result["closest"]:
        assert pair["fake"] >= 170 and pair["train"] == 40 + pair["fake"] - 170 and pair["d_train"] < pair["d_heldout"]


def test_a_generator_that_copies_moved_images_is_caught():
    result = judge(near_copies(TRAIN[:120].roll((1, -1), (2, 3)), 9))
    assert result["suspected"] and "pixels, moved" in result["verdict"]


def test_a_generator_that_only_copies_is_caught():
    result = judge(near_copies(TRAIN[:120], 8))
    assert result["suspected"] and result["spaces"][0]["q05"] < 0.6


@pytest.mark.parametrize("seed", range(10, 16))
def test_fresh_images_are_not_accused(seed):
    result = judge(phantoms(150, seed))
    assert result["suspected"] is False and result["verdict"] == "no sign of copying"
    assert all(0.9 < s["q50"] < 1.1 for s in result["spaces"])


@pytest.mark.parametrize("seed", range(20, 24))
def test_smooth_images_are_nearer_to_everything_and_not_accused(seed):
    result = judge(phantoms(150, seed, noise=0.0))
    assert result["spaces"][0]["near_p"] < 0.01 and not result["suspected"]


def test_copies_of_heldout_images_are_not_copies_of_training_images():
    result = judge(torch.cat([phantoms(120, 30), near_copies(HELDOUT[:40], 31)]))
    assert not result["suspected"]


def test_between_the_two_it_is_left_open():
    """Near for certain, but 13 of 15 real images are training images: that the closest are among them says little."""
    heldout = {name: x[:70] for name, x in REAL["heldout"].items()}
    made = pixel_spaces(torch.cat([phantoms(80, 40), near_copies(TRAIN[:22], 41)]), query=True)
    result = memorisation(fake=made, train=REAL["train"], heldout=heldout)
    assert result["suspected"] is None and "cannot be excluded" in result["verdict"]


def test_too_few():
    result = judge(phantoms(5, 0))
    assert result["suspected"] is None and "too few" in result["verdict"] and result["closest"] == []
