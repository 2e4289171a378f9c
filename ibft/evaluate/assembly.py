"""From a completion to the program that is run. How it is done decides the score, so it is chosen and recorded.

A completion is either the body that continues the problem's prompt, or a full program with the prompt in it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Literal

from ibft.evaluate.problems import Problem

CompletionFormat = Literal["auto", "body", "full"]
Header = Literal["dataset", "model"]

_BYTE_ORDER_MARK = "\ufeff"
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+(?:\([^)]*\)|.*)", re.MULTILINE)


def assemble(
    problem: Problem, completion: str, completion_format: CompletionFormat = "auto", header: Header = "dataset"
) -> str:
    """The program's source; of a Verilog problem, the design without the testbench.

    "body": the prompt, then the completion. "full": the completion in place of the prompt, of which only what comes
    before the function is kept in Python (imports, helpers). "auto": "full" for each completion that defines what the
    problem asks for, "body" for the others. `header` is about full Verilog designs: "dataset" puts the problem's own
    module header in place of the completion's and of the words before it, "model" leaves the completion as it is.
    """
    if completion_format == "auto":
        completion_format = "full" if is_full(problem, completion) else "body"
    if problem.language == "verilog":
        if completion_format == "body":
            return f"{problem.prompt}\n{completion}"
        found = _module_header(problem, completion)
        if header == "model" or found is None:
            return completion
        start, end = found
        return f"{_modules(completion[:start])}{problem.prompt}\n{completion[end:]}"
    completion = completion.removeprefix(_BYTE_ORDER_MARK)
    if completion_format == "body":
        return problem.prompt + completion
    # Python has them before everything else.
    future = "".join(f"{line}\n" for line in _FUTURE.findall(completion))
    return f"{future}{_before_function(problem)}{_FUTURE.sub('', completion) if future else completion}"


def is_full(problem: Problem, completion: str) -> bool:
    """Whether the completion defines the module or function that the problem asks for.

    What begins with an indented line is the body of a function, whatever comes after it.
    """
    if problem.language == "verilog":
        return _module_header(problem, completion) is not None
    if problem.entry_point is None:
        return True  # there is no header to continue
    completion = completion.removeprefix(_BYTE_ORDER_MARK)
    if re.match(r"(?:[ \t]*(?:#.*)?\r?\n)*[ \t]+[^\s#]", completion):
        return False
    name = re.escape(problem.entry_point)
    return re.search(rf"^(async\s+def|def|class)\s+{name}\b|^{name}\s*=", completion, re.MULTILINE) is not None


def format_warning(
    problems: Sequence[Problem], completions: Sequence[str], completion_format: CompletionFormat
) -> str | None:
    """A sentence if most completions (each of the problem at its place) look like the other format; else None."""
    if completion_format == "auto":
        return None
    pairs = [(p, c) for p, c in zip(problems, completions, strict=True) if p.language == "verilog" or p.entry_point]
    full = sum(is_full(problem, completion) for problem, completion in pairs)
    fitting = full if completion_format == "full" else len(pairs) - full
    if not pairs or 2 * fitting >= len(pairs):
        return None
    other = "body" if completion_format == "full" else "full"
    what = "module" if pairs[0][0].language == "verilog" else "function"
    return (
        f"{full} of {len(pairs)} completions define the {what} that their problem asks for, which looks like "
        f"--completion_format {other}, and they were assembled as {completion_format}."
    )


def without_comments(source: str, *, strings: bool = False) -> str:
    """Verilog source with its comments (and with `strings`, its strings) turned into spaces, place by place."""

    def blank(match: re.Match[str]) -> str:
        text = match.group()
        kept = text[0] == "\\" or (text[0] == '"' and not strings)
        return text if kept else re.sub(r"[^\n]", " ", text)

    # An escaped identifier first: it may hold what elsewhere begins a string or a comment. It ends as for the compiler.
    return re.sub(r'\\[^ \t\b\f\r\n]+|"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?(?:\*/|\Z)', blank, source, flags=re.DOTALL)


def module_name(problem: Problem) -> str:
    """Of the design under test."""
    found = re.search(r"\bmodule\s+(\w+)", without_comments(problem.prompt, strings=True))
    return found.group(1) if found else "top_module"


def _module_header(problem: Problem, completion: str) -> tuple[int, int] | None:
    """Where the completion's declaration of the design's module begins and ends, its semicolon included."""
    plain = without_comments(completion, strings=True)
    found = re.search(rf"\bmodule\s+{module_name(problem)}\b", plain)
    semicolon = plain.find(";", found.end()) if found else -1
    return (found.start(), semicolon + 1) if found and semicolon >= 0 else None


def _modules(text: str) -> str:
    """The whole modules in what comes before the design; the rest is words about it."""
    plain = without_comments(text, strings=True)
    # One pass from token to token: an expression for a whole module would look for each one's end again.
    header, end = re.compile(r"^[ \t]*module\s+\w+\s*[#(;]", re.MULTILINE), re.compile(r"\bendmodule\b")
    modules, place = "", 0
    while (begun := header.search(plain, place)) and (ended := end.search(plain, begun.end())):
        modules += f"{text[begun.start() : ended.end()]}\n"
        place = ended.end()
    return modules


def _before_function(problem: Problem) -> str:
    """What of the prompt comes before the function that is asked for."""
    if problem.entry_point is None:
        return ""
    found = re.search(
        rf"^(?:@.*\n)*(?:async\s+)?def\s+{re.escape(problem.entry_point)}\b", problem.prompt, re.MULTILINE
    )
    before = problem.prompt[: found.start()] if found else ""
    try:
        ast.parse(before)
    except (SyntaxError, ValueError):
        return ""  # text for people
    return before
