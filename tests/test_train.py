"""The two training stages: same seed, same result; killed and resumed, same result; what they leave
behind.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from minidiff import config, runs
from minidiff.data import images
from minidiff.data.dataset import Images
from minidiff.data.table import Table, read_csv, write_table
from minidiff.diffusion import store
from minidiff.diffusion.generate import Recipe
from minidiff.diffusion.model import VAES
from minidiff.diffusion.public.export import export
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError
from minidiff.sampling.plan import encode
from minidiff.stages import finished_vae, pictures
from minidiff.training import state

ROOT = Path(__file__).parents[1]
PARTS = ("model", "ema", "optimizer", "precision")


def vae_config(tiny, out, **knobs):
    return train.VAEConfig(data=(str(tiny / "data"),), out=str(out), size=32, steps=20, batch=4,
                           save_every=7, log_every=3, **knobs)


def diffusion_config(tiny, out, **knobs):
    given = {"steps": 20, "batch": 6, "save_every": 7, "log_every": 3, "views": 2, "lr": 3e-3,
             "snapshots": 0, "vae": str(tiny / "vae"), **knobs}
    return train.DiffusionConfig(data=(str(tiny / "data"),), out=str(out), **given)


def contents(run: Path) -> dict:
    """Weights, EMA, optimiser, scaler and log of a finished run."""
    last = run / "checkpoints" / "step_00000020"
    tensors = {name: load_file(last / f"{name}.safetensors") for name in PARTS}
    return {"tensors": tensors, "state": (last / "state.json").read_text(),
            "log": (run / "log.jsonl").read_text()}


def assert_same(a: Path, b: Path):
    x, y = contents(a), contents(b)
    for name in PARTS:
        assert x["tensors"][name].keys() == y["tensors"][name].keys()
        for key, value in x["tensors"][name].items():
            assert torch.equal(value, y["tensors"][name][key]), f"{name} {key}"
    assert x["state"] == y["state"] and x["log"] == y["log"]


def command(verb: str, cfg) -> list[str]:
    saved = Path(cfg.out).with_suffix(".json")
    runs.write_json(saved, {**cfg.__dict__})
    return [sys.executable, str(ROOT / "train.py"), verb, "--from", str(saved)]


def start(words) -> subprocess.Popen:
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


STAGES = {"vae": (vae_config, train.train_vae),
          "diffusion": (diffusion_config, train.train_diffusion)}


@pytest.fixture
def unbroken(once, tiny):
    """unbroken(stage) → a run of 20 steps; to be read only."""
    def get(stage: str) -> Path:
        make, run = STAGES[stage]
        return once(f"unbroken-{stage}", lambda root: run(make(tiny, root / "run"))) / "run"
    return get


@pytest.mark.parametrize("verb", STAGES)
def test_unbroken_equals_killed_in_another_process_and_resumed_here(tiny, unbroken, tmp_path, verb):
    make, run = STAGES[verb]
    killed = start(command(verb, make(tiny, tmp_path / "killed")))
    checkpoint = tmp_path / "killed" / "checkpoints" / "step_00000007"
    while not checkpoint.exists():
        assert killed.poll() is None, killed.stderr.read().decode()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished = tmp_path / "killed" / f"{'vae' if verb == 'vae' else 'model'}.json"
    assert not finished.exists(), "killed too late to test anything"
    run(make(tiny, tmp_path / "killed"))
    assert_same(unbroken(verb), tmp_path / "killed")


def test_sigterm_saves_and_ends_well(tiny, tmp_path):
    cfg = vae_config(tiny, tmp_path / "run")
    cfg = replace(cfg, steps=4000, save_every=4000)
    ignoring = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # Ctrl-C, as nohup and `&` do
    process = start([*ignoring, *command("vae", cfg)])
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    newest = state.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and 0 < int(newest.name[5:]) < 4000


def test_a_half_written_checkpoint_is_passed_over(tiny, unbroken, tmp_path, capsys):
    run = shutil.copytree(unbroken("vae"), tmp_path / "run")
    before = contents(run)
    (run / "checkpoints" / "step_00000020" / "ema.safetensors").write_bytes(b"torn")
    train.train_vae(vae_config(tiny, run))
    assert "taking the checkpoint before it" in capsys.readouterr().err
    assert before["log"] == (run / "log.jsonl").read_text()
    assert contents(run)["state"] == before["state"]


def test_a_finished_run_says_all(tiny):
    vae, diffusion = tiny / "vae", tiny / "diffusion"
    facts = json.loads((vae / "vae.json").read_text())
    assert facts["n_held_out"] == 28 and 5 < facts["psnr"] < 40 and 20 < facts["psnr_pca64"] < 40
    for run in (vae, diffusion):
        assert {"config.json", "run.json", "log.jsonl", "loss.png",
                "vae.safetensors"} <= {p.name for p in run.iterdir()}
    log = runs.read_log(diffusion / "log.jsonl")
    assert [line["step"] for line in log] == [2, 3, 4, 6]
    assert [line["val_loss"] is not None for line in log] == [False, True, False, True]
    assert {"loss_t0", "loss_t3", "grad_norm", "lr", "skipped"} <= set(log[0])
    # 3 labels × 8 seeds, gutters of 2 px
    grid = images.read(diffusion / "grids" / "step_00000006.png")
    assert grid.shape[1:] == (3 * 32 + 2 * 2, 8 * 32 + 7 * 2)
    _, saved = store.load_pipeline(diffusion)
    # no patient, no file
    assert len(saved["rows"]) == 44 and set(saved["rows"][0]) == {"label", "sex", "age", "view"}


def test_the_latent_scale_is_that_of_the_training_images(tiny):
    from minidiff.data.dataset import load_pixels
    from minidiff.data.table import read_table
    from minidiff.diffusion.vae import encoder
    from minidiff.pixels import to_float

    vae = store.load_vae(tiny / "vae")
    _, pixels = load_pixels(read_table(tiny / "data").select(split="train"), 32)
    mean, std = encoder(vae)(to_float(pixels))
    noise = torch.randn(200, *mean.shape, generator=torch.Generator().manual_seed(0))
    assert (mean + std * noise).std().item() == pytest.approx(1.0, abs=5e-3)
    assert (mean.std() / mean.std().square().add(std.square().mean()).sqrt()).item() < 0.98


def test_a_finished_run_keeps_its_latent_scale(tiny, tmp_path, no_pictures):
    """Models were trained on its latents: also one of when the means alone gave the scale."""
    run = shutil.copytree(tiny / "vae", tmp_path / "run")
    facts = runs.read_json(run / "vae.json")
    runs.write_json(run / "vae.json", {**facts, "scale": 2.5})
    train.train_vae(train.VAEConfig(data=(str(tiny / "data"),), out=str(run), size=32, steps=12,
                                    batch=4))
    assert runs.read_json(run / "vae.json")["scale"] == store.load_vae(run).scale == 2.5
    (run / "vae.json").unlink()
    train.train_vae(train.VAEConfig(data=(str(tiny / "data"),), out=str(run), size=32, steps=12,
                                    batch=4))
    assert runs.read_json(run / "vae.json") == facts


def test_micro_batches_of_the_vae_stage_change_rounding_alone(tiny, tmp_path, no_pictures):
    """The first step's gradient is kept as AdamW's first moment: a tenth or so of it."""
    moments = {}
    for accumulate in (1, 2, 4):
        run = tmp_path / str(accumulate)
        cfg = vae_config(tiny, run, accumulate=accumulate, augment=0.5, edges=2.0)
        train.train_vae(replace(cfg, steps=1, log_every=1))
        saved = load_file(run / "checkpoints" / "step_00000001" / "optimizer.safetensors")
        moments[accumulate] = torch.cat([v.flatten() for k, v in saved.items()
                                         if k.endswith("exp_avg")]).double()
        log = runs.read_log(run / "log.jsonl")[0]
        moments[accumulate] *= max(1, log["grad_norm"])  # undo the clipping
        assert log["loss"] == pytest.approx(
            log["l1"] + 2 * log["edges"] + 1e-3 * log["kl"] / (3 * 32 * 32), rel=1e-5)
    for accumulate in (2, 4):
        error = (moments[accumulate] - moments[1]).norm() / moments[1].norm()
        assert 0 < error < 1e-5


def test_micro_batches_must_be_equal(tiny, tmp_path, capsys):
    fails(capsys, ["vae", "--data", tiny / "data", "--size", "32", "--batch", "4", "--accumulate",
                   "3", "--out", tmp_path / "run"], "not a multiple of 1 processes × 3 micro")


def test_moments_are_cached_by_content_and_made_again_when_damaged(tiny, tmp_path, no_pictures):
    run = tmp_path / "run"
    train.train_diffusion(diffusion_config(tiny, run, steps=1))
    cache = run / "latents.safetensors"
    # load_file maps the file that is damaged below
    whole = {k: v.clone() for k, v in load_file(cache).items()}
    assert whole["train"].shape == (2, 2, 44, 4, 8, 8) and whole["val"].shape[1] == 1
    assert not torch.equal(whole["train"][:, 0], whole["train"][:, 1])  # an augmented view
    cache.write_bytes(cache.read_bytes()[:-9])
    train.train_diffusion(diffusion_config(tiny, run, steps=1))
    assert all(torch.equal(whole[k], v) for k, v in load_file(cache).items())


def test_bf16_and_fp16_train(tiny, tmp_path, no_pictures):
    for precision in ("bf16", "fp16"):
        train.train_diffusion(diffusion_config(tiny, tmp_path / precision, steps=3,
                                               precision=precision))
        model = load_file(tmp_path / precision / "model.safetensors")
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in model.values())


def fails(capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        config.main(train.VERBS, default=["vae", "diffusion"], doc="", argv=[str(a) for a in argv])
    err = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and err.startswith("error: ") and said in err, err


def test_bad_input_is_one_sentence_and_status_2(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    fails(capsys, ["vae", "--data", tmp_path / "nowhere", "--out", out], "nowhere")
    (tmp_path / "empty").mkdir()
    fails(capsys, ["vae", "--data", tmp_path / "empty", "--out", out], "empty")
    fails(capsys, ["vae", "--data", tiny / "data", "--size", "50", "--out", out],
          "--size 50 is not allowed")
    fails(capsys, ["vae", "--data", tiny / "data", "--out", tiny / "diffusion", "--size", "32"],
          "holds a run with other settings")
    fails(capsys, ["diffusion", "--data", tiny / "data", "--vae", tmp_path / "novae", "--out", out],
          "has to finish first")
    fails(capsys, ["diffusion", "--data", tiny / "data", "--vae", tiny / "vae", "--condition",
                   "label,weight", "--out", out], "weight")
    fails(capsys, ["vae", "--data", tiny / "data", "--device", "cuda:77", "--size", "32", "--out",
                   out], "device 'cuda:77' is not here")
    assert not out.exists()


def test_corrupt_images_are_refused_or_skipped_and_listed(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "data", tmp_path / "data")
    bad = sorted((tmp_path / "data" / "images" / "covid").glob("*.png"))[0]
    bad.write_bytes(bad.read_bytes()[:100])
    words = ["vae", "--data", tmp_path / "data", "--size", "32", "--steps", "2", "--batch", "2"]
    fails(capsys, [*words, "--out", tmp_path / "a"], bad.name)
    config.main(train.VERBS, default=["vae"], doc="",
                argv=[str(w) for w in [*words, "--skip-bad", "--out", tmp_path / "b"]])
    notes = json.loads((tmp_path / "b" / "run.json").read_text())["facts"]["notes"]
    assert any(bad.name in note for note in notes)


def test_an_age_of_fifty_in_words_names_its_row(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "data", tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.csv"
    lines = metadata.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if ",train," in line and line.split(",")[5])
    cells = lines[place].split(",")
    lines[place] = ",".join([*cells[:5], "fifty", *cells[6:]])
    metadata.write_text("\n".join(lines) + "\n")
    fails(capsys, ["diffusion", "--data", tmp_path / "data", "--vae", tiny / "vae", "--out",
                   tmp_path / "x"], f"metadata.csv:{place + 1}: age 'fifty' is not a number")


def test_adapters_alone_are_trained_kept_and_merged(tiny, tmp_path, no_pictures):
    out = tmp_path / "adapted"
    cfg = diffusion_config(tiny, out, init=str(tiny / "diffusion"), rank=2, steps=7)
    train.train_diffusion(cfg)
    kept = load_file(out / "checkpoints" / "step_00000007" / "model.safetensors")
    assert all(".lora_" in name or "conditioner" in name
               for name in kept) and any(".lora_up" in name for name in kept)
    before, after = (load_file(run / "model.safetensors") for run in (tiny / "diffusion", out))
    # merged: plain names again
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".to_q." in name for name in changed)
    assert all("transformer_blocks" in name or "conditioner" in name for name in changed)
    adapters = load_file(out / "lora.safetensors")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    difference = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
    assert torch.allclose(after[f"{name}.weight"] - before[f"{name}.weight"], difference, atol=1e-6)


def test_a_stage_from_a_run_keeps_the_chain_and_starts_where_it_ended(tiny, tmp_path, no_pictures):
    out = tmp_path / "second"
    train.train_diffusion(diffusion_config(tiny, out, init=str(tiny / "diffusion"), vae="",
                                           train="all", steps=1, lr=1e-9))
    first, second = (load_file(run / "model.safetensors") for run in (tiny / "diffusion", out))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    facts = runs.read_json(out / "run.json")["facts"]
    assert facts["init"]["sha256"] == runs.sha256(tiny / "diffusion" / "model.safetensors")
    third = tmp_path / "third"
    train.train_diffusion(diffusion_config(tiny, third, init=str(out), vae="", steps=1))
    assert runs.read_json(third / "run.json")["facts"]["init"]["before"]["sha256"] == facts["init"][
        "sha256"]


def test_the_decoder_is_fine_tuned_alone_and_latents_stay(tiny, tmp_path, no_pictures):
    out = tmp_path / "decoder"
    train.train_vae(replace(vae_config(tiny, out, init=str(tiny / "vae")), steps=3))
    before, after = (load_file(run / "vae.safetensors") for run in (tiny / "vae", out))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert store.load_vae(out).scale == store.load_vae(tiny / "vae").scale


def test_live_views_balance_and_prior(tiny, tmp_path, no_pictures):
    from minidiff.data import phantom
    phantom.write(tmp_path / "others", n=40, size=32, seed=7)
    out = tmp_path / "run"
    train.train_diffusion(diffusion_config(tiny, out, views=0, balance=1.0,
                                           prior=(str(tmp_path / "others"),), steps=3))
    assert load_file(out / "latents.safetensors")["train"].shape[1] == 1
    assert len(runs.read_json(out / "model.json")["rows"]) == 44 + 24
    assert runs.read_json(out / "run.json")["facts"]["n_train"] == 68


def test_best_holds_the_average_of_the_lowest_held_out_loss(unbroken):
    out = unbroken("diffusion")
    losses = {line["step"]: line["val_loss"] for line in runs.read_log(out / "log.jsonl")
              if line["val_loss"] is not None}
    pipeline, facts = store.load_pipeline(out / "best")
    assert losses[facts["step"]] == min(losses.values()) == facts[
        "val_loss"] and pipeline.size == 32
    last = runs.read_log(out / "log.jsonl")[-1]
    assert {"val_loss_t0", "val_loss_t3", "gap",
            "gap_low"} <= set(last) and last["gap_low"] < last["gap"]
    assert images.read(out / "strips" / "step_00000020.png").shape[1:] == (2 * 32 + 2,
                                                                           8 * 32 + 7 * 2)
    if facts["step"] == 20:
        a, b = load_file(out / "model.safetensors"), load_file(out / "best" / "model.safetensors")
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_rate_may_stay_constant(tiny, tmp_path, no_pictures):
    train.train_diffusion(diffusion_config(tiny, tmp_path / "run", steps=6, decay="constant",
                                           lr=1e-3))
    assert {line["lr"] for line in runs.read_log(tmp_path / "run" / "log.jsonl")} == {1e-3}


def test_the_perceptual_loss_is_added_when_its_weights_are_given(tiny, tmp_path, no_pictures):
    from minidiff.diffusion.lpips import LPIPS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = {name: tensor for name, tensor in LPIPS().state_dict().items() if "features" in name}
    runs.save_tensors(tmp_path / "vgg.safetensors", vgg)
    cfg = vae_config(tiny, tmp_path / "run", lpips=(str(tmp_path / "vgg.safetensors"),))
    train.train_vae(replace(cfg, steps=3, batch=2))
    assert all(line["lpips"] > 0 for line in runs.read_log(tmp_path / "run" / "log.jsonl"))


def test_an_init_that_predicts_otherwise_is_refused(tiny, tmp_path, capsys):
    fails(capsys, ["diffusion", "--data", tiny / "data", "--init", tiny / "diffusion",
                   "--prediction", "eps", "--out", tmp_path / "x"],
          "predicts v; a run that begins there must, too")


def test_flow_schedule_shift_and_times_reach_the_model(tiny, tmp_path, capsys, no_pictures):
    """They are kept with it, so that sampling needs no word of them; nonsense is refused."""
    run = tmp_path / "flow"
    train.train_diffusion(diffusion_config(tiny, run, steps=4, prediction="flow", shift=0.5,
                                           schedule="cosine", times="logit-normal"))
    pipeline, facts = store.load_pipeline(run)
    assert pipeline.denoiser.prediction == "flow"
    assert torch.equal(pipeline.denoiser.schedule.sigmas_table,
                       Schedule.cosine().shifted(0.5).sigmas_table)
    labels = encode(pipeline.conditioner.variables, facts["rows"][:2])
    made, = pipeline.images(labels, [0, 1], Recipe(steps=3))
    assert made.shape == (2, 3, 32, 32)
    assert {line["step"] for line in runs.read_log(run / "log.jsonl")} == {3, 4}
    with pytest.raises(InputError, match="predicts flow; a file of Stable Diffusion can say eps"):
        export(pipeline, "ldm", tmp_path / "ldm")
    assert not (tmp_path / "ldm").exists()
    common = ["diffusion", "--data", tiny / "data", "--vae", tiny / "vae", "--out", tmp_path / "x"]
    fails(capsys, [*common, "--schedule", "zero-snr", "--prediction", "eps"], "v, x0 or flow")
    fails(capsys, [*common, "--shift", "0"], "--shift 0: a factor of σ, above 0")
    fails(capsys, [*common, "--times", "karras"], "uniform")


def test_the_last_line_names_best_only_where_it_is(tiny, tmp_path, capsys, no_pictures):
    train.train_diffusion(diffusion_config(tiny, tmp_path / "with", steps=1))
    assert "best/ holds those" in capsys.readouterr().out
    shutil.copytree(tiny / "data", tmp_path / "data")
    rows = read_csv(tmp_path / "data" / "metadata.csv", ("file_name",))
    parts = dict.fromkeys((row["patient"] for row in rows), "train")
    parts[rows[0]["patient"]] = "test"
    write_table(tmp_path / "data" / "metadata.csv",
                [{**row, "split": parts[row["patient"]]} for row in rows])
    cfg = diffusion_config(tiny, tmp_path / "without", steps=1)
    train.train_diffusion(replace(cfg, data=(str(tmp_path / "data"),)))
    said = capsys.readouterr().out
    assert "finished" in said and "best/" not in said


def test_of_many_images_some_are_reconstructed_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(finished_vae, "ENOUGH", 8)
    pixels = torch.randint(0, 256, (24, 1, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    found = []
    for step in (1, 3):
        rows = [{"file": str(i)} for i in range(24)][::step]
        some = Images(Table(rows, hashes={row["file"]: row["file"] for row in rows}),
                      pixels[::step])
        torch.manual_seed(0)
        vae = VAE(VAES["TINY"]).eval()
        finished_vae.finish_vae(tmp_path / str(step), vae, some, some, [], False)
        found.append(runs.read_json(tmp_path / str(step) / "vae.json"))
    every, third = found
    assert every["n_held_out"] == third["n_held_out"] == 8
    assert [every[name] for name in ("scale", "psnr", "psnr_pca64")] == [
        third[name] for name in ("scale", "psnr", "psnr_pca64")]
    assert len(every["trained_on"]) == 24


def test_the_nearest_training_image_is_found_in_whatever_parts(monkeypatch):
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    some = (pixels[[17, 3, 8]] * 0.9 + 10).byte()
    for at_once in (2048, 8, 1):
        monkeypatch.setattr(pictures, "within", lambda side, n=at_once: n)
        assert pictures.nearest(some, pixels).tolist() == [17, 3, 8]
