"""`ibft eval`: generate, run, report, doctor, compare, or all of the first three at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ibft.errors import InputError, Interrupted
from ibft.evaluate.config import DoctorFlags, EvalFlags, GenerateFlags, PlotFlags, ReportFlags, RunFlags, SandboxFlags
from ibft.evaluate.extraction import Extraction
from ibft.evaluate.plot import plot
from ibft.evaluate.problems import TASKS, Problem, load_problems
from ibft.evaluate.samples import Sample, by_temperature, read_samples
from ibft.figure import check_figure
from ibft.flags import did_you_mean, parse_flags

if TYPE_CHECKING:
    from ibft.evaluate.sandbox import Limits

_USAGE = f"""usage: ibft eval TASK --model M [--adapter A] [options]
       ibft eval COMMAND [options]

The first does all of it: samples from the model, their execution in a sandbox, the report.

tasks:
  {", ".join(TASKS)}, or a file of JSON lines

commands:
  generate   samples of a model for a task's problems (ibft eval generate --help)
  run        execute samples, from a file of task_id and completion (ibft eval run --help)
  report     Pass@k and Pass@k^(m) of what was run, with intervals (ibft eval report --help)
  compare    two runs: how far apart, how sure, who wins where (ibft eval compare --help)
  doctor     whether sandbox and tools work here, and every canonical solution passes (ibft eval doctor --help)"""


def main(argv: Sequence[str]) -> None:
    """Runs a command of `ibft eval`. InputError for whatever cannot be used."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return
    try:
        _dispatch(argv[0], argv[1:])
    except KeyboardInterrupt as interrupt:
        raise Interrupted("interrupted; the same command goes on where it stopped.", signal.SIGINT) from interrupt


def _dispatch(command: str, rest: Sequence[str]) -> None:
    if command in _COMMANDS:
        _COMMANDS[command](rest)
    elif command.startswith("-"):
        raise InputError(f"`ibft eval` takes a task or a command first, not {command}. `ibft eval --help` lists them.")
    elif command in TASKS or Path(command).expanduser().is_file():
        _evaluate(command, rest)
    else:
        raise InputError(
            f"{command!r} is not a command of `ibft eval`, a task, nor a file; there are {', '.join(_COMMANDS)}, and "
            f"the tasks {', '.join(TASKS)}.{did_you_mean(command, [*_COMMANDS, *TASKS])}"
        )


def _generate(argv: Sequence[str]) -> None:
    config = parse_flags(GenerateFlags, argv, "ibft eval generate", "Samples of a model for a task's problems.")
    from ibft.evaluate.generate import generate_samples

    print(f"samples in {generate_samples(config, load_problems(config.task, config.data, config.split))}")


def _run(argv: Sequence[str]) -> None:
    config = parse_flags(
        RunFlags, argv, "ibft eval run", "Execute samples in a sandbox, and judge each by its problem's tests."
    )
    problems = load_problems(config.task, config.data, config.split)
    samples = read_samples(config.samples, problems, Extraction() if config.extract_again else None)
    _judge(config, problems, samples, Path(config.samples))


def _evaluate(task: str, argv: Sequence[str]) -> None:
    description = "All at once: samples of a model, their execution in a sandbox, the report."
    config = parse_flags(EvalFlags, ["--task", task, *argv], f"ibft eval {task}", description)
    problems = load_problems(config.task, config.data, config.split)
    from ibft.evaluate.generate import generate_samples

    file = generate_samples(config, problems)
    print(f"samples in {file}", file=sys.stderr)
    first = {problem.task_id for problem in problems[: config.limit]}
    asked = [  # the file may hold more, from other commands
        sample
        for sample in read_samples(file, problems)
        if sample.task_id in first and sample.temperature in config.temperature and sample.sample < config.num_samples
    ]
    _judge(config, problems[: config.limit], asked, file)


def _judge(config: RunFlags | EvalFlags, problems: Sequence[Problem], samples: Sequence[Sample], file: Path) -> None:
    """Judges samples and prints the report, for each temperature in a folder of its own if there are several."""
    from ibft.evaluate.execute import run_samples
    from ibft.evaluate.judge import Settings
    from ibft.evaluate.report import load_results, markdown, report

    settings = Settings(
        completion_format=config.completion_format,
        header=config.header,
        rule=config.rule,
        subset=config.subset,
        limits=_limits(config),
        workers=config.workers,
        allow_unsafe=config.allow_unsafe,
    )
    record = {"task": config.task, "data": config.data, "split": config.split, "samples": str(file)}
    groups = by_temperature(samples)
    pages = []
    for temperature, group in groups.items():
        folder = Path(config.output) / (f"temperature-{temperature}" if len(groups) > 1 else "")
        with tqdm(total=len(group), desc="Judging", unit="sample", disable=not sys.stderr.isatty()) as bar:
            run_samples(
                problems,
                group,
                folder,
                settings,
                record={**record, "temperature": temperature},
                progress=partial(_advance, bar),
            )
        pages.append(markdown(report(load_results(folder))))
        (folder / "report.md").write_text(pages[-1], encoding="utf-8")
    print("\n".join(pages), end="")
    print(f"results in {config.output}", file=sys.stderr)


