"""The GPU suite runs without a GPU: `make gpu DRY=1`, and what its report says of a record."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_cases
from benchmarks.gpu_plots import DRY_LABEL, figure, plots
from benchmarks.gpu_report import TARGETS, report

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
CASES = {target.case for target in TARGETS}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """From the top of the project, without what this test run has set for itself."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST", "TRITON", "IBKERNELS", "MAKE"))}
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_dry_mode_runs_every_test_and_every_benchmark(tmp_path: Path) -> None:
    result = run("make", "gpu", "DRY=1", f"GPU_PYTHON={sys.executable}", f"OUT={tmp_path}", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " failed" not in result.stdout
    record = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert record["dry"] and record["command"] == "python -m benchmarks.gpu"
    assert record["versions"].keys() >= {"python", "torch", "triton"} and str(ROOT) not in json.dumps(record)
    assert record["cases"].keys() == CASES
    for case in record["cases"].values():
        assert "ibkernels" not in case["left_out"] and any(name.startswith("floor") for name in case["seconds"])
        assert {"ibkernels", "eager", "torch.compile"} <= case["seconds"].keys()
        assert (
            case["relative_error"].keys() == case["peak_bytes"].keys() and max(case["relative_error"].values()) < 1e-4
        )
        assert all(len(samples) == 2 and min(samples) > 0 for samples in case["seconds"].values())
    command = (sys.executable, "-m", "benchmarks.gpu", "report", str(tmp_path / "gpu-dry.json"))
    printed = run(*command, "--plots", str(tmp_path / "plots")).stdout
    tables, _, paths = printed.rpartition("\n\n")
    assert tables in result.stdout and "these numbers mean nothing" in tables
    assert all(target.text in tables for target in TARGETS)
    assert {Path(path) for path in paths.split()} == set((tmp_path / "plots").iterdir()) and len(paths.split()) == 6
    assert all(DRY_LABEL in Path(path).read_text() for path in paths.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tests_are_skipped_and_benchmarks_refuse() -> None:
    tests = run(sys.executable, "-m", "pytest", "tests/gpu/test_contract.py", "-rs", "-p", "no:cacheprovider")
    assert tests.returncode == 0 and "needs a GPU" in tests.stdout and " passed" not in tests.stdout
    benchmarks = run(sys.executable, "-m", "benchmarks.gpu")
    assert benchmarks.returncode == 2 and "there is no GPU" in benchmarks.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_libraries_that_were_brought_along_are_found_and_a_limit_reports_what_failed() -> None:
    recipe = run("make", "-n", "gpu", "TESTS_SECONDS=9", PYTHONPATH="/brought").stdout
    assert recipe.count("export PYTHONPATH=.:/brought ") == 2  # the tests and the timings
    assert 'limit="timeout --signal=INT --kill-after=30 9"' in recipe


def test_a_case_that_cannot_be_measured_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {"left_out": {}, "seconds": {"ibkernels": [1.0]}}

    def out_of_memory() -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu, "DRY", True)
    monkeypatch.setattr(gpu_cases, "cases", lambda: iter([("one", out_of_memory), ("other", lambda: measured)]))
    monkeypatch.setattr(gpu, "measure_case", lambda case, timer: case)
    saved: list[dict[str, Any]] = []
    record = gpu.measure(lambda cases: saved.append(dict(cases)))
    assert (
        record["one"]["left_out"] == {"ibkernels": "RuntimeError: CUDA out of memory"} and not record["one"]["seconds"]
    )
    assert record["other"] is measured and [list(cases) for cases in saved] == [["one"], ["one", "other"]]
    assert "out_of_memory" in capsys.readouterr().err
    written = report({**record_of(seconds=0.001, bytes=1e6), "cases": {"one": record["one"]}})
    assert "Not measured: ibkernels (RuntimeError: CUDA out of memory)." in written


@pytest.mark.parametrize(("late", "slept"), [([False], 1), ([True, False], 2), ([True] * 9, 4)])
def test_a_call_is_timed_again_where_the_device_did_not_wait_for_the_host(
    late: list[bool], slept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, cycles = iter(late), []
    event = SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, query=lambda: next(asked), elapsed_time=lambda end: 3.0
    )
    stand_in = SimpleNamespace(
        get_device_properties=lambda: SimpleNamespace(L2_cache_size=8),
        Event=lambda enable_timing: event,
        _sleep=cycles.append,
    )
    monkeypatch.setattr(gpu, "torch", SimpleNamespace(cuda=stand_in, zeros=lambda *_, **__: torch.zeros(1), float32=0))
    calls: list[None] = []
    assert gpu.DeviceTimer()(lambda: calls.append(None)) == 3e-3
    assert len(calls) == slept and cycles == [gpu._AHEAD_CYCLES * 2**i for i in range(slept)]


def record_of(**ours: float) -> dict[str, Any]:
    """A record in which every variant takes 10 ms and 100 MB but ours, whose figures are given."""
    names = ["ibkernels", "eager", "torch.compile", "floor: copy", "floor: GEMMs"]
    case = {
        "seconds": {name: [ours["seconds"] if name == "ibkernels" else 0.01] * 3 for name in names},
        "peak_bytes": {"ibkernels": ours["bytes"], "eager": 1e8, "torch.compile": 1e8},
        "relative_error": {},
        "moved_bytes": {"ibkernels": 60, "floor: copy": 100},
        "left_out": {"Liger": "not importable"},
    }
    where = {"device": {"name": "a GPU", "driver": "580"}, "versions": {"torch": "2.11"}, "shape": {"tokens": 1}}
    return {**where, "date": "today", "commit": "", "dry": False, "cases": dict.fromkeys(CASES, case)}


def verdicts(record: dict[str, Any]) -> list[str]:
    return [line.split(" | ")[-1].removesuffix(" |") for line in report(record).splitlines()[-len(TARGETS) :]]


def test_the_report_judges_every_target() -> None:
    assert verdicts(record_of(seconds=0.001, bytes=1e6)) == ["yes"] * len(TARGETS)
    assert verdicts(record_of(seconds=0.013, bytes=4e8)) == ["**no**"] * len(TARGETS)
    without_ours = record_of(seconds=0.001, bytes=1e6)
    for case in without_ours["cases"].values():
        case["seconds"].pop("ibkernels", None)
        case["peak_bytes"].pop("ibkernels", None)
    assert verdicts(without_ours) == ["not measured"] * len(TARGETS)
    assert "Not measured: Liger (not importable)." in report(without_ours)


def test_the_report_says_where_configurations_were_searched_for() -> None:
    record = record_of(seconds=0.001, bytes=1e6)
    assert "IBKERNELS_AUTOTUNE" not in report(record) and "IBKERNELS_AUTOTUNE=1" in report({**record, "autotune": True})


# ---- the pictures of a record ----------------------------------------------------------------------------------------


def measured_record() -> dict[str, Any]:
    record = record_of(seconds=0.001, bytes=3e6)
    case = record["cases"]["bottleneck, lora: forward"]
    samples = {"floor: copy": [1e-3, 2e-3, 4e-3], "eager": [5e-3, 7e-3, 6e-3], "ibkernels": [3e-3, 1e-3, 2e-3]}
    record["cases"]["bottleneck, lora: forward"] = {
        **case, "seconds": samples, "relative_error": {"ibkernels": 2e-3, "eager": 4e-4},
    }  # fmt: skip
    return record


def test_a_picture_shows_medians_spread_memory_and_error() -> None:
    record = measured_record()
    drawn = figure(record, "bottleneck, lora: forward")
    times, memory, errors = drawn.axes
    names = ["ibkernels", "eager", "floor: copy"]  # ours first, floors last
    assert [label.get_text() for label in times.get_yticklabels()] == names
    samples = record["cases"]["bottleneck, lora: forward"]["seconds"]
    assert [bar.get_width() for bar in times.patches] == pytest.approx(
        [1e3 * statistics.median(samples[n]) for n in names]
    )
    whiskers = [segment[:, 0].tolist() for segment in times.collections[0].get_segments()]
    assert whiskers[2] == pytest.approx([1.4, 3.2])  # p20 and p80 of 1, 2 and 4
    assert [bar.get_width() for bar in memory.patches][:2] == pytest.approx([3, 100])
    points = errors.collections[0].get_offsets()
    assert points[:2, 0].tolist() == pytest.approx([2e-3, 4e-4])
    assert not any(DRY_LABEL in text.get_text() for text in drawn.texts)
    assert any("Not measured: Liger (not importable)." in text.get_text() for text in drawn.texts)


def test_pictures_come_from_the_record_alone(tmp_path: Path) -> None:
    record = measured_record()
    record["cases"]["bottleneck, linear: forward"] = {**record["cases"]["bottleneck, linear: forward"], "seconds": {}}
    written = [plots(json.loads(json.dumps(record)), tmp_path / name) for name in ("one", "two")]
    assert len(written[0]) == len(CASES) - 1  # what was not measured has no picture
    assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]
    assert all(path.read_text().count("<svg") == 1 and "ibkernels" in path.read_text() for path in written[0])


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), ("{", "Expecting"), ("[]", "TypeError"), ("{}", "'device'")]
)
def test_what_is_no_record_is_refused_with_a_sentence(
    content: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    assert gpu.main(["report", str(path), "--plots", str(tmp_path / "plots")]) == 2
    printed = capsys.readouterr()
    assert f"{path} is not a record of benchmarks.gpu" in printed.err and reason in printed.err and not printed.out
    assert not (tmp_path / "plots").exists()


def test_plots_that_cannot_be_drawn_leave_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(measured_record()))
    assert gpu.main(["report", str(path), "--plots", str(path)]) == 2
    printed = capsys.readouterr()
    assert "cannot be written to" in printed.err and "### Targets" in printed.out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert gpu.main(["report", str(path), "--plots", str(tmp_path / "plots")]) == 2
    printed = capsys.readouterr()
    assert 'the plots need matplotlib: pip install "ibft[bench]"' in printed.err and "### Targets" in printed.out
