"""What runs inside the sandboxes that judge Python: the candidate's process, and the process of its tests.

Run as a script, `python -c <this file> candidate|checker|together [socket]`, with nothing but the standard library. The
tests call the candidate over a socket. Arguments and results cross as text that can spell values of exact builtin types
and nothing else; a subclass crosses as the builtin value it holds, anything else not at all.
"""

import builtins
import json
import os
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MAX_FRAME = 1_000_000  # bytes of one call or result
_ATOMS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {  # type: name, to JSON, from JSON
    int: ("int", lambda number: int.__format__(number, "x"), lambda text: int(text, 16)),
    float: ("float", float.hex, float.fromhex),
    str: ("str", str.__str__, str),
    bytes: ("bytes", bytes.hex, bytes.fromhex),
    bytearray: ("bytearray", bytearray.hex, bytearray.fromhex),
    complex: ("complex", lambda z: [z.real.hex(), z.imag.hex()], lambda pair: complex(*map(float.fromhex, pair))),
    range: ("range", lambda r: [r.start, r.stop, r.step], lambda three: range(*three)),
}
_SEQUENCES: dict[type, tuple[str, Callable[[Any], Iterator[Any]]]] = {
    list: ("list", list.__iter__),
    tuple: ("tuple", tuple.__iter__),
    set: ("set", set.__iter__),
    frozenset: ("frozenset", frozenset.__iter__),
}
_FROM_JSON = {name: parse for name, _, parse in _ATOMS.values()}
_BUILD: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": iter,
}
_ITERATORS: tuple[type, ...] = (
    types.GeneratorType,
    *(map, filter, zip, enumerate, reversed),
    *(type(iter(value)) for value in ([0], (0,), "", b"", {0}, range(0))),
    *(type(iter(view)) for view in (vars(builtins).keys(), vars(builtins).values(), vars(builtins).items())),
    type(reversed([""])),
    type(vars(builtins).values()),
)
_VIEWS: dict[type, str] = {type(vars(builtins).keys()): "keys", type(vars(builtins).items()): "items"}
_CONSTANTS = {"None": None, "True": True, "False": False}


class CannotCross(Exception):
    """A value that is not made of builtin ones, or too large."""


class CandidateGone(BaseException):
    """The candidate's process ended; no test that catches exceptions goes on after it."""


def encode(value: Any, depth: int = 0) -> list[Any]:
    """The value as JSON-able lists, [kind, content]. CannotCross for what is not made of builtin values."""
    if depth > 100:
        raise CannotCross("it is nested more than 100 deep")
    for name, constant in _CONSTANTS.items():
        if value is constant:
            return [name, None]
    kind = next((base for base in type(value).__mro__ if base in _ATOMS or base in _SEQUENCES or base is dict), None)
    if kind in _ATOMS:
        name, to_json, _ = _ATOMS[kind]
        return [name, to_json(value)]
    if kind in _SEQUENCES:
        name, items = _SEQUENCES[kind]
        return [name, [encode(item, depth + 1) for item in items(value)]]
    if kind is dict:
        return ["dict", [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in dict.items(value)]]
    if type(value) in _VIEWS:
        return [_VIEWS[type(value)], [encode(item, depth + 1) for item in value]]
    if type(value) in _ITERATORS:
        return ["iterator", _encode_some(value, depth)]
    raise CannotCross(f"it is or holds a value of type {type(value).__name__}")


def _encode_some(values: Any, depth: int) -> list[Any]:
    found = []
    for item in values:
        found.append(encode(item, depth + 1))
        if len(found) * 8 > MAX_FRAME:
            raise CannotCross("it does not end, or is too large")
    return found


def decode(value: Any) -> Any:
    """The value that `encode` spelled; ValueError or TypeError for anything that it would not have written."""
    kind, content = value
    if kind in _CONSTANTS:
        return _CONSTANTS[kind]
    if kind in _FROM_JSON:
        return _FROM_JSON[kind](content)
    if kind in _BUILD:
        return _BUILD[kind]([decode(item) for item in content])
    if kind == "dict":
        return {decode(k): decode(v) for k, v in content}
    if kind == "keys":
        return dict.fromkeys(decode(item) for item in content).keys()
    if kind == "items":
        return dict(decode(item) for item in content).items()
    raise ValueError(f"no such kind of value: {kind!r:.40}")