def _advance(bar: Any, done: int, total: int, category: str) -> None:
    bar.update(done - bar.n)


def _limits(config: SandboxFlags) -> Limits:
    from ibft.evaluate.sandbox import Limits

    return Limits(wall_seconds=config.wall_seconds, cpu_seconds=config.cpu_seconds, memory_mib=config.memory_mib)


def _doctor(argv: Sequence[str]) -> None:
    tasks: list[str] = []
    description = "Whether sandbox and tools work on this machine, and every canonical solution passes in them."
    config = parse_flags(DoctorFlags, argv, "ibft eval doctor", description, words=("[TASK...]", tasks))
    from ibft.evaluate.doctor import examine
    from ibft.evaluate.judge import Settings
    from ibft.evaluate.problems import tasks_in

    if not tasks and config.data is not None:
        tasks = tasks_in(config.data)
    settings = Settings(limits=_limits(config), workers=config.workers, allow_unsafe=config.allow_unsafe)
    found: dict[str, Any] = {}
    failures = []
    for task in tasks or [""]:
        try:
            problems = [] if not task else load_problems(task, config.data if task in TASKS else None)
            diagnosis = examine(problems, settings)
        except InputError as error:  # the other tasks may do without what this one lacks
            failures.append(f"{task}: {error}" if task else str(error))
            continue
        found[task or "machine"] = diagnosis.to_dict()
        if not config.json:
            print("\n".join([*([task] if task else []), *(f"  {line}" for line in diagnosis.lines())]), flush=True)
    if config.json:
        print(json.dumps(found, indent=2))
    if failures:
        raise InputError(" ".join(failures))
    if not tasks:
        print("note: --data names a folder whose tasks' canonical solutions are checked, too.", file=sys.stderr)


def _report(argv: Sequence[str]) -> None:
    named: list[str] = []
    description = "Pass@k and Pass@k^(m) of what `ibft eval run` left in each folder, with bootstrap intervals."
    config = parse_flags(PlotFlags, argv, "ibft eval report", description, words=("DIR...", named))
    if not named:
        raise InputError("`ibft eval report` takes the folders of results to report on: ibft eval report DIR.")
    from ibft.evaluate.report import folders, load_results, markdown, report

    if config.plot is not None:
        check_figure(Path(config.plot), "--plot")
    found = [folder for name in named for folder in folders(Path(name).expanduser())]
    reports = [
        report(load_results(folder, name), config.ks, seed=config.seed)
        for folder, name in zip(found, _short_names(found), strict=True)
    ]
    if config.plot is not None:
        plot(reports, Path(config.plot))
        print(f"plot in {config.plot}", file=sys.stderr)
    if config.json:
        print(json.dumps(reports[0] if len(reports) == 1 else {"runs": reports}, indent=2))
    else:
        print("\n".join(markdown(each) for each in reports), end="")


def _compare(argv: Sequence[str]) -> None:
    named: list[str] = []
    description = "How far run B is from run A on the same problems, how sure that is, and who wins where."
    config = parse_flags(ReportFlags, argv, "ibft eval compare", description, words=("A B", named))
    if len(named) != 2:
        raise InputError(f"`ibft eval compare` takes two folders of results, not {len(named)}: ibft eval compare A B.")
    from ibft.evaluate.compare import compare, markdown
    from ibft.evaluate.report import folders, load_results

    found = []
    for name in named:
        inner = folders(Path(name).expanduser())
        if len(inner) > 1:
            raise InputError(f"{name!r} holds several temperatures; name one: {', '.join(map(str, inner))}.")
        found += inner
    a, b = (load_results(folder, name) for folder, name in zip(found, _short_names(found), strict=True))
    values = compare(a, b, config.ks, seed=config.seed)
    print(json.dumps(values, indent=2) if config.json else markdown(values), end="\n" if config.json else "")


def _short_names(found: Sequence[Path]) -> list[str]:
    """What tells folders apart: their paths below the folder that holds them all."""
    paths = [folder.resolve() for folder in found]
    if len(set(paths)) == 1:
        return [path.name for path in paths]
    shared = Path(os.path.commonpath(paths))
    return [str(path.relative_to(shared)) if path != shared else path.name for path in paths]


_COMMANDS = {"generate": _generate, "run": _run, "report": _report, "compare": _compare, "doctor": _doctor}
