"""`ibft export --push_to_hub`: what goes to the Hub, with which token, and what is left where that fails."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ibft.export
from ibft.cli import main

FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"}


def export(run: Path, output: Path, more: str) -> int:
    return main(f"export --adapter {run} --output_dir {output} {more}".split())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class _FakeApi:
    """Records what it is asked; `private` is that of the repository, `fail` an error to raise on upload."""

    calls: list[tuple[str, dict[str, Any]]]
    private: bool = True
    fail: Exception | None = None

    def __init__(self, token: str) -> None:
        self.calls.append(("token", {"token": token}))

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> str:
        if self.fail is not None:
            raise self.fail
        files = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.calls.append(("upload_folder", {**options, "files": files}))
        return f"https://huggingface.co/{options['repo_id']}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[_FakeApi]:
    fake = type("FakeApi", (_FakeApi,), {"calls": []})
    monkeypatch.setattr(ibft.export, "HfApi", fake)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return fake


def test_push(
    adapter_folder: Path, base_folder: Path, tmp_path: Path, hub: type[_FakeApi], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(adapter_folder, tmp_path / "out", "--push_to_hub me/model --private --revision v1") == 0
    calls = dict(hub.calls)
    assert calls["token"] == {"token": "hf_secret"}
    assert calls["create_repo"] == {"repo_id": "me/model", "private": True, "exist_ok": True}
    assert calls["create_branch"] == {"repo_id": "me/model", "branch": "v1", "exist_ok": True}
    assert calls["upload_folder"]["revision"] == "v1" and calls["upload_folder"]["files"] == FILES
    printed = capsys.readouterr().out
    assert "uploaded to https://huggingface.co/me/model" in printed and "hf_secret" not in printed
    assert f"will tell others '{base_folder}'" in printed  # a path of this machine, about to be published


def test_the_published_name_of_the_token(
    adapter_folder: Path, tmp_path: Path, hub: type[_FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_published")
    assert export(adapter_folder, tmp_path / "out", "--push_to_hub me/model") == 0
    assert dict(hub.calls)["token"] == {"token": "hf_published"}
    assert dict(hub.calls)["create_repo"]["private"] is None  # an organisation may have its own default


def test_nothing_private_goes_to_a_public_repository(
    adapter_folder: Path, tmp_path: Path, hub: type[_FakeApi], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private = False
    assert export(adapter_folder, tmp_path / "out", "--push_to_hub me/model --private") == 2
    assert "exists and is public; nothing was uploaded" in capsys.readouterr().err
    assert "upload_folder" not in dict(hub.calls)


def test_a_failed_upload_keeps_the_folder(
    adapter_folder: Path, tmp_path: Path, hub: type[_FakeApi], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail = ConnectionError("no route\nto host")
    assert export(adapter_folder, tmp_path / "out", "--push_to_hub me/model") == 2
    error = capsys.readouterr().err
    assert "--push_to_hub me/model: no route to host." in error
    assert f"`hf upload me/model {tmp_path / 'out'}`" in error
    assert names(tmp_path / "out") == FILES


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload takes; every file is sent within the commit."""

    files: dict[str, bytes]
    seen: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = f"http://{self.headers['Host']}"
        type(self).seen.append(f"{self.path} {self.headers.get('Authorization')}")
        if self.path == "/api/repos/create":
            return self._answer({"url": f"{hub}/me/model"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        for line in body.splitlines():
            record = json.loads(line)
            if record["key"] == "file":
                type(self).files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
        commit = {"commitUrl": f"{hub}/me/model/commit/{'a' * 40}", "commitOid": "a" * 40, "success": True}
        return self._answer(commit)

    def _answer(self, values: dict[str, Any]) -> None:
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def local_hub() -> Iterator[tuple[str, type[_Hub]]]:
    handler = type("Hub", (_Hub,), {"files": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_push_through_the_real_client(adapter_folder: Path, tmp_path: Path, local_hub: tuple[str, type[_Hub]]) -> None:
    """In a process of its own: the client reads HF_ENDPOINT when it is imported."""
    endpoint, handler = local_hub
    places = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_local"}
    environment = {**os.environ, **places, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)

    def push(output: str) -> subprocess.CompletedProcess[str]:
        more = ["--adapter", str(adapter_folder), "--output_dir", str(tmp_path / output), "--push_to_hub", "me/model"]
        command = [sys.executable, "-m", "ibft", "export", *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    result = push("out")
    assert result.returncode == 0, result.stderr
    assert "uploaded to" in result.stdout
    assert handler.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "/api/repos/create Bearer hf_local" in handler.seen

    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    result = push("second")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "ibft: error: --push_to_hub me/model: " in result.stderr
    assert names(tmp_path / "second") == FILES
