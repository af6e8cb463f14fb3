"""Files that are damaged, hostile or something else: one sentence each, with the name, and nothing
is ever run.
"""

import functools
import json
import os
import pickle
import re
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from minidiff.diffusion.public import weights
from minidiff.diffusion.public.load import load_sd
from minidiff.diffusion.public.weights import read_weights
from minidiff.errors import InputError

sd = pytest.importorskip("sd_peer")


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch, tmp_path):
    sd.ours(monkeypatch, tmp_path)


def refused(path, match="."):
    """The one sentence with which a file is refused."""
    with pytest.raises(InputError, match=match) as caught:
        load_sd(path, prediction="eps")
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1500
    return message


# Mutations: one tensor of each dialect.

def write_in(dialect, root, state, part, whole):
    """A file with this state; a folder is `whole` with another `part`."""
    if dialect == "folder":
        path = shutil.copytree(whole, root / "folder")
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        sd.write_safetensors(path / part / f"{file}.safetensors", {
            k.split(":")[1]: t for k, t in state.items() if k.startswith(part + ":")})
        return path
    if dialect == "ckpt":
        return sd.write_ckpt(root / "m.ckpt", state)
    return sd.write_safetensors(root / "m.safetensors", state)


@functools.cache
def state_of(dialect, version):
    nets = sd.originals(version)
    if dialect == "folder":
        parts = zip(("unet", "vae", "text_encoder"), nets)
        return {f"{part}:{k}": t for part, net in parts for k, t in net.state_dict().items()}
    return sd.ldm_state(version, *nets)


