"""`ibft memorization plot`: its estimate of a density, what it says of each pair, and the figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import gaussian_kde

from ibft.cli import main
from ibft.data.memorized import SCHEMA
from ibft.memorization.config import PlotFlags
from ibft.memorization.plot import _bandwidth, compare, density, describe
from ibft.memorization.separation import separation


def test_density_equals_scipy() -> None:
    values = np.random.default_rng(0).normal(-2, 0.7, 2500)
    grid = np.linspace(-6, 2, 300)
    exact = gaussian_kde(values, bw_method=_bandwidth(values) / values.std(ddof=1))(grid)
    np.testing.assert_allclose(density(values, grid), exact, atol=1e-12)


def test_density_at_a_border_has_all_of_its_mass_below() -> None:
    """Of -Exp(1), whose density is highest at the border, where a plain estimate would halve it."""
    values = -np.random.default_rng(1).exponential(size=20_000)
    grid = np.linspace(-12, 0, 2000)
    heights = density(values, grid, upper=0.0)
    assert np.trapezoid(heights, grid) == pytest.approx(1, abs=1e-3)
    assert heights[-1] == pytest.approx(1, abs=0.15)
    assert np.abs(heights - np.exp(grid)).max() < 0.15
    assert density(values, grid)[-1] < 0.7


@pytest.mark.parametrize("values", [[-1.0] * 5, [-1.0], [0.0, 0.0], [-3.0, *[-1.0] * 9]])
def test_density_of_values_that_are_the_same(values: list[float]) -> None:
    bandwidth = _bandwidth(np.array(values))
    grid = np.linspace(min(values) - 10 * bandwidth, max(values) + 10 * bandwidth, 20_001)
    assert np.trapezoid(density(np.array(values), grid), grid) == pytest.approx(1, abs=1e-3)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A file of scores with a record of the model and the data that they are of."""

    def run(name: str, scores: list[float | None], model: str | None = None, data: str = "d", **record: Any) -> str:
        path = tmp_path / name
        columns: dict[str, list[Any]] = dict.fromkeys(("min_k", "min_k_plus_plus", "mean_log_prob"), scores)
        for column in SCHEMA.names:
            columns.setdefault(column, ["x"] * len(scores) if column in ("source", "digest") else [1] * len(scores))
        table = pa.table({column: columns[column] for column in SCHEMA.names}, schema=SCHEMA)
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        if model is not None:
            values = {"model": model, "adapter": None, "dataset": [f"{data}.jsonl"], "k": 0.2, "span": "response"}
            identity = {"model": model, "adapter": record.get("adapter"), "data": data}
            path.with_name(f"{name}.record.json").write_text(json.dumps({**values, **record, "identity": identity}))
        return str(path)

    return run


