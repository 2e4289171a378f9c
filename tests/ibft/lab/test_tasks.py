"""Each generated program must do what its operations say, and each description must say which program it is."""

import itertools
import json
import random
import re

import pytest

from ibft.errors import InputError
from ibft.lab.tasks import _KINDS, Operation, _shares, _spaces, _unrank, generate_tasks, run_operations, write_jsonl


def _solve(program):
    scope = {}
    exec(program, scope)
    return scope["solve"]


def _lists(rng):
    yield []
    for length in (1, 2, 3, 7, 12):
        yield [rng.randint(-30, 30) for _ in range(length)]


def test_programs_compute_what_their_operations_say():
    rng = random.Random(0)
    tasks = generate_tasks(900, seed=1)
    assert {op.name for task in tasks for op in task.operations} == set(_KINDS)
    for task in tasks:
        solve = _solve(task.program)
        for xs in _lists(rng):
            given = list(xs)
            assert solve(given) == run_operations(task.operations, xs), task
            assert given == xs, "solve must leave its argument alone"


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([Operation("even"), Operation("add", 3)], [5, -1]),
        ([Operation("odd"), Operation("sort")], [-3, 1, 5]),
        ([Operation("greater", 1), Operation("negate")], [-2, -5]),
        ([Operation("less", 2), Operation("square"), Operation("sum")], 26),
        ([Operation("multiple", 5)], [5]),
        ([Operation("multiply", 2), Operation("last", 2)], [10, 2]),
        ([Operation("first", 2), Operation("reverse")], [-3, 2]),
        ([Operation("skip", 2), Operation("max")], 5),
        ([Operation("alternate"), Operation("min")], -4),
        ([Operation("greater", 9), Operation("count")], 0),
        ([Operation("greater", 9), Operation("max")], 0),
    ],
)
def test_operations_by_hand(operations, expected):
    assert run_operations(operations, [2, -3, -4, 5, 1]) == expected


def test_same_seed_same_tasks_other_seed_others():
    assert generate_tasks(200, seed=7) == generate_tasks(200, seed=7)
    programs = [{task.program for task in generate_tasks(200, seed=seed)} for seed in (7, 8)]
    assert len(programs[0] & programs[1]) < 100  # a third are short, and of those there are few


def test_no_program_or_name_comes_twice_and_lengths_are_even():
    tasks = generate_tasks(3000, seed=0)
    for attribute in ("program", "description", "name", "operations"):
        assert len({getattr(task, attribute) for task in tasks}) == len(tasks)
    lengths = [sum(_KINDS[op.name].family != "reduce" for op in task.operations) for task in tasks]
    one_step = sum(len(ends) * len(choices) for choices, ends in _spaces(1))
    assert [lengths.count(n) for n in (1, 2, 3)] == _shares(3000, [one_step, 10**6, 10**6])
    assert lengths.count(1) == one_step  # all of them: the rest is shared by the longer tasks
    assert lengths[:300].count(3) not in (0, 300)  # mixed, not in blocks


def test_a_family_does_not_follow_itself():
    for task in generate_tasks(500, seed=0):
        families = [_KINDS[op.name].family for op in task.operations]
        assert all(a != b for a, b in itertools.pairwise(families)) and "reduce" not in families[:-1]


def test_unranking_reaches_every_task_once():
    sizes = [sum(len(a) * len(ends) for a, ends in _spaces(1)), sum(len(a) * len(b) * len(c) for a, b, c in _spaces(2))]
    for steps, size in enumerate(sizes, start=1):
        assert len({_unrank(steps, index) for index in range(size)}) == size


def test_shares_add_up():
    assert _shares(10, [2, 100, 100]) == [2, 4, 4]
    assert _shares(6, [9, 9, 9]) == [2, 2, 2]
    assert _shares(27, [9, 9, 9]) == [9, 9, 9]
    for count in range(1, 28):
        shares = _shares(count, [3, 7, 17])
        assert sum(shares) == count and all(a <= b for a, b in zip(shares, [3, 7, 17], strict=True))


def test_descriptions_determine_the_program():
    """Read every wording back: no two operations share a phrase, and the joint cannot occur inside one."""
    phrases = {"return the list": None}
    for name, kind in _KINDS.items():
        for k, words in itertools.product(kind.ks or [None], kind.words):
            phrase = words.format(k=k)
            assert phrase not in phrases and ", then " not in phrase
            phrases[phrase] = Operation(name, k)
    for task in generate_tasks(500, seed=3):
        body = re.fullmatch(r"Write solve\(xs\): (.*)\.", task.description)[1]
        read = [phrases[phrase] for phrase in body.split(", then ")]
        assert tuple(op for op in read if op) == task.operations


def test_wording_varies():
    words = {task.description.split(": ")[1] for task in generate_tasks(600, seed=0) if task.operations[0][0] == "even"}
    assert {text.split(",")[0].rstrip(".") for text in words} == {"keep the even numbers", "drop the odd numbers"}


def test_write_jsonl(tmp_path):
    tasks = generate_tasks(5, seed=0)
    write_jsonl(tasks, tmp_path / "tasks.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert rows == [{"instruction": task.description, "output": task.program} for task in tasks]


@pytest.mark.parametrize("count", [0, -1, 10**8])
def test_more_or_fewer_tasks_than_exist(count):
    with pytest.raises(InputError, match=rf"between 1 and \d+, not {count}\."):
        generate_tasks(count, seed=0)


def test_unknown_operation():
    with pytest.raises(InputError, match="'median' is not an operation"):
        run_operations([Operation("median")], [1])
