"""resnet: parity with torchvision's resnet18 in names and numbers, seeded start, refused
weights.
"""

import pytest
import torch
from torchvision_peer import torchvision

from minidiff.classification.resnet import ResNet, load_torchvision
from minidiff.errors import InputError


def randomise(net, seed):
    """Every tensor random, BatchNorm's scale, shift, mean and variance included: else swapped norms
    would pass.
    """
    g = torch.Generator().manual_seed(seed)
    for name, x in net.state_dict().items():
        if name.endswith(("running_var", "bn1.weight")):
            x.copy_(torch.rand(x.shape, generator=g) + 0.5)
        elif x.is_floating_point() and x.ndim == 1:
            x.copy_(torch.randn(x.shape,
                                generator=g) * 0.3 + (0.8 if name.endswith("weight") else 0))
        elif x.is_floating_point():
            x.copy_(torch.randn(x.shape, generator=g) / x[0].numel() ** 0.5)


@pytest.fixture(scope="module")
def pair():
    peer = torchvision().models.resnet18(weights=None, num_classes=7)
    randomise(peer, 1)
    net = ResNet(7)
    assert load_torchvision(net, peer.state_dict()) == []
    return peer, net


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_parity_with_torchvision(pair, mode):
    peer, net = (m.train(mode == "train") for m in pair)
    x = torch.randn(4, 1, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs, ours = peer(x.expand(-1, 3, -1, -1)), net(x)
    assert theirs.abs().max() > 0.1
    assert (theirs - ours).abs().max() <= 1e-5
    # train moves the running statistics
    for (name, a), b in zip(peer.state_dict().items(), net.state_dict().values()):
        if "running" in name:
            assert torch.allclose(a, b, atol=1e-5), name


def test_names_shapes_and_count_are_torchvisions(pair):
    peer, net = pair
    theirs = {k: tuple(x.shape) for k, x in peer.state_dict().items()}
    ours = {k: tuple(x.shape) for k, x in net.state_dict().items()}
    assert ours == {**theirs, "conv1.weight": (64, 1, 7, 7)}
    # resnet18, grey
    assert sum(p.numel() for p in ResNet(1000).parameters()) == 11_689_512 - 2 * 64 * 49


def test_fc_of_another_size_is_kept(pair):
    net = ResNet(3, seed=5)
    assert load_torchvision(net, pair[0].state_dict()) == ["fc.weight", "fc.bias"]
    assert torch.equal(net.fc.weight, ResNet(3, seed=5).fc.weight)
    assert torch.equal(net.layer4[1].conv2.weight, pair[0].layer4[1].conv2.weight)


def test_refused_weights_are_named_and_change_nothing():
    net = ResNet(2, width=8)
    good, before = ResNet(2, width=8, seed=1).state_dict(), net.conv1.weight.clone()
    missing = {k: x for k, x in good.items() if k != "layer2.0.bn1.weight"}
    for bad, words in [
        (missing, r"layer2.0.bn1.weight missing for \(16,\)"),
        ({**good, "encoder.x": torch.zeros(1)}, r"encoder.x \(1,\) for nothing"),
        (ResNet(2, width=16).state_dict(), r"conv1.weight \(16, 1, 7, 7\) for \(8, 1, 7, 7\)"),
    ]:
        with pytest.raises(InputError, match=words):
            load_torchvision(net, bad)
    assert torch.equal(net.conv1.weight, before)


def test_seed_alone_decides_the_start_and_the_global_stream_is_untouched():
    state = torch.get_rng_state()
    a = ResNet(2, width=8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    b, c = ResNet(2, width=8, seed=3), ResNet(2, width=8, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    for (name, x), y in zip(a.named_parameters(), c.parameters()):
        assert "conv" not in name and "fc" not in name or not torch.equal(x, y), name
    assert abs(ResNet(2).layer3[1].conv1.weight.std().item() / (2 / (256 * 9)) ** 0.5 - 1) < 0.01


def test_features_are_the_layer_before_fc():
    net = ResNet(3, width=8).eval()
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert net.features(x).shape == (2, 64)
    assert torch.allclose(net.fc(net.features(x)), net(x))