MUTATIONS = {
    "rename": lambda s, n: {(k.replace(".", "._", 1) if k == n else k): t for k, t in s.items()},
    "drop": lambda s, n: {k: t for k, t in s.items() if k != n},
    "add": lambda s, n: {**s, re.sub(r"[._](weight|bias)$", r".more_\1", n): s[n].clone()},
    "transpose": lambda s, n: {**s, n: s[n].transpose(0, 1).contiguous()},
    "halve": lambda s, n: {**s, n: s[n][: len(s[n]) // 2].clone()},
}
LDM_UNET = "model.diffusion_model."
VICTIMS = {  # a tensor that is not square, of each network, in each dialect
    "ldm": {
        "SD 1.x": (LDM_UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
                   "first_stage_model.encoder.conv_out.weight",
                   "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
        "SD 2.x": (LDM_UNET + "output_blocks.3.1.transformer_blocks.0.attn2.to_v.weight",
                   "first_stage_model.decoder.conv_in.weight",
                   "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight")},
    "folder": {
        "SD 1.x": ("unet:down_blocks.1.resnets.0.conv_shortcut.weight", "vae:quant_conv.weight",
                   "text_encoder:text_model.embeddings.position_embedding.weight"),
        "SD 2.x": ("unet:up_blocks.1.resnets.2.time_emb_proj.weight",
                   "vae:decoder.conv_out.weight",
                   "text_encoder:text_model.encoder.layers.0.mlp.fc2.weight")},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("version", ["SD 1.x", "SD 2.x"])
@pytest.mark.parametrize("dialect", ["ckpt", "safetensors", "folder"])
def test_one_tensor_changed_is_refused_by_name(dialect, version, mutation, tmp_path):
    state = state_of("folder" if dialect == "folder" else "ldm", version)
    parts = sd.originals(version)
    whole = sd.write_folder(tmp_path / "whole", *parts) if dialect == "folder" else None
    for i, victim in enumerate(VICTIMS["folder" if dialect == "folder" else "ldm"][version]):
        victim = victim if victim in state else victim.replace("text_model.", "")
        if mutation == "transpose" and state[victim].shape[0] == state[victim].shape[1]:
            victim = victim.replace("quant_conv", "encoder.conv_in")
        changed = MUTATIONS[mutation](state, victim)
        (tmp_path / str(i)).mkdir()
        path = write_in(dialect, tmp_path / str(i), changed, victim.split(":")[0], whole)
        message, name = refused(path), victim.split(":")[-1]
        renamed = {"rename": name.replace(".", "._", 1),
                   "add": re.sub(r"[._](weight|bias)$", r".more_\1", name)}
        expected = renamed.get(mutation, name)
        kind = {"rename": "unexpected", "add": "1 unexpected",
                "drop": "1 missing"}.get(mutation, "1 of another shape")
        for part in (expected, kind, str(tmp_path / str(i))):
            assert part in message


def test_the_first_ten_names_and_how_many(tmp_path):
    state = {k: t for k, t in state_of("ldm", "SD 1.x").items() if ".input_blocks.4." not in k}
    message = refused(sd.write_safetensors(tmp_path / "m.safetensors", state))
    assert re.search(r"(\d+) missing: (\S+, ){9}\S+ and (\d+) more", message)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_other_types_are_refused_by_name(tmp_path, dtype):
    name = "model.diffusion_model.out.2.weight"
    state = state_of("ldm", "SD 1.x")
    state = {**state, name: state[name].to(dtype)}
    refused(sd.write_safetensors(tmp_path / "m.safetensors", state),
            f"{name} is {str(dtype).removeprefix('torch.')}; allowed are float32")


# Other files.

def small(path, names):
    return sd.write_safetensors(path, {name: torch.zeros(4, 4) for name in names})


@pytest.mark.parametrize("names, message", [
    (["conditioner.embedders.0.transformer.x", "model.diffusion_model.label_emb.0.0.weight"],
     "SDXL is not supported"),
    (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "SD3 is not supported"),
    (["double_blocks.0.img_attn.qkv.weight"], "Flux is not supported"),
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
     "a LoRA file is not supported"),
    (["unet.down_blocks.0.attentions.0.lora_A.weight"], "a LoRA file is not supported"),
    (["control_model.input_blocks.0.0.weight"], "ControlNet is not supported"),
    (["emb_params"], "a textual inversion is not supported"),
    (["some.classifier.weight"], "no Stable Diffusion UNet"),
])
def test_files_of_other_models(tmp_path, names, message):
    refused(small(tmp_path / "x.safetensors", names), message)


@pytest.mark.parametrize("channels, task, instead", [
    (9, "a UNet for inpainting", "--mask DIR`"), (8, "a UNet for editing", "--change`"),
    (5, "a UNet for depth", "made from"), (7, "a UNet for enlarging", "made from"),
])
def test_unets_of_other_tasks_are_refused_with_what_does_that_here(tmp_path, channels, task,
                                                                   instead):
    """An LDM file, a diffusers folder by its config and by its weights, and a UNet on top."""
    first, whole = torch.zeros(32, channels, 3, 3), sd.originals("SD 1.x")
    ldm = {**state_of("ldm", "SD 1.x"), "model.diffusion_model.input_blocks.0.0.weight": first}
    found = [refused(sd.write_safetensors(tmp_path / "in.safetensors", ldm))]
    good = sd.write_folder(tmp_path / "f", *whole)
    unet = sd.write_safetensors(tmp_path / "unet.safetensors",
                                {**whole[0].state_dict(), "conv_in.weight": first})
    with pytest.raises(InputError) as caught:
        load_sd(good, unet=unet)
    found.append(str(caught.value))
    shutil.copy(unet, next((good / "unet").glob("*.safetensors")))
    found.append(refused(good))
    file = good / "unet/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": channels}))
    found.append(refused(good, str(file)))
    for said in found:
        assert f"{channels} input channels, {task}" in said and said.endswith(instead), said
    assert str(unet) in found[1]


