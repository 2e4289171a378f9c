"""Whether a Verilog design does what its testbench's reference does, judged by Icarus Verilog.

The testbench and the design run in one simulation, so the design could meddle with the count of mismatches or print a
verdict of its own: the rule "strict" looks for both, in what the preprocessor leaves of the design.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Literal

from ibft.errors import HarnessError, InputError
from ibft.evaluate.assembly import module_name, without_comments
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_verdict import Verdict
from ibft.evaluate.sandbox import Limits, Outcome, Sandbox

Rule = Literal["strict", "v1"]
PROGRAMS = ("iverilog", "vvp")

# The first line says that the sandbox works: without it, nothing was judged.
_MARK = b"the sandbox works\n"
_SAY_SO = "echo the sandbox works\n"
_PREPROCESS = f"""{_SAY_SO}cat > design.sv
"$1" -E -g2012 -o plain.sv design.sv >&2 < /dev/null || exit 97
cat plain.sv"""
# The compiler's words go to stderr. stdout holds the ports of the design, as they were compiled, and after a mark what
# the simulation prints.
_PORTS = r"/^S_[^ ]* \.scope module, \"[^\"]*\" \"$3\" /,/^S_/{/^ *\.port_info/p;}"
_SIMULATION = b"the simulation begins\n"
_STRICT = f"""{_SAY_SO}cat > design.sv
"$1" -Wall -Wno-timescale -g2012 -s tb -o design.vvp design.sv >&2 < /dev/null || exit 97
sed -n "{_PORTS}" design.vvp
echo the simulation begins
exec "$2" -n design.vvp < /dev/null"""
# The same text without the testbench's hierarchy, in which a name that leads upwards leads nowhere.
_ALONE = f"""{_SAY_SO}cat > design.sv
exec "$1" -g2012 -s "$3" -t null design.sv >&2 < /dev/null"""
_V1 = f"""{_SAY_SO}cat > design.sv
"$1" -Wall -Winfloop -Wno-timescale -g2012 -s tb -o design.vvp design.sv < /dev/null
exec "$2" -n design.vvp < /dev/null"""
_COMPILER_FAILED = 97

# Of the system tasks, those that compute, print, or check times; another could end the simulation, touch a file, set a
# value or find a way to one. None of chance: a design that draws from the testbench's numbers chooses what is tested.
_BASE = "[bho]?"
_SUSPICIOUS_TASKS = re.compile(
    rf"""(?<![\w$])\$(?!(?:
    (?:display|write|strobe|monitor|swrite){_BASE} | monitor(?:on|off) | info|warning|error | sformatf? | sscanf
    | s?time|realtime|timeformat|printtimescale
    | (?:un)?signed|cast|bits|typename|itor|rtoi | (?:bitsto(?:short)?real|(?:short)?realtobits)
    | clog2|ln|log10|exp|sqrt|pow|floor|ceil|abs|min|max|hypot | a?(?:sin|cos|tan)h?|atan2
    | countones|countbits|onehot0?|isunknown | left|right|low|high|increment|size|(?:unpacked_)?dimensions
    | sampled|past|rose|fell|stable | setup|hold|setuphold|recovery|removal|recrem|skew|timeskew|fullskew
    | period|width|nochange
    )(?![\w$]))[\w$]*""",
    re.VERBOSE,
)
# What no design needs and a dishonest one does: values set from outside.
_SUSPICIOUS_WORDS = re.compile(r"(?<![\w$])(?:force|release|deassign|r?tran(?:if[01])?|alias|bind)(?![\w$])")
_STRENGTH = re.compile(r"\(\s*(?:supply|strong|pull|weak|highz)[01]\b")  # with it, a design wins over the testbench
# Of the directives that the preprocessor leaves, those that neither name anything nor swallow text.
_HARMLESS_DIRECTIVE = re.compile(
    r"`(?:timescale\s+\d+\s*\w*\s*/\s*\d+\s*\w*|default_nettype\s+\w+|(?:end)?celldefine|resetall"
    r"|unconnected_drive\s+\w+|nounconnected_drive|end_keywords)[ \t]*$",
    re.MULTILINE,
)
_LINE_DIRECTIVE = re.compile(r"^#line\b", re.MULTILINE)  # of the compiler's own; it swallows the line
# Numbers, after which a name can follow without a space: 1tb.x is a 1 and tb.x. Names are matched to be passed over.
_NUMBER = re.compile(
    r"""[a-zA-Z_$][\w$]*
    | (?P<number>'[sS]?(?:[dD][ \t]*(?:[0-9][0-9_]*|[xzXZ?]_*) | [bB][ \t]*[01xzXZ?][01xzXZ?_]*
        | [oO][ \t]*[0-7xzXZ?][0-7xzXZ?_]* | [hH][ \t]*[0-9a-fA-FxzXZ?][0-9a-fA-FxzXZ?_]*) | '[01xzXZ]
      | [0-9][0-9_]*(?:\.[0-9][0-9_]*)?(?:[eE][+-]?[0-9][0-9_]*)?)
      (?P<unit>[munpf]?s)?(?P<name>[\w$]*)""",
    re.VERBOSE,
)
# No design needs them, and they end a name for the compiler, or not, as for no one else.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
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
    if rule == "v1":
        outcome = _run(sandbox, _V1, f"{problem.test}\n{design}", limits)
        return (_stopped(outcome) or _v1(outcome))._replace(seconds=round(outcome.seconds, 3))
    return _judge_strictly(sandbox, problem, design, limits, samples)[0]


def reference(
    sandbox: Sandbox, problem: Problem, design: str, limits: Limits, *, rule: Rule = "strict"
) -> tuple[Verdict, int | None]:
    """The verdict on the canonical solution, and in how many samples it was compared if it passes."""
    if rule == "v1":
        return judge(sandbox, problem, design, limits, rule=rule), None
    return _judge_strictly(sandbox, problem, design, limits, None)


def _judge_strictly(
    sandbox: Sandbox, problem: Problem, design: str, limits: Limits, samples: int | None
) -> tuple[Verdict, int | None]:
    """The verdict, and in how many samples a passing design was compared."""
    design = _CONTROL.sub(" ", re.sub(r"\r\n?", "\n", design))  # a lone CR ends a comment for the compiler
    if _FENCE.search(design):
        return Verdict("compile_error", "a Markdown fence (```) is left in the design"), None
    if re.search(r"`\s*include\b", without_comments(design, strings=True)):
        return Verdict("suspicious", "it includes a file"), None
    outcome = _run(sandbox, _PREPROCESS, design, limits)
    seconds = outcome.seconds
    verdict = _stopped(outcome) or (_not_compiled(_said(outcome)) if outcome.exit_code else None)
    found = None
    if verdict is None:
        plain = outcome.stdout.decode(errors="replace")
        if (what := suspicious(problem, plain)) is not None:
            verdict = Verdict("suspicious", what)
        else:
            whole = f"{problem.test}\n{plain}"
            ports, outcome = _ports(_run(sandbox, _STRICT, whole, limits, module_name(problem)))
            seconds += outcome.seconds
            verdict = _stopped(outcome) or _strict(outcome, samples)
            if verdict.category == "passed" and (what := _other_ports(problem, ports)) is not None:
                verdict = Verdict("suspicious", what)
            if verdict.category == "passed":
                alone = _run(sandbox, _ALONE, whole, limits, module_name(problem))
                seconds += alone.seconds
                verdict = _stopped(alone) or _alone(alone)
            found = _mismatches(outcome.stdout.decode(errors="replace"))
    compared = found[1] if found is not None and verdict.category == "passed" else None
    return verdict._replace(seconds=round(seconds, 3)), compared


def _run(sandbox: Sandbox, script: str, source: str, limits: Limits, *more: str) -> Outcome:
    """HarnessError if the sandbox does not come as far as the script."""
    argv = ["sh", "-c", script, "judge", *programs(), *more]
    outcome = sandbox.run(argv, limits, stdin=source.encode(errors="replace"))
    if outcome.stdout.startswith(_MARK):
        return outcome._replace(stdout=outcome.stdout.removeprefix(_MARK))
    if outcome.stopped is None:
        raise HarnessError(
            f"The sandbox ({sandbox.tier}) failed with code {outcome.exit_code}: {_first_line(_said(outcome))}. "
            "What was judged before is kept; the same command goes on from there."
        )
    return outcome


def _said(outcome: Outcome) -> str:
    return outcome.stderr.decode(errors="replace")


def _mismatches(text: str) -> tuple[int, int] | None:
    """Mismatches and samples, if the text reports them exactly once and nothing else looks like a report."""
    found = _REPORT.findall(text)
    return (int(found[0][0]), int(found[0][1])) if len(found) == 1 and text.count("Mismatches") == 1 else None


def suspicious(problem: Problem, design: str) -> str | None:
    """What in a preprocessed design reaches beyond it: a system task, a name of the testbench; None: nothing."""
    if _LINE_DIRECTIVE.search(design):
        return "it uses #line"
    text = without_comments(design, strings=True)
    text = re.sub(r"\\([^ \t\b\f\r\n]+)", r" \1 ", text)  # an escaped identifier is the identifier
    text = _NUMBER.sub(_apart, text)
    if found := _SUSPICIOUS_TASKS.search(text) or _SUSPICIOUS_WORDS.search(text) or _STRENGTH.search(text):
        return f"it uses {found.group()}"
    if re.search(r"\binout\b", text) and "inout" not in problem.prompt:
        return "it has an inout port, and the problem has none"
    if found := re.search(r"`\s*\S*", _HARMLESS_DIRECTIVE.sub("", text)):
        return f"it uses {found.group()}, which the preprocessor leaves"
    modules, instances = _names_of_test(problem)
    if found := re.search(rf"(?<![\w$])(?:({modules})(?![\w$])|({instances})\s*(?:\[[^]]*\]\s*)?\.)", text):
        return f"it touches {found.group(1) or found.group(2)}, which is the testbench's"
    return None


def _apart(found: re.Match[str]) -> str:
    """A number and the name behind it, which begins before or after what may be a unit of time."""
    if found["number"] is None:
        return found.group()
    unit, name = found["unit"] or "", found["name"]
    return f"{found['number']} {unit}{name} {name if unit else ''}"


@functools.lru_cache(maxsize=1024)
def _names_of_test(problem: Problem) -> tuple[str, str]:
    """Patterns: the testbench's modules and its count, which no design names; instances, ways into it with a point."""
    text = without_comments(problem.test, strings=True)
    modules = set(re.findall(r"\bmodule\s+(\w+)", text))
    design = module_name(problem)
    named = re.findall(r"^\s*(\w+)\s+(?:#\s*\([^;]*?\)\s*)?(\w+)\s*(?:\[[^]]*\]\s*)?\(", text, re.MULTILINE)
    instances = {name for module, name in named if module in modules or module == design}
    modules = (modules | {"stats1"}) - {design}
    return "|".join(map(re.escape, sorted(modules))), "|".join(map(re.escape, sorted(instances))) or "(?!)"


