"""Verdicts on Python: what crosses between candidate and tests, whose helpers they use, and what is whose fault."""

import math
from dataclasses import replace
from typing import Any

import pytest

from ibft.evaluate import python_child, python_verdict
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_child import CannotCross, decode, encode
from ibft.evaluate.sandbox import Limits, Outcome, Sandbox, choose_sandbox, readable_folders

LIMITS = Limits(wall_seconds=30, cpu_seconds=5, memory_mib=512)
SQUARE = Problem(
    "square",
    "python",
    'def f(x):\n    """The square."""\n',
    "    return x * x\n",
    test="def check(candidate):\n    assert candidate(3) == 9\n",
    entry_point="f",
)


def category(sandbox: Sandbox, problem: Problem, source: str, **options: Any) -> str:
    return python_verdict.judge(sandbox, problem, source, LIMITS, **options).category


def asserting(*tests: str, setup: str = "") -> Problem:
    return Problem("own", "python", '"""Do it."""\n', "", setup=setup, tests=tests)


VALUES = [
    *(None, True, False, 0, -1, 10**5000, 1.5, -0.0, math.inf, 1j, "", "text", "\ud800\0é", b"\0\xff", bytearray(b"a")),
    *([], (), set(), frozenset(), {}, [1, [2, (3, {4: {5}})]], {(1, "a"): [None]}, {frozenset({1})}, range(1, 9, 2)),
    *({True: 1}, [True, 1, 1.0], "x" * 10_000),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(type(value).__name__))
def test_builtin_values_cross_unchanged(value: Any) -> None:
    back = decode(encode(value))
    assert back == value and type(back) is type(value) and (not isinstance(value, dict) or [*back] == [*value])
    assert not isinstance(value, float) or math.copysign(1, back) == math.copysign(1, value)
    assert isinstance(value, int) or repr(back) == repr(value)


def test_nan_and_views_and_iterators_cross() -> None:
    import itertools

    class Two:
        left = 2
        __iter__ = lambda self: self  # noqa: E731

        def __next__(self) -> int:
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return self.left

    assert list(decode(encode(Two()))) == [1, 0]
    assert list(decode(encode(itertools.chain([1], [2])))) == [1, 2]
    assert len(decode(encode({1: 2}.values()))) == 1
    with pytest.raises(python_child.TooLarge):
        encode(itertools.count())
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode({1: 2}.keys())) == {1: 2}.keys()
    assert decode(encode({1: 2}.items())) == {1: 2}.items()
    for iterator in (iter([1, 2]), (x for x in (1, 2)), map(int, "12"), {1: 0, 2: 0}.keys().__iter__(), zip([1, 2])):
        assert len(list(decode(encode(iterator)))) == 2


def test_a_subclass_crosses_as_what_it_holds() -> None:
    from collections import Counter, OrderedDict, namedtuple
    from enum import IntEnum

    class Liar(int):
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = int.__hash__
        __index__ = __int__ = __format__ = lambda self, *_: 9

    for value, plain in [
        (Liar(7), 7),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (namedtuple("P", "x y")(1, 2), (1, 2)),
        (IntEnum("E", "A B")(2), 2),
    ]:
        back = decode(encode(value))
        assert back == plain and type(back) is type(plain)


@pytest.mark.parametrize("value", [object(), int, len, lambda: 0, ..., [object()], {1: object()}, (1).__add__])
def test_nothing_else_crosses(value: Any) -> None:
    with pytest.raises(CannotCross):
        encode(value)


