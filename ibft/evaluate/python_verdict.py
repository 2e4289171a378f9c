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
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from ibft.evaluate import seccomp
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_child import MAX_FRAME
from ibft.evaluate.sandbox import Limits, Outcome, Sandbox, supervise

INTERPRETER = os.path.realpath(sys.executable)


class Verdict(NamedTuple):
    """What became of a sample: a category (see docs/evaluation.md), and a word on it."""

    category: str
    detail: str = ""
    seconds: float = 0.0
    transient: bool = False  # a limit, or a process that died: on a busier or idler machine it may be another


def judge(sandbox: Sandbox, problem: Problem, source: str, limits: Limits, *, isolated: bool = True) -> Verdict:
    """Runs the problem's tests on a program. With `isolated` off, in the program's own process, where it can cheat."""
    if (size := len(json.dumps(source))) > MAX_FRAME - 1000:
        return Verdict("memory", f"the program takes {size} bytes, and at most {MAX_FRAME} are run")
    job = _job(problem, source)
    if not isolated:
        outcome = sandbox.run(_command("together"), limits, stdin=job)
        return _verdict(outcome)._replace(seconds=round(outcome.seconds, 3))
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


# What the tests' process can say; nothing else is taken from it, since beside the candidate it may not be itself.
_SAID = ("passed", "wrong_output", "syntax_error", "runtime_error", "memory")
_SAID_APART = (*_SAID, "harness_error", "gone", "not_started")


def _verdict(tests: Outcome, candidate: Outcome | None = None) -> Verdict:
    """`candidate`: None where it ran in the tests' process."""
    stopped = (candidate.stopped if candidate is not None else None) or tests.stopped
    if stopped == "processes":
        return Verdict("runtime_error", "it started too many processes", transient=True)
    if stopped is not None:
        return Verdict(stopped, transient=True)
    if not tests.stdout:
        return _failed("the tests' process", tests)
    said = _said(tests.stdout, _SAID if candidate is None else _SAID_APART) if tests.exit_code == 0 else None
    if said is None:  # of what it does to the tests once it has started, a candidate bears the cost
        category = "memory" if b"MemoryError" in tests.stderr else "runtime_error"
        text = f"the tests ended without a verdict (exit code {tests.exit_code})"
        return Verdict(category, text, transient=True)
    category, detail = said
    if candidate is not None and category == "not_started":
        return _failed("the candidate's process", candidate)
    if candidate is not None and category == "gone":
        code = f" (exit code {candidate.exit_code})" if candidate.exit_code not in (0, 137) else ""
        return Verdict("runtime_error", f"its process ended before it had answered{code}", transient=True)
    return Verdict(category, detail[:500], transient=category == "memory")


def _failed(what: str, outcome: Outcome) -> Verdict:
    error = " ".join(outcome.stderr.decode(errors="replace").split())[-300:]
    return Verdict("harness_error", f"{what} did not start (exit code {outcome.exit_code}): {error}", transient=True)


def _said(text: bytes, categories: Sequence[str]) -> tuple[str, str] | None:
    """The category and the word on it, if the tests' process says that it has started, then this, and nothing else."""
    try:
        started, verdict = (json.loads(line) for line in text.splitlines())
        category, detail = verdict
    except (ValueError, TypeError, RecursionError):
        return None
    whole = started == "started" and type(verdict) is list and category in categories and isinstance(detail, str)
    return (category, detail) if whole else None


@functools.cache
def _script() -> str:
    return resources.files("ibft.evaluate").joinpath("python_child.py").read_text("utf-8")


def _command(role: str, descriptor: int | None = None) -> list[str]:
    """The standard library alone (-S), so that verdicts do not depend on what is installed beside ibft."""
    more = [] if descriptor is None else [str(descriptor)]
    return [INTERPRETER, "-s", "-S", "-P", "-c", _script(), role, *more, seccomp.program().hex()]


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
