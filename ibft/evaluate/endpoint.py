"""Samples from a server with OpenAI's completions API (vLLM, SGLang, `transformers serve`), many requests at a time.

Every answer is stored as it arrives. What may pass (a refused connection, a hang, 429, 5xx, half an answer) is tried
again; what will not (no such model, a prompt too long) ends the run with the server's own words, after the answers
that were on their way are stored too.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ibft.errors import InputError
from ibft.evaluate.sampling import Request, SamplesFile, Sampling

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP statuses that another try may not meet
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds


@dataclass(frozen=True)
class Endpoint:
    """Where completions are made. `url` is the API's base, which usually ends in /v1."""

    url: str
    model: str  # as the server names it
    concurrency: int = 32
    retries: int = 8  # of one request, after the first try
    timeout: float = 600.0  # seconds without a byte of the answer
    api_key: str | None = None  # None: OPENAI_API_KEY, if that is set

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"--endpoint {self.url!r} is no address; one is http://localhost:8000/v1.")

    @property
    def completions(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith("/completions") else f"{base}/completions"


class _Passing(Exception):
    """A failure that another try may not meet; `wait` is how long the server asks to be left alone, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def generate_from(
    endpoint: Endpoint,
    requests: Sequence[Request],
    prompts: Sequence[str],
    sampling: Sampling,
    file: SamplesFile,
) -> None:
    """Makes the samples, of `prompts` as the server is to get them, and appends each to the file as it arrives.

    InputError when the server refuses a request for good, or fails it more than `retries` times in a row; the message
    says what is stored.
    """
    waiting = iter(zip(requests, prompts, strict=True))
    halted = threading.Event()  # ends the pauses between tries
    told = threading.Event()  # of the first failure, the user has been
    running: dict[Future[tuple[str, str]], Request] = {}
    failure: BaseException | None = None
    with (
        ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="completions") as pool,
        tqdm(total=len(requests), desc="Generating", unit="sample", disable=not sys.stderr.isatty()) as bar,
    ):
        while True:
            # No more are handed out than can run, so that a failure leaves little to wait for.
            while failure is None and len(running) < endpoint.concurrency and (entry := next(waiting, None)):
                request, prompt = entry
                running[pool.submit(_complete, endpoint, request, prompt, sampling, halted, told)] = request
            if not running:
                break
            try:
                done = wait(running, return_when=FIRST_COMPLETED).done
            except KeyboardInterrupt as interrupt:
                if failure is not None:
                    raise
                print("\nibft: waiting for the answers on their way; interrupt again to lose them.", file=sys.stderr)
                failure, done = interrupt, set()
                halted.set()
            for future in done:
                request = running.pop(future)
                try:
                    file.add(request, *future.result())
                    bar.update()
                except InputError as error:
                    failure = failure or error
                    halted.set()
    if isinstance(failure, InputError):
        raise InputError(f"{failure} {len(file)} samples are in {file.path}; the same command goes on.") from failure
    if failure is not None:
        raise failure


def _complete(
    endpoint: Endpoint,
    request: Request,
    prompt: str,
    sampling: Sampling,
    halted: threading.Event,
    told: threading.Event,
) -> tuple[str, str]:
    """One sample's raw text and finish reason, tried as often as it takes and is allowed."""
    body = json.dumps(_body(endpoint, request, prompt, sampling)).encode()
    for attempt in range(endpoint.retries + 1):
        try:
            return _read_answer(_post(endpoint, body), sampling)
        except _Passing as error:
            last, pause = error, error.wait
            if attempt == 0 and not told.is_set():
                told.set()
                print(
                    f"note: {endpoint.completions} failed with: {error}. What fails is tried up to "
                    f"{endpoint.retries} times again.",
                    file=sys.stderr,
                )
        if pause is None:  # doubled each time, and scattered, or all would come back at once
            pause = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if attempt == endpoint.retries or halted.wait(pause):
            break
    raise InputError(
        f"{endpoint.completions} failed {attempt + 1} times for sample {request.sample} of "
        f"{request.problem.task_id!r}, last with: {last}."
    )


def _body(endpoint: Endpoint, request: Request, prompt: str, sampling: Sampling) -> dict[str, Any]:
    """Only what OpenAI's API knows: servers refuse what they do not."""
    body: dict[str, Any] = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": sampling.max_new_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
    }
    if sampling.top_p < 1:
        body["top_p"] = sampling.top_p
    if sampling.top_k:
        body["top_k"] = sampling.top_k  # not OpenAI's, and only sent where it was asked for
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    return body


def _post(endpoint: Endpoint, body: bytes) -> dict[str, Any]:
    """The answer as JSON. _Passing, or InputError for a refusal that will stay."""
    headers = {"Content-Type": "application/json"}
    if key := endpoint.api_key or os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(endpoint.completions, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=endpoint.timeout) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        reason = f"{error.code} {error.reason}: {_message(error)}"
        if error.code in _PASSING:
            raise _Passing(reason, _retry_after(error)) from error
        raise InputError(f"{endpoint.completions} refuses with {reason}.") from error
    except urllib.error.URLError as error:
        raise _Passing(str(error.reason)) from error
    except (http.client.HTTPException, OSError) as error:  # cut off, reset, timed out
        raise _Passing(f"{type(error).__name__} {error}".strip()) from error
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise _Passing(f"an answer that is no JSON ({content[:80]!r})") from error
    return answer if isinstance(answer, dict) else {}


def _read_answer(answer: dict[str, Any], sampling: Sampling) -> tuple[str, str]:
    """Raw text and finish reason. Servers leave out the stop sequence; it is put back, as it was generated."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    text, finish_reason = choice.get("text"), choice.get("finish_reason")
    if not isinstance(text, str) or finish_reason not in ("stop", "length"):
        raise _Passing(f"an answer without a text that is finished ({json.dumps(answer)[:120]})")
    if finish_reason == "stop" and sampling.stop:
        said = [choice[name] for name in ("stop_reason", "matched_stop") if name in choice]  # vLLM's name, SGLang's
        if not said and len(sampling.stop) == 1:  # or the end of the text, which looks the same
            said = list(sampling.stop)
        if said and said[0] in sampling.stop and said[0] not in text:  # `transformers serve` leaves it in
            text += said[0]
    return text, finish_reason


def _message(error: urllib.error.HTTPError) -> str:
    """The server's words, in a line."""
    try:
        text = error.read(4096).decode(errors="replace")
    except (http.client.HTTPException, OSError):
        return "no further word"
    try:
        value = json.loads(text)
        inner = value.get("error", value)
        text = inner if isinstance(inner, str) else str(inner.get("message") or inner.get("detail") or text)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300].rstrip(".") or "no further word"


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    try:
        return min(max(float(error.headers.get("Retry-After", "")), 0.0), _LONGEST_WAIT)
    except ValueError:  # none, or a date
        return None
