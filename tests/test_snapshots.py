"""Models kept on the way."""

import pytest
import torch
from safetensors.torch import load_file

import train
from minidiff.diffusion import store
from minidiff.errors import InputError
from minidiff.evaluation.monitor import checkpoints
from minidiff.training import state


def test_models_kept_on_the_way_are_runs_and_change_nothing(tiny, tmp_path, no_pictures):
    def trained(name, **more):
        cfg = train.DiffusionConfig(data=(str(tiny / "data"),), vae=str(tiny / "vae"), views=2,
                                    steps=6, batch=6,
                                    save_every=3, log_every=2, out=str(tmp_path / name), **more)
        train.train_diffusion(cfg)
        return tmp_path / name, cfg

    bare, (run, cfg) = tiny / "diffusion", trained("kept", snapshots=2)
    assert not (bare / "snapshots").exists() and [p.step for p in checkpoints(run)] == [2, 4, 6]
    weights = [load_file(folder / "model.safetensors")
               for folder in (bare, run, *(p.folder for p in checkpoints(run)))]
    # finished alike
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    # those on the way are not
    assert any(not torch.equal(weights[2][k], weights[3][k]) for k in weights[2])
    for point in checkpoints(run):
        pipeline, facts = store.load_pipeline(point.folder)
        assert facts["size"] == 32 and facts["trained_on"] and pipeline.vae.scale.item() > 0
    train.train_diffusion(cfg)  # the same command again is no fault


def test_the_disk_is_checked_for_snapshots(tmp_path, monkeypatch):
    model = torch.nn.Linear(4, 5).requires_grad_(False)  # snapshots of 100 bytes, empty states
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: type("Free", (), {"free": 700}))
    state.require_space(tmp_path, model, 7)
    with pytest.raises(InputError, match="and 8 snapshots of 0.00 GB need"):
        state.require_space(tmp_path, model, 8)
    (tmp_path / "snapshots/step_1").mkdir(parents=True)
    (tmp_path / "snapshots/step_1/model.json").write_text("{}")
    state.require_space(tmp_path, model, 8)  # one is there already
