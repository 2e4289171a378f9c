"""Verdicts on Verilog: the rules, and what a design may not touch."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ibft.errors import HarnessError
from ibft.evaluate import verilog_verdict
from ibft.evaluate.problems import Problem, load_problems
from ibft.evaluate.sandbox import Limits, Outcome, Sandbox, choose_sandbox
from ibft.evaluate.verilog_verdict import _strict, _v1, judge, reference, suspicious

LIMITS = Limits(wall_seconds=30, cpu_seconds=10)


def ended(stdout: str, stderr: str = "", exit_code: int = 0) -> Outcome:
    return Outcome(exit_code, None, stdout.encode(), stderr.encode(), 0.1)


NONE, SOME = "Hint: Total mismatched samples is 0\nMismatches: 0 in 20 samples\n", "Mismatches: 3 in 20 samples\n"


@pytest.mark.parametrize(
    ("outcome", "category"),
    [
        (ended(NONE), "passed"),
        (ended(NONE, "warning: something"), "passed"),
        (ended(SOME), "wrong_output"),
        (ended("Mismatches: 0 in 19 samples\n"), "suspicious"),
        (ended("Mismatches: 0 in 0 samples\n"), "suspicious"),
        (ended(NONE + NONE), "suspicious"),
        (ended(NONE + SOME), "suspicious"),
        (ended(NONE + "x" + SOME), "suspicious"),
        (ended(NONE + "Mismatches\n"), "suspicious"),
        (ended(" " + SOME.replace("3", "0")), "suspicious"),
        (ended("Mismatches: 0 in 20 samples!\n"), "suspicious"),
        (ended("nothing\n"), "runtime_error"),
        (ended(NONE, "design.sv:1: warning: input port a is coerced to inout."), "suspicious"),
        (ended(NONE, exit_code=1), "runtime_error"),
        (ended(NONE, exit_code=139), "runtime_error"),
        (ended("", "design.sv:3: syntax error", 97), "syntax_error"),
        (ended("", "design.sv:3: error: no such module", 97), "compile_error"),
    ],
)
def test_the_strict_rule(outcome: Outcome, category: str) -> None:
    assert _strict(outcome, 20).category == category


@pytest.mark.parametrize(
    ("outcome", "category"),
    [
        (ended(NONE), "passed"),
        (ended(NONE + SOME), "passed"),
        (ended("x" + NONE, exit_code=1), "passed"),
        (ended(SOME), "wrong_output"),
        (ended(NONE, "warning: something"), "compile_error"),
        (ended(NONE, "syntax error"), "syntax_error"),
        (ended("nothing"), "runtime_error"),
    ],
)
def test_the_original_rule(outcome: Outcome, category: str) -> None:
    assert _v1(outcome).category == category


BENCH = (
    "module reference_module(input a);\nendmodule\nmodule tb();\n  reference_module good1 (.a(1));\n"
    "  top_module top_module1 (.a(1));\nendmodule\n"
)
PROBLEM = Problem("p", "verilog", "module top_module(input a);\n", "endmodule", BENCH)


@pytest.mark.parametrize(
    "design",
    [
        *(
            "reference_module r(a);",
            "assign x = tb.y;",
            "assign x = \\tb .y;",
            "assign x = good1.y;",
            "x = top_module1.y;",
        ),
        *(
            "initial $finish;",
            "initial $finish(0);",
            "initial $stop;",
            "initial $fopen(f);",
            "$dumpfile(f);",
            "$readmemh(f);",
        ),
        *("`include <x>", "` include <x>", "`define x(a) b", "`pragma x", "initial stats1 = 0;", "/* */ $finish"),
        *('wire \\a" ; initial $finish; wire \\b" ;', "wire \\a/* ; assign x = good1.y; wire \\b*/ ;"),
        *("x = good1[0].y;", "x = good1 [0] . y;", "#line 1 /*"),
        # a name behind a number
        *(
            "#1tb.x = 0;",
            "#1.5e3tb.x = 0;",
            "if (4'b1force) x;",
            "x = 'hf_?1:'h0|good1.y;",
            "#1ns$finish;",
            "#1stb.x = 0;",
        ),
        *("#1stats1 = 0;", "x = 8'd1_good1.y;", "'1release x;"),
        *("x = $random;", "x = $urandom_range(3);", "$sdf_annotate(f);", "$vpi_call;", "$displays(x);"),
    ],
)
def test_what_reaches_beyond_a_design_is_suspicious(design: str) -> None:
    assert suspicious(PROBLEM, design) is not None


@pytest.mark.parametrize(
    "design",
    [
        *(
            "// $finish tb.x",
            "/* reference_module */",
            '$display("tb.x $finish");',
            "wire tbx, a_tb; reg finish, stop;",
        ),
        *(
            "initial $display(a);",
            "`timescale 1ns / 1ps // a\n`default_nettype none",
            "assign y = $signed(a) + $clog2(8);",
            "sub tb1 (.a(a));",
            "wire stim1, good1;",
            "real r; initial r = $log10(10.0);",
            "supply0 gnd;",
        ),
        "wire a$finish, in$force; assign y = a$finish;",
        "#10ns x = 16'hdead + 8'b1x_z + 3'o7 + 4'sd3 + '1 + 1_000 + 1.5e-3; #1 y = 2*tbx;",
        "initial begin $write(x); $monitor(y); $displayh($countones(a), $bits(b)); $error(x); end",
    ],
)
def test_ordinary_designs_are_not(design: str) -> None:
    assert suspicious(PROBLEM, design) is None


def test_canonical_solutions_are_not_suspicious(test_data: Callable[[str], Path]) -> None:
    for name in ("human", "machine"):
        for problem in load_problems(f"verilogeval-{name}", test_data("verilogeval_v1")):
            assert suspicious(problem, problem.prompt + problem.canonical_solution) is None, problem.task_id


def test_a_real_testbench_tells_right_from_wrong(
    sandbox: Sandbox, iverilog: None, test_data: Callable[[str], Path]
) -> None:
    problems = {p.task_id: p for p in load_problems("verilogeval-human", test_data("verilogeval_v1"))}
    gates = problems["gatesv"]
    right = f"{gates.prompt}\n{gates.canonical_solution}"
    verdict, samples = reference(sandbox, gates, right, LIMITS)
    assert verdict.category == "passed" and samples is not None and samples > 100
    for rule in ("strict", "v1"):
        assert judge(sandbox, gates, right, LIMITS, rule=rule, samples=samples).category == "passed"
        wrong = judge(sandbox, gates, right.replace("in[2:0] &", "in[2:0] |"), LIMITS, rule=rule, samples=samples)
        assert wrong.category == "wrong_output" and re.search(rf"mismatches in {samples}", wrong.detail)
    assert judge(sandbox, gates, right, LIMITS, samples=samples + 1).category == "suspicious"
    # A warning of the compiler's: only the original rule asks for them, and fails a design for them.
    warned = right.replace("endmodule", "\twire [1:0] x; sub s(.a(in)); \nendmodule\nmodule sub(input a); endmodule")
    assert judge(sandbox, gates, warned, LIMITS, rule="strict", samples=samples).category == "passed"
    assert judge(sandbox, gates, warned, LIMITS, rule="v1", samples=samples).category == "compile_error"


GOOD = "assign y = a & b;\nendmodule\n"
AND_BENCH = """module tb();
  reg a = 0, b = 0; wire y;
  top_module top_module1 (.a, .b, .y);
  initial begin #1 a = 1; b = 1; #1 if (y === 1) $display("Mismatches: 0 in 1 samples"); end
