"""From results on disk to one object, a page, a comparison and a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibft.cli import main
from ibft.errors import InputError
from ibft.evaluate import compare, plot, report
from ibft.evaluate.metrics import Count
from ibft.evaluate.report import Results, load_results

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A folder of results: for each problem the samples that passed, as "110": two passed, one failed."""

    def make(folder: str, outcomes: dict[str, str], **run: Any) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True)
        rows = [
            {
                "task_id": task_id,
                "sample": sample,
                "category": "passed" if mark == "1" else "wrong_output",
                "passed": mark == "1",
                "detail": "",
                "seconds": 0.1,
                "key": "k",
            }
            for task_id, marks in outcomes.items()
            for sample, mark in enumerate(marks)
        ]
        (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "task": "humaneval",
            "completion_format": "body",
            "header": "dataset",
            "rule": "strict",
            "sandbox_tier": "bubblewrap",
            "tools": {"python": "3.11"},
            "limits": {"wall_seconds": 10},
            "problems": list(outcomes),
            "samples_per_problem": {task_id: len(marks) for task_id, marks in outcomes.items()},
            "warnings": [],
            "subset": False,
        }
        (path / "run.json").write_text(json.dumps({**values, **run}))
        return path

    return make


def test_the_object(write: Write) -> None:
    folder = write("a", {"p": "11000", "q": "11111", "r": "00000"})
    found = report.report(load_results(folder))
    assert list(found["metrics"]) == ["pass@1", "pass@5", *(f"pass@5^({m})" for m in range(2, 6))]
    assert found["metrics"]["pass@1"] == pytest.approx(7 / 15)
    assert found["metrics"]["pass@5"] == pytest.approx(2 / 3)
    assert found["metrics"]["pass@5^(2)"] == pytest.approx(2 / 3)  # all five are drawn
    assert found["metrics"]["pass@5^(3)"] == pytest.approx(1 / 3)
    assert found["intervals"].keys() == found["metrics"].keys()
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= found["metrics"][name] <= high <= 1
    assert (found["problems"], found["samples"], found["samples_per_problem"]) == (3, 15, 5)
    assert found["categories"] == {"wrong_output": 8, "passed": 7}
    assert found["name"] == "a" and found["task"] == "humaneval" and found["sandbox_tier"] == "bubblewrap"
    json.dumps(found, allow_nan=False)


def test_ten_samples_give_every_m(write: Write) -> None:
    names = report.report(load_results(write("a", {"p": "1" * 10})))["metrics"]
    assert len(names) == 1 + 5 + 10 and names["pass@10^(10)"] == 1


def test_missing_samples_have_failed_unless_it_is_a_subset(write: Write) -> None:
    outcomes = {"p": "11", "q": "1", "r": ""}
    whole = report.report(load_results(write("whole", outcomes)))
    assert whole["metrics"] == {"pass@1": pytest.approx((1 + 1 / 2 + 0) / 3)}
    assert whole["categories"] == {"passed": 3, "missing": 3} and whole["samples"] == 6
    assert whole["warnings"] == ["3 samples are not there and count as failed, of 2 problems: q, r."]
    subset = report.report(load_results(write("subset", outcomes, subset=True)))
    assert subset["metrics"] == {"pass@1": 1.0} and subset["problems"] == 2
    assert subset["categories"] == {"passed": 3} and subset["warnings"] == []


def test_a_k_that_the_samples_do_not_allow(write: Write) -> None:
    results = load_results(write("a", {"p": "110", "q": "100"}))
    assert list(report.report(results, [2, 3])["metrics"])[-1] == "pass@3^(3)"
    with pytest.raises(InputError, match="Pass@5 needs at least 5 samples of each problem, and there are 3"):
        report.report(results, [5])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[:-1], "is not finished: 3 of 4 samples are judged"),
        (lambda rows: [], "is not finished: 0 of 4"),
        (lambda rows: [*rows, rows[0]], "line 5: sample 0 of 'p' is not one of the run, or comes twice"),
        (lambda rows: [{**rows[0], "sample": [0]}, *rows], r"line 1: \[0\] \(list\) is no sample of 'p'"),
        (lambda rows: [{**rows[0], "task_id": {}}, *rows], "is no sample of {}"),
        (lambda rows: [{**rows[0], "task_id": "z"}, *rows], "sample 0 of 'z' is not one of the run"),
        (lambda rows: [{**rows[0], "category": "harness_error"}, *rows[1:]], "the harness failed"),
        (lambda rows: [{"task_id": "p", "sample": 0}, *rows], "line 1 has no 'category'"),
    ],
)
def test_results_that_are_not_whole(write: Write, change: Any, sentence: str) -> None:
    folder = write("a", {"p": "10", "q": "01"})
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(InputError, match=sentence):
        load_results(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"problems": [], "samples_per_problem": {}, "subset": false}'])
