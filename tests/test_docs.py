"""The documents: their commands parse, their links lead somewhere, and the index names each page.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from minidiff.config import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {"-m minidiff.diffusion.public": "minidiff.diffusion.public.__main__",
           "-m minidiff.data.volumes": "minidiff.data.volumes.__main__",
           "-m minidiff.data.dicom": "minidiff.data.dicom.__main__",
           **{f"{name}.py": name for name in ("train", "sample", "classify", "evaluate")}}
DEFAULTS = {"train": ["vae", "diffusion"], "sample": "sample", "classify": "study",
            "evaluate": "report"}
COMMAND = re.compile(r"(?:python|--|\d) +(-m minidiff\.[a-z.]+|(?:benchmarks/)?[a-z]+\.py)(.*)")


def commands(page: Path) -> list[tuple[str, str]]:
    """(program, its words) of every command that a page shows in a block or between backticks."""
    text = page.read_text()
    blocks = re.findall(r"^ *```(?:sh|bash)\n(.*?)^ *```|((?:^ {4}[^\n]*\n)+)", text,
                        re.M | re.S)
    inline = re.findall(r"`(python [^`]+)`", text)
    lines = "\n".join(["\n".join(fenced or indented for fenced, indented in blocks),
                       *(re.sub(r"\s+", " ", line) for line in inline)])
    lines = re.sub(r"\\\n *", "", lines).replace("&&", "\n")
    return [found.groups() for line in lines.splitlines() if (found := COMMAND.search(line))]


def words(text: str) -> list[str]:
    """Without a comment, brackets and the caption of a block; … stands for more flags."""
    text = re.sub(r"[\[\]…]", "", re.split(r"(?<=\S)   +(?!-)|#|;", text)[0])
    return [w for w in shlex.split(text) if w != "&"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/x/vae").mkdir(parents=True)
    (tmp_path / "runs/x/vae/config.json").write_text('{"data": ["DIR"]}')
    monkeypatch.chdir(tmp_path)
    for program, rest in commands(page):
        given = words(rest)
        if program.startswith("benchmarks/"):
            source = (ROOT / program).read_text()
            strange = [w for w in given if w.startswith("--") and f'"{w}"' not in source
                       and f'"{w[2:]}"' not in source]
            assert not strange, f"{page.name}: {program}{rest}"
        elif program in MODULES and not {"--help", "--from"} & {*given}:
            name = MODULES[program]
            verbs = importlib.import_module(name).VERBS
            try:
                chosen = parse(verbs, DEFAULTS.get(name, ""), "", given)
            except SystemExit:
                pytest.fail(f"{page.name}: {program}{rest}\n{capsys.readouterr().err}")
            assert chosen and all(callable(run) for run, _ in chosen)
        else:
            assert (ROOT / program).is_file() or program in MODULES, f"{page.name}: {program}"


def test_commands_are_found_and_a_wrong_flag_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text `python train.py vae\n--steps 3` text\n\n"
                    "    python evaluate.py card   x\n\n"
                    "```sh\ntorchrun --nproc-per-node 8 -- sample.py --sets 2 \\\n"
                    "  --n 3  # two\n```\n")
    assert commands(page) == [("evaluate.py", " card   x"), ("sample.py", " --sets 2 --n 3  # two"),
                              ("train.py", " vae --steps 3")]
    assert words(" --sets 2 [--n 3] # two") == ["--sets", "2", "--n", "3"]
    with pytest.raises(SystemExit):
        parse(importlib.import_module("sample").VERBS, "sample", "", ["--setz", "2"])


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    paths = re.findall(r"`((?:minidiff|tests|benchmarks|tools|docs)/[\w/]+\.\w+)`", text)
    gone = [link for link in links if link and "://" not in link
            and not (page.parent / link).exists()]
    gone += [path for path in paths if not (ROOT / path).exists()]
    assert not gone, f"{page.name}: {gone}"


def test_pages_are_short_and_the_index_names_each():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 200, page.name
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
