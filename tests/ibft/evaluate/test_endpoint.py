"""Samples from a server that fails in every way servers fail: each is asked for as it must be, none is lost."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import ibft.evaluate.endpoint as endpoint
from ibft.errors import InputError
from ibft.evaluate.config import GenerateFlags
from ibft.evaluate.endpoint import Endpoint
from ibft.evaluate.generate import generate_samples
from ibft.evaluate.problems import load_problems

Rows = dict[tuple[str, float, int], dict[str, Any]]


def answer_to(body: dict[str, Any]) -> str:
    """What the server answers a request with: a function of prompt, temperature and seed."""
    return hashlib.sha256(json.dumps([body["prompt"], body["temperature"], body["seed"]]).encode()).hexdigest()[:12]


@dataclass
class Server:
    """An OpenAI-compatible server; `misbehave(body, attempt)` names the failure of a request's n-th try, or None."""

    misbehave: Callable[[dict[str, Any], int], str | None] = lambda body, attempt: None
    choice: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {"text": answer_to(body), "finish_reason": "stop"}
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)  # by seed
    running: int = 0
    most_running: int = 0
    delay: float = 0.0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)
    release: threading.Event = field(default_factory=threading.Event)  # ends hanging answers with the test


class Handler(BaseHTTPRequestHandler):
    state: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        with state.lock:
            state.bodies.append(body)
            state.headers.append(dict(self.headers))
            state.attempts[body["seed"]] += 1
            attempt = state.attempts[body["seed"]]
            state.running += 1
            state.most_running = max(state.most_running, state.running)
        time.sleep(state.delay)
        with state.lock:  # before the answer, upon which the next request may come
            state.running -= 1
        self.answer(body, state.misbehave(body, attempt))

    def answer(self, body: dict[str, Any], failure: str | None) -> None:
        content = json.dumps({"choices": [self.state.choice(body)]}).encode()
        if failure is not None and failure.isdigit():
            self.send_response(int(failure))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"message": "the server says why"}}).encode())
            return
        if failure == "hang":
            self.state.release.wait(30)
            return
        if failure == "reset":
            self.connection.close()
            return
        content = {"empty": b"", "no json": content[:-5], "no choice": b'{"choices": []}'}.get(failure or "", content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + 100 * (failure == "truncated")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:  # connections that the test itself cuts
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    http = Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    yield state
    state.release.set()
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def ask(server: Server, own_task: Path, tmp_path: Path) -> Callable[..., Rows]:
    """`ibft eval generate --endpoint`; the rows of samples.jsonl."""

    def run(**options: Any) -> Rows:
        common: dict[str, Any] = {"num_samples": 3, "temperature": [0.2, 1.0], "request_timeout": 0.5, "retries": 4}
        config = GenerateFlags(
            task=str(own_task),
            output=str(tmp_path / "out"),
            model="served",
            **{"endpoint": server.url, **common, **options},
        )
        generate_samples(config, load_problems(str(own_task)))
        return stored(tmp_path)

    return run


def stored(folder: Path) -> Rows:
    rows = [json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text().splitlines()]
    found = {(row["task_id"], row["temperature"], row["sample"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_what_is_asked(ask: Callable[..., Rows], server: Server, own_rows: list[dict[str, Any]]) -> None:
    rows = ask(top_p=0.9, max_new_tokens=77, stop=["\\nxx"])
    prompts = {row["task_id"]: row["prompt"] for row in own_rows}
    expected = [
        {
            "model": "served",
            "prompt": prompts[task_id],
            "max_tokens": 77,
            "temperature": temperature,
            "seed": row["seed"],
            "top_p": 0.9,
            "stop": ["\nxx"],
        }
        for (task_id, temperature, _), row in rows.items()
    ]
    by_seed = sorted(server.bodies, key=lambda body: body["seed"])
    assert by_seed == sorted(expected, key=lambda body: body["seed"])
    assert len(rows) == 36 and "Authorization" not in server.headers[0]
    plain = ask(top_p=1.0, overwrite=True)
    assert "top_p" not in server.bodies[-1] and {row["seed"] for row in plain.values()} == {
        row["seed"] for row in rows.values()
    }


def test_every_failure_that_may_pass(
    ask: Callable[..., Rows], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third of the requests fail three times, each time otherwise; every sample arrives, once, and is its own."""
    ways = ["429", "500", "hang", "truncated", "reset", "empty", "no json", "no choice", "503"]

    def misbehave(body: dict[str, Any], attempt: int) -> str | None:
        return ways[(body["seed"] + attempt) % 9] if body["seed"] % 3 == 0 and attempt <= 3 else None

    server.misbehave = misbehave
    rows = ask(num_samples=8, concurrency=16, request_timeout=2.0)  # no sound answer takes as long on a busy machine
    assert len(rows) == 96
    bodies = {body["seed"]: body for body in server.bodies}
    assert all(row["completion"] == answer_to(bodies[row["seed"]]) for row in rows.values())
    failed = [seed for seed, count in server.attempts.items() if count > 1]
    assert failed and all(server.attempts[seed] == 4 for seed in failed)
    assert "tried up to 4 times again" in capsys.readouterr().err


def test_as_many_at_a_time_as_are_wanted(ask: Callable[..., Rows], server: Server) -> None:
    server.delay = 0.05
    ask(concurrency=12)
    assert server.most_running == 12


@pytest.mark.parametrize("status", ["400", "401", "404", "422"])
def test_a_refusal_ends_it_and_what_has_come_stays(
    ask: Callable[..., Rows], server: Server, status: str, tmp_path: Path
) -> None:
    refused: list[int] = []

    def misbehave(body: dict[str, Any], attempt: int) -> str | None:
        with server.lock:
            if not refused and len(server.attempts) > 10:
                refused.append(body["seed"])
        return status if body["seed"] in refused else None

    server.misbehave = misbehave
    with pytest.raises(
        InputError, match=rf"/v1/completions refuses with {status} .*: the server says why\. \d+ samples are"
    ):
        ask(concurrency=4)
    before = stored(tmp_path)
    assert 7 <= len(before) < 36
    assert server.attempts[refused[0]] == 1  # no second try of what will not pass

    server.misbehave = lambda body, attempt: None
    asked = len(server.bodies)
    after = ask(concurrency=4)
    assert before.items() <= after.items() and len(after) == 36
    assert len(server.bodies) - asked == 36 - len(before)


def test_a_server_that_never_recovers(ask: Callable[..., Rows], server: Server) -> None:
    server.misbehave = lambda body, attempt: "500"
    with pytest.raises(
        InputError, match=r"failed 3 times for sample \d of 'add/\d', last with: 500 .*the server says why"
    ):
        ask(retries=2, concurrency=2)


def test_no_server(ask: Callable[..., Rows]) -> None:
    with pytest.raises(InputError, match=r"failed 2 times .*refused.* 0 samples are in"):
        ask(endpoint="http://127.0.0.1:9/v1", retries=1)


def test_interrupted(ask: Callable[..., Rows], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers on their way are waited for and stored."""
    real, calls = endpoint.wait, []

    def wait(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    server.delay = 0.02
    monkeypatch.setattr(endpoint, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        ask(concurrency=4)
    assert len(stored(tmp_path)) == len(server.bodies) < 36


def test_the_key(ask: Callable[..., Rows], server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ask()
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)


@pytest.mark.parametrize(
    ("said", "raw"),
    [
        ({"finish_reason": "stop"}, "  assign y = a;\nendmodule"),  # says no more: one stop sequence is what it can be
        ({"finish_reason": "stop", "stop_reason": "endmodule"}, "  assign y = a;\nendmodule"),  # vLLM
        ({"finish_reason": "stop", "matched_stop": "endmodule"}, "  assign y = a;\nendmodule"),  # SGLang
        ({"finish_reason": "stop", "stop_reason": None}, "  assign y = a;\n"),  # vLLM, the end of the text
        ({"finish_reason": "stop", "matched_stop": 2}, "  assign y = a;\n"),  # SGLang, likewise
        ({"finish_reason": "length"}, "  assign y = a;\n"),
        ({"finish_reason": "stop", "text": "  endmodule\n"}, "  endmodule\n"),  # transformers serve
    ],
)
def test_the_stop_sequence_is_put_back(server: Server, tmp_path: Path, said: dict[str, Any], raw: str) -> None:
    row = {
        "task_id": "m",
        "language": "verilog",
        "prompt": "module top_module(input a, output y);\n",
        "test": "module tb;",
    }
    (tmp_path / "task.jsonl").write_text(json.dumps(row))
    server.choice = lambda body: {"text": "  assign y = a;\n", **said}
    task = str(tmp_path / "task.jsonl")
    config = GenerateFlags(task=task, output=str(tmp_path / "out"), model="m", endpoint=server.url, num_samples=1)
    generate_samples(config, load_problems(task))
    (found,) = stored(tmp_path).values()
    assert (found["raw"], found["finish_reason"]) == (raw, said["finish_reason"])
    assert server.bodies[0]["stop"] == ["endmodule"]


def test_the_prompt_of_an_adapter(
    ask: Callable[..., Rows], server: Server, adapter_folder: Path, own_rows: list[dict[str, Any]]
) -> None:
    ask(adapter=str(adapter_folder), num_samples=1, temperature=[0.5])
    assert {body["prompt"] for body in server.bodies} == {row["prompt"] + "\n" for row in own_rows}
    assert all("stop" not in body for body in server.bodies)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x", "http://", "8000"])
def test_no_address(url: str) -> None:
    with pytest.raises(InputError, match="is no address; one is http://localhost:8000/v1"):
        Endpoint(url, "m")


def test_addresses() -> None:
    for url in ("http://a/v1", "http://a/v1/", "http://a/v1/completions"):
        assert Endpoint(url, "m").completions == "http://a/v1/completions"
