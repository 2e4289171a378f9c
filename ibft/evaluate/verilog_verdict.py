"""Whether a Verilog design does what its testbench's reference does, judged by Icarus Verilog.

The testbench and the design run in one simulation, so the design could meddle with the count of mismatches or print a
verdict of its own: the rule "strict" looks for both.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from typing import Literal

from ibft.errors import InputError
from ibft.evaluate.assembly import module_name, without_comments
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_verdict import Verdict
from ibft.evaluate.sandbox import Limits, Outcome, Sandbox

Rule = Literal["strict", "v1"]
PROGRAMS = ("iverilog", "vvp")

# The compiler's words go to stderr, so that stdout is the simulation's alone.
_STRICT = """cat > design.sv
"$1" -g2012 -s tb -o design.vvp design.sv >&2 < /dev/null || exit 97
exec "$2" -n design.vvp < /dev/null"""
_V1 = """cat > design.sv
"$1" -Wall -Winfloop -Wno-timescale -g2012 -s tb -o design.vvp design.sv < /dev/null
exec "$2" -n design.vvp < /dev/null"""
_COMPILER_FAILED = 97

# What no design needs and a dishonest one does: ending the simulation, files, and values set from outside.
_SUSPICIOUS_TASKS = re.compile(
    r"\$(finish|stop|exit|fatal|system|fopen|fclose|fwrite|fdisplay|fstrobe|fmonitor|fflush|fscanf|fread|fgets|fgetc"
    r"|fseek|rewind|ungetc|readmem|writemem|dump|sreadmem|deposit|force|release|root|value\$plusargs|test\$plusargs"
    r"|incsave|save|restart|reset|input|log|nolog|key|nokey|scope|showscopes|list)\w*"
)
_REPORT = re.compile(r"^Mismatches: (\d+) in (\d+) samples$", re.MULTILINE)


def judge(
    sandbox: Sandbox,
    problem: Problem,
    design: str,
    limits: Limits,
    *,
    rule: Rule = "strict",
    samples: int | None = None,
) -> Verdict:
    """Compiles and simulates a design with its problem's testbench.

    "strict": passed with exactly one line of mismatches, which reports none in `samples` samples (those that the
    canonical solution yields; None: in at least one). "v1": the original rule of VerilogEval 1, by which anything on
    stderr fails and the first line of mismatches counts; for comparison with published numbers, as it can be fooled.
    """
    if rule == "strict" and (found := suspicious(problem, design)) is not None:
        return Verdict("suspicious", found)
    outcome = _simulate(sandbox, problem, design, limits, rule)
    verdict = _stopped(outcome) or (_strict(outcome, samples) if rule == "strict" else _v1(outcome))
    return verdict._replace(seconds=round(outcome.seconds, 3))


def reference(
    sandbox: Sandbox, problem: Problem, design: str, limits: Limits, *, rule: Rule = "strict"
) -> tuple[Verdict, int | None]:
    """The verdict on the canonical solution, and in how many samples it was compared if it passes."""
    outcome = _simulate(sandbox, problem, design, limits, rule)
    verdict = _stopped(outcome) or (_strict(outcome, None) if rule == "strict" else _v1(outcome))
    found = _mismatches(outcome.stdout.decode(errors="replace"))
    samples = found[1] if found is not None and verdict.category == "passed" else None
    return verdict._replace(seconds=round(outcome.seconds, 3)), samples


def _simulate(sandbox: Sandbox, problem: Problem, design: str, limits: Limits, rule: Rule) -> Outcome:
    source = f"{problem.test}\n{design}".encode(errors="replace")
    script = _STRICT if rule == "strict" else _V1
    return sandbox.run(["sh", "-c", script, "judge", *programs()], limits, stdin=source)


def _mismatches(text: str) -> tuple[int, int] | None:
    """Mismatches and samples, if the text reports them exactly once and nothing else looks like a report."""
    found = _REPORT.findall(text)
    return (int(found[0][0]), int(found[0][1])) if len(found) == 1 and text.count("Mismatches") == 1 else None


def suspicious(problem: Problem, design: str) -> str | None:
    """What in a design reaches beyond it: a system task, or a name of the testbench; None if there is nothing."""
    text = without_comments(design, strings=True)
    text = re.sub(r"\\(\S+)", r" \1 ", text)  # an escaped identifier is the identifier
    if found := _SUSPICIOUS_TASKS.search(text):
        return f"it uses {found.group()}"
    if "``" in text:
        return "it pastes names together in a macro"
    if found := re.search(r"`\s*include\b", text):
        return "it includes a file"
    names = "|".join(map(re.escape, sorted(_names_of_test(problem))))
    if names and (found := re.search(rf"(?<![\w$`])({names})(?![\w$])", text)):
        return f"it touches {found.group(1)}, which is the testbench's"
    return None


@functools.lru_cache(maxsize=1024)
def _names_of_test(problem: Problem) -> frozenset[str]:
    """Modules and instances of the testbench, through which a design could reach into it."""
    text = without_comments(problem.test, strings=True)
    modules = set(re.findall(r"\bmodule\s+(\w+)", text))
    design = module_name(problem)
    instances = re.findall(r"^\s*(\w+)\s+(?:#\s*\([^;]*?\)\s*)?(\w+)\s*\(", text, re.MULTILINE)
    named = {name for module, name in instances if module in modules or module == design}
    return frozenset((modules | named | {"stats1"}) - {design})


def _stopped(outcome: Outcome) -> Verdict | None:
    if outcome.stopped == "processes":
        return Verdict("runtime_error", "it started too many processes")
    if outcome.stopped is not None:
        return Verdict(outcome.stopped)
    error = outcome.stderr.decode(errors="replace")
    if outcome.exit_code and re.search(r"bad_alloc|out of memory|Cannot allocate memory|memory exhausted", error):
        return Verdict("memory", "out of memory")
    if outcome.exit_code and "CPU time limit exceeded" in error:
        return Verdict("timeout")
    if outcome.exit_code == 128 + 25 or "File too large" in error:
        return Verdict("output_limit", "a file grew too large")
    return None


def _strict(outcome: Outcome, samples: int | None) -> Verdict:
    text, error = (part.decode(errors="replace") for part in (outcome.stdout, outcome.stderr))
    if outcome.exit_code == _COMPILER_FAILED:
        return _not_compiled(error)
    if outcome.exit_code != 0:
        return Verdict("runtime_error", f"the simulator ended with code {outcome.exit_code}: {_first_line(error)}")
    found = _mismatches(text)
    if found is None:
        if "Mismatches" in text:
            return Verdict(
                "suspicious", "the simulation reports mismatches more than once, or not on a line of its own"
            )
        return Verdict("runtime_error", "the simulation reports no number of mismatches")
    wrong, total = found
    if wrong:
        return Verdict("wrong_output", f"{wrong} mismatches in {total} samples")
    if total == 0 or (samples is not None and total != samples):
        return Verdict("suspicious", f"the simulation ends after {total} samples, not {samples or 'one or more'}")
    return Verdict("passed")


def _v1(outcome: Outcome) -> Verdict:
    text, error = (part.decode(errors="replace") for part in (outcome.stdout, outcome.stderr))
    if error:
        return _not_compiled(error)
    found = re.search(r"Mismatches: ([0-9]*) in ([0-9]*) samples", text)
    if found is None:
        return Verdict("runtime_error", "the simulation reports no number of mismatches")
    wrong, total = found.groups()
    return Verdict("passed") if int(wrong) == 0 else Verdict("wrong_output", f"{wrong} mismatches in {total} samples")


def _not_compiled(error: str) -> Verdict:
    return Verdict("syntax_error" if "syntax error" in error else "compile_error", _first_line(error))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]


@functools.cache
def programs() -> tuple[str, str]:
    """The paths of iverilog and vvp; InputError if they are not installed."""
    found = [shutil.which(name) for name in PROGRAMS]
    if found[0] is None or found[1] is None:
        missing = [name for name, path in zip(PROGRAMS, found, strict=True) if path is None]
        raise InputError(
            f"{' and '.join(missing)} cannot be found; install Icarus Verilog (apt-get install iverilog, or "
            "brew install icarus-verilog), which judges Verilog."
        )
    return found[0], found[1]


@functools.cache
def versions() -> dict[str, str]:
    """Of the tools that a verdict depends on."""
    told = subprocess.run([programs()[1], "-V"], capture_output=True, text=True)
    said = told.stdout + told.stderr
    found = re.search(r"version (\S+)", said)
    return {"iverilog": found.group(1) if found else _first_line(said)}
