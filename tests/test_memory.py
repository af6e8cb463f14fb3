"""The benchmark that counts memory, on networks whose tensors can be counted by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory


def test_a_storage_counts_once_and_until_its_last_view_is_gone():
    with FakeTensorMode(), memory.Held() as held:
        x = torch.zeros(1000)
        view = x.view(10, 100).t()
        assert held.now == 4000
        y = x.double() + 1                      # 8000 for the doubles and for their sum
        assert held.now == 4000 + 8000 and held.peak == 4000 + 2 * 8000
        del x, y
        assert held.now == 4000
        del view
        assert held.now == 0 and held.peak == 4000 + 2 * 8000


def test_a_training_step_counts_as_by_hand():
    """1000 rows of 8, 16, 16 and 1 numbers, float32. The most is held when the gradient of the
    second layer's input is there: x, h, silu(h), that gradient, and the output's, still in use.
    """
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.SiLU(), nn.Linear(16, 1, bias=False))
    found = memory.count(net, lambda: net(torch.zeros(1000, 8)).sum(), "fp32")
    weights = 4 * (8 * 16 + 16)
    assert found["weights"] == found["EMA"] == weights
    few = found["moments"] - 2 * weights  # AdamW's two counters of steps, the loss and three flags
    assert few == 4 * (2 + 1 + 3)
    activations = 4 * 1000 * (8 + 16 + 16 + 16)
    assert activations < found["step"] < activations + 4 * 1000 + 2 * weights
    assert found["peak"] == found["step"] + 4 * weights + few


def test_norms_hold_what_they_hold_on_cuda():
    """4 bytes a number in bf16, too: the most is the input of the norm and that of SiLU, and the
    gradients behind and before SiLU. The norm's input is a copy, for the convolution's output is
    channels_last. Without gradients, one tensor is made of another.
    """
    def held(precision: str) -> float:
        net = nn.Sequential(nn.Conv2d(1, 64, 1, bias=False), nn.GroupNorm(2, 64), nn.SiLU(),
                            nn.Conv2d(64, 1, 1, bias=False))
        net.to(memory_format=torch.channels_last)
        step = memory.count(net, lambda: net(torch.zeros(4, 1, 64, 64)).sum(), precision)["step"]
        return step / (4 * 64 * 64 * 64)
    assert [held(name) for name in ("bf16", "fp32", "")] == pytest.approx([16, 16, 8], rel=0.01)


def test_the_table_is_that_of_the_networks():
    rows = json.loads(Path(memory.__file__).with_suffix(".json").read_text())
    by = {tuple(row[k] for k in ("network", *memory.KNOBS) if k in row): row for row in rows}
    assert len(by) == len(rows) == len(memory.UNET) + len(memory.VAE)
    assert by["UNet", "all", "bf16", 16, False]["weights"] == pytest.approx(3.45e9, rel=1e-2)
    again = memory.count_vae("decode", "fp32", 4)
    assert {name: by["VAE", "decode", "fp32", 4][name] for name in again} == again
