"""Claims about hub ids, against a small hub on this machine (a fresh process each: HF_ENDPOINT is
read when huggingface_hub is imported)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from flexpipe.errors import ModelError
from flexpipe.memory.hub import download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by id, each file's content by name, and the paths that were asked for."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        for repo, files in self.hub.repos.items():
            if path.startswith(f"/{repo}/resolve/") and repo not in self.hub.gated:
                name = path.split("/", 5)[5]
                if name in files:
                    return self.send(200, files[name], "application/octet-stream")
            elif path.startswith(f"/api/models/{repo}"):
                return self.api(repo, files, path.removeprefix(f"/api/models/{repo}"))
        self.send(404, b"{}", "application/json", error="RepoNotFound")

    def api(self, repo: str, files: dict[str, bytes], rest: str) -> None:
        if repo in self.hub.gated:
            return self.send(403, b"{}", "application/json", error="GatedRepo")
        if rest.startswith("/tree"):
            listing: object = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in files.items()
            ]
        elif rest in ("", "/revision/main", f"/revision/{COMMIT}"):
            names = [{"rfilename": name} for name in files]
            listing = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": names}
        else:
            return self.send(404, b"{}", "application/json", error="RevisionNotFound")
        self.send(200, json.dumps(listing).encode(), "application/json")

    def send(self, status: int, body: bytes, kind: str, error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_etag(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def weights() -> bytes:
    return save({"w": torch.arange(1000, dtype=torch.float32)})


@pytest.fixture
def hub() -> Iterator[Hub]:
    config = b'{"model_type": "llama"}'
    shared = {"config.json": config, "tokenizer.json": b"{}", "README.md": b"#"}
    repos = {
        "org/good": shared
        | {
            "model.safetensors": weights(),
            "pytorch_model.bin": b"pickle",
            "generation_config.json": b'{"eos_token_id": 2}',
            "original/consolidated.safetensors": b"a second copy",
            "consolidated.safetensors": b"a second copy",
        },
        "org/pickled": shared | {"pytorch_model.bin": b"pickle"},
        "org/empty": shared,
        "org/gated": shared,
    }
    hub = Hub(repos, gated={"org/gated"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def run(script: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    prelude = """
        from pathlib import Path
        from flexpipe.errors import ModelError
        from flexpipe.memory.source import open_checkpoint
        def refusal(model, **kwargs):
            try:
                open_checkpoint(model, cache_dir=Path("unused"), **kwargs)
            except ModelError as error:
                return str(error)
    """
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        env=kept | {"HF_HOME": str(home), "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_hub_id_fetches_weights_configs_and_tokenizer_and_nothing_else(
    tmp_path: Path, hub: Hub
) -> None:
    script = """
        checkpoint = open_checkpoint("org/good", cache_dir=Path("unused"))
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.generation_config == {"eos_token_id": 2}
        assert checkpoint.require("w", (1000,)).num_bytes == 4000
        print(sorted(path.name for path in checkpoint.directory.iterdir()))
    """
    done = run(script, tmp_path, HF_ENDPOINT=hub.url)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert done.stdout.strip() == str(names)
    assert "%" in done.stderr, "huggingface_hub's progress bar goes to stderr"
    assert not any(".bin" in path or "consolidated" in path for path in hub.asked)

    hub.asked.clear()
    run(script, tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert hub.asked == [], "a second run is served from the hub's own cache"


def test_refusals_of_the_hub_say_what_to_do(tmp_path: Path, hub: Hub) -> None:
    script = """
        print(refusal("org/pickled"))
        print(refusal("org/empty"))
        print(refusal("org/gated"))
        print(refusal("org/absent"))
        print(refusal("org/good", revision="v9"))
    """
    out = run(script, tmp_path, HF_ENDPOINT=hub.url).stdout
    for words in (
        "org/pickled has only pickled weights (pytorch_model.bin)",
        "save_pretrained",
        "org/empty has no *.safetensors files",
        "org/gated is gated",
        "org/absent is neither a directory here nor a model on the hub",
        "org/good has no revision 'v9'",
    ):
        assert words in out, out
    assert not any("resolve" in path and ".bin" in path for path in hub.asked)


def test_without_a_network_the_error_says_so(tmp_path: Path) -> None:
    script = 'print(refusal("org/good"))'
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        out = run(script, tmp_path, **environment).stdout
        assert "the hub cannot be reached" in out, out


def test_dummy_weights_for_a_hub_id_fetch_no_weights(tmp_path: Path, hub: Hub) -> None:
    script = """
        from flexpipe.memory.hub import download
        print(sorted(path.name for path in download("org/good", weights=False).iterdir()))
    """
    out = run(script, tmp_path, HF_ENDPOINT=hub.url).stdout
    assert out.strip() == "['config.json', 'generation_config.json', 'tokenizer.json']"


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "a/b/c", "with space", Path("m")])
def test_what_is_neither_directory_nor_id_is_refused_without_asking(model: str | Path) -> None:
    with pytest.raises(ModelError, match="neither a directory nor a hub id"):
        download(model)
