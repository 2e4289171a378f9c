"""From what a model wrote to the code in it. Deterministic, so that it can be redone from the raw text.

A fenced block of Markdown is taken as it stands. Text without one is code followed by what the model went on to write:
it is cut at a stop sequence (Python) or after its `endmodule` (Verilog).
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from ibft.evaluate.problems import MBPP_STOP, PROGRAM_STOP, PYTHON_STOP, Problem

_THOUGHT_END = "</think>"  # of models that reason before they answer
_FENCE = re.compile(r"^[ ]{0,3}(?:```|~~~)[ \t]*([\w+#-]*)[^\n`]*$", re.MULTILINE)
_MODULE = re.compile(r"^[ \t]*module\b", re.MULTILINE)
_END_MODULE = re.compile(r"\bendmodule\b")


@dataclass(frozen=True)
class Extraction:
    """`extraction(raw, problem)` gives the code. `stop` replaces the stop sequences of Python, if it is not None."""

    stop: tuple[str, ...] | None = None

    def __call__(self, raw: str, problem: Problem) -> str:
        text = raw.rpartition(_THOUGHT_END)[2]
        first = _FENCE.search(text)
        if first is None:
            return self._cut(text, problem)
        if _closes(text, first, problem):
            return self._cut(text[: first.start()], problem)
        blocks = _blocks(text)
        return next((block for block in blocks if declares_answer(block, problem)), blocks[0])

    def _cut(self, text: str, problem: Problem) -> str:
        """Text without a fence, up to where the answer ends."""
        if problem.language == "verilog":
            ends = [match.end() for match in _END_MODULE.finditer(text)]
            if not ends:
                return text
            whole = declares_answer(text[: ends[0]], problem)  # a body may be followed by other modules
            return text[: ends[-1] if whole else ends[0]] + "\n"
        stop = self.stop
        if stop is None and problem.entry_point is None:
            stop = MBPP_STOP
        elif stop is None:
            stop = PROGRAM_STOP if declares_answer(text, problem) else PYTHON_STOP
        return text[: first_stop(text, stop)]


def first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the first of the stop sequences begins; the length of the text if there is none."""
    return min((at for at in (text.find(sequence) for sequence in stop) if at >= 0), default=len(text))


def declares_answer(code: str, problem: Problem) -> bool:
    """Whether the code is an answer of its own, and no continuation: it declares a module, or what the tests call."""
    if problem.language == "verilog":
        return _MODULE.search(code) is not None
    name = re.escape(problem.entry_point) if problem.entry_point else r"\w+"
    return re.search(rf"^(?:async[ \t]+def|def|class)[ \t]+{name}\b|^{name}[ \t]*=", code, re.MULTILINE) is not None


def _closes(text: str, fence: re.Match[str], problem: Problem) -> bool:
    """Whether the first fence ends code that began before it, because the prompt ended inside the block."""
    before = text[: fence.start()]
    if fence[1] or not before.strip() or len(_FENCE.findall(text)) % 2 == 0:
        return False
    if problem.language == "verilog":
        return _END_MODULE.search(before) is not None
    return _parses(problem.prompt + before) or _parses(before)


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in the model's strings
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _blocks(text: str) -> list[str]:
    """The contents of the fenced blocks; the last may lack its end."""
    fences = list(_FENCE.finditer(text))
    closings = [*fences[1::2], None] if len(fences) % 2 else fences[1::2]
    return [
        text[opening.end() + 1 : closing.start() if closing is not None else len(text)]
        for opening, closing in zip(fences[::2], closings, strict=True)
    ]
