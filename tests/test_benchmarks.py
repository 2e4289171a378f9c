"""The benchmarks run, compare like with like, and do not time what computes something else. No test asserts a time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_kernels, padding
from benchmarks.measure import Ratio, can_measure_memory, in_fresh_process, interleave, ratio, relative_error
from benchmarks.step import SIZES, VARIANTS, build, cells, check, label, table
from ibft.data import document_lengths

ROOT = Path(__file__).parents[1]
TOY = SIZES["toy"]
STEPS = [label(*cell) for cell in cells(TOY)]


def run(*arguments: str) -> str:
    """Runs `python arguments` from the top of the project, as a user would."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check_record(record: dict[str, Any], rounds: int) -> None:
    assert record["device"].keys() == {"cpu", "cores", "threads", "load_average"}
    assert {"python", "torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["command"].startswith("python -m benchmarks.step") and str(ROOT) not in json.dumps(record)
    assert all(len(times) == rounds and min(times) > 0 for times in record["seconds"].values())
    assert record["ratio"].keys() == record["seconds"].keys()
    assert record["ratio"]["eager-sft"]["median"] == 1
    assert record["relative_error"].keys() == {name for name in record["seconds"] if name.startswith("ibft")}
    assert max(record["relative_error"].values()) < 1e-4


def test_suite_runs_at_toy_size(tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    report = run("-m", "pytest", "benchmarks", "--size", "toy", "-p", "no:cacheprovider", f"--benchmark-json={file}")
    benchmarks = {entry["name"]: entry for entry in json.loads(file.read_text())["benchmarks"]}
    ops = [f"{name}: {op}" for name, case in bench_kernels.CASES.items() for op in case.implementations]
    floors = [name for name, case in bench_kernels.CASES.items() if case.floor is not None]
    expected = {f"test_op[{passes}-{op}]" for op in ops for passes in ("forward", "forward+backward")}
    expected |= {f"test_floor[{passes}-{name}]" for name in floors for passes in ("forward", "forward+backward")}
    expected |= {f"test_step[{name}]" for name in STEPS} | {"test_noise[torch.randn]", "test_noise[ibkernels]"}
    assert benchmarks.keys() == expected
    for entry in benchmarks.values():
        assert entry["stats"]["rounds"] == len(entry["extra_info"]["baseline_seconds"]) == 2
        assert entry["extra_info"].get("relative_error", 0) < 1e-4
    assert "time / baseline, round by round" in report


def test_step_command_writes_its_record(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "toy.json"
    quick = ["--size", "toy", "--rounds", "2", "--threads", "1", "--no-memory"]
    printed = run("-m", "benchmarks.step", *quick, "--record", str(file))
    record = json.loads(file.read_text())
    assert list(record["seconds"]) == STEPS
    assert table(record) in printed
    check_record(record | {"command": record["command"].replace(str(file), "FILE")}, rounds=2)


def test_published_record_is_whole_and_quoted_as_it_is() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())
    check_record(record, rounds=len(record["seconds"]["eager-sft"]))
    assert record["memory_mib"].keys() == record["seconds"].keys()
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert table(record) in readme and record["command"] in readme and record["device"]["cpu"] in readme


def test_padding_command_writes_its_record(tmp_path: Path) -> None:
    file = tmp_path / "padding.json"
    printed = run("-m", "benchmarks.padding", "--size", "toy", "--rounds", "2", "--threads", "1", "--record", str(file))
    record = json.loads(file.read_text())
    assert padding.table(record) in printed
    check_padding(record, rounds=2)


def check_padding(record: dict[str, Any], rounds: int) -> None:
    size = padding.Size(**{name: value for name, value in record["size"].items() if name != "name"})
    assert record["command"].startswith("python -m benchmarks.padding") and str(ROOT) not in record["command"]
    assert {"torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["seconds"].keys() == record["positions"].keys() == padding.LAYOUTS.keys()
    assert all(len(times) == rounds and min(times) > 0 for times in record["seconds"].values())
    assert record["relative_error"].keys() == padding.LAYOUTS.keys() - {"published"}
    assert max(record["relative_error"].values()) < 1e-4
    assert record["real_tokens"] == padding.lengths(size).sum()
    assert record["positions"]["published"] == size.documents * size.max_length
    assert (
        record["positions"]["packed, mask"] == record["positions"]["packed, varlen"] < size.documents * size.max_length
    )


def test_published_padding_record_is_whole_and_quoted_as_it_is() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "padding.json").read_text())
    check_padding(record, rounds=len(record["seconds"]["published"]))
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert padding.table(record) in readme and record["command"] in readme


def test_a_layout_that_trains_something_else_is_not_measured() -> None:
    size = padding.SIZES["toy"]
    model, documents = padding.build_model(size), padding.build_documents(size)
    expected = padding.gradients(padding.Step("published", size, model, documents))
    step = padding.Step("packed, varlen", size, model, documents)
    assert padding.check(step, expected) < 1e-5
    for batch in step.batches:  # the row taken for one document: they see each other
        row = batch["input_ids"].shape[1]
        batch |= document_lengths([row] * batch["input_ids"].shape[0])
    with pytest.raises(RuntimeError, match=r"packed, varlen: .* differs from that of published rows"):
        padding.check(step, expected)


@pytest.mark.parametrize("documents", [32, 2001])
def test_lengths_are_spread_as_they_say(documents: int) -> None:
    lengths = padding.lengths(replace(padding.SIZES["full"], documents=documents))
    assert abs(np.median(lengths) - 400) < 5 and lengths.max() <= 2048 and (np.diff(lengths) >= 0).all()
    if documents > 1000:
        assert (lengths >= 2047).mean() == pytest.approx(0.005, abs=0.0011)


@pytest.mark.skipif(not can_measure_memory(), reason="needs /proc/self/clear_refs")
def test_peak_is_that_of_the_live_tensors() -> None:
    """A step that holds 96 MiB and then, once they are freed, 64: its peak is 96 above rest, of which nothing stays."""
    probe = "; ".join(
        [
            "import json, torch",
            "from benchmarks.measure import peak_of",
            "step = lambda: [torch.ones(mib * 2**18).sum() for mib in (96, 64)]",
            "print(json.dumps(peak_of(step, lambda: None, repeats=2)))",
        ]
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    output = subprocess.check_output([sys.executable, "-c", probe], cwd=ROOT, env=environment, text=True)
    result = json.loads(output)
    assert 95 <= result["peak"] - result["rest"] <= 100


@pytest.mark.skipif(not can_measure_memory(), reason="needs /proc/self/clear_refs")
def test_peak_of_a_variant_in_a_fresh_process() -> None:
    result = in_fresh_process("benchmarks.step", ["--peak", "ibft-ib", "--size", "toy"], pinned_malloc=True)
    assert result["peak"] >= result["rest"] > 0


def test_eager_loss_is_that_of_ibmodel_in_float64() -> None:
    losses = {variant: build(variant, TOY, 8, dtype=torch.float64, sample=False).loss(None) for variant in VARIANTS}
    # transformers computes the plain loss in float32 whatever the model is; the bottleneck's share of it is float64.
    assert losses["ibft-sft"].item() == pytest.approx(losses["eager-sft"].item(), rel=1e-6)
    ours, eager = ((losses[f"{kind}-ib"] - losses[f"{kind}-sft"]).item() for kind in ("ibft", "eager"))
    assert ours > 0.01
    assert ours == pytest.approx(eager, rel=1e-9)


def test_a_step_that_computes_something_else_is_not_measured() -> None:
    ours, eager = build("ibft-ib", TOY, 8), build("eager-ib", TOY, 8)
    assert check(ours, eager) < 1e-5
    ours.parameters["bottleneck.weight"].data[0, 0] += 0.1
    with pytest.raises(RuntimeError, match="differs from the eager one"):
        check(ours, eager)
    with pytest.raises(RuntimeError, match=r"bottleneck\.\w+ differs"):
        check(build("ibft-sft", TOY, 8), eager)


def test_unknown_variant_is_named() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*eager-sft"):
        build("fast", TOY, 8)


def test_rounds_run_every_step_once_and_ratios_are_taken_within_a_round() -> None:
    calls: list[str] = []
    samples = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)  # type: ignore[misc]
    assert [sorted(calls[start : start + 3]) for start in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert [len(times) for times in samples.values()] == [4, 4, 4]
    assert ratio([2, 40, 60], [1, 10, 30]) == Ratio(2, 2, 3)  # of the medians it would be 4


def test_relative_error_of_what_is_missing_or_not_finite_is_infinite() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(None, expected) == relative_error(expected * float("nan"), expected) == float("inf")
