"""What runs inside the sandboxes that judge Python: the candidate's process, and the process of its tests.

Run as a script, `python -c <this file> candidate|checker|together ...`: one file, with the standard library alone. The
tests call the candidate over a socket. Arguments and results cross as text that can spell values of exact builtin types
and nothing else; a subclass crosses as the builtin value it holds, anything else not at all.
"""

import builtins
import contextlib
import json
import os
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

MAX_FRAME = 16_000_000  # bytes of one call or result, and of the program
MAX_ITEMS = 250_000  # of an iterator, which may have no end
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 4, 22, 2
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
_VIEWS: dict[type, str] = {
    type(vars(builtins).keys()): "keys",
    type(vars(builtins).values()): "values",
    type(vars(builtins).items()): "items",
}
_CONSTANTS = {"None": None, "True": True, "False": False}


class CannotCross(Exception):
    """A value that is not made of builtin ones, or too large."""


class TooLarge(CannotCross):
    """A value too large, or nested too deep."""


class CandidateGone(BaseException):
    """The candidate's process ended; no test that catches exceptions goes on after it."""


def encode(value: Any, depth: int = 0) -> list[Any]:
    """The value as JSON-able lists, [kind, content]. CannotCross for what is not made of builtin values."""
    if depth > 100:
        raise TooLarge("it is nested more than 100 deep")
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
    if isinstance(value, Iterator):
        return ["iterator", _encode_some(value, depth)]
    raise CannotCross(f"it is or holds a value of type {type(value).__name__}")


def _encode_some(values: Any, depth: int) -> list[Any]:
    found = []
    for item in values:
        found.append(encode(item, depth + 1))
        if len(found) > MAX_ITEMS:
            raise TooLarge("it does not end, or is too large")
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
    if kind == "values":
        return dict(enumerate(decode(item) for item in content)).values()
    if kind == "items":
        return dict(decode(item) for item in content).items()
    raise ValueError(f"no such kind of value: {kind!r:.40}")


def send(channel: socket.socket, message: Any) -> None:
    """One frame. TooLarge if it is too large."""
    frame = json.dumps(message).encode("ascii")
    if len(frame) > MAX_FRAME:
        raise TooLarge(f"it takes {len(frame)} bytes, more than {MAX_FRAME}")
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


def confine(code: bytes) -> None:
    """Puts a filter of system calls (see seccomp.py) over this process and what it starts. OSError if that fails."""
    import ctypes

    held = ctypes.create_string_buffer(code, len(code))
    given = struct.pack("HP", len(code) // 8, ctypes.addressof(held))
    if code and ctypes.CDLL(None).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, given, 0, 0) != 0:
        raise OSError("the kernel takes no filter of system calls")


def candidate(channel: socket.socket) -> None:
    """Says that it has started, loads the program that comes first, then answers calls of its functions."""
    send(channel, {"started": True})
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
        return _raised(NameError(f"name {call['name']!r} is not defined"))
    try:
        arguments, keywords = decode(call["arguments"]), decode(call["keywords"])
        value = encode(names[call["name"]](*arguments, **keywords))
        if len(json.dumps(value)) > MAX_FRAME - 1000:
            raise TooLarge("it is too large")
        return {"value": value}
    except CannotCross as error:
        return {"kept": str(error)}
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> dict[str, Any]:
    """What is known of an exception: its own name, the builtin type that it is of, and its arguments if they cross."""
    arguments = None
    with contextlib.suppress(BaseException):
        if len(json.dumps(encoded := encode(error.args))) < MAX_FRAME - 2000:
            arguments = encoded
    base = next(kind for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind)
    return {"raised": describe(error), "base": base.__name__, "arguments": arguments}


