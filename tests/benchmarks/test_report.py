"""Tables, pictures and pages come from the records alone, and every figure on a page is one of a record."""

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.cost import BACKWARD, BOTH, FORWARD
from benchmarks.measure import ratio
from benchmarks.op_report import details, memory, share, summary
from benchmarks.plots import draw

ROOT = Path(__file__).parents[2]
RECORDS = sorted(report.RESULTS.glob("*.json"))
Record = dict[str, Any]


def case_of(ours: float, passes: str = BOTH) -> Record:
    """Of a machine of 100 GFLOP/s and 10 GB/s: an op of 50 GFLOP and 1 GB, 0.5 s at least; eager PyTorch takes 2 s."""
    others = {"eager": [2.0] * 5, "torch.compile": [1.0] * 5, "floor: products": [0.6] * 5, "floor: copy": [0.1] * 5}
    return {
        "op": "linear CE", "dtype": "float32", "passes": passes,
        "size": {"tokens": 512, "hidden": 1024, "bottleneck": 128, "rank": 32, "vocabulary": 32000},
        "cost": {"flops": 50e9, "bytes": 1e9, "peaks": {"ibkernels": 32 * 2**20}},
        "relative_error": {"eager": 1e-7, "ibkernels": 2e-7}, "peak_bytes": {"eager": 2**28, "ibkernels": 2**25},
        "left_out": {"Liger": "needs a GPU"}, "seconds": {"ibkernels": [ours] * 5, **others},
        "probes": {"flops": 1e9, "bytes": 1e8, "seconds": {"product": [0.01] * 5, "copy": [0.01] * 5}},
    }  # fmt: skip


def record_of(ours: float) -> Record:
    cases = {f"linear CE, float32: {passes}": case_of(ours, passes) for passes in (FORWARD, BACKWARD, BOTH)}
    return {
        "suite": "ops", "command": "make bench", "date": "today", "commit": "0123456789abcdef", "size": "full",
        "device": {"cpu": "a CPU", "cores": 2, "threads": 2, "load_average": [0.5, 0.5, 0.5]},
        "versions": {"torch": "2.13"}, "cases": cases,
    }  # fmt: skip


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_summary_says_what_bounds_an_op_and_who_is_fastest() -> None:
    for ours, shown, reached, fastest in (
        (0.625, "625", "80%", "ibkernels"),
        (1.01, "1,010", "50%", "either"),
        (1.25, "1,250", "40%", "torch.compile"),
    ):
        (row,) = cells(summary(record_of(ours)))[2:]
        assert row[:5] == ["linear CE, float32: forward + backward", "products", "500", shown, reached]
        assert row[6].startswith(f"{ours / 2:.2f} (") and row[7].endswith(" torch.compile") and row[8] == "0.12"
        assert row[9] == fastest


def test_the_share_of_the_limit_is_taken_round_by_round() -> None:
    case = case_of(1.0)
    slow = [0.01, 0.02, 0.04, 0.02, 0.01]  # the machine, and with it ours
    case["probes"]["seconds"]["product"] = slow
    case["seconds"]["ibkernels"] = [100 * second for second in slow]
    assert share(case, "ibkernels") == pytest.approx(0.5)


def test_details_have_every_variant_and_every_reason() -> None:
    text = details(record_of(0.625))
    rows = {row[0]: row for row in cells(text) if len(row) > 5}
    assert {"ibkernels", "eager", "torch.compile", "floor: products", "floor: copy"} <= rows.keys()
    assert rows["ibkernels"][1:4] == ["625", "625", "625"] and rows["ibkernels"][5] == "80%"
    assert rows["ibkernels"][6:9] == ["80", "1.6", "32"] and rows["ibkernels"][9:] == ["2e-07", "2e-07"]
    assert "- Not measured: Liger (needs a GPU)." in text and "N=512, H=1024, K=128, R=32, V=32000." in text


def test_memory_stands_beside_the_prediction() -> None:
    rows = cells(memory(record_of(0.625)))
    assert ["linear CE, float32: forward + backward", "ibkernels", "32", "32", "1.00"] in rows


