"""Fetching checkpoints, against a server in this process."""

import hashlib
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import Golden
from safetensors.torch import save_file

from harmonica.commands import listing, published
from harmonica.downloads import fetch, state, verify
from harmonica.errors import HarmonicaError
from harmonica.hub import state_of_part
from harmonica.metrics.weights import METRIC_WEIGHTS
from harmonica.weights import load_weights
from models import HUB_PARTS, MODELS, HubFolder, WeightSource
from models.dit import DiT, DiTConfig

CONTENT = bytes(range(256)) * 5000


class Server(ThreadingHTTPServer):
    """Serves CONTENT; ``drop_at`` cuts the connection once, ``announced`` is the Hub's hash."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.drop_at: int | None = None
        self.announced: str | None = None
        self.moved: dict[str, str] = {}  # by path, what it redirects to
        self.content = CONTENT
        self.version: str | None = None  # its ETag
        self.knows_if_range = True
        self.ranges: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pt"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.ranges.append(wanted)
        if self.path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[self.path])
            self.end_headers()
            return
        if self.headers.get("If-Range", server.version) != server.version and server.knows_if_range:
            wanted = None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if wanted and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        if server.version:
            self.send_header("ETag", server.version)
        if server.announced:
            self.send_header("X-Linked-ETag", f'"{server.announced}"')
        self.end_headers()
        if server.drop_at is not None:
            body, server.drop_at = body[: server.drop_at], None
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()


def source(*urls: str) -> WeightSource:
    return WeightSource("weights.pt", urls, size=1000)


def left_behind(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_a_file_is_fetched_once_and_verified(server, tmp_path):
    server.announced = hashlib.sha256(CONTENT).hexdigest()
    path = fetch(source(server.url), tmp_path)
    assert path.read_bytes() == CONTENT
    assert verify(path) == server.announced
    fetch(source(server.url), tmp_path)
    assert len(server.ranges) == 1
    assert left_behind(tmp_path) == ["weights.pt", "weights.pt.sha256"]


def test_an_interrupted_fetch_resumes(server, tmp_path):
    server.drop_at = 1_100_000
    with pytest.raises(HarmonicaError):
        fetch(source(server.url), tmp_path)
    assert not (tmp_path / "weights.pt").exists()
    assert "partly fetched" in state(source(server.url), tmp_path)
    assert fetch(source(server.url), tmp_path).read_bytes() == CONTENT
    assert server.ranges[0] is None and server.ranges[1].startswith("bytes=")


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_another_version_is_not_joined_to_the_first(server, tmp_path, knows_if_range):
    server.version, server.drop_at = '"one"', 1_100_000
    with pytest.raises(HarmonicaError):
        fetch(source(server.url), tmp_path)
    server.version, server.content = '"two"', CONTENT[::-1]
    server.knows_if_range = knows_if_range
    if not knows_if_range:
        with pytest.raises(HarmonicaError):
            fetch(source(server.url), tmp_path)
    server.drop_at = 1_100_000
    with pytest.raises(HarmonicaError):
        fetch(source(server.url), tmp_path)
    assert fetch(source(server.url), tmp_path).read_bytes() == CONTENT[::-1]
    assert server.ranges[-1].startswith("bytes=")  # but a version is gone on with
    assert left_behind(tmp_path) == ["weights.pt", "weights.pt.sha256"]


def test_the_second_address_is_tried(server, tmp_path):
    path = fetch(source("http://127.0.0.1:9/none", server.url), tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_file_that_is_not_the_announced_one_is_refused(server, tmp_path):
    server.announced = "0" * 64
    with pytest.raises(HarmonicaError, match="not the expected file"):
        fetch(source(server.url), tmp_path)
    assert left_behind(tmp_path) == []


def test_a_file_that_is_not_the_pinned_one_is_refused(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    other = replace(source(server.url), sha256="0" * 64, arguments="inception")
    with pytest.raises(HarmonicaError, match=r"not the expected file.*`download\.py inception`"):
        fetch(other, tmp_path)
    assert left_behind(tmp_path) == []
    path = fetch(replace(other, sha256=digest), tmp_path)
    assert verify(path, digest) == digest
    # A file that was put there by hand has no record, and is held to the pin all the same.
    path.with_name("weights.pt.sha256").unlink()
    with pytest.raises(HarmonicaError, match="not the published file"):
        verify(path, "0" * 64)
    assert verify(path) == digest


def test_a_partial_file_that_is_too_long_is_started_again(server, tmp_path):
    (tmp_path / ".weights.pt.0.part").write_bytes(CONTENT + b"more")
    with pytest.raises(HarmonicaError):
        fetch(source(server.url), tmp_path)
    assert fetch(source(server.url), tmp_path).read_bytes() == CONTENT


def test_a_whole_partial_file_is_taken(server, tmp_path):
    (tmp_path / ".weights.pt.0.part").write_bytes(CONTENT)
    assert fetch(source(server.url), tmp_path).read_bytes() == CONTENT


def test_only_https_is_answered(server, tmp_path):
    """Neither at first, nor where a server sends us on to, nor on the way there."""
    with pytest.raises(HarmonicaError, match="InvalidSchema"):
        fetch(source("http://example.org/weights.pt"), tmp_path)
    here, elsewhere = (f"http://{at}:{server.server_port}" for at in ("127.0.0.1", "127.1"))
    ways = (
        {"/weights.pt": f"{elsewhere}/last"},
        {"/weights.pt": f"{elsewhere}/between", "/between": f"{here}/last"},
    )
    for way in ways:
        server.moved = way
        server.ranges.clear()
        with pytest.raises(HarmonicaError, match="InvalidSchema"):
            fetch(source(server.url), tmp_path)
        assert len(server.ranges) == len(way) + 1  # it would have answered there
    assert left_behind(tmp_path) == []
    server.moved = {"/weights.pt": f"{here}/last"}
    assert fetch(source(server.url), tmp_path).read_bytes() == CONTENT


def test_an_error_page_is_not_a_checkpoint(server, tmp_path):
    server.content = b"<html>sorry</html>"
    with pytest.raises(HarmonicaError, match="not the expected file"):
        fetch(source(server.url), tmp_path)


def test_a_file_that_changed_is_noticed(server, tmp_path):
    path = fetch(source(server.url), tmp_path)
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(HarmonicaError, match="changed since"):
        verify(path)


@pytest.mark.parametrize("layout", ["bare", "ema", "safetensors"])
def test_checkpoint_layouts_load(golden_b: Golden, tmp_path, layout):
    weights, path = golden_b.model.state_dict(), tmp_path / "weights"
    if layout == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"ema": weights, "opt": {}} if layout == "ema" else weights, path)
    model = DiT(DiTConfig(**golden_b.hparams["model"]))
    load_weights(model, path, "DiT")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_of_another_model_names_the_tensor(golden_b: Golden, tmp_path):
    torch.save(golden_b.model.state_dict(), tmp_path / "w.pt")
    other = DiT(DiTConfig(**{**golden_b.hparams["model"], "num_classes": 3}))
    with pytest.raises(HarmonicaError, match=r"y_embedder\.embedding_table\.weight is \(8, 48\)"):
        load_weights(other, tmp_path / "w.pt", "DiT")
    deeper = DiT(DiTConfig(**{**golden_b.hparams["model"], "depth": 5}))
    with pytest.raises(HarmonicaError, match=r"blocks\.4.* is missing"):
        load_weights(deeper, tmp_path / "w.pt", "DiT")


def test_a_folder_of_the_hub_is_found_again_offline(tmp_path, monkeypatch):
    """In the cache of the Hub's client, of which only what belongs to the part counts."""
    part = HubFolder("someone/vae", "vae", ("vae/*",), size=1000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert state_of_part(part) == "not fetched, at least 0.0 GB"
    snapshot = tmp_path / "models--someone--vae" / "snapshots" / "abc"
    (snapshot / "vae").mkdir(parents=True)
    (tmp_path / "models--someone--vae" / "refs").mkdir()
    (tmp_path / "models--someone--vae" / "refs" / "main").write_text("abc")
    (snapshot / "other.bin").write_bytes(bytes(5000))
    (snapshot / "vae" / "config.json").write_bytes(bytes(100))
    assert state_of_part(part).startswith("partly fetched")
    (snapshot / "vae" / "weights.safetensors").write_bytes(bytes(1000))
    assert state_of_part(part).startswith(str(snapshot))


def test_everything_that_is_published_is_listed_and_can_be_asked_for():
    lines = listing().splitlines()
    for name, size in [(m.name, s) for m in MODELS.values() for s in m.weights]:
        assert any(line.split()[:3] == [name, str(size), "px"] for line in lines)
        source = published(name, size)
        if isinstance(source, WeightSource):
            assert source.arguments.split()[0] == name
            assert source.size > 1e8 and all(url.startswith("https://") for url in source.urls)
    files = [s.file for m in MODELS.values() for s in m.weights.values() if not isinstance(s, Path)]
    assert len(files) == len(set(files))
    for name in (*HUB_PARTS, *METRIC_WEIGHTS):
        assert any(line.split()[0] == name for line in lines) and published(name, None)
    with pytest.raises(HarmonicaError, match="PixArt-Sigma-XL/2 --image-size 2048"):
        published("PixArt-Sigma-XL/2", 300)