@pytest.mark.parametrize(
    "value",
    [None, 1, [], ["int"], ["int", []], ["object", 1], ["set", [["list", []]]], ["dict", [[1]]], ["float", "x"]],
)
def test_what_encode_would_not_write_is_no_value(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(value)


def test_right_and_wrong(sandbox: Sandbox) -> None:
    assert category(sandbox, SQUARE, "def f(x):\n    return x * x") == "passed"
    assert category(sandbox, SQUARE, "def f(x):\n    return x + x") == "wrong_output"
    assert category(sandbox, SQUARE, "def f(x):\n    return 1 / 0") == "runtime_error"
    assert category(sandbox, SQUARE, "def f(x)\n    return x") == "syntax_error"
    assert category(sandbox, SQUARE, "def g(x):\n    return x * x") == "runtime_error"
    assert category(sandbox, SQUARE, "import nothing_of_that_name") == "runtime_error"
    assert category(sandbox, SQUARE, "def f(x):\n    return int(input())") == "runtime_error"


def test_details_say_what_failed(sandbox: Sandbox) -> None:
    def detail(source: str) -> str:
        return python_verdict.judge(sandbox, SQUARE, source, LIMITS).detail

    assert detail("def f(x):\n    raise KeyError('k')") == "KeyError: 'k'"
    assert "name 'f' is not defined" in detail("x = 1")
    assert "SyntaxError" in detail("def")
    assert "type object" in detail("def f(x):\n    return object()")


def test_helpers_of_the_prompt_are_the_prompts(sandbox: Sandbox) -> None:
    problem = replace(
        SQUARE,
        prompt='def key(x):\n    return x * x\n\n\ndef f(x):\n    """The key."""\n',
        test="def check(candidate):\n    assert candidate(3) == key(3)\n",
    )
    assert category(sandbox, problem, "def f(x):\n    return x * x") == "passed"
    assert category(sandbox, problem, "def key(x):\n    return 0\ndef f(x):\n    return 0") == "wrong_output"


def test_assertions_call_functions_by_name(sandbox: Sandbox) -> None:
    problem = asserting("assert f(2) == g(1) == 4", "assert sorted([f(3), f(1)]) == [4, 9]", setup="import math")
    source = "def f(x):\n    return x * x if x > 1 else 4\ndef g(x):\n    return 4\ndef sorted(x):\n    return 0"
    assert category(sandbox, problem, source) == "passed"
    assert category(sandbox, problem, source.replace("x * x", "x")) == "wrong_output"
    named_like_a_builtin = replace(asserting("assert sum(2, 3) == 5"), canonical_solution="def sum(a, b): return a + b")
    assert category(sandbox, named_like_a_builtin, "def sum(a, b):\n    return a + b") == "passed"


def test_arguments_are_copies(sandbox: Sandbox) -> None:
    problem = asserting("assert f(xs) == [1, 2]", "assert xs == [2, 1]", setup="xs = [2, 1]")
    assert category(sandbox, problem, "def f(xs):\n    xs.sort()\n    return xs") == "passed"


def test_tests_may_expect_an_exception(sandbox: Sandbox) -> None:
    problem = asserting("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass")
    assert category(sandbox, problem, "def f(x):\n    raise ValueError") == "passed"
    assert category(sandbox, problem, "def f(x):\n    raise OSError") == "runtime_error"
    assert category(sandbox, problem, "def f(x):\n    return 0") == "wrong_output"
    forgiving = asserting("try:\n    assert f(1) == 2\nexcept BaseException:\n    pass")
    assert category(sandbox, forgiving, "import os\ndef f(x):\n    os._exit(0)") == "runtime_error"


@pytest.mark.parametrize("test", ["assert True", "1 / 0", "import nothing_of_that_name", "assert f(", "f(open)"])
def test_tests_that_do_not_work_are_no_ones_failure(sandbox: Sandbox, test: str) -> None:
    verdict = python_verdict.judge(sandbox, asserting(test), "def f(x):\n    return x", LIMITS)
    assert verdict.category == "harness_error"


def test_in_one_process_everything_crosses(sandbox: Sandbox) -> None:
    problem = asserting("assert f(Node(3)).value == 3", setup="root = Node(1)")
    source = "class Node:\n    def __init__(self, value):\n        self.value = value\ndef f(x):\n    return x\n"
    assert category(sandbox, problem, source) == "wrong_output"
    assert category(sandbox, problem, source, isolated=False) == "passed"
    assert category(sandbox, problem, source + "import os\nos._exit(0)", isolated=False) == "runtime_error"
    assert category(sandbox, problem, source.replace("= value", "= 0"), isolated=False) == "wrong_output"
    assert category(sandbox, problem, "class", isolated=False) == "syntax_error"


def test_the_order_of_a_set_is_the_same_in_every_run(sandbox: Sandbox) -> None:
    problem = asserting("assert f() == 'x'")
    source = "def f():\n    return ''.join({str(n) for n in range(20)})"
    assert len({python_verdict.judge(sandbox, problem, source, LIMITS).detail for _ in range(3)}) == 1


def test_frames_have_a_limit() -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(CannotCross):
            python_child.send(ours, "x" * python_child.MAX_FRAME)
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ValueError):
            python_child.receive(theirs)


FRAMES = """import json, os, struct, time
def put(message):
    frame = json.dumps(message).encode()
    for n in range(3, 64):
        try: os.write(n, struct.pack("!I", len(frame)) + frame)
        except OSError: pass
"""


@pytest.mark.parametrize(
    "message", [{"failed": 5}, {"failed": [1, 2, 3]}, {"failed": [[], "x"]}, {"ready": 1}, {"started": True}, []]
)
def test_forged_frames_are_the_candidates_failure(sandbox: Sandbox, message: Any) -> None:
    assert category(sandbox, SQUARE, f"{FRAMES}put({message!r})\ntime.sleep(1)") == "runtime_error"
    forged = f"{FRAMES}put({{'ready': 1}})\nput({{'call': 1, 'raised': 5}})\ntime.sleep(1)"
    assert category(sandbox, SQUARE, forged) == "runtime_error"


def test_large_programs_arguments_and_results_cross(sandbox: Sandbox) -> None:
    assert category(sandbox, SQUARE, "def f(x):\n    return x * x\n#" + "x" * 1_100_000) == "passed"
    assert category(sandbox, SQUARE, "#" + "x" * python_child.MAX_FRAME) == "memory"
    large = replace(SQUARE, test="def check(candidate):\n    assert len(candidate(list(range(100_000)))) == 100_000\n")
    assert category(sandbox, large, "def f(x):\n    return x") == "passed"