def test_folders_of_other_models(tmp_path):
    for part, message in (("transformer", "SD3 or Flux"),
                          ("text_encoder_2", "SDXL .*is not supported")):
        (tmp_path / part).mkdir()
        refused(tmp_path, message)
        (tmp_path / part).rmdir()
    refused(tmp_path, "config.json is missing")
    path = sd.write_folder(tmp_path / "f", *sd.originals("SD 1.x"))
    file = path / "unet" / "config.json"
    good = json.loads(file.read_text())
    for change, message in (
            ({"addition_embed_type": "text_time"}, "addition_embed_type 'text_time' is not known"),
            ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
            ({"act_fn": "gelu"}, "act_fn 'gelu'"), ({"in_channels": 6}, "in_channels 6"),
            ({"block_out_channels": [10**9] * 3}, "not possible"),
            ({"layers_per_block": 10**6}, "not possible"),
            ({"block_out_channels": "x"}, "not possible"),
            ({"block_out_channels": [33, 64, 64]}, "not possible"),
            ({"attention_head_dim": 0}, "not possible"),
            ({"attention_head_dim": 7}, "7 heads do not"),
            ({"new_trick": 3}, "new_trick 3 is not known"),
            ({"cross_attention_dim": None}, "not those of this model|not possible")):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=message):
            load_sd(path)
    for text in ("{", "[" * 100_000, "[1]", "\x00"):
        file.write_text(text)
        with pytest.raises(InputError, match=str(file)):
            load_sd(path)


def test_schedulers_that_are_refused(tmp_path):
    path = sd.write_folder(tmp_path / "f", *sd.originals("SD 1.x"))
    file = path / "scheduler" / "scheduler_config.json"
    good = json.loads(file.read_text())
    for change in ({"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"},
                   {"beta_start": "x"}, {"num_train_timesteps": 10**12}, {"trained_betas": [2.0]},
                   {"prediction_type": "flow"}):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match="scheduler_config.json"):
            load_sd(path)


def test_shards_have_to_hold_what_their_index_says(tmp_path):
    path = sd.write_folder(tmp_path / "f", *sd.originals("SD 1.x"), max_shard_size="3MB")
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    load_sd(path)
    name, shard = next(iter(table["weight_map"].items()))
    for change, message in (({name: "../../secret"}, "files beside it"),
                            ({"more": shard}, "does not hold what"),
                            ({name: "not-there.safetensors"}, "no such file|does not hold what")):
        index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], **change}}))
        with pytest.raises(InputError, match=message):
            load_sd(path)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize("content, message", [
    (b"", r"\(0 bytes\) is neither"),
    (b"hello, this is a text file\n", "neither a safetensors file nor"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "neither .*Git-LFS pointer"),
    (b"<!DOCTYPE html><html>", "neither .*a web page saved under this name; download"),
    (b'{"error":"Repository not found"}', "neither .*text, which begins"),
    (header(b"{}", 10**15), "damaged or cut short"),
    (header(b"{}" + b" " * 100, 7), "damaged or cut short"),
    (header(b'{"a":' * 5000 + b"1" + b"}" * 5000), "damaged or cut short"),
    (header(b'{"a":{"dtype":"F32","shape":[9999999999,9999999999],"data_offsets":[0,4]}}')
     + b"0000", "damaged"),
    (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            + b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"0000", "damaged"),
    (header(b"{" + b" " * (17 << 20) + b"}"), "holds no tensors"),
    (b"PK\x03\x04 not a zip", "damaged or not a checkpoint"),
    (b"\x80\x02 not a pickle", "damaged"), (b"\x80\x02.", "damaged"),
])
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, message)
    os.rename(path, tmp_path / "x.ckpt")  # the extension says nothing
    refused(tmp_path / "x.ckpt", message)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "legacy"])