def send(channel: socket.socket, message: Any) -> None:
    """One frame. CannotCross if it is too large."""
    frame = json.dumps(message).encode("ascii")
    if len(frame) > MAX_FRAME:
        raise CannotCross(f"it takes {len(frame)} bytes, more than {MAX_FRAME}")
    channel.sendall(struct.pack("!I", len(frame)) + frame)


def receive(channel: socket.socket) -> Any:
    """The next frame; EOFError at the end, ValueError for anything but a frame."""
    (length,) = struct.unpack("!I", _exactly(channel, 4))
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return json.loads(_exactly(channel, length))


def _exactly(channel: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = channel.recv(length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def load(source: str, name: str) -> dict[str, Any]:
    """Runs a program as a module of its own; returns its names."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def describe(error: BaseException) -> list[str]:
    """The type's name and the message, of a length that fits."""
    try:
        return [type(error).__name__, str(error)[:300]]
    except BaseException:
        return [type(error).__name__, ""]


def candidate(channel: socket.socket) -> None:
    """Loads the program that comes first, then answers calls of its functions."""
    try:
        names = load(receive(channel)["source"], "solution")
    except BaseException as error:
        send(channel, {"failed": describe(error)})
        return
    send(channel, {"ready": True})
    while True:
        call = receive(channel)
        send(channel, {"call": call["call"], **_answer(names, call)})


def _answer(names: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    if call["name"] not in names:
        return {"raised": ["NameError", f"name {call['name']!r} is not defined"]}
    try:
        arguments, keywords = decode(call["arguments"]), decode(call["keywords"])
        value = encode(names[call["name"]](*arguments, **keywords))
        if len(json.dumps(value)) > MAX_FRAME - 1000:
            raise CannotCross("it is too large")
        return {"value": value}
    except CannotCross as error:
        return {"kept": str(error)}
    except BaseException as error:
        return {"raised": describe(error)}


class Candidate:
    """The tests' side of the candidate's process."""

    def __init__(self, channel: socket.socket, say: Callable[[Any], None]) -> None:
        self._channel, self._say = channel, say
        self.calls, self.gone = 0, False
        self.verdict: tuple[BaseException, list[str]] | None = None  # the last call's exception, and what it means

    def ask(self, message: Any) -> dict[str, Any]:
        """Sends and receives; CandidateGone if the process has ended or does not answer as one that runs our script."""
        try:
            send(self._channel, message)
            answer = receive(self._channel)
            if type(answer) is dict:
                return answer
        except (OSError, EOFError, ValueError, RecursionError):
            pass
        self.gone = True
        raise CandidateGone

    def function(self, name: str) -> Callable[..., Any]:
        """The function of that name, to be called as if it were here."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                given = {"arguments": encode(arguments), "keywords": encode(keywords)}
            except CannotCross as wrong:
                raise self._fails(wrong, "harness_error", f"the tests give {name} what cannot cross: {wrong}") from None
            if self.calls == 0:
                self._say("calling")
            self.calls += 1
            answer = self.ask({"call": self.calls, "name": name, **given})
            if answer.get("call") != self.calls:
                self.gone = True
                raise CandidateGone
            if "value" in answer:
                try:
                    return decode(answer["value"])
                except (ValueError, TypeError, OverflowError, RecursionError) as wrong:
                    raise self._fails(CannotCross(f"it is no value ({wrong})"), "wrong_output") from None
            if "raised" in answer:
                kind, text = (str(part) for part in answer["raised"])
                error = _builtin_error(kind)(text)
                raise self._fails(error, "memory" if kind == "MemoryError" else "runtime_error", f"{kind}: {text}")
            raise self._fails(CannotCross(str(answer.get("kept"))), "wrong_output")

        return call

    def _fails(self, error: Exception, category: str, text: str = "") -> Exception:
        self.verdict = (error, [category, text or f"its result cannot be compared: {error}"])
        return error


def _builtin_error(name: str) -> type[Exception]:
    """The builtin exception of that name; not one that a loop takes for its end."""
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RuntimeError
    special = (StopIteration, StopAsyncIteration, UnicodeError, ExceptionGroup)
    return RuntimeError if issubclass(kind, special) else kind


def checker(channel: socket.socket, job: dict[str, Any], say: Callable[[Any], None]) -> list[str]:
    """Runs the tests; returns the category and a word on it."""
    remote = Candidate(channel, say)
    try:
        ready = remote.ask({"source": job["source"]})
        if "ready" not in ready:
            kind, text = (str(part) for part in ready.get("failed", ("Error", "it did not load")))
            syntax = kind in ("SyntaxError", "IndentationError", "TabError")
            category = "syntax_error" if syntax else "memory" if kind == "MemoryError" else "runtime_error"
            return [category, f"{kind}: {text}"]
        names: dict[str, Any] = {name: remote.function(name) for name in job["remote"]}
        _run_tests(job, names, remote.function)
    except CandidateGone:
        return ["runtime_error", "its process ended before it had answered"]
    except BaseException as error:
        if remote.gone:
            return ["runtime_error", "its process ended before it had answered"]
        if remote.verdict is not None and error is remote.verdict[0]:
            return remote.verdict[1]
        if remote.calls == 0:
            return ["harness_error", "the tests failed before they called the candidate: " + ": ".join(describe(error))]
        return _judge(error)
    if remote.gone:
        return ["runtime_error", "its process ended before it had answered"]
    if remote.calls == 0:
        return ["harness_error", "the tests do not call the candidate"]
    return ["passed", ""]


def together(job: dict[str, Any]) -> list[str]:
    """Candidate and tests in one process, for tests that work no other way; a candidate that cheats can pass here."""
    try:
        names = load(job["source"], "solution")
    except (SyntaxError, MemoryError) as error:
        return ["memory" if isinstance(error, MemoryError) else "syntax_error", ": ".join(describe(error))]
    except BaseException as error:
        return ["runtime_error", ": ".join(describe(error))]
    try:
        own = dict(names)
        _run_tests(job, names, own.__getitem__)
    except BaseException as error:
        if isinstance(error, AssertionError):
            return _judge(error)
        return ["memory" if isinstance(error, MemoryError) else "runtime_error", ": ".join(describe(error))]
    return ["passed", ""]


def _run_tests(job: dict[str, Any], names: dict[str, Any], function: Callable[[str], Any]) -> None:
    """The prompt's helpers are its own, whatever the candidate made of them; the function under test is never its."""
    entry = job["entry_point"]
    exec(compile(job["prompt"], "<prompt>", "exec"), names)
    if entry is not None:
        names[entry] = function(entry)
    for number, text in enumerate([job["setup"], job["test"], *job["tests"]]):
        exec(compile(text, f"<tests {number}>", "exec"), names)
    if entry is not None:
        names["check"](names[entry])


def _judge(error: BaseException) -> list[str]:
    if isinstance(error, MemoryError):
        return ["memory", "the tests ran out of memory on its result"]
    kind, text = describe(error)
    line = f" in line {error.__traceback__.tb_lineno}" if error.__traceback__ is not None else ""
    return [
        "wrong_output",
        f"{kind}{line}: {text}" if kind != "AssertionError" else f"a test fails: {text}".rstrip(": "),
    ]


def main() -> None:
    """The verdict goes to what stdout was; what tests print goes nowhere."""
    role = sys.argv[1]
    if role == "candidate":
        candidate(socket.socket(fileno=int(sys.argv[2])))
        return
    verdicts = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)

    def say(word: Any) -> None:
        os.write(verdicts, json.dumps(word).encode() + b"\n")

    job = json.loads(sys.stdin.buffer.read())
    say(checker(socket.socket(fileno=int(sys.argv[2])), job, say) if role == "checker" else together(job))
    os._exit(0)  # threads of the tests, or of a candidate beside them, keep nothing waiting


if __name__ == "__main__":
    main()
