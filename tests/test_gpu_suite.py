"""The GPU suite runs without a GPU: `make gpu DRY=1`, and what its report says of a record."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
    printed = run(sys.executable, "-m", "benchmarks.gpu", "report", str(tmp_path / "gpu-dry.json")).stdout.strip()
    assert printed in result.stdout and "these numbers mean nothing" in printed
    assert all(target.text in printed for target in TARGETS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tests_are_skipped_and_benchmarks_refuse() -> None:
    tests = run(sys.executable, "-m", "pytest", "tests/gpu/test_contract.py", "-rs", "-p", "no:cacheprovider")
    assert tests.returncode == 0 and "needs a GPU" in tests.stdout and " passed" not in tests.stdout
    benchmarks = run(sys.executable, "-m", "benchmarks.gpu")
    assert benchmarks.returncode == 2 and "there is no GPU" in benchmarks.stderr


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
