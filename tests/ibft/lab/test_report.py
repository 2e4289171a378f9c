"""The lab's report: its numbers are those of results.json, and it needs nothing else."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab_results import ARMS, FEW, GRID, TASKS, Page, found, results, written
from scipy import stats

from ibft.cli import main
from ibft.errors import InputError
from ibft.lab import report
from ibft.lab.report import write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three seeds and two regimes."""
    folder = tmp_path_factory.mktemp("lab")
    shares = {"sft": 0.2, "sft-reference": 0.6, "ib-0.1-1": 0.4, "ib-1-1": 0.1}
    written(folder, results(shares, regimes=("mixed", "strong")))
    write_report(folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take nearly all of the time, for tests of their words."""
    monkeypatch.setattr(report, "draw", lambda *_: [])


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<script|<iframe|<link|\bdata:", text)
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    page = Page(text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    figures = sorted((folder / "figures").glob("*.svg"))
    assert page.tags.count("svg") == len(figures) > 10
    drawn = (
        "barrier",
        "arms",
        "terms",
        "grid",
        "collapse",
        "options",
        "layers",
        "densities",
        "representation",
        "curves",
    )
    for section in (*drawn, "pass"):
        assert section in page.ids and any(figure.name.startswith(section) for figure in figures), section


def test_every_figure_is_a_file_of_its_own(folder: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    for figure in (folder / "figures").glob("*.svg"):
        text = figure.read_text()
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "Regime mixed" in text or "Regime strong" in text  # text stays text: selectable, and read aloud
        assert not re.search(r"<image|<script|metadata", text)


def test_numbers_are_those_of_the_results(folder: Path) -> None:
    values = json.loads((folder / "results.json").read_text())
    page = Page((folder / "report.html").read_text())
    cells = {row[0]: row for row in page.rows if len(row) == 3}  # the main table: an arm, two regimes
    summary = (folder / "summary.md").read_text()
    for each in values["arms"]:
        for column, regime in enumerate(("mixed", "strong"), 1):
            runs = [row for row in values["runs"] if (row["arm"], row["regime"]) == (each["name"], regime)]
            mean = np.mean([np.mean(row["held_out"]["correct_greedy"]) for row in runs])
            assert cells[each["title"]][column].startswith(f"{100 * mean:.1f} (")
        assert f"| {' | '.join(cells[each['title']])} |" in summary
    text = "".join(page.text)
    for row in values["runs"]:
        assert row["file"] in text
    metric = np.mean([row["held_out"]["metrics"]["pass@5^(3)"] for row in values["runs"] if row["arm"] == "sft"])
    everything = [row for row in page.rows if row[0] == "SFT" and row[1] == "96.0%"]  # of each regime
    assert len(everything) == 2 and all(f"{100 * metric:.1f}" in row for row in everything)
    assert "0.910 (0.885 to 0.935)" in text  # the AUCs 0.90, 0.91, 0.92: 0.91 +- 4.303 * 0.01 / sqrt(3)


def test_arms_that_leave_rows_out_say_how_many(tmp_path: Path, undrawn: None) -> None:
    values = results()
    for row in values["runs"]:
        if row["arm"] == "sft-filtered":
            row.update(trained_rows=75, trained_memorised_rows=3 * row["seed"], epochs=60)
    _, sections, _ = found(tmp_path, values)
    assert any("FILTERED (75 rows, 0 to 6 of them memorised, 60 epochs)" in each for each in sections["arms"])
    write_report(tmp_path)
    rows = Page((tmp_path / "report.html").read_text()).rows
    (row,) = (row for row in rows if row[0] == "SFT-FILTERED" and len(row) > 10)
    assert row[-4:] == ["75", "0–6", "60", "3"]


def test_shared_runs_are_said_to_be_shared(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    values = results(regimes=("one", "two", "none"), seeds=(0, 1), arms=FEW)
    for row in values["runs"]:
        if row["arm"] == "sft-reference" and row["regime"] != "none":
            row["shared"] = "none"
    write_report(written(tmp_path, values))
    text = "".join(Page((tmp_path / "report.html").read_text()).text)
    assert "From the reference base, one, two and none list the same runs" in text
    for row in values["runs"]:
        row.pop("shared", None)
    request.getfixturevalue("undrawn")
    write_report(written(tmp_path, values))
    assert "list the same runs" not in (tmp_path / "report.html").read_text()


def test_separations_on_the_page_stay_within_their_range(tmp_path: Path, undrawn: None) -> None:
    values = results()
    for row in values["separations"]:
        row["auc"], row["ks"] = [(1.0, 1.0), (0.6, 0.2), (1.0, 1.0)][row["seed"]]
    write_report(written(tmp_path, values))
    (row,) = (row for row in Page((tmp_path / "report.html").read_text()).rows if len(row) == 6 and row[-1] == "3")
    assert re.fullmatch(r"0\.867 \(0\.\d+ to 1\.000\)", row[3]) and row[4] == "0.733 (0.000 to 1.000)"


def test_one_seed_is_warned_of_and_has_intervals_over_tasks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = written(tmp_path / "one", results({"sft": 0.2, "ib-published": 0.5}, seeds=(0,), arms=FEW))
    printed = write_report(folder)
    text = "".join(Page((folder / "report.html").read_text()).text)
    for shown in (printed.replace("\n  ", " "), text, (folder / "summary.md").read_text()):
        assert "Everything here is of one seed" in shown
    expected = stats.binomtest(20, TASKS).proportion_ci(method="wilson")
    assert f"20.0 ({100 * expected.low:.1f}–{100 * expected.high:.1f})" in text
    assert "of 1 seeds" not in text and "nan" not in text
    request.getfixturevalue("undrawn")
    three = written(tmp_path / "three", results(arms=FEW))
    assert "one seed" not in write_report(three)


def test_seeds_of_the_trials_are_warned_of(tmp_path: Path, undrawn: None) -> None:
    chosen = {"chosen": {"arm": "ib-published", "seeds": [0, 1, 2]}}
    for seeds, expected in (
        ((1, 2, 3), "chosen in trials on seeds 0, 1 and 2, and seeds 1 and 2 are some of those"),
        ((2, 3), "chosen in trials on seeds 0, 1 and 2, and seed 2 is one of those"),
        ((3, 4), None),
    ):
        folder = written(tmp_path, {**results(arms=FEW, seeds=seeds), **chosen})
        printed = " ".join(write_report(folder).split())
        text = "".join(Page((folder / "report.html").read_text()).text)
        for shown in (printed, text, (folder / "summary.md").read_text()):
            assert (expected or "flatters") in shown if expected else "flatters" not in shown


def test_a_part_of_the_experiment_is_said_to_be_one(tmp_path: Path, undrawn: None) -> None:
    printed = write_report(written(tmp_path, {**results(arms=FEW), "pieces": {"planned": 284, "done": 95}}))
    for shown in (
        " ".join(printed.split()),
        (tmp_path / "report.html").read_text(),
        (tmp_path / "summary.md").read_text(),
    ):
        assert "95 of the 284 pieces" in shown


def without(values: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in parts}


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    full = results(seeds=(0,), arms=[*FEW, *(each for each in ARMS if each["name"] == "ib-0.1-1")])
    optional = ("memorization", "separations", "representation", "bases", "config", "tasks", "versions", "device")
    bare = copy.deepcopy(without(full, *optional, "processor_seconds", "command", "mode", "seeds"))
    for row in bare["runs"]:
        for part in ("curve", "kinds", "processor_seconds", "file"):
            del row[part]
        row["held_out"] = {"correct_greedy": row["held_out"]["correct_greedy"]}
    only_sft = {**bare, "runs": [row for row in bare["runs"] if row["arm"] == "sft"]}
    no_sft = {**full, "runs": [row for row in full["runs"] if row["arm"] == "ib-published"]}
    no_grid = {**full, "runs": [row for row in full["runs"] if row["arm"] not in GRID]}
    nulls = copy.deepcopy(full)
    for row in nulls["runs"]:
        for record in row["curve"]:
            record["active_share"] = None
    for name, values in {"bare": bare, "sft": only_sft, "no sft": no_sft, "no grid": no_grid, "nulls": nulls}.items():
        folder = written(tmp_path / name, values)
        assert "arm" in write_report(folder)
        text = (folder / "report.html").read_text()
        Page(text)
        assert "None" not in text and "nan" not in text, name


def test_text_of_the_results_is_only_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"q\" $\\alpha$"
    values = results(seeds=(0, 1), arms=copy.deepcopy(FEW))
    values["regimes"][0]["title"] = values["arms"][2]["title"] = values["command"] = values["device"] = evil
    values["tasks"]["example"] = {"name": evil, "description": evil, "program": evil}
    for row in values["runs"]:
        row["file"] = evil
    folder = written(tmp_path, values)
    write_report(folder)
    page = Page((folder / "report.html").read_text())
    assert "script" not in page.tags
    assert "".join(page.text).count(evil) > 10


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    folder = written(tmp_path, results(seeds=(0, 1)))
    (folder / "figures").mkdir()
    (folder / "figures" / "of-other-results.svg").write_text("<svg/>")
    (folder / "runs.txt").write_text("kept")
    write_report(folder)
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not (folder / "figures" / "of-other-results.svg").exists() and (folder / "runs.txt").exists()
    write_report(folder)
    assert first == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_wrong_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no results\.json; name the --output_dir of `ibft lab`"):
        write_report(tmp_path / "nothing")
    good = results(seeds=(0,))
    unknown, twice = copy.deepcopy(good), copy.deepcopy(good)
    unknown["runs"][0]["arm"] = "sftt"
    twice["runs"].append(twice["runs"][0])
    for values, message in (
        ([], "is not what `ibft lab` writes"),
        (without(good, "arms"), "is not what `ibft lab` writes \\(KeyError: 'arms'\\)"),
        (unknown, "a run of regime 'mixed' and arm 'sftt', which the file does not name"),
        (twice, "two runs of regime 'mixed', arm 'sft' and seed 0"),
        ({**good, "runs": []}, "holds no run, so there is nothing to report"),
    ):
        folder = written(tmp_path / "wrong", values)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            write_report(folder)
        assert [path.name for path in folder.iterdir()] == ["results.json"]
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json cannot be read"):
        write_report(folder)


@pytest.mark.parametrize("library", ["matplotlib", "scipy"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    found_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found_spec(name))
    folder = written(tmp_path, results(seeds=(0,)))
    with pytest.raises(InputError, match=f'the report needs {library}, .*pip install "ibft\\[plot\\]"'):
        write_report(folder)
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "lab", results(seeds=(0,), arms=FEW))
    assert main(["lab", "report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "IB-FT ib-published" in printed and "Everything here is of one seed" in printed
    assert (folder / "report.html").exists()
    assert main(["lab", "report", str(tmp_path / "other")]) == 2
    assert "holds no results.json" in capsys.readouterr().err
