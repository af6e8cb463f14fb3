"""Work beside the device: in its order, with its faults, and the same as in turn."""

import threading

import pytest
import torch

from minidiff.overlap import Behind, ahead, send

CPU, OTHER = torch.device("cpu"), torch.device("meta")  # of the device only its type is asked


@pytest.mark.parametrize("device", [CPU, OTHER])
def test_items_come_in_order_and_a_fault_in_its_place(device):
    def make(item):
        if item == 3:
            raise ValueError("of the fourth")
        return item**2

    made = ahead(make, range(6), device)
    assert [next(made) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="of the fourth"):
        next(made)


def test_one_is_made_while_the_one_before_is_used():
    begun = [threading.Event() for _ in range(3)]

    def make(item):
        begun[item].set()
        return item

    made = ahead(make, range(3), OTHER)
    assert next(made) == 0 and begun[1].wait(10) and not begun[2].is_set()
    made.close()


def test_what_is_not_asked_for_is_not_made_on_the_cpu():
    seen = []
    made = ahead(lambda item: seen.append(item) or item, range(9), CPU)
    assert next(made) == 0 and seen == [0]


def test_jobs_behind_run_in_order_and_their_faults_are_raised():
    order, behind = [], Behind(OTHER)
    for k in range(5):
        behind.run(order.append, k)
    behind.wait()
    assert order == [0, 1, 2, 3, 4]
    behind.run(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        behind.wait()
    behind.wait()  # once
    with pytest.raises(ZeroDivisionError):
        Behind(CPU).run(lambda: 1 / 0)


def test_an_expanded_image_can_be_pinned(monkeypatch):
    """Grey images hold one channel that is expanded to three, which pinned memory cannot be."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: seen.append(x.stride()) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **_: x)
    grey = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(-1, 3, -1, -1)
    assert torch.equal(send(grey, "cuda"), grey) and seen == [(48, 16, 4, 1)]