def _ports(outcome: Outcome) -> tuple[dict[str, str], Outcome]:
    """The design's ports as the compiler has them, each with its direction; the outcome without them."""
    ports, mark, said = outcome.stdout.partition(_SIMULATION)
    if not mark:
        return {}, outcome
    found = re.findall(r'\.port_info \d+ /(\w+) [^"\n]*"([^"\n]+)"', ports.decode(errors="replace"))
    return {name: direction.lower() for direction, name in found}, outcome._replace(stdout=said)


def _other_ports(problem: Problem, ports: Mapping[str, str]) -> str | None:
    """What the ports of a design open to it that those of its problem do not; None: nothing."""
    text = without_comments(problem.prompt, strings=True)
    asked: dict[str, str] = {}
    direction = None
    for word in re.findall(r"[a-zA-Z_]\w*", text[text.find("module") :]):
        if word in ("input", "output", "inout"):
            direction = word
        elif direction is not None:
            asked.setdefault(word, direction)
    for name, direction in ports.items():
        if direction != "input" and asked.get(name) == "input":
            return f"its input {name} is an {direction}, through which it drives what the reference gets"
    added = [name for name in ports if name not in asked]
    if asked and added and ".*" in without_comments(problem.test, strings=True):
        return f"it has a port {added[0]} of its own, which the testbench may connect by its .*"
    return None


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
    if found := re.search(r"input port (\S+) is coerced to inout", error):
        return Verdict("suspicious", f"it drives its input {found.group(1)}")
    if outcome.exit_code != 0:
        return Verdict("runtime_error", f"the simulator ended with code {outcome.exit_code}: {_first_line(error)}")
    reported = _mismatches(text)
    if reported is None:
        if "Mismatches" in text:
            return Verdict(
                "suspicious", "the simulation reports mismatches more than once, or not on a line of its own"
            )
        return Verdict("runtime_error", "the simulation reports no number of mismatches")
    wrong, total = reported
    if wrong:
        return Verdict("wrong_output", f"{wrong} mismatches in {total} samples")
    if total == 0 or (samples is not None and total != samples):
        return Verdict("suspicious", f"the simulation ends after {total} samples, not {samples or 'one or more'}")
    return Verdict("passed")


def _alone(outcome: Outcome) -> Verdict:
    """The verdict on a design that passes, by whether it compiles on its own."""
    if outcome.exit_code == 0:
        return Verdict("passed")
    return Verdict("suspicious", f"it names what is the testbench's: {_not_compiled(_said(outcome)).detail}")


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
    errors = "\n".join(line for line in error.splitlines() if "error:" in line or "syntax error" in line)
    return Verdict("syntax_error" if "syntax error" in error else "compile_error", _first_line(errors or error))


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
