"""Completions of both forms become the programs that their format says."""

import pytest

from ibft.evaluate.assembly import assemble, format_warning, is_full, without_comments
from ibft.evaluate.problems import Problem

PYTHON = Problem(
    "p",
    "python",
    'import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r: float) -> float:\n    """Area."""\n',
    "    return math.pi * r * r\n",
    test="def check(candidate):\n    pass\n",
    entry_point="area",
)
VERILOG = Problem(
    "v", "verilog", "module top_module (\n\tinput a,\n\toutput y\n);\n", "\tassign y = a;\nendmodule\n", "tb"
)
FULL = "module top_module(input a, output reg y);\n  always @* y = a;\nendmodule\n"


def test_a_body_continues_the_prompt() -> None:
    assert assemble(PYTHON, "    return 1\n", "body") == PYTHON.prompt + "    return 1\n"
    assert assemble(VERILOG, "assign y = a;\nendmodule", "body") == f"{VERILOG.prompt}\nassign y = a;\nendmodule"


def test_a_full_program_keeps_what_the_prompt_has_before_the_function() -> None:
    full = "def area(r):\n    return math.pi * helper(r) ** 2\n"
    source = assemble(PYTHON, full, "full")
    assert source == PYTHON.prompt[: PYTHON.prompt.index("def area")] + full
    names: dict[str, object] = {}
    exec(source, names)
    assert names["area"](1) == pytest.approx(3.14159, abs=1e-5)  # type: ignore[operator]


def test_the_header_of_a_full_design_is_the_data_sets_or_the_models() -> None:
    assert assemble(VERILOG, FULL, "full", "model") == FULL
    source = assemble(VERILOG, FULL, "full", "dataset")
    assert source == f"{VERILOG.prompt}\n\n  always @* y = a;\nendmodule\n"


def test_words_before_a_design_are_left_out_and_modules_kept() -> None:
    inverter = "module inverter(input a, output y);\n  assign y = ~a;\nendmodule"
    words = "module should be simple. Here it is: // module top_module(wrong);\n"
    source = assemble(VERILOG, f"{words}{inverter}\n### Answer\n{FULL}", "full", "dataset")
    assert source.startswith(f"{inverter}\n{VERILOG.prompt}")
    assert "simple" not in source and "Answer" not in source


@pytest.mark.parametrize(
    ("problem", "completion", "full"),
    [
        (PYTHON, "    return 1\n", False),
        (PYTHON, "def area(r):\n    return 1\n", True),
        (PYTHON, "import math\narea = lambda r: 1\n", True),
        (PYTHON, "    x = 1\n    def area(): pass\n", False),
        (PYTHON, "def area_of(r):\n    return 1\n", False),
        (VERILOG, FULL, True),
        (VERILOG, "assign y = a; // module top_module(input a);\nendmodule", False),
        (VERILOG, "module top_module_2(input a);\nendmodule", False),
    ],
)
def test_auto_takes_each_completion_for_what_it_defines(problem: Problem, completion: str, full: bool) -> None:
    assert is_full(problem, completion) == full
    assert assemble(problem, completion) == assemble(problem, completion, "full" if full else "body")


def test_the_other_format_is_warned_of() -> None:
    problems = [VERILOG] * 3
    assert format_warning(problems, [FULL, FULL, "assign y = a;"], "full") is None
    assert format_warning(problems, [FULL, FULL, "assign y = a;"], "auto") is None
    warning = format_warning(problems, [FULL, FULL, "assign y = a;"], "body")
    assert warning is not None and "2 of 3" in warning and "--completion_format full" in warning
    assert "body" in (format_warning([PYTHON], ["    return 1"], "full") or "")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("words", ["module a(\n", "module top_module\n", "module a;\n"])
def test_long_completions_are_read_in_one_pass(words: str) -> None:
    # Looking for the end of each module anew would take minutes.
    assert assemble(VERILOG, words * 50_000 + FULL).endswith("endmodule\n")


def test_comments_become_spaces_in_their_place() -> None:
    source = 'a /* x\ny */ b // c\n"// no" d'
    plain = without_comments(source)
    assert len(plain) == len(source) and plain.split() == ["a", "b", '"//', 'no"', "d"]
    assert without_comments(source, strings=True).split() == ["a", "b", "d"]
    for escaped in ('\\a" x \\b" ', "\\a// x", "\\a/* x \\b*/ "):
        assert without_comments(escaped, strings=True) == escaped


def test_what_python_wants_first_comes_first() -> None:
    full = '"""Area."""\nfrom __future__ import annotations\ndef area(r: Unknown):\n    return math.pi\n'
    for completion in (full, f"\ufeff{full}"):
        source = assemble(PYTHON, completion)
        names: dict[str, object] = {}
        exec(source, names)
        assert "helper" in names and source.startswith("from __future__ import annotations\n")


def test_an_indented_beginning_is_a_body() -> None:
    assert not is_full(PYTHON, "\n  # pi\n    return 1\n\ndef area(r):\n    return 2\n")
    assert is_full(PYTHON, "  # pi\ndef area(r):\n    return 2\n")
