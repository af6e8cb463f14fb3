"""fetch: public files by name from a server on loopback that answers as the Hugging Face Hub
does.
"""

import hashlib
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from minidiff import config
from minidiff.diffusion.public import __main__ as public
from minidiff.diffusion.public import fetch, load
from minidiff.diffusion.public.load import load_sd, read_vae
from minidiff.errors import InputError
from minidiff.evaluation.features import inception

pytest.importorskip("huggingface_hub", reason="pip install minidiff[hub]")
BODY = bytes(range(256)) * 12_000  # 3 MB, read in three blocks


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of /…/NAME; the Hub's own paths lead to another host, which stores the file."""

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.asked.append((self.command, self.headers["Host"].split(":")[0], begin,
                             self.headers["Authorization"]))
        body = server.files.get(name)
        elsewhere = server.stored and "/resolve/main/" in self.path
        self.send_response(404 if body is None else 302 if elsewhere else 206
                           if begin and server.ranges else 200)
        if body is None:
            return self.end_headers()
        rest = body[begin:] if server.ranges else body
        if elsewhere:
            self.send_header("Location", f"http://localhost:{server.server_port}/stored/{name}")
            rest = b""
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(rest[: server.cut])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that HF_ENDPOINT names; files: name → bytes; cut: bytes after which the connection
    ends.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.cut, server.ranges, server.stored = {}, [], None, True, False
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def publish(what, body):
        if what == "inception":
            public = (f"{server.url}/{Path(inception.URL).name}", hashlib.sha256(body).hexdigest(),
                      len(body))
            monkeypatch.setattr(fetch, "INCEPTION", public)
            for name, value in zip(("URL", "SHA256", "SIZE"), public):
                monkeypatch.setattr(inception, name, value)
            file = Path(inception.URL).name
        else:
            source = replace(fetch.ON_HUB[what], size=len(body),
                             sha256=hashlib.sha256(body).hexdigest())
            monkeypatch.setitem(fetch.ON_HUB, what, source)
            file = source.file
        server.files[file] = body
        return file

    server.publish = publish
    yield server
    server.shutdown()
    server.server_close()


def run(*words):
    config.main(public.VERBS, default="show", doc="", argv=[str(w) for w in words])


def fails(capsys, *words) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    # no bars
    line, = [line for line in capsys.readouterr().err.splitlines()
             if line.strip() and "B/s]" not in line]
    return line


def test_a_model_and_a_vae_are_fetched_whole_and_load(hub, tmp_path, capsys, monkeypatch):
    sd = pytest.importorskip("sd_peer")
    sd.ours(monkeypatch, tmp_path)
    nets = sd.originals("SD 1.x")
    hub.publish("sd-1.5",
                sd.write_safetensors(tmp_path / "a", sd.ldm_state("SD 1.x", *nets)).read_bytes())
    hub.publish("vae-ft-mse", sd.write_safetensors(tmp_path / "b", sd.ldm_vae(nets[1].state_dict(),
                                                                              3, "")).read_bytes())
    run("fetch", "sd-1.5", "--to", tmp_path / "to")
    model = tmp_path / "to" / fetch.ON_HUB["sd-1.5"].file
    said = capsys.readouterr().out
    assert f"next: python train.py diffusion --root runs/x --data DIR --init {model}" in said
    assert model.read_bytes() == hub.files[model.name]
    assert torch.equal(load_sd(model, prediction="eps").unet.conv_in.weight, nets[0].conv_in.weight)
    run("fetch", "vae-ft-mse")
    file = fetch.cache() / fetch.ON_HUB["vae-ft-mse"].file
    assert fetch.cache() == tmp_path / "cache/minidiff"
    assert "CreativeML" not in capsys.readouterr().out
    assert torch.equal(read_vae(file).vae.quant_conv.weight, nets[1].quant_conv.weight)


