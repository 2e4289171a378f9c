"""Verdicts on Python: what crosses between candidate and tests, whose helpers they use, and what is whose fault."""

import math
from dataclasses import replace
from typing import Any

import pytest

from ibft.evaluate import python_child, python_verdict
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_child import CannotCross, decode, encode
from ibft.evaluate.sandbox import Limits, Sandbox

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
