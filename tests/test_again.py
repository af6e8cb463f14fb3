"""Made again: whole batches bit for bit, images that were drawn again too, and what is told of
where and how.
"""

import re
import shutil

import numpy as np
import pytest

import sample
from minidiff import runs
from minidiff.data import images
from minidiff.errors import InputError
from minidiff.evaluation import verify as chain
from minidiff.sampling import again
from minidiff.sampling.again import TOLERANCE, VerifyConfig, batches, make_again, verify


def request(tiny, out, **knobs):
    """12 images in batches of 5, 5 and 2."""
    return sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), **{
        "per_label": 4, "steps": 2, "batch": 5, **knobs})


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("again") / "set"
    sample.sample(request(tiny, out))
    return out


def calls_of(monkeypatch) -> list[list[int]]:
    """The seeds of each batch that is made from here on."""
    calls, make = [], again.make_images

    def counting(pipeline, rows, recipe, *, seeds, **knobs):
        calls.append(list(seeds))
        return make(pipeline, rows, recipe, seeds=seeds, **knobs)

    monkeypatch.setattr(again, "make_images", counting)
    return calls


@pytest.mark.parametrize("k", [1, 5, 6, 12, 100])
def test_whole_batches_are_made_until_they_hold_k_images(made, monkeypatch, k):
    calls = calls_of(monkeypatch)
    found = make_again(made, VerifyConfig(k=k, seed=3))
    assert all(call in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]) for call in calls)
    assert len(found.apart) == sum(map(len, calls)) >= min(k, 12)
    assert sum(map(len, calls[:-1])) < k                       # and not one more
    assert set(found.apart.values()) == {0}                    # on the CPU: bit for bit
    files = {str(p.relative_to(made)) for p in made.glob("images/*/*.png")}
    assert set(found.apart) <= files and (k < 12 or set(found.apart) == files)


def test_the_choice_is_the_seeds(made, monkeypatch):
    calls = calls_of(monkeypatch)
    for seed in (0, 1, 2, 3, 4, 0):
        make_again(made, VerifyConfig(k=1, seed=seed))
    assert calls[0] == calls[-1] and len(set(map(tuple, calls))) > 1


def test_images_drawn_again_are_made_in_the_batch_of_that_attempt(tiny, tmp_path, monkeypatch):
    """By a filter and by chance: the batches of the second and third attempt, and no other."""
    whole_check, batches_made = sample.check, []

    def picky(cfg, pixels, finite, rows, watch):
        reasons = whole_check(cfg, pixels, finite, rows, watch)
        first, attempt = [int(row["seed"]) for row in rows], len(batches_made)
        batches_made.append((attempt, first))
        # of the first batch 1, 3 and 4 once, 3 twice; of the last 11 once
        twice = {0: {1, 3, 4}, 1: {3}, 4: {11}}.get(attempt, set())
        return ["not new" if seed in twice else reason for seed, reason in zip(first, reasons)]

    monkeypatch.setattr(sample, "check", picky)
    out = tmp_path / "set"
    sample.sample(request(tiny, out))
    assert [seeds for _, seeds in batches_made] == [
        [0, 1, 2, 3, 4], [1, 3, 4], [3], [5, 6, 7, 8, 9], [10, 11], [11]]
    monkeypatch.undo()
    r = sample.RETRY
    found = batches(out, runs.read_json(out / "plan.json"), 5)
    assert [seeds for _, seeds in found] == [[0, 1, 2, 3, 4], [1 + r, 3 + r, 4 + r], [3 + 2 * r],
                                             [5, 6, 7, 8, 9], [10, 11], [11 + r]]
    calls = calls_of(monkeypatch)
    again_now = make_again(out, VerifyConfig(k=12))
    assert sorted(calls) == sorted(seeds for _, seeds in found)
    assert len(again_now.apart) == 12 and set(again_now.apart.values()) == {0}


def shift(path, levels: int) -> None:
    """Write an image anew, this many grey levels towards the middle."""
    pixels = images.read(path).astype(int)
    images.write(path, np.where(pixels < 128, pixels + levels, pixels - levels).astype("uint8"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_tolerance_is_that_of_the_recorded_precision(tiny, tmp_path, capsys, precision):
    out, limit = tmp_path / "set", TOLERANCE[precision]
    sample.sample(request(tiny, out, precision=precision, per_label=1))
    assert set(make_again(out, VerifyConfig()).apart.values()) == {0}  # in the same precision
    victim, manifest = sorted(out.glob("images/*/*.png"))[1], runs.read_json(out / "manifest.json")
    for apart, more in ((limit, limit), (limit + 1, 1)):
        shift(victim, more)
        manifest["sha256"][str(victim.relative_to(out))] = runs.sha256(victim)
        runs.write_json(out / "manifest.json", manifest)
        assert max(make_again(out, VerifyConfig()).apart.values()) == apart
        if apart == limit:
            verify(VerifyConfig(out=str(out)))
            assert (f"largest difference {apart} of 255 grey levels, allowed {limit} (made in "
                    f"{precision} on ") in capsys.readouterr().out
    with pytest.raises(InputError, match=f"{re.escape(str(victim))} differs by {limit + 1} grey "
                                         f"levels .*allowed are {limit} "):
        verify(VerifyConfig(out=str(out)))


@pytest.mark.parametrize("made_on, device, asked, said, limit", [
    (None, "auto", ("auto", "fp32"), "fp32 on an unknown machine", 1),  # by an earlier version
    ({"precision": "fp32", "device": "cpu", "machine": "a CPU"}, "auto", ("cpu", "fp32"),
     "fp32 on a CPU", 1),
    ({"precision": "bf16", "device": "cuda", "machine": "H100"}, "auto", ("auto", "bf16"),
     "bf16 on H100", 4),
    ({"precision": "tf32", "device": "cuda", "machine": "H100"}, "cuda:1", ("cuda:1", "tf32"),
     "tf32 on H100", 1),
])
def test_it_checks_as_they_were_made_and_says_where(made, tmp_path, monkeypatch, made_on, device,
                                                    asked, said, limit):
    shutil.copytree(made, out := tmp_path / "set")
    manifest = runs.read_json(out / "manifest.json")
    assert manifest.pop("made_on")["precision"] == "fp32"
    runs.write_json(out / "manifest.json", manifest | ({"made_on": made_on} if made_on else {}))
    calls, really = [], again.open_pipeline
    monkeypatch.setattr(again, "open_pipeline", lambda run, *how, **more: (
        calls.append(how) or really(run, "cpu", *how[1:], **more)))
    found = make_again(out, VerifyConfig(k=1, device=device))
    assert calls == [(*asked, "")] and found.limit == limit
    assert found.where == f"made in {said}, checked on {runs.machine()['machine']}"


def test_origins_are_found_from_elsewhere(tiny, tmp_path, monkeypatch):
    """Paths in a config and in a table are relative to where the command ran."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/x").symlink_to(tiny)
    monkeypatch.chdir(tmp_path / "root")
    sample.sample(sample.SampleConfig(run="x/diffusion", out="made", origin=("x/data",), steps=4,
                                      per_label=1, strength=0.5))
    for place in (tmp_path / "root", tmp_path):
        monkeypatch.chdir(place)
        found = make_again((tmp_path / "root/made").relative_to(place), chain.VerifyConfig(k=3))
        assert set(found.apart.values()) == {0} and len(found.apart) == 3