def test_each_pair_is_measured_and_named(write: Callable[..., str], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    scores = [(-rng.exponential(size=size) - shift).tolist() for size, shift in ((80, 0), (80, 0.3), (50, 1))]
    files = [
        write("base.jsonl", [*scores[0], None], "models/base", "tuning"),
        write("tuned.jsonl", scores[1], "models/base", "tuning", adapter="runs/ib"),
        write("unseen.jsonl", scores[2], "models/base", "unseen"),
    ]
    result = compare(PlotFlags(output=str(tmp_path / "new" / "plot.png")), files)
    assert [each["label"] for each in result["files"]] == ["base on tuning", "ib on tuning", "base on unseen"]
    assert [each["documents"] for each in result["files"]] == [80, 80, 50]
    assert result["files"][2]["quartiles"] == pytest.approx(np.quantile(scores[2], [0.25, 0.5, 0.75]))
    assert [(pair["a"], pair["b"], pair["differ"]) for pair in result["pairs"]] == [
        ("base on tuning", "ib on tuning", "model"),
        ("base on tuning", "base on unseen", "data"),
        ("ib on tuning", "base on unseen", "model and data"),
    ]
    assert result["pairs"][1]["auc"] == separation(scores[0], scores[2]).auc
    assert result["pairs"][2]["ks"] == separation(scores[1], scores[2]).ks
    lines = describe(result).splitlines()
    assert lines[0].split() == ["min_k", "documents", "mean", "25%", "50%", "75%"]
    assert lines[6].split()[-2:] == [f"{result['pairs'][0]['auc']:.3f}", f"{result['pairs'][0]['ks']:.3f}"]
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_labels(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    bare = [write("a.jsonl", [-1.0, -2.0]), write("b.jsonl", [-3.0, -4.0])]
    assert [each["label"] for each in compare(PlotFlags(), bare)["files"]] == ["a", "b"]
    assert compare(PlotFlags(), bare)["pairs"][0]["differ"] is None
    same = [write(f"{name}.jsonl", [-1.0], "m", "d") for name in "cd"]
    assert [each["label"] for each in compare(PlotFlags(), same)["files"]] == ["c", "d"]
    again = compare(PlotFlags(), [same[0], same[0]])
    assert [each["label"] for each in again["files"]] == [same[0], same[0]]
    command = ["memorization", "plot", *bare, "--json", "--labels", "seen, often", "unseen"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["pairs"][0]["a"], printed["pairs"][0]["b"]) == ("seen, often", "unseen")
    assert (printed["pairs"][0]["auc"], printed["pairs"][0]["ks"]) == (1, 1)


@pytest.mark.parametrize("measure", ["min_k", "min_k_plus_plus", "mean_log_prob"])
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_every_measure_and_ending(write: Callable[..., str], tmp_path: Path, measure: Any, ending: str) -> None:
    files = [write("a.jsonl", [-1.0, -1.0, -1.0]), write("b.jsonl", [-3.0])]  # nothing varies
    output = tmp_path / f"plot.{ending}"
    compare(PlotFlags(output=str(output), measure=measure), files)
    assert output.stat().st_size > 1000


def test_without_matplotlib_the_numbers_are_there(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("a.jsonl", [-1.0, -2.0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["memorization", "plot", file]) == 0
    assert main(["memorization", "plot", file, "--output", "p.png"]) == 2
    assert 'not installed: pip install "ibft[plot]"' in capsys.readouterr().err


def test_one_value_far_out_does_not_take_the_axis(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    limits: list[tuple[float, float]] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: limits.append(figure.axes[0].get_xlim()))
    usual = np.random.default_rng(3).normal(0, 1, 40).tolist()
    flags = PlotFlags(output=str(tmp_path / "plot.png"), measure="min_k_plus_plus")
    compare(flags, [write("a.jsonl", usual)])
    compare(flags, [write("b.jsonl", [*usual, -1.85e21])])
    (left, right), (low, high) = limits
    assert left < min(usual) and max(usual) < right
    assert low == pytest.approx(left, abs=1) and high == pytest.approx(right, abs=1)


def test_scores_of_another_dtype_are_refused(write: Callable[..., str]) -> None:
    files = [write(f"{dtype}.jsonl", [-1.0, -2.0], "m", dtype=dtype) for dtype in ("float32", "bfloat16")]
    with pytest.raises(ValueError, match=r"float32.jsonl was scored with --dtype float32 and .* --dtype bfloat16"):
        compare(PlotFlags(), files)


@pytest.mark.parametrize(("record", "label"), [({"k": 0.5}, "Min-50% Prob"), (None, "Min-K% Prob")])
def test_k_is_what_a_record_says(
    write: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: dict[str, Any] | None,
    label: str,
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters as letters
    second = write("b.jsonl", [-3.0, -4.0]) if record is None else write("b.jsonl", [-3.0, -4.0], "m", **record)
    result = compare(PlotFlags(output=str(tmp_path / "plot.svg")), [write("a.jsonl", [-1.0, -2.0]), second])
    assert result["k"] == (record or {}).get("k")
    assert f">{label}: mean" in (tmp_path / "plot.svg").read_text()


def test_a_file_without_scores_is_refused(write: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="holds no scores: every row is empty or too long"):
        compare(PlotFlags(), [write("a.jsonl", [None, None])])
