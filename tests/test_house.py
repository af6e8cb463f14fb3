"""The house rules: which way imports run, how long files are, and that the scripts' commands
exist.
"""

import ast
import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "cells", "convolution", "pixels", "variables", "counted", "config", "runs",
          "distributed", "overlap", "statistics", "rating", "threads", "root", "download", "lock",
          "names", "hashes", "balance", "__init__"}
MAY_IMPORT = {  # room -> rooms; leaves are open to all
    "training": set(),
    "data": set(),
    "diffusion": set(),
    "classification": {"training", "data"},
    "sampling": {"training", "data", "diffusion", "evaluation"},
    "stages": {"training", "data", "diffusion", "evaluation", "sampling"},
    "evaluation": {"training", "data", "classification"},
    "public": {"diffusion"},
    "dicom": {"data"}, "volumes": {"data"},
    "matrix": {"training", "data", "classification", "evaluation"},
    **dict.fromkeys(("metrics", "features", "pages", "readers", "study", "anomalies"),
                    {"data", "classification", "evaluation"}),
}
DIFFUSION = {  # within diffusion
    "schedule": set(), "samplers": set(), "norm": set(), "unet": {"norm"}, "vae": {"norm"},
    "conditioning": set(),
    "denoiser": {"schedule"}, "times": {"schedule"},
    "model": {"unet", "vae", "conditioning", "schedule"},
    "guidance": {"denoiser", "model"},
    "inpainting": {"denoiser", "samplers"},
    "generate": {"conditioning", "denoiser", "guidance", "inpainting", "samplers", "schedule",
                 "vae"},
    "store": {"denoiser", "generate", "model", "schedule", "vae"},
    "watch": {"denoiser"}, "likelihood": {"denoiser"},
    "clip": set(), "lora": set(),
    "lpips": {"public"},
    "begin": {"lora", "model", "public", "schedule", "store", "vae"},
}
PUBLIC = {  # within diffusion/public; all may import the networks, schedule and pipeline
    "fetch": set(), "keys": set(), "weights": set(),
    "reader": {"weights"},
    "ldm": {"keys", "reader", "weights"},
    "folder": {"ldm", "reader", "weights"},
    "lora": {"folder", "keys", "weights"},
    "export": {"folder", "keys", "ldm", "lora"},
    "load": {"folder", "keys", "ldm", "reader", "weights"},
    "__main__": {"export", "fetch", "load", "lora"},
}
COMMANDS = {"public/__main__": {"data", "sampling"}}  # by `python -m`: as scripts, they read images
LEAF_IMPORTS = {
    **dict.fromkeys(("cells", "distributed", "lock", "statistics"), {"errors"}),
    "variables": {"cells", "errors"},
    "runs": {"errors", "threads"},
    "config": {"distributed", "download", "errors", "lock", "root", "runs", "threads"},
    "balance": {"errors", "variables"}, "rating": {"statistics"}, "download": {"errors", "runs"},
    "hashes": {"download", "runs"}, "root": {"errors", "runs"},
    "pixels": {"errors"},
    "__init__": {"api"},
    "api": {"diffusion", "errors", "evaluation", "pixels", "sampling", "variables"},
}
MODULES = sorted((ROOT / "minidiff").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, as paths below minidiff: 'data/images', 'runs', …"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            package = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{a.name}" for a in node.names} if package else {node.module}
    return {name.removeprefix("minidiff.").replace(".", "/") for name in found
            if name.startswith("minidiff.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room, name = path.parent.name, path.stem
    for other in imports(path):
        target = other.split("/")[0]
        if room == "public" and other.startswith("diffusion/public/"):
            assert other.split("/")[2] in PUBLIC[name], f"public/{name} imports {other}"
        elif room == "minidiff":
            assert target in LEAF_IMPORTS.get(name, set()) | {
                "__version__"}, f"leaf {name} imports {other}"
        elif target not in LEAVES | {"__version__"} and target != room:
            allowed = MAY_IMPORT[room] | COMMANDS.get(f"{room}/{name}", set())
            assert target in allowed, f"{path.relative_to(ROOT)} imports {other}"
        elif room == "diffusion" and target == "diffusion" and name in DIFFUSION:
            assert other.split("/")[1] in DIFFUSION[name], f"{name} imports {other}"


def test_the_rooms_of_evaluation_form_no_cycle():
    """A room is a folder of evaluation or a file beside the folders."""
    evaluation, needs = ROOT / "minidiff/evaluation", {}
    for path in evaluation.rglob("*.py"):
        room = path.relative_to(evaluation).with_suffix("").parts[0]
        used = {other.split("/")[1] for other in imports(path) if other.startswith("evaluation/")}
        needs.setdefault(room, set()).update(used - {room})
    while needs:
        free = {room for room, used in needs.items() if not used & set(needs)}
        assert free, f"these rooms import each other: {needs}"
        needs = {room: used for room, used in needs.items() if room not in free}


def test_no_page_is_written_in_python():
    """HTML stands in the templates of evaluation/pages and evaluation/readers."""
    tag = re.compile(r"</?(p|div|table|tr|td|th|h[1-6]|figure|section|span|b|strong|svg)[ >]")
    for path in (ROOT / "minidiff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not tag.search(node.value), f"{path}:{node.lineno}: {node.value[:60]}"


def test_every_module_of_diffusion_has_its_rule():
    assert {p.stem
            for p in (ROOT / "minidiff/diffusion").glob("*.py")} - {"__init__"} == set(DIFFUSION)
    assert {p.stem for p in (
        ROOT / "minidiff/diffusion/public").glob("*.py")} - {"__init__"} == set(PUBLIC)


def test_samplers_import_nothing_of_ours():
    assert imports(ROOT / "minidiff/diffusion/samplers.py") == set()


def test_nothing_imports_the_scripts_and_peers_stay_out():
    scripts = {"train", "sample", "classify", "evaluate"}
    peers = {"diffusers", "lpips", "transformers", "torchvision", "sklearn", "statsmodels",
             "pytorch_fid", "torch_fidelity",
             "cleanfid", "torchmetrics", "torchxrayvision", "prdc", "pytorch_msssim", "peft",
             "omegaconf"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                getattr(node, "module", "") or ""]
            assert not {n.split(".")[0] for n in names} & (scripts | peers), path


@pytest.mark.parametrize("path", [*MODULES, *ROOT.glob("*.py")],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350, f"{path.name} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"


def test_the_tests_are_the_same_on_every_machine():
    """One thread here and in what is started from here, and no GPU: see conftest.py."""
    import torch
    assert torch.get_num_threads() == 1 and not torch.cuda.is_available()
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1" and not os.environ[
        "CUDA_VISIBLE_DEVICES"]


def test_no_global_randomness_in_the_package():
    banned = re.compile(
        r"np\.random\.(?!default_rng|Generator|SeedSequence)|\bimport random\b|torch\.seed\(")
    for path in [*MODULES, *ROOT.glob("*.py")]:
        assert not banned.search(path.read_text()), path


@pytest.mark.parametrize("script", ["train", "sample", "classify", "evaluate"])
def test_the_commands_in_the_docstrings_parse(script, tmp_path, monkeypatch):
    import importlib

    from minidiff.config import parse
    module = importlib.import_module(script)
    (tmp_path / "runs/x/vae").mkdir(parents=True)
    (tmp_path / "runs/x/vae/config.json").write_text('{"data": ["DIR"]}')
    monkeypatch.chdir(tmp_path)
    doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    commands = re.findall(rf"python {script}\.py(.*)", doc)
    assert commands
    for command in commands:
        # a caption follows after three spaces or more
        words = shlex.split(re.split(r"   +|#", command)[0])
        if not words or "--from" in words:
            continue
        default = next(iter(module.VERBS)) if len(module.VERBS) < 2 or script != "train" else [
            "vae", "diffusion"]
        assert all(callable(run) and cfg is not None
                   for run, cfg in parse(module.VERBS, default, "", words))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.name)
def test_what_a_benchmark_imports_of_ours_is_there(path):
    """Also inside functions: no test runs all of them to their end."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "minidiff":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