def test_a_run_file_that_is_none(write: Write, content: str) -> None:
    folder = write("a", {"p": "10"})
    (folder / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json is not what `ibft eval run` writes"):
        load_results(folder)


def shell(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["eval", *command.split()])
    out, err = capsys.readouterr()
    return code, out, err


class TestReportCommand:
    def test_one_object_and_nothing_else(self, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
        folder = write("a", {"p": "11000", "q": "11111"})
        for command in (f"report {folder} --json", f"report --json {folder}"):
            code, out, err = shell(command, capsys)
            found = json.loads(out)
            assert code == 0 and err == "" and set(found) >= {"metrics", "intervals"}
            assert found == report.report(load_results(folder))

    def test_the_page(self, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
        folder = write(
            "a", {"p": "11000", "q": "11111"}, warnings=["these look like whole modules."], tools={"bwrap": "1"}
        )
        code, out, _ = shell(f"report {folder}", capsys)
        assert code == 0 and out.startswith("# humaneval: a\n")
        assert "| pass@1 | 0.7000 | 0.4000 to 1.0000 |" in out
        assert "| passed | 7 | 70.0% |" in out and "**Warning**: these look like whole modules." in out
        assert "completion format body, header dataset" in out and "bwrap 1" in out

    def test_temperatures_and_several_folders(
        self, write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for model, temperature in itertools.product(("sft", "ib"), ("1.0", "0.2")):
            write(f"{model}/temperature-{temperature}", {"p": "10", "q": "11"})
        _, out, _ = shell(f"report {tmp_path}/sft {tmp_path}/ib --json", capsys)
        assert [each["name"] for each in json.loads(out)["runs"]] == [
            "sft/temperature-0.2",
            "sft/temperature-1.0",
            "ib/temperature-0.2",
            "ib/temperature-1.0",
        ]
        _, out, _ = shell(f"report {tmp_path}/sft/temperature-0.2 --json", capsys)
        assert json.loads(out)["name"] == "temperature-0.2"

    def test_ks(self, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
        folder = write("a", {"p": "110"})
        _, out, _ = shell(f"report {folder} --json --k 3 2", capsys)
        assert list(json.loads(out)["metrics"]) == ["pass@2", "pass@2^(2)", "pass@3", "pass@3^(2)", "pass@3^(3)"]

    def test_the_plot(self, write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        write("sft", {"p": "1100000000", "q": "1111100000"})
        write("ib", {"p": "1111100000", "q": "1111111100"})
        code, out, err = shell(f"report {tmp_path}/sft {tmp_path}/ib --json --plot {tmp_path}/p.png", capsys)
        assert code == 0 and len(json.loads(out)["runs"]) == 2 and "plot in" in err
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("command", "sentence"),
        [
            ("report", "takes the folders of results to report on"),
            ("report {here}/none", "is not a folder; name the --output of `ibft eval run`"),
            ("report {here}", "holds no run.json, so no results"),
            ("report {here}/a --k 0", "--k takes whole numbers of at least 1, not 0"),
            ("report {here}/a --k 2.5", "not 2.5"),
            ("report {here}/a --k 5", "Pass@5 needs at least 5 samples of each problem, and there are 2"),
            ("report {here}/a --plot x.jpeg", "ends in .png, .svg or .pdf, not 'x.jpeg'"),
            ("report {here}/a --jsn", "--jsn is not an option of `ibft eval report"),
            ("compare {here}/a", "takes two folders of results, not 1"),
            ("compare {here}/a {here}/b {here}/a", "takes two folders of results, not 3"),
            ("compare {here}/a {here}/hot", "holds several temperatures; name one: "),
            ("compare {here}/a {here}/other", "only one task compares"),
        ],
    )
    def test_what_is_refused(
        self, command: str, sentence: str, write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        write("a", {"p": "10"})
        write("other", {"p": "10"}, task="mbpp")
        for temperature in ("0.2", "1.0"):
            write(f"hot/temperature-{temperature}", {"p": "10"})
        code, out, err = shell(command.format(here=tmp_path), capsys)
        assert code == 2 and out == "" and "Traceback" not in err
        assert err.startswith("ibft: error") and sentence in err


class TestCompare:
    def test_against_resampling_by_hand(self) -> None:
        generator = np.random.default_rng(5)
        totals = {f"p{index}": generator.binomial(10, rate, 2) for index, rate in enumerate(generator.random(60))}
        a, b = (
            Results(name, {"task": "t"}, {task_id: Count(10, int(c[side])) for task_id, c in totals.items()})
            for side, name in enumerate("ab")
        )
        found = compare.compare(a, b)
        difference = np.array([(c[1] - c[0]) / 10 for c in totals.values()])
        row = found["metrics"]["pass@1"]
        assert row["difference"] == pytest.approx(difference.mean())
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        draws = difference[generator.integers(0, 60, (20_000, 60))].mean(1)
        assert row["interval"] == pytest.approx(list(np.quantile(draws, [0.025, 0.975])), abs=0.005)
        ahead = (draws > 1e-9).mean() + (abs(draws) <= 1e-9).mean() / 2
        assert row["b_ahead"] == pytest.approx(ahead, abs=0.02)
        assert set(found["wins"]["b"]) == {task_id for task_id, c in totals.items() if c[1] > c[0]}
        assert found["wins"]["ties"] == int((difference == 0).sum())
        assert sum(len(found["wins"][side]) for side in "ab") + found["wins"]["ties"] == 60

    def test_a_paired_interval_is_narrow_where_the_problems_differ(self) -> None:
        """Problems from 0 to 1 spread each value widely; B is better by one sample in each."""
        a = Results("a", {"task": "t"}, {str(c): Count(10, c) for c in range(10)})
        b = Results("b", {"task": "t"}, {str(c): Count(10, c + 1) for c in range(10)})
        row = compare.compare(a, b)["metrics"]["pass@1"]
        assert row["interval"] == pytest.approx([0.1, 0.1]) and row["b_ahead"] == 1

    def test_ties_are_ties(self) -> None:
        """0.1 + 0.2 - 0.3 is not 0 in floats, but nobody is ahead."""
        steps = (1, 2, -3)
        a = Results("a", {"task": "t"}, {str(step): Count(10, 5) for step in steps})
        b = Results("b", {"task": "t"}, {str(step): Count(10, 5 + step) for step in steps})
        sums = [sum(draw) for draw in itertools.product(steps, repeat=3)]
        expected = sum((total > 0) + (total == 0) / 2 for total in sums) / 27
        assert compare.compare(a, b)["metrics"]["pass@1"]["b_ahead"] == pytest.approx(expected, abs=0.02)

    def test_with_itself(self) -> None:
        a = Results("a", {"task": "t"}, {str(c): Count(10, c) for c in range(10)})
        found = compare.compare(a, a)
        assert all(row["difference"] == 0 and row["b_ahead"] == 0.5 for row in found["metrics"].values())
        assert found["wins"] == {"a": [], "b": [], "ties": 10} and found["warnings"] == []

    def test_the_page_and_its_warnings(self, write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        write("sft", {"p": "10", "q": "00", "r": "11"})
        write("ib", {"p": "11", "q": "00"}, rule="v1", sandbox_tier="rlimits")
        code, out, _ = shell(f"compare {tmp_path}/sft {tmp_path}/ib", capsys)
        assert code == 0 and out.startswith("# humaneval: ib (B) against sft (A)")
        assert "| pass@1 | 0.2500 | 0.5000 | +0.2500 |" in out
        assert "B solves a larger share of its samples than A in 1: p" in out and "as large a share in 1" in out
        assert "another sandbox_tier: bubblewrap and rlimits" in out
        assert "another rule: strict and v1" in out and "A has 3 problems and B 2; compared are the 2 of both" in out
        _, out, _ = shell(f"compare {tmp_path}/sft {tmp_path}/ib --json", capsys)
        assert json.loads(out)["wins"] == {"a": [], "b": ["p"], "ties": 1}

    def test_nothing_in_common(self) -> None:
        a, b = (Results(name, {"task": "t"}, {name: Count(1, 1)}) for name in "ab")
        with pytest.raises(InputError, match="have no problem in common"):
            compare.compare(a, b)


class TestPlot:
    def test_the_largest_k_that_all_have(self, write: Write, tmp_path: Path) -> None:
        ten = report.report(load_results(write("ten", {"p": "1100000000"})))
        five = report.report(load_results(write("five", {"p": "11000"})))
        for suffix in ("png", "svg", "pdf"):
            assert plot.plot([ten, five], tmp_path / f"p.{suffix}") == 5
            assert (tmp_path / f"p.{suffix}").stat().st_size > 1_000
        assert plot.plot([ten], tmp_path / "p.png") == 10
        words = (tmp_path / "p.svg").read_text()
        assert "Pass@" in words or "path" in words