def test_files_cut_short_anywhere(tmp_path, kind):
    state = {f"model.diffusion_model.{i}": torch.randn(16, 16) for i in range(4)}
    path = tmp_path / "x.bin"
    sd.write_safetensors(path, state) if kind == "safetensors" else sd.write_ckpt(
        path, state, legacy=kind == "legacy")
    whole = path.read_bytes()
    assert len(read_weights(path).tensors) == 4
    for part in (0.01, 0.2, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: max(3, int(part * len(whole)))])
        refused(path)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "legacy"])
def test_bytes_changed_at_random_give_one_sentence(tmp_path, kind):
    state = {k: t for k, t in state_of("ldm", "SD 1.x").items()
             if "input_blocks.1." in k or k == "alphas_cumprod"}
    path = tmp_path / "x.bin"
    sd.write_safetensors(path, state) if kind == "safetensors" else sd.write_ckpt(
        path, state, legacy=kind == "legacy")
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for place, value in torch.randint(1 << 30, (3, 2), generator=generator).tolist():
            damaged[place % 3000 if place % 2 else -1 - place % 3000] = value % 256
        path.write_bytes(damaged)
        refused(path)


def test_missing_file(tmp_path):
    refused(tmp_path / "nowhere.ckpt", "no such file")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["state_dict", "callbacks", "root", "key"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_payload_is_named_and_not_run(tmp_path, where, legacy):
    marker = tmp_path / "ran"
    payload = Payload(marker)
    state = {"a": torch.zeros(1)}
    if where == "state_dict":
        state["b"] = payload
    extra = {"extra": payload} if where == "callbacks" else {("x",
                                                              payload): 1} if where == "key" else {}
    path = tmp_path / "x.ckpt"
    if where == "root":
        torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    else:
        sd.write_ckpt(path, state, legacy=legacy, extra=extra)
    assert "system" in refused(path, "wants to run (posix|os).system")
    assert not marker.exists()
    with open(path, "rb") as file:  # the payload would have run
        torch.load(file, weights_only=False) if where == "root" else None
    assert marker.exists() == (where == "root")


@pytest.mark.parametrize("name", [
    "builtins.eval", "builtins.getattr", "subprocess.Popen", "numpy.load", "torch.hub.load",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping", "__main__.Callback"])
def test_every_other_class_is_refused_by_its_name(tmp_path, name):
    module, _, leaf = name.rpartition(".")
    data = b"\x80\x02}" + b"X" + struct.pack(
        "<I", 1) + b"a" + f"c{module}\n{leaf}\n".encode() + b"X\x01\x00\x00\x001\x85Rs."
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/version", "3\n")
    assert leaf in refused(path, "wants to run")


def test_the_stubs_do_nothing():
    assert vars(weights.Inert(1, "os.system")) == {}
    assert weights.Inert().__setstate__({"a": 1}) is None


@pytest.mark.parametrize("bomb", ["compressed", "pickle", "no pickle"])
def test_zip_bombs(tmp_path, bomb, monkeypatch):
    path = tmp_path / "x.ckpt"
    monkeypatch.setattr(weights, "LARGEST", 1 << 16)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if bomb == "compressed"
                         else zipfile.ZIP_STORED) as archive:
        archive.writestr("x/readme" if bomb == "no pickle" else "x/data.pkl", b"0" * (1 << 20))
    refused(path, {"compressed": "compressed zip", "pickle": "a pickle of 1 MB",
                   "no pickle": "not a checkpoint"}[bomb])


def test_a_checkpoint_without_tensors(tmp_path):
    path = tmp_path / "x.ckpt"
    for content in ({"state_dict": {}}, [1, 2], {"state_dict": [1]}, {"a": "b"}):
        torch.save(content, path)
        refused(path, "holds no tensors by name")


def test_plain_pickles_are_not_read(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    refused(path, "damaged or not a checkpoint")


def test_safetensors_stay_mapped_to_the_file(tmp_path):
    path = sd.write_safetensors(tmp_path / "x.safetensors", {"a": torch.arange(4.0)})
    assert torch.equal(read_weights(path).tensors["a"], load_file(path)["a"])