endmodule
"""
AND = Problem("and", "verilog", "module top_module(input a, input b, output y);\n", GOOD, AND_BENCH)


@pytest.mark.parametrize(
    ("design", "category"),
    [
        (f"{AND.prompt}{GOOD}", "passed"),
        (f"// a\r{AND.prompt}{GOOD}".replace("\n", "\r\n"), "passed"),
        (f"`define B b\n`timescale 1ns/1ns\n{AND.prompt}{GOOD.replace('& b', '& `B')}", "passed"),
        (f"```verilog\n{AND.prompt}{GOOD}```\n", "compile_error"),
    ],
)
def test_designs_are_judged_as_the_compiler_reads_them(
    sandbox: Sandbox, iverilog: None, design: str, category: str
) -> None:
    verdict = judge(sandbox, AND, design, LIMITS, samples=1)
    assert verdict.category == category and ("fence" in verdict.detail) == ("```" in design)


PORTS = """Problem:
module top_module #(parameter N = 2) (input [N-1:0] a, input wire b, c, output reg [3:0] y, z, inout bus);
"""


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        ({"a": "input", "b": "input", "c": "input", "y": "output", "z": "output", "bus": "inout"}, None),
        ({"c": "output"}, "its input c is an output"),
        ({"b": "inout"}, "its input b is an inout"),
        ({"y": "input", "more": "input"}, None),
        ({}, None),
    ],
)
def test_ports_are_compared_with_those_of_the_problem(ports: dict[str, str], said: str | None) -> None:
    found = verilog_verdict._other_ports(replace(PROBLEM, prompt=PORTS), ports)
    assert found is said is None or (said is not None and said in (found or ""))
    split = "module top_module(a, b, c, y, z, bus); input [1:0] a; input b, c; output [3:0] y, z; inout bus;"
    assert verilog_verdict._other_ports(replace(PROBLEM, prompt=split), ports) == found
    assert verilog_verdict._other_ports(replace(PROBLEM, prompt="Write a module."), ports) is None


def test_a_port_more_matters_where_the_testbench_connects_all() -> None:
    connecting = replace(PROBLEM, prompt=PORTS, test=BENCH.replace("(.a(1));\nend", "(.a(1), .*);\nend"))
    assert "port more" in (verilog_verdict._other_ports(connecting, {"a": "input", "more": "input"}) or "")
    assert verilog_verdict._other_ports(connecting, {"a": "input", "y": "output"}) is None


def test_the_compiler_tells_the_ports(sandbox: Sandbox, iverilog: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(verilog_verdict, "_other_ports", lambda problem, ports: seen.append(ports))
    design = "module top_module(b, y, a);\n input a, b;\n output [0:0] y;\n sub s(a);\n" + GOOD + SUB
    assert judge(sandbox, AND, design, LIMITS, samples=1).category == "passed"
    assert seen == [{"a": "input", "b": "input", "y": "output"}]


SUB = "module sub(input other);\nendmodule\n"
SHARED = "typedef logic [0:0] bit_t;\n" + AND_BENCH.replace(
    "initial begin", "task show(input x); $display(x); endtask\n  initial begin"
)


@pytest.mark.parametrize(
    ("design", "category"),
    [
        (f"{AND.prompt}bit_t x;\n{GOOD}", "passed"),  # what stands above the testbench's modules is for all
        (f"{AND.prompt}wire show = a;\n{GOOD}", "passed"),
        (f"{AND.prompt}task show; endtask\ninitial show;\n{GOOD}", "passed"),
        (f"{AND.prompt}initial show(a);\n{GOOD}", "suspicious"),
    ],
)
def test_a_design_compiles_without_the_testbench(sandbox: Sandbox, iverilog: None, design: str, category: str) -> None:
    verdict = judge(sandbox, replace(AND, test=SHARED), design, LIMITS, samples=1)
    assert verdict.category == category, verdict
    assert category == "passed" or "show" in verdict.detail


def test_a_sandbox_that_fails_is_no_verdict_on_the_design(
    sandbox: Sandbox, iverilog: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = ended("", "bwrap: Creating new namespace failed: No space left on device", 1)
    monkeypatch.setattr(Sandbox, "run", lambda *args, **options: failed)
    for rule in ("strict", "v1"):
        with pytest.raises(HarnessError, match="namespace failed"):
            judge(sandbox, AND, f"{AND.prompt}{GOOD}", LIMITS, rule=rule)
        with pytest.raises(HarnessError):
            reference(sandbox, AND, f"{AND.prompt}{GOOD}", LIMITS, rule=rule)


def test_versions_name_the_simulator(iverilog: None) -> None:
    assert re.fullmatch(r"\d+\.\d+", verilog_verdict.versions()["iverilog"])


def test_a_sandbox_can_read_the_tools(iverilog: None, sandbox: Sandbox) -> None:
    from ibft.evaluate.sandbox import readable_folders

    own = choose_sandbox(readable=readable_folders(*verilog_verdict.programs()))
    assert own.run([verilog_verdict.programs()[1], "-V"], LIMITS).exit_code == 0
