"""Small list-processing tasks: a description in words, the Python program, and what the program must return.

Tiny models learn them in minutes on a laptop, there are millions of them, and none is in any base model's corpus.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ibft.errors import InputError

MAX_STEPS = 3
_SYLLABLES = [consonant + vowel for consonant in "BCDFGHJKLMNPQRSTVWZ" for vowel in "aeiou"]


class Operation(NamedTuple):
    """One step of a task; `k` is its number, or None where it takes none."""

    name: str
    k: int | None = None


@dataclass(frozen=True)
class Task:
    """A function `solve(xs)` on lists of integers, described, written out and as a list of operations."""

    name: str  # says nothing about the program
    description: str  # determines the program
    program: str
    operations: tuple[Operation, ...]


class _Kind(NamedTuple):
    """How one operation reads: its line of Python, and its wordings, of which every one says the same."""

    family: str
    code: str
    words: tuple[str, ...]
    ks: Sequence[int] = ()


# A family never follows itself, so that no task says "the first 5, then the first 3".
_KINDS: dict[str, _Kind] = {
    "even": _Kind("filter", "xs = [x for x in xs if x % 2 == 0]", ("keep the even numbers", "drop the odd numbers")),
    "odd": _Kind("filter", "xs = [x for x in xs if x % 2 == 1]", ("keep the odd numbers", "drop the even numbers")),
    "greater": _Kind("filter", "xs = [x for x in xs if x > {k}]",
                     ("keep the numbers greater than {k}", "drop every number that is {k} or less"), range(10)),
    "less": _Kind("filter", "xs = [x for x in xs if x < {k}]",
                  ("keep the numbers less than {k}", "drop every number that is {k} or more"), range(10)),
    "multiple": _Kind("filter", "xs = [x for x in xs if x % {k} == 0]",
                      ("keep the multiples of {k}", "keep the numbers divisible by {k}"), range(3, 10)),
    "add": _Kind("map", "xs = [x + {k} for x in xs]",
                 ("add {k} to each number", "increase every number by {k}"), range(1, 10)),
    "multiply": _Kind("map", "xs = [x * {k} for x in xs]",
                      ("multiply each number by {k}", "scale every number by a factor of {k}"), range(2, 10)),
    "negate": _Kind("map", "xs = [-x for x in xs]", ("negate each number", "flip the sign of every number")),
    "square": _Kind("map", "xs = [x * x for x in xs]", ("square each number", "multiply every number by itself")),
    "first": _Kind("slice", "xs = xs[:{k}]", ("take the first {k}", "keep only the first {k} numbers"), range(2, 7)),
    "last": _Kind("slice", "xs = xs[-{k}:]", ("take the last {k}", "keep only the last {k} numbers"), range(2, 7)),
    "skip": _Kind("slice", "xs = xs[{k}:]", ("drop the first {k}", "skip the first {k} numbers"), range(2, 7)),
    "alternate": _Kind("slice", "xs = xs[::2]", ("take every second number, starting with the first",
                                                 "keep the numbers at even positions, counted from 0")),
    "reverse": _Kind("slice", "xs = xs[::-1]", ("reverse the list", "put the list in reverse order")),
    "sort": _Kind("sort", "xs = sorted(xs)", ("sort in increasing order", "order from smallest to largest")),
    "sum": _Kind("reduce", "return sum(xs)", ("return the sum", "return the total")),
    "max": _Kind("reduce", "return max(xs, default=0)", ("return the largest number, or 0 for an empty list",
                                                         "return the maximum, or 0 if nothing is left")),
    "min": _Kind("reduce", "return min(xs, default=0)", ("return the smallest number, or 0 for an empty list",
                                                         "return the minimum, or 0 if nothing is left")),
    "count": _Kind("reduce", "return len(xs)", ("return how many numbers there are", "return the count")),
}  # fmt: skip


def generate_tasks(count: int, *, seed: int, max_steps: int = MAX_STEPS) -> list[Task]:
    """`count` different tasks in random order, the same for the same arguments.

    No program comes twice, so any split of the list is disjoint: `tasks[:800]` to train on, `tasks[800:]` held out.
    Two programs may still agree on the lists at hand: counting a reversed list is counting it.
    A task has one to `max_steps` list operations, equally often while there are enough of the short ones; about four in
    five then reduce the list to a number. InputError when `count` is more than the tasks that exist.
    """
    sizes = [sum(math.prod(map(len, space)) for space in _spaces(steps)) for steps in range(1, max_steps + 1)]
    most = min(sum(sizes), len(_SYLLABLES) ** 3)
    if not 1 <= count <= most:
        raise InputError(f"the number of tasks must be between 1 and {most}, not {count}.")
    rng = random.Random(seed)
    picks = [
        (steps, index)
        for steps, share in enumerate(_shares(count, sizes), start=1)
        for index in rng.sample(range(sizes[steps - 1]), share)
    ]
    rng.shuffle(picks)
    names = rng.sample(range(len(_SYLLABLES) ** 3), count)
    return [_task(_name(number), _unrank(*pick), rng) for number, pick in zip(names, picks, strict=True)]


def run_operations(operations: Sequence[Operation], xs: Sequence[int]) -> list[int] | int:
    """What a task's program must return for `xs`, computed from its operations and not from its text."""
    values = list(xs)
    for name, k in operations:
        result = _apply(name, k or 0, values)
        if isinstance(result, int):
            return result
        values = result
    return values


