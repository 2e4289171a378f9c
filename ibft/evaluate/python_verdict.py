"""Whether a Python program passes its problem's tests, without taking the program's word for it.

The tests run in one sandboxed process and the program in another; see python_child.py for what passes between them.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import os
import socket
import sys
from importlib import resources
from typing import NamedTuple

from ibft.evaluate.problems import Problem
from ibft.evaluate.sandbox import Limits, Outcome, Sandbox, supervise

INTERPRETER = os.path.realpath(sys.executable)


class Verdict(NamedTuple):
    """What became of a sample: a category (see docs/evaluation.md), and a word on it."""

    category: str
    detail: str = ""
    seconds: float = 0.0


def judge(sandbox: Sandbox, problem: Problem, source: str, limits: Limits, *, isolated: bool = True) -> Verdict:
    """Runs the problem's tests on a program. With `isolated` off, in the program's own process, where it can cheat."""
    job = _job(problem, source)
    if not isolated:
        outcome = sandbox.run(_command("together"), limits, stdin=job)
        return _verdict(outcome, outcome)._replace(seconds=round(outcome.seconds, 3))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # The candidate starts first, so that the two interpreters start at the same time.
        descriptor = theirs.fileno()
        program = sandbox.start(_command("candidate", descriptor), limits, pass_fds=[descriptor])
        try:
            theirs.close()  # the checker must see the end when the candidate's is closed
            checker = sandbox.start(_command("checker", ours.fileno()), limits, stdin=job, pass_fds=[ours.fileno()])
        except BaseException:
            program.finish()
            raise
        ours.close()
    tests, candidate = supervise(checker, program)
    return _verdict(tests, candidate)._replace(seconds=round(tests.seconds, 3))


def _verdict(tests: Outcome, candidate: Outcome) -> Verdict:
    stopped = candidate.stopped or tests.stopped
    if stopped == "interrupted":
        return Verdict("interrupted")
    if stopped is not None:
        return Verdict("runtime_error", "it started too many processes") if stopped == "processes" else Verdict(stopped)
    said = [json.loads(line) for line in tests.stdout.splitlines()]
    if said and isinstance(said[-1], list):
        category, detail = said[-1]
        if category == "runtime_error" and candidate.exit_code not in (0, 137):
            detail += f" (exit code {candidate.exit_code})" if "process ended" in detail else ""
        return Verdict(category, detail)
    error = " ".join(tests.stderr.decode(errors="replace").split())[-300:]
    if candidate is tests or said:
        # Of what it does to the tests once it is called, or beside it, a candidate bears the cost.
        category = "memory" if "MemoryError" in error else "runtime_error"
        return Verdict(category, f"the tests ended without a verdict (exit code {tests.exit_code})")
    return Verdict("harness_error", f"the tests' process failed (exit code {tests.exit_code}): {error}")


@functools.cache
def _script() -> str:
    return resources.files("ibft.evaluate").joinpath("python_child.py").read_text("utf-8")


def _command(role: str, descriptor: int | None = None) -> list[str]:
    """The standard library alone (-S), so that verdicts do not depend on what is installed beside ibft."""
    more = [] if descriptor is None else [str(descriptor)]
    return [INTERPRETER, "-s", "-S", "-P", "-c", _script(), role, *more]


def _job(problem: Problem, source: str) -> bytes:
    job = {
        "source": source,
        "prompt": _runnable(problem.prompt),
        "setup": problem.setup,
        "test": problem.test,
        "tests": list(problem.tests),
        "entry_point": problem.entry_point,
        "remote": sorted(_remote_names(problem)),
    }
    return json.dumps(job).encode("ascii")


def _runnable(prompt: str) -> str:
    """The prompt as a program of its own, whose last function may lack a body; "" if it is not one."""
    for program in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        if _parsed(program) is not None:
            return program
    return ""


@functools.lru_cache(maxsize=1024)
def _remote_names(problem: Problem) -> frozenset[str]:
    """Names that the tests read and do not make themselves: the candidate's to define."""
    read: set[str] = set()
    made: set[str] = set()
    for text in (problem.setup, problem.test, *problem.tests):
        for node in ast.walk(_parsed(text) or ast.Module([], [])):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                made.add(node.name)
            elif isinstance(node, ast.arg):
                made.add(node.arg)
            elif isinstance(node, ast.alias):
                made.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                made.add(node.name)
    # A solution may name its function like a builtin, if the canonical one does.
    solution = _parsed(problem.canonical_solution) or _parsed(problem.prompt + problem.canonical_solution)
    own = {getattr(node, "name", None) for node in solution.body} if solution is not None else set()
    return frozenset(name for name in read - made if name in own or not hasattr(builtins, name))


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def versions() -> dict[str, str]:
    """Of the tools that a verdict depends on."""
    return {"python": sys.version.split()[0]}
