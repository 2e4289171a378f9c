"""Scaling curves and crossovers: their records at toy sizes, and what is read from them. No test asserts a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scaling, step_scaling
from benchmarks.op_report import crossing
from benchmarks.report import sections, tables


def test_scaling_command_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scaling.json"
    scaling.main(["--size", "toy", "--threads", "1", "--record", str(file)])
    record = json.loads(file.read_text())
    assert record["sweeps"].keys() == {
        f"{op} over {axis}" for op, (_, axes) in scaling.SWEEPS["toy"].items() for axis, _ in axes
    }
    for sweep in record["sweeps"].values():
        values = [point["size"][sweep["axis"]] for point in sweep["points"]]
        assert values == sorted(set(values)) and len(values) == 2
        flops = [point["cost"]["flops"] for point in sweep["points"]]
        assert flops[0] < flops[1]
    for found in record["crossovers"].values():
        assert [len(point["seconds"]["absorbed"]) for point in found["points"]] == [2] * len(scaling.FACTORS)
        assert max(point["relative_error"] for point in found["points"]) < 1e-5
    assert tables(record) in capsys.readouterr().out


def test_full_sizes_are_those_of_the_axes() -> None:
    for size, axes in scaling.SWEEPS["full"].values():
        assert all(hasattr(size, axis) and len(values) >= 4 for axis, values in axes)
    assert {axis for _, axes in scaling.SWEEPS["full"].values() for axis, _ in axes} == {
        "tokens", "hidden", "bottleneck", "rank", "vocabulary",
    }  # fmt: skip
    assert {256000, 32000} <= set(step_scaling.AXES["full"]["vocabulary"])


def crossover_of(at: float, noise: float) -> dict[str, Any]:
    """Absorbed takes at / N of the time of full width, over rounds that differ by that much."""
    generator = np.random.default_rng(0)
    points = []
    for tokens in (50, 100, 200, 400):
        full = np.exp(generator.normal(0, noise, 20))
        points.append({"tokens": tokens, "seconds": {"absorbed": list(full * at / tokens), "full width": list(full)}})
        points[-1]["seconds"]["absorbed"] = list(full * at / tokens * np.exp(generator.normal(0, noise, 20)))
    return {"predicted": 100.0, "predicted_here": 100.0, "points": points}


def test_a_crossover_is_found_where_the_ratio_passes_one() -> None:
    exact = crossing(crossover_of(130, noise=0.0))
    assert exact is not None and exact.tokens == pytest.approx(130) and exact.low == pytest.approx(exact.high)
    noisy = crossing(crossover_of(130, noise=0.1))
    assert noisy is not None and noisy.low < 130 < noisy.high and noisy.high / noisy.low < 1.5
    assert crossing(crossover_of(1000, noise=0.0)) is None and crossing(crossover_of(10, noise=0.0)) is None


def test_step_scaling_command_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "axes.json"
    arguments = ["--size", "toy", "--rounds", "2", "--threads", "1", "--no-memory", "--record", str(file)]
    step_scaling.main([*arguments, "--axis", "vocabulary", "--axis", "label_share"])
    record = json.loads(file.read_text())
    assert list(record["axes"]) == ["vocabulary", "label_share"]
    for axis, points in record["axes"].items():
        assert [point["size"][axis] for point in points] == list(step_scaling.AXES["toy"][axis])
        assert all(max(point["relative_error"].values()) < 1e-4 and len(point["seconds"]) == 4 for point in points)
    flops = [point["flops"]["ibft-ib K=8"] for point in record["axes"]["label_share"]]
    assert flops[0] < flops[1]
    assert sections(record)["table"]() in capsys.readouterr().out


def test_an_unknown_axis_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_scaling.main(["--axis", "width"])
    assert "--axis width: there are vocabulary, length" in capsys.readouterr().err
