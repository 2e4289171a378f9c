"""`pytest benchmarks` runs as a user runs it, at toy sizes, and leaves its records. No test asserts a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_kernels import CELLS
from benchmarks.measure import BATCHES
from benchmarks.op_cases import OPS
from benchmarks.ops import case_name
from benchmarks.report import tables
from benchmarks.step import SIZES, cells, label

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_suite_runs_at_toy_size(tmp_path: Path) -> None:
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST", "TRITON", "IBKERNELS"))}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--size", "toy", "-p", "no:cacheprovider", "-q"]
    command += ["--benchmark-quiet", "--records", str(tmp_path), f"--benchmark-json={tmp_path / 'pytest.json'}"]
    result = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"timed, part {BATCHES} of {BATCHES}" in result.stdout

    replayed = {entry["name"]: entry for entry in json.loads((tmp_path / "pytest.json").read_text())["benchmarks"]}
    cases = [case_name(OPS[op], *rest) for op, *rest in CELLS]
    steps = [label(*cell) for cell in cells(SIZES["toy"])]
    assert replayed.keys() == {f"test_op[{name}]" for name in cases} | {f"test_step[{name}]" for name in steps}

    ops, step = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ops", "step-toy"))
    assert list(ops["cases"]) == cases and list(step["seconds"]) == steps
    for name, case in ops["cases"].items():
        assert "ibkernels" in case["seconds"] and "floor: copy" in case["seconds"]
        # pytest-benchmark has the very samples of the record.
        stats = replayed[f"test_op[{name}]"]["stats"]
        assert stats["data"] == case["seconds"]["ibkernels"] and stats["rounds"] == BATCHES
    text = json.dumps([ops, step])
    assert os.uname().nodename not in text and str(ROOT) not in text
    for record in (ops, step):
        assert record["command"].startswith("python -m pytest benchmarks --size toy") and "commit" in record
        assert tables(record).splitlines()[-1] in result.stdout and "these numbers mean nothing" in tables(record)


@pytest.mark.timeout(300)
def test_only_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--size", "toy", "-p", "no:cacheprovider", "-q"]
    subprocess.run([*command, "-k", "noise", "--records", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    assert list(json.loads((tmp_path / "ops.json").read_text())["cases"]) == ["noise, float32: forward"]
