"""The tiny language: every task's program belongs to it and runs as its operations say; hostile programs never run."""

import builtins

import pytest

from ibft.lab.language import MAX_CHARACTERS, run_program
from ibft.lab.tasks import generate_tasks, run_operations

INPUTS = [[], [0], [5, -3, 5, 12, -8, 7, 100], list(range(-20, 20))]


def test_every_task_belongs_to_it():
    for task in generate_tasks(1500, seed=4):
        assert run_program(task.program, INPUTS) == [run_operations(task.operations, xs) for xs in INPUTS]


def test_what_raises_returns_none_for_that_input():
    assert run_program("def solve(xs):\n    return max(xs)\n", [[], [2, 1]]) == [None, 2]
    assert run_program("def solve(xs):\n    return [x % 0 for x in xs]", [[], [1]]) == [[], None]
    assert run_program("def solve(xs):\n    return xs[::0]", [[1]]) == [None]


def test_inputs_are_left_alone():
    inputs = [[3, 1, 2]]
    assert run_program("def solve(xs):\n    xs = sorted(xs)\n    return xs\n", inputs) == [[1, 2, 3]]
    assert inputs == [[3, 1, 2]]


def test_nothing_is_printed_of_what_a_model_writes(recwarn: pytest.WarningsRecorder) -> None:
    for program in ("def solve(xs):\n    return [x for x in xs if x > 1if x]", "def solve(xs):\n    return '\\d'"):
        run_program(program, INPUTS)
    assert not recwarn.list


HOSTILE = {
    "import": "import os\ndef solve(xs):\n    return xs",
    "import within": "def solve(xs):\n    import os\n    return xs",
    "repeated default": "def solve(xs):\n    return max(xs, default=0, default=0)",
    "attribute": "def solve(xs):\n    return xs.__class__",
    "method": "def solve(xs):\n    xs = xs.copy()\n    return xs",
    "builtin": "def solve(xs):\n    return open('x')",
    "exec": "def solve(xs):\n    return exec('1')",
    "print": "def solve(xs):\n    print(xs)\n    return xs",
    "rebound builtin": "def solve(xs):\n    sum = xs\n    return sum",
    "loop": "def solve(xs):\n    while True:\n        pass\n    return xs",
    "for": "def solve(xs):\n    for x in xs:\n        xs = xs\n    return xs",
    "recursion": "def solve(xs):\n    return solve(xs)",
    "recursion in a list": "def solve(xs):\n    xs = [solve(x) for x in xs]\n    return xs",
    "decorator": "@open\ndef solve(xs):\n    return xs",
    "default": "def solve(xs=open('x')):\n    return xs",
    "annotation": "def solve(xs: open('x')):\n    return xs",
    "returns": "def solve(xs) -> open('x'):\n    return xs",
    "async": "async def solve(xs):\n    return xs",
    "generator": "def solve(xs):\n    return sum(x for x in xs)",
    "yield": "def solve(xs):\n    yield xs",
    "two generators": "def solve(xs):\n    return [x for x in xs for x in xs]",
    "nested list": "def solve(xs):\n    return [xs for x in xs]",
    "quadratic": "def solve(xs):\n    return [sum(xs) for x in xs]",
    "list times": "def solve(xs):\n    xs = xs * 9\n    return xs",
    "list of lists": "def solve(xs):\n    return [[x] for x in xs]",
    "list display": "def solve(xs):\n    return [1, 2]",
    "power": "def solve(xs):\n    return [x ** 9 for x in xs]",
    "shift": "def solve(xs):\n    return [x << 9 for x in xs]",
    "products": "def solve(xs):\n" + "    xs = [x * x for x in xs]\n" * 7 + "    return xs",
    "products at once": "def solve(xs):\n    return [x*x*x*x*x*x*x*x for x in xs]",
    "large constant": "def solve(xs):\n    return [x + 10000 for x in xs]",
    "minus large constant": "def solve(xs):\n    return [x + -10000 for x in xs]",
    "float": "def solve(xs):\n    return [x + 0.5 for x in xs]",
    "bool": "def solve(xs):\n    return [x + True for x in xs]",
    "string": "def solve(xs):\n    return 'ab'",
    "complex": "def solve(xs):\n    return 1j",
    "walrus": "def solve(xs):\n    return [(x := 1) for x in xs]",
    "lambda": "def solve(xs):\n    return sorted(xs, key=lambda x: x)",
    "starred": "def solve(xs):\n    return max(*xs)",
    "double starred": "def solve(xs):\n    return max(xs, **{'default': 0})",
    "keyword": "def solve(xs):\n    return max(xs, key=xs)",
    "keyword twice": "def solve(xs):\n    return max(xs, default=0, default=0)",
    "more arguments": "def solve(xs, ys):\n    return xs",
    "no name": "def solve():\n    return 0",
    "other name": "def other(xs):\n    return xs",
    "two functions": "def solve(xs):\n    return xs\ndef solve(xs):\n    return xs",
    "after it": "def solve(xs):\n    return xs\nsolve([])",
    "no return": "def solve(xs):\n    xs = sorted(xs)",
    "returns nothing": "def solve(xs):\n    return",
    "two returns": "def solve(xs):\n    return xs\n    return xs",
    "number for a list": "def solve(xs):\n    xs = sum(xs)\n    return xs",
    "x outside": "def solve(xs):\n    return x",
    "slice by a list": "def solve(xs):\n    return xs[:len(xs)]",
    "index": "def solve(xs):\n    return xs[0]",
    "too deep": "def solve(xs):\n    return " + "(" * 250 + "xs" + ")" * 250,
    "many minuses": "def solve(xs):\n    return [" + "-" * 400 + "x for x in xs]",
    "too long": "def solve(xs):\n    return xs" + "\n" * MAX_CHARACTERS,
    "a null byte": "def solve(xs):\n    return xs\0",
    "a surrogate": "def solve(xs):\n    return xs # \udc80",
    "no Python": "def solve(xs:\n",
    "empty": "",
    "huge digits": "def solve(xs):\n    return [x + " + "9" * 500 + " for x in xs]",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_of_the_language_is_never_run(program, monkeypatch):
    monkeypatch.setattr(builtins, "exec", lambda *_: pytest.fail("it was run"))
    assert run_program(program, [[1, 2]]) is None


def test_the_longest_numbers_stay_short():
    program = "def solve(xs):\n" + "    xs = [x * x for x in xs]\n" * 6 + "    return sum(xs)"
    (result,) = run_program(program, [[1000] * 20])
    assert result.bit_length() < 1000