def test_what_is_too_large_is_the_fault_of_who_made_it(sandbox: Sandbox) -> None:
    """No canonical solution is asked here."""
    too_large = replace(SQUARE, test="def check(candidate):\n    candidate('x' * 17_000_000)\n")
    assert category(sandbox, too_large, "def f(x):\n    return x") == "harness_error"
    twice = replace(SQUARE, test="def check(candidate):\n    assert candidate(candidate(2)) == 16\n")
    deep = "def f(x):\n    a = []\n    for _ in range(100): a = [a]\n    return a"
    assert category(sandbox, twice, deep) == "wrong_output"


def test_no_test_takes_what_cannot_cross_for_an_expected_exception(sandbox: Sandbox) -> None:
    for caught in ("Exception", "BaseException"):
        test = f"def check(candidate):\n    try:\n        candidate(3)\n    except {caught}:\n        pass\n"
        assert category(sandbox, replace(SQUARE, test=test), "def f(x):\n    return object()") == "wrong_output"


@pytest.mark.parametrize(
    ("body", "caught"),
    [
        ("class Own(ValueError): pass\n    raise Own('a', 2)", "ValueError as e: assert e.args == ('a', 2)"),
        ("import json; json.loads('{')", "ValueError: pass"),
        ("b'\\xff'.decode()", "UnicodeDecodeError as e: assert e.start == 0"),
        ("return {}['k']", "KeyError as e: assert e.args == ('k',)"),
        ("raise KeyError(object())", "KeyError: pass"),
    ],
)
def test_exceptions_keep_their_class_and_arguments(sandbox: Sandbox, body: str, caught: str) -> None:
    test = f"def check(c):\n    try:\n        c(1)\n    except {caught}\n    else:\n        assert False\n"
    source = "def f(x):\n" + "".join(f"    {line.strip()}\n" for line in body.split("\n"))
    assert category(sandbox, replace(SQUARE, test=test), source) == "passed"


@pytest.mark.parametrize(
    "words", ["not json", '["passed"]', '["harness_error", "x"]', '["interrupted", ""]', '["missing", ""]', "[[1], {}]"]
)
@pytest.mark.parametrize("end", ["os._exit(0)", ""])
def test_in_one_process_forged_words_are_its_own_failure(sandbox: Sandbox, words: str, end: str) -> None:
    source = (
        f"import os\nfor n in range(64):\n    try: os.write(n, {words!r}.encode() + b'\\n')\n"
        f"    except OSError: pass\n{end}\ndef f(x):\n    return x * x"
    )
    assert category(sandbox, SQUARE, source, isolated=False) == "runtime_error"


@pytest.mark.parametrize("role", ["candidate", "checker", "together"])
def test_a_sandbox_that_does_not_start_is_no_ones_failure(
    sandbox: Sandbox, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = python_verdict._command

    def failing(asked: str, descriptor: int | None = None) -> list[str]:
        return ["sh", "-c", "echo no namespace >&2; exit 1"] if asked == role else command(asked, descriptor)

    monkeypatch.setattr(python_verdict, "_command", failing)
    verdict = python_verdict.judge(sandbox, SQUARE, "def f(x):\n    return x * x", LIMITS, isolated=role != "together")
    assert verdict.category == "harness_error" and "no namespace" in verdict.detail and verdict.transient


def test_limits_alone_do_not_let_a_candidate_speak_for_the_tests() -> None:
    unsafe = choose_sandbox(tier="rlimits", readable=readable_folders(python_verdict.INTERPRETER))
    source = """import os, signal
def f(x):
    for p in sorted((int(p) for p in os.listdir("/proc") if p.isdigit()), reverse=True):
        try:
            if b"\\0checker\\0" not in open(f"/proc/{p}/cmdline", "rb").read(): continue
            os.kill(p, signal.SIGSTOP)
            for n in range(3, 12):
                try: os.write(os.open(f"/proc/{p}/fd/{n}", os.O_WRONLY), b'["passed", ""]\\n')
                except OSError: pass
            os.kill(p, signal.SIGKILL)
            break
        except OSError: pass
    return 7
"""
    assert category(unsafe, SQUARE, source) in ("runtime_error", "wrong_output")
    privileges = "def f(x):\n    raise ValueError(open('/proc/self/status').read().split('CapEff:')[1][:17])"
    assert "0000000000000000" in python_verdict.judge(unsafe, SQUARE, privileges, LIMITS).detail


def test_a_verdict_counts_once_and_of_tests_that_ended_by_themselves() -> None:
    candidate = Outcome(137, None, b"", b"", 0.0)
    for code, text, expected in [
        (0, b'"started"\n["passed", ""]\n', "passed"),
        (137, b'"started"\n["passed", ""]\n', "runtime_error"),
        (0, b'"started"\n["wrong_output", ""]\n["passed", ""]\n', "runtime_error"),
        (1, b"", "harness_error"),
    ]:
        assert python_verdict._verdict(Outcome(code, None, text, b"", 0.0), candidate).category == expected