def write_jsonl(tasks: Sequence[Task], path: str | Path) -> None:
    """One line per task: the description as `instruction`, the program as `output`."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for task in tasks:
            file.write(json.dumps({"instruction": task.description, "output": task.program}) + "\n")


def _shares(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide `count` as evenly as the sizes allow; sizes ascend, so what a short length lacks falls to the longer."""
    shares: list[int] = []
    for position, size in enumerate(sizes):
        shares.append(min(size, (count - sum(shares)) // (len(sizes) - position)))
    return shares


@functools.cache
def _spaces(steps: int) -> list[tuple[list[tuple[Operation, ...]], ...]]:
    """All tasks with this many list operations, as a list of Cartesian products: a choice for each place."""
    families: dict[str, list[tuple[Operation, ...]]] = {}
    for name, kind in _KINDS.items():
        choices = [(Operation(name, k),) for k in kind.ks] or [(Operation(name),)]
        families.setdefault(kind.family, []).extend(choices)
    ends = [(), *families.pop("reduce")]  # an optional reduction
    return [
        (*(families[family] for family in order), ends)
        for order in itertools.product(families, repeat=steps)
        if all(a != b for a, b in itertools.pairwise(order))
    ]


def _unrank(steps: int, index: int) -> tuple[Operation, ...]:
    """The task number `index` among those with this many list operations: sampled without listing them all."""
    for space in _spaces(steps):
        size = math.prod(map(len, space))
        if index < size:
            break
        index -= size
    operations: list[Operation] = []
    for choices in space:
        index, choice = divmod(index, len(choices))
        operations.extend(choices[choice])
    return tuple(operations)


def _name(number: int) -> str:
    """Three syllables, as BaDoKu: an id of few tokens, none of which says anything about the program."""
    number, last = divmod(number, len(_SYLLABLES))
    return "".join(_SYLLABLES[index] for index in (*divmod(number, len(_SYLLABLES)), last))


def _task(name: str, operations: tuple[Operation, ...], rng: random.Random) -> Task:
    lines = [_KINDS[op.name].code.format(k=op.k) for op in operations]
    words = [rng.choice(_KINDS[op.name].words).format(k=op.k) for op in operations]
    if _KINDS[operations[-1].name].family != "reduce":
        lines.append("return xs")
        words.append("return the list")
    program = "def solve(xs):\n" + "".join(f"    {line}\n" for line in lines)
    return Task(name, f"Write solve(xs): {', then '.join(words)}.", program, operations)


def _apply(name: str, k: int, xs: list[int]) -> list[int] | int:
    """One operation; written with other means than the programs are, so that one checks the other."""
    match name:
        case "even":
            return list(filter(lambda x: not x & 1, xs))
        case "odd":
            return list(filter(lambda x: x & 1, xs))
        case "greater":
            return [x for x in xs if not x <= k]
        case "less":
            return [x for x in xs if not x >= k]
        case "multiple":
            return [x for x in xs if k * (x // k) == x]
        case "add":
            return list(map(k.__add__, xs))
        case "multiply":
            return [sum([x] * k) for x in xs]
        case "negate":
            return [0 - x for x in xs]
        case "square":
            return [abs(x) ** 2 for x in xs]
        case "first":
            return [x for i, x in enumerate(xs) if i < k]
        case "last":
            return [x for i, x in enumerate(xs) if i >= len(xs) - k]
        case "skip":
            return [x for i, x in enumerate(xs) if i >= k]
        case "alternate":
            return [x for i, x in enumerate(xs) if i % 2 == 0]
        case "reverse":
            return list(reversed(xs))
        case "sort":
            return sorted(xs, key=lambda x: -x, reverse=True)
        case "sum":
            return functools.reduce(operator.add, xs, 0)
        case "max":
            return sorted(xs)[-1] if xs else 0
        case "min":
            return sorted(xs)[0] if xs else 0
        case "count":
            return sum(1 for _ in xs)
    raise InputError(f"{name!r} is not an operation; there are {', '.join(_KINDS)}.")
