"""Tables of any record, from the record alone, and the pages that quote them.

A page has regions `<!-- report: FILE WHICH -->` to `<!-- end -->`, which `python -m benchmarks report` fills with the
section WHICH of the record FILE of benchmarks/results; without that record the region is empty.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import op_report
from benchmarks.measure import ROOT
from benchmarks.tables import warning, where

Record = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "performance.md")
PICTURES = ROOT / "docs" / "images"
_REGION = re.compile(r"(<!-- report: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: Path) -> Record:
    """A record. Raises OSError or ValueError for what is none."""
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or not {"command", "device"} <= record.keys():
        raise ValueError("it is JSON of something else")
    return record


def suite(record: Record) -> str:
    """Of which suite a record is; those before the field was there are told by what they hold."""
    if "suite" in record:
        return record["suite"]
    return "gpu" if "dry" in record else "padding" if "real_tokens" in record else "step"


def sections(record: Record) -> dict[str, Callable[[], str]]:
    """What can be told of a record, by name."""
    from benchmarks import gpu_report, gpu_step, padding, step, step_report

    found: dict[str, dict[str, Callable[[], str]]] = {
        "ops": {
            "machine": lambda: op_report.machine(record),
            "details": lambda: op_report.details(record),
            "memory": lambda: op_report.memory(record),
            "summary": lambda: op_report.summary(record),  # last, where a reader of a terminal looks first
        },
        "scaling": {
            "sweeps": lambda: op_report.sweeps(record),
            "crossovers": lambda: op_report.crossovers(record),
        },
        "step": {"table": lambda: step.table(record)},
        "step scaling": {"table": lambda: step_report.axes(record)},
        "padding": {"table": lambda: padding.table(record)},
        "gpu": {"table": lambda: gpu_report.report(record)},
        "gpu step": {"table": lambda: gpu_step.table(record)},
    }
    return found[suite(record)]


def tables(record: Record) -> str:
    """All of it, with where it was made."""
    lines = [] if suite(record) == "gpu" else [where(record), "", f"`{record['command']}`"]
    if warning(record):
        lines += ["", f"**{warning(record)}**"]
    for make in sections(record).values():
        lines += ["", make()]
    return "\n".join(lines).strip()


def filled(page: Path) -> str:
    """A page's text with its regions as the records are now. Raises ValueError for a section that there is not."""

    def fill(match: re.Match[str]) -> str:
        opening, file, which, closing = match.groups()
        if not (RESULTS / file).exists():
            return opening + closing
        record = read(RESULTS / file)
        if which == "where":
            text = f"{where(record)}\n\n```bash\n{record['command']}\n```"
        elif which == "pictures":
            drawn = sorted(PICTURES.glob(f"{Path(file).stem}.*.svg"))
            text = "\n".join(f"![{path.stem}]({os.path.relpath(path, page.parent)})" for path in drawn)
        elif which in sections(record):
            text = sections(record)[which]()
        else:
            raise ValueError(f"{page.name}: {file} has no section {which}; there are {', '.join(sections(record))}")
        return f"{opening}\n{text}\n\n{closing}"

    return _REGION.sub(fill, page.read_text())