def test_a_record_without_ours_or_without_eager_has_tables_too() -> None:
    for name in ("ibkernels", "eager"):
        record = record_of(0.625)
        for case in record["cases"].values():
            del case["seconds"][name], case["peak_bytes"][name]
        assert "torch.compile" in details(record) and report.tables(record)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_published_records_have_tables_and_pictures(path: Path, tmp_path: Path) -> None:
    record = report.read(path)
    assert record["command"] in report.tables(record)
    assert str(ROOT) not in path.read_text()
    assert draw(record, path.stem, tmp_path)


def test_pages_quote_the_records_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", "--check"]) == 0, capsys.readouterr().out
    for page in report.PAGES:
        for picture in _pictures(page):
            assert picture.exists(), f"{page.name} shows {picture}"


def _pictures(page: Path) -> list[Path]:
    lines = page.read_text().splitlines()
    return [page.parent / line.split("](")[1].rstrip(")") for line in lines if line.startswith("![")]


def test_a_page_is_filled_from_the_results_and_empty_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text("before\n<!-- report: ops.json summary -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "PAGES", (page,))
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "PICTURES", tmp_path / "images")
    assert command.main(["report", "--check"]) == 1 and "page.md is out of date" in capsys.readouterr().out
    assert command.main(["report"]) == 0
    assert page.read_text() == "before\n<!-- report: ops.json summary -->\n<!-- end -->\nafter\n"
    results.mkdir()
    (results / "ops.json").write_text(json.dumps(record_of(0.625)))
    assert command.main(["report"]) == 0 and command.main(["report", "--check"]) == 0
    assert summary(record_of(0.625)) in page.read_text() and list((tmp_path / "images").glob("ops.*.svg"))
    page.write_text("<!-- report: ops.json colours -->\n<!-- end -->\n")
    capsys.readouterr()
    assert command.main(["report"]) == 2 and "has no section colours; there are machine" in capsys.readouterr().err


def test_a_record_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(record_of(0.625)))
    assert command.main(["report", str(file), "--plots", str(tmp_path / "png"), "--format", "png"]) == 0
    printed = capsys.readouterr().out
    assert "a CPU, 2 cores, 2 threads, load average 0.5" in printed and "commit 0123456789ab" in printed
    assert {path.name for path in (tmp_path / "png").iterdir()} == {"mine.limits.png", "mine.linear-ce-float32.png"}
    assert command.main(["report", str(file), "--plots", str(file)]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        draw(record_of(0.625), "ops", tmp_path / folder)
    one, two = (sorted((tmp_path / folder).iterdir()) for folder in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two] and len(one) == 2
    assert "80%" in one[0].read_text() + one[1].read_text()
    shutil.rmtree(tmp_path / "one")


def test_step_tables_are_of_the_samples() -> None:
    record = report.read(report.RESULTS / "step.json")
    rows = {row[0]: row for row in cells(report.sections(record)["table"]())}
    median = statistics.median(record["seconds"]["eager-ib K=64"])
    assert rows["eager-ib K=64"][1] == f"{median:.2f}" and rows["eager-ib K=64"][3] == f"{2048 / median:,.0f}"
    assert rows["eager-sft"][4] == "1.00 (1.00-1.00)"


@pytest.mark.parametrize("page", ["README.md", "docs/scaling.md"])
def test_what_a_step_costs_is_what_its_record_says(page: str) -> None:
    seconds = json.loads((report.RESULTS / "step.json").read_text())["seconds"]
    text = " ".join((ROOT / page).read_text().split())
    quoted = re.search(r"took (1\.\d+) \(([^)]*)\) and (1\.\d+) times \(([^)]*)\)", text)
    assert quoted is not None
    for width, (median, interval) in zip((64, 256), (quoted.group(1, 2), quoted.group(3, 4)), strict=True):
        found = ratio(seconds[f"ibft-ib K={width}"], seconds["ibft-sft"])
        assert median == f"{found.median:.2f}"
        assert interval.endswith(f"{found.low:.2f} to {found.high:.2f}")
