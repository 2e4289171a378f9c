"""From what models write to code: bodies, whole programs, answers in Markdown, and what runs on behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ibft.evaluate.extraction import Extraction
from ibft.evaluate.problems import Problem, load_problems

PYTHON = Problem("p", "python", 'def f(x):\n    """Doc."""\n', "", entry_point="f")
LISTED = Problem("l", "python", '"""\nWrite f.\n"""\n', "", tests=("assert f()",))
VERILOG = Problem("v", "verilog", "module top_module(input a, output y);\n", "")
BODY = "    if x:\n        return 1\n\n    # not the end\n    return 2\n"
WHOLE = "import os\n\n\ndef helper():\n    pass\n\n\ndef f(x):\n    return helper()\n"


@pytest.mark.parametrize(
    ("problem", "raw", "code"),
    [
        # A body runs on into other code.
        (PYTHON, BODY, BODY),
        (PYTHON, BODY + "\ndef g():\n    pass\n", BODY),
        (PYTHON, BODY + "\nclass A:\n    pass\n", BODY),
        (PYTHON, BODY + "\n# Test\nf(1)", BODY),
        (PYTHON, BODY + "\n@cache\ndef g(): pass", BODY),
        (PYTHON, BODY + "\nif __name__ == '__main__':\n    f()", BODY),
        (PYTHON, BODY + "\nassert f(1)\ndef g(): pass", BODY),
        # A whole program keeps its other functions.
        (PYTHON, WHOLE, WHOLE),
        (PYTHON, WHOLE + "\nprint(f(1))", WHOLE),
        (PYTHON, "f = lambda x: x\nprint(f)", "f = lambda x: x"),
        (LISTED, WHOLE + "\nassert f(1)\n", WHOLE),
        # Markdown.
        (PYTHON, f"Sure:\n\n```python\n{WHOLE}```\nIt works.", WHOLE),
        (PYTHON, f"```\n{WHOLE}```", WHOLE),
        (LISTED, f"Answer\n```\n{WHOLE}```", WHOLE),  # a word is a program, too
        (PYTHON, f"```python\n{BODY}```\n", BODY),
        (PYTHON, f"Use:\n```bash\npip install x\n```\nthen\n```python\n{WHOLE}\n```", WHOLE + "\n"),
        (PYTHON, f"```py\n{WHOLE}", WHOLE),  # ended by its length
        (PYTHON, f"  ```python\n{WHOLE}  ```", WHOLE),
        (PYTHON, f"~~~python\n{WHOLE}~~~", WHOLE),
        # The prompt ended inside a block, and the answer closes it.
        (PYTHON, f"{BODY}```\n\nThis returns `1`.", BODY),
        (PYTHON, f"{BODY}```\nTry it:\n```python\nf(1)\n```", BODY),
        (LISTED, f"{WHOLE}```", WHOLE),
        (VERILOG, "  assign y = a;\nendmodule\n```\ndone", "  assign y = a;\nendmodule\n"),
        # Thoughts before the answer.
        (PYTHON, f"<think>\n```python\ndef f(x): wrong\n```\n</think>\n```python\n{WHOLE}```", WHOLE),
        # Verilog: a body ends with the first endmodule, modules with the last.
        (VERILOG, "  assign y = a;\nendmodule\n\nmodule tb; endmodule", "  assign y = a;\nendmodule\n"),
        (VERILOG, "module x; endmodule\nmodule top_module; endmodule // end\ntext", None),
        (VERILOG, "  assign y = a;\n", "  assign y = a;\n"),
        (VERILOG, "```verilog\nmodule top_module; endmodule\n```", "module top_module; endmodule\n"),
        (VERILOG, "wire endmodule_x;\nendmodule", "wire endmodule_x;\nendmodule\n"),
        # Nothing.
        (PYTHON, "", ""),
        (PYTHON, "```python\n```", ""),
    ],
)
def test_extraction(problem: Problem, raw: str, code: str | None) -> None:
    expected = "module x; endmodule\nmodule top_module; endmodule\n" if code is None else code
    assert Extraction()(raw, problem).rstrip() == expected.rstrip()
    assert Extraction()(raw, problem)[: len(expected.rstrip())] == expected.rstrip()


def test_stop_sequences_of_the_users_own() -> None:
    assert Extraction(("\n\n\n",))(BODY + "\n\nrest", PYTHON) == BODY[:-1]
    assert Extraction(("xyz",))(BODY + "\ndef g(): pass", PYTHON) == BODY + "\ndef g(): pass"
    assert Extraction(("xyz",))(f"```\n{WHOLE} xyz\n```", PYTHON) == f"{WHOLE} xyz\n"  # a block is taken as it stands


@pytest.mark.parametrize("task", ["humaneval/HumanEval.jsonl.gz", "verilogeval_v1/VerilogEval_Machine.jsonl"])
def test_no_canonical_solution_is_harmed(task: str, test_data: Callable[[str], Path]) -> None:
    """As a body that runs on, as a whole program, in a block, and both with words around."""
    name = "humaneval" if task.startswith("humaneval") else "verilogeval-machine"
    extract = Extraction()
    for problem in load_problems(name, test_data(task)):
        body = problem.canonical_solution.rstrip()
        after = "\n\n\ndef other():\n    pass\n" if problem.language == "python" else "\n\nmodule other; endmodule\n"
        whole = problem.prompt + body
        assert extract(body + after, problem).rstrip() == body
        assert extract(whole, problem).rstrip() == whole
        assert extract(f"Here it is:\n\n```{problem.language}\n{whole}\n```\nDone.\n", problem) == whole + "\n"
        assert extract(f"{body}\n```\nDone.\n", problem).rstrip() == body
