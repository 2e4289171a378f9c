"""The training step on a GPU, in its dry mode: every variant runs, and a failure costs one group."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_step, report

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_dry_mode_runs_every_variant(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    command = ["make", "gpu-step", "DRY=1", f"GPU_PYTHON={sys.executable}", f"OUT={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "gpu-step-dry.json").read_text())
    assert (
        record["seconds"].keys() == record["peak_bytes"].keys() == {*gpu_step.OURS, *gpu_step.EAGER, gpu_step.TRL}
        and not record["left_out"]
    )
    assert all(len(samples) == 2 and min(samples) > 0 for samples in record["seconds"].values())
    for ours, eager in zip(gpu_step.OURS, gpu_step.EAGER, strict=True):
        assert record["loss"][ours] == pytest.approx(record["loss"][eager], rel=1e-5)
    table = report.sections(record)["table"]()
    assert table in result.stdout and "these numbers mean nothing" in table and table.count("| ibft-ib: ") == 3


def test_what_cannot_be_measured_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_steps(names: tuple[str, ...], body: dict[str, Any]) -> None:
        if "eager-ib" in names:
            raise RuntimeError("CUDA out of memory")
        body["seconds"] |= {name: [1.0] for name in names}
        body["loss"] |= {name: 5.0 if name == "eager-sft" else 4.0 for name in names}

    monkeypatch.setattr(gpu_step, "DRY", True)
    monkeypatch.setattr(gpu_step, "measure_steps", measure_steps)
    monkeypatch.setitem(sys.modules, "trl", None)
    saved: list[set[str]] = []
    body = gpu_step.measure(lambda body: saved.append(set(body["seconds"])))
    assert saved == [set(gpu_step.OURS), *[{*gpu_step.OURS, "eager-sft"}] * 3]
    assert body["left_out"].keys() == {"eager-ib", gpu_step.TRL, "ibft-sft"}
    assert "out of memory" in body["left_out"]["eager-ib"] and "its loss is 4" in body["left_out"]["ibft-sft"]
    assert "CUDA out of memory" in capsys.readouterr().err
