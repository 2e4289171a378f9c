"""`ibft lab report`: from results.json to a page, its figures, a summary and a table for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ibft.errors import InputError
from ibft.lab.figures import Panel, check_plotting, draw
from ibft.lab.report_conclusions import of_regime
from ibft.lab.report_data import Lab, load
from ibft.lab.report_findings import Findings, find
from ibft.lab.report_page import page
from ibft.lab.report_short import caveats, in_short
from ibft.lab.report_tables import Table, held_out

PAGE_NAME, SUMMARY_NAME, FIGURES_NAME = "report.html", "summary.md", "figures"


def write_report(folder: Path) -> str:
    """Writes report.html, summary.md and figures/*.svg into `folder`, from its results.json alone.

    The same results give the same bytes. Returns the table and the conclusions for a terminal. InputError where there
    are no results of `ibft lab`, or the libraries that draw are missing; nothing is written then.
    """
    check_plotting()
    lab = load(folder)
    all_found = [find(lab, regime) for regime in lab.regimes]
    panels = draw(lab, all_found)
    text = page(lab, all_found, panels)
    try:
        _write(folder, panels, text, summary(lab, all_found))
    except OSError as error:
        raise InputError(f"the report cannot be written to {folder}: {error.strerror or error}.") from error
    return terminal(lab, all_found)


def _write(folder: Path, panels: Sequence[Panel], text: str, markdown: str) -> None:
    figures = folder / FIGURES_NAME
    figures.mkdir(exist_ok=True)
    for old in figures.glob("*.svg"):  # of other results, maybe
        old.unlink()
    for panel in panels:
        (figures / f"{panel.name}.svg").write_text(panel.svg, encoding="utf-8")
    (folder / PAGE_NAME).write_text(text, encoding="utf-8")
    (folder / SUMMARY_NAME).write_text(markdown, encoding="utf-8")


def summary(lab: Lab, all_found: Sequence[Findings]) -> str:
    """The conclusions and the main table as Markdown, fit for a section of a README."""
    table = held_out(lab, all_found)
    lines = [f"- {sentence}" for sentence in in_short(lab, all_found)]
    for caveat in caveats(lab, all_found):
        lines += ["", f"**{caveat.title}** {caveat.text}"]
    lines += ["", table.caption, "", _markdown_row(table.columns), _markdown_row(["---"] * len(table.columns))]
    lines += [_markdown_row(row) for row in table.rows]
    for found in all_found:
        lines += ["", f"**{found.regime.title}**", ""]
        said = of_regime(lab, found)
        lines += [f"- {sentence}" for section in said.values() for sentence in section]
    lines += ["", f"Made by `{lab.raw.get('command', 'ibft lab')}`; `ibft lab report FOLDER` makes it again."]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def terminal(lab: Lab, all_found: Sequence[Findings]) -> str:
    """The main table in columns, and the conclusions below it."""
    table = held_out(lab, all_found)
    lines = [*textwrap.wrap(table.caption, 100), "", *_columns(table), ""]
    for sentence in [*in_short(lab, all_found), *(caveat.text for caveat in caveats(lab, all_found))]:
        lines += textwrap.wrap(sentence, 100, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def _columns(table: Table) -> list[str]:
    cells = [list(table.columns), *map(list, table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