@pytest.mark.parametrize("what", ["sd-1.4", "inception"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on_and_a_whole_one_is_not_repeated(hub, tmp_path, capsys, what,
                                                                ranges):
    file, hub.ranges = tmp_path / hub.publish(what, BODY), ranges
    hub.cut = 2_000_000
    assert "cut off after 2,000,000 of 3,072,000 bytes; the same command resumes" in fails(
        capsys, "fetch", what, "--to", tmp_path)
    assert not file.exists() and Path(f"{file}.part").stat().st_size == 2_000_000
    hub.cut = None
    run("fetch", what, "--to", tmp_path)
    assert file.read_bytes() == BODY and hub.asked[-1][2] == 2_000_000 and not Path(
        f"{file}.part").exists()
    asked = len(hub.asked)
    run("fetch", what, "--to", tmp_path)
    assert len(hub.asked) == asked


def test_killed_before_the_rename_it_asks_for_nothing(hub, tmp_path):
    file = tmp_path / hub.publish("inception", BODY)
    Path(f"{file}.part").write_bytes(BODY)
    run("fetch", "inception", "--to", tmp_path)
    assert file.read_bytes() == BODY and hub.asked == []


def test_a_wrong_file_is_refused_removed_and_both_hashes_named(hub, tmp_path, capsys):
    file, right = hub.publish("sd-1.5", BODY), hashlib.sha256(BODY).hexdigest()
    for wrong in (b"x" * len(BODY), BODY + b"more", b"<html>"):
        hub.files[file] = wrong
        line = fails(capsys, "fetch", "sd-1.5", "--to", tmp_path / "to")
        assert hashlib.sha256(wrong[: len(BODY) + 1]).hexdigest() in line and right in line
        assert not (tmp_path / "to").exists()
    # is not overwritten
    (tmp_path / file).write_bytes(b"my own")
    line = fails(capsys, "fetch", "sd-1.5", "--to", tmp_path)
    assert hashlib.sha256(
        b"my own").hexdigest() in line and right in line and "move it away" in line
    assert (tmp_path / file).read_bytes() == b"my own"


def test_the_token_is_shown_to_the_hub_alone(hub, tmp_path):
    file = hub.publish("sd-2.1", BODY)
    run("fetch", "sd-2.1", "--to", tmp_path / "a")
    assert [(host, token)
            for _, host, _, token in hub.asked] == [("127.0.0.1", "Bearer hf_secret")] * 2
    hub.stored = True
    run("fetch", "sd-2.1", "--to", tmp_path / "b")
    assert hub.asked[-1] == ("GET", "localhost", 0,
                             None) and (tmp_path / "b" / file).read_bytes() == BODY


def test_two_processes_do_not_write_into_one_file(hub, tmp_path, capsys):
    import fcntl
    with open(tmp_path / (hub.publish("inception", BODY) + ".part"), "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = fails(capsys, "fetch", "inception", "--to", tmp_path)
        assert "another process is fetching it" in said


def test_without_network_file_or_library_one_line_says_what_to_do(hub, tmp_path, capsys,
                                                                  monkeypatch):
    hand = "by hand and give the same command to check it"
    line = fails(capsys, "fetch", "sd-1.5", "--to", tmp_path)                          # 404
    assert "v1-5-pruned-emaonly.safetensors cannot be reached (Client error '404" in line
    assert hand in line
    hub.shutdown()
    hub.server_close()
    for what in ("sd-1.5", "inception"):
        hub.publish(what, BODY)
        line = fails(capsys, "fetch", what, "--to", tmp_path)
        assert "refused" in line and f"to {tmp_path} {hand}" in line and (
            "set HF_ENDPOINT" in line) == (what == "sd-1.5")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'minidiff[hub]', or copy v1-5" in fails(capsys, "fetch", "sd-1.5", "--to",
                                                                tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_are_listed_and_a_mistyped_one_is_told(capsys):
    for words in ((), ("--list",), ("sd-1.5", "--list")):
        run("fetch", *words)
        out = capsys.readouterr().out
        assert all(f"\n{name:<12}" in "\n" + out
                   for name in fetch.sources()) and "4.27 GB, CreativeML OpenRAIL-M" in out
        assert f"SHA-256 {inception.SHA256}" in out
        assert "huggingface.co/stabilityai/sd-vae-ft-mse-original" in out
    said = fails(capsys, "fetch", "sd15")
    assert "'sd15' is not one of sd-1.5, sd-1.4, sd-2.1, vae-ft-mse, inception" in said
    assert "nearest: sd-1.5" in said


def test_the_sources_agree_with_what_else_is_known_of_them(monkeypatch, tmp_path):
    known = {name: digest for digest, (name, *_) in load.KNOWN.items()}
    sources = fetch.sources()
    assert all(known.get(s.file, s.sha256) == s.sha256 and len(s.sha256) == 64
               for s in sources.values())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert inception.weights() == fetch.cache() / sources["inception"].file


def test_auto_takes_what_fetch_left(hub):
    hub.publish("inception", BODY)
    run("fetch", "inception")
    assert inception.download(digest=inception.SHA256) == inception.weights() and len(
        hub.asked) == 1


def test_an_absent_init_fetches_nothing(hub, tmp_path):
    from minidiff.diffusion.begin import start_vae
    hub.publish("sd-1.5", BODY)
    absent = str(tmp_path / fetch.ON_HUB["sd-1.5"].file)
    for read in (load_sd, lambda path: start_vae(path, "SD15", 0)):
        with pytest.raises(InputError, match="no such file"):
            read(absent)
    assert hub.asked == [] and not Path(absent).exists()


def test_to_import_it_is_cheap():
    code = ("import sys, minidiff.diffusion.public.fetch as f; f.cache(); "
            "print({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout == "set()\n"


def test_a_user_without_a_home_has_a_cache_where_he_works(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert fetch.cache() == Path(".cache/minidiff")
