"""`python -m benchmarks report` and `python -m benchmarks compare OLD NEW`: what records say."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, report
from benchmarks.plots import draw

_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


def main(argv: Sequence[str] | None = None) -> int:
    """1 where something became worse or a page is out of date, 2 for what cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").strip())
    commands = parser.add_subparsers(dest="command", required=True)
    reporting = commands.add_parser(
        "report", help="tables and pictures from records alone; without FILE, the pages that quote benchmarks/results"
    )
    reporting.add_argument("files", metavar="FILE", type=Path, nargs="*", help="print the tables of these records")
    reporting.add_argument("--plots", metavar="DIR", type=Path, help="also draw them, in DIR")
    reporting.add_argument("--format", choices=("svg", "png"), default="svg", help="of the pictures (default: svg)")
    reporting.add_argument("--check", action="store_true", help="change no page, fail where one is out of date")
    comparing = commands.add_parser("compare", help="what became slower or larger beyond noise between two records")
    comparing.add_argument("old", metavar="OLD", type=Path)
    comparing.add_argument("new", metavar="NEW", type=Path)
    comparing.add_argument("--all", action="store_true", help="also list what stayed the same")
    options = parser.parse_args(argv)
    if options.command == "compare":
        return compare_files(options.old, options.new, options.all)
    if not options.files:
        return update_pages(options.check)
    for file in options.files:
        if (printed := _of(file, lambda record: report.tables(record))) is None:
            return 2
        print(printed, end="\n\n")
        if options.plots is not None and not _draw(file, options.plots, options.format):
            return 2
    return 0


def compare_files(old_file: Path, new_file: Path, everything: bool) -> int:
    """Prints what changed, and what else is different about the two."""
    records = [_of(file, lambda record: (record, list(compare.groups(record)))) for file in (old_file, new_file)]
    if records[0] is None or records[1] is None:
        return 2
    (old, _), (new, _) = records
    if report.suite(old) != report.suite(new):
        print(f"{old_file} is of {report.suite(old)}, {new_file} of {report.suite(new)}", file=sys.stderr)
        return 2
    changes = compare.compare(old, new)
    if not changes:
        print(f"{old_file} and {new_file} have nothing in common to compare", file=sys.stderr)
        return 2
    print(compare.report(changes, everything))
    print(*(f"Different: {difference}." for difference in compare.differences(old, new)), sep="\n")
    return int(any(change.verdict == "worse" and change.variant.startswith("ib") for change in changes))


def update_pages(check: bool) -> int:
    """Draws the pictures of all records and fills the pages' regions; with `check`, says which page is out of date."""
    stale = []
    for file in sorted(report.RESULTS.glob("*.json")):
        if not check and not _draw(file, report.PICTURES, "svg"):
            return 2
    for page in report.PAGES:
        try:
            text = report.filled(page)
        except _ERRORS as error:
            print(f"{page.name}: {error}", file=sys.stderr)
            return 2
        if text != page.read_text():
            stale.append(f"{page.parent.name}/{page.name}")
            if not check:
                page.write_text(text)
    print(*(f"{name} {'is out of date' if check else 'written'}" for name in stale), sep="\n")
    return int(check and bool(stale))


def _of(file: Path, what: Any) -> Any:
    """what(the record of a file); None, with the reason on stderr, where it is no record."""
    try:
        return what(report.read(file))
    except _ERRORS as error:
        print(f"{file} is not a record of benchmarks ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def _draw(file: Path, folder: Path, kind: str) -> bool:
    try:
        for path in draw(report.read(file), file.stem, folder, kind):
            print(path)
    except ModuleNotFoundError as error:
        print(f'the plots need {error.name}: pip install "ibft[bench]"', file=sys.stderr)
        return False
    except OSError as error:
        print(f"the plots cannot be written to {folder}: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