class Candidate:
    """The tests' side of the candidate's process."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.calls, self.values, self.gone = 0, 0, False
        self.verdict: tuple[BaseException, list[str]] | None = None  # the last call's exception, and what it means
        self.kept: list[str] | None = None  # the verdict on a value that did not cross, whatever the tests make of it

    def hear(self) -> dict[str, Any]:
        """The next message; CandidateGone if the process has ended or does not speak as one that runs our script."""
        try:
            answer = receive(self._channel)
        except (OSError, EOFError, ValueError, RecursionError, MemoryError):
            self.lose()
        if type(answer) is not dict:
            self.lose()
        return answer

    def ask(self, message: Any) -> dict[str, Any]:
        """Sends and hears. TooLarge for a message that is."""
        try:
            send(self._channel, message)
        except OSError:
            self.lose()
        return self.hear()

    def lose(self) -> NoReturn:
        self.gone = True
        raise CandidateGone

    def words(self, value: Any) -> tuple[str, str]:
        """The name and the message of an exception, as `describe` gives them."""
        if type(value) is not list or len(value) != 2 or not all(type(part) is str for part in value):
            self.lose()
        return value[0][:100], value[1][:300]

    def function(self, name: str) -> Callable[..., Any]:
        """The function of that name, to be called as if it were here."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            try:
                given = {"arguments": encode(arguments), "keywords": encode(keywords)}
                answer = self.ask({"call": self.calls, "name": name, **given})
            except CannotCross as wrong:
                # Large is what the tests made of a large result, if there has been one.
                category = "wrong_output" if self.values and isinstance(wrong, TooLarge) else "harness_error"
                text = f"the tests give {name} what cannot cross: {wrong}"
                raise self._fails(CannotCross(str(wrong)), category, text) from None
            if answer.get("call") != self.calls:
                self.lose()
            if "value" in answer:
                self.values += 1
                try:
                    return decode(answer["value"])
                except (ValueError, TypeError, OverflowError, RecursionError) as wrong:
                    raise self._fails(CannotCross(f"it is no value ({wrong})"), "wrong_output") from None
            if "raised" in answer:
                kind, text = self.words(answer["raised"])
                error = _exception(answer.get("base"), text, answer.get("arguments"))
                category = "memory" if isinstance(error, MemoryError) else "runtime_error"
                raise self._fails(error, category, f"{kind}: {text}")
            raise self._fails(CannotCross(f"{answer.get('kept')!s:.300}"), "wrong_output")

        call.__name__ = name
        return call

    def _fails(self, error: BaseException, category: str, text: str = "") -> BaseException:
        self.verdict = (error, [category, text or f"its result cannot be compared: {error}"])
        if isinstance(error, CannotCross):
            self.kept = self.kept or self.verdict[1]
        return error


def _exception(name: Any, text: str, arguments: Any) -> Exception:
    """The builtin exception of that name and those arguments; not one that a loop takes for its end."""
    kind = getattr(builtins, name, None) if type(name) is str else None
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        kind = RuntimeError
    if issubclass(kind, (StopIteration, StopAsyncIteration, ExceptionGroup)):
        kind = RuntimeError
    for base in kind.__mro__:  # some need arguments of their own kind, which did not cross
        with contextlib.suppress(Exception):
            return base(*decode(arguments))
        with contextlib.suppress(Exception):
            return base(text)
    return RuntimeError(text)


def checker(channel: socket.socket, job: dict[str, Any], say: Callable[[Any], None]) -> list[str]:
    """Runs the tests; returns the category and a word on it. Categories of its own: "not_started" and "gone"."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # where no wall stands between, its files are not open to all
    remote = Candidate(channel)
    say("started")  # from here on, what the process meets with can be the candidate's doing
    try:
        remote.hear()
    except CandidateGone:
        return ["not_started", ""]
    try:
        ready = remote.ask({"source": job["source"]})
        if "ready" not in ready:
            kind, text = remote.words(ready.get("failed"))
            syntax = kind in ("SyntaxError", "IndentationError", "TabError")
            category = "syntax_error" if syntax else "memory" if kind == "MemoryError" else "runtime_error"
            return [category, f"{kind}: {text}"]
        names: dict[str, Any] = {name: remote.function(name) for name in job["remote"]}
        _run_tests(job, names, remote.function)
    except BaseException as error:
        if remote.gone:
            return ["gone", ""]
        if remote.kept is not None:
            return remote.kept
        if remote.verdict is not None and error is remote.verdict[0]:
            return remote.verdict[1]
        if remote.calls == 0:
            return ["harness_error", "the tests failed before they called the candidate: " + ": ".join(describe(error))]
        return _judge(error)
    if remote.gone:
        return ["gone", ""]
    if remote.kept is not None:
        return remote.kept
    if remote.calls == 0:
        return ["harness_error", "the tests do not call the candidate"]
    return ["passed", ""]


def together(job: dict[str, Any], say: Callable[[Any], None]) -> list[str]:
    """Candidate and tests in one process, for tests that work no other way; a candidate that cheats can pass here."""
    say("started")
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
    if role != "checker":  # which runs nothing of the candidate's
        confine(bytes.fromhex(sys.argv[-1]))
    if role == "candidate":
        return candidate(socket.socket(fileno=int(sys.argv[2])))
    verdicts = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)

    def say(word: Any) -> None:
        os.write(verdicts, json.dumps(word).encode() + b"\n")

    job = json.loads(sys.stdin.buffer.read())
    say(checker(socket.socket(fileno=int(sys.argv[2])), job, say) if role == "checker" else together(job, say))
    os._exit(0)  # threads of the tests, or of a candidate beside them, keep nothing waiting


if __name__ == "__main__":
    main()
