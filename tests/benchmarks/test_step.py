"""The training step: variants that agree, a record that is whole, sweeps. No test asserts a time."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import can_measure_memory, in_fresh_process
from benchmarks.models import VARIANTS
from benchmarks.step import SIZES, build, cells, check, label, main, step_flops, table

ROOT = Path(__file__).parents[2]
TOY = SIZES["toy"]
STEPS = [label(*cell) for cell in cells(TOY)]


def check_record(record: dict[str, Any], rounds: int) -> None:
    assert record["device"].keys() == {"cpu", "cores", "threads", "load_average"}
    assert {"python", "torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["command"].startswith("python -m benchmarks.step") and str(ROOT) not in json.dumps(record)
    assert all(len(times) == rounds and min(times) > 0 for times in record["seconds"].values())
    assert record["relative_error"].keys() == {name for name in record["seconds"] if name.startswith("ibft")}
    assert max(record["relative_error"].values()) < 1e-4


def test_step_command_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "folder" / "toy.json"
    main(["--size", "toy", "--rounds", "2", "--threads", "1", "--no-memory", "--record", str(file)])
    record = json.loads(file.read_text())
    assert list(record["seconds"]) == STEPS and record["flops"].keys() == record["relative_error"].keys()
    assert table(record) in capsys.readouterr().out
    assert record["suite"] == "step" and "commit" in record
    check_record(record | {"command": record["command"].replace(str(file), "FILE")}, rounds=2)


def test_published_record_is_whole() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())
    check_record(record, rounds=len(record["seconds"]["eager-sft"]))
    assert record["memory_mib"].keys() == record["seconds"].keys()


@pytest.mark.skipif(not can_measure_memory(), reason="needs /proc/self/clear_refs")
def test_peak_of_a_variant_in_a_fresh_process() -> None:
    cell = json.dumps(["ibft-ib", asdict(TOY), 8])
    result = in_fresh_process("benchmarks.step", ["--peak", cell], pinned_malloc=True)
    assert result["peak"] >= result["rest"] > 0


def test_eager_loss_is_that_of_ibmodel_in_float64() -> None:
    import torch

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


def test_the_share_of_labels_is_what_is_asked_for() -> None:
    for share, labels in ((0.25, 16), (1.0, 62)):  # of 2 x 32 tokens; a document's first one is never a label
        size = replace(TOY, label_share=share)
        assert check(build("ibft-ib", size, 8), build("eager-ib", size, 8)) < 1e-5
        batch = build("ibft-sft", size, 8).batch
        assert int((batch["labels"] != -100).sum()) == labels


def test_flops_grow_with_what_is_computed() -> None:
    sft, ib = (step_flops(build(variant, TOY, 8), TOY) for variant in ("ibft-sft", "ibft-ib"))
    assert 0 < sft < ib < 2 * sft


def test_unknown_variant_is_named() -> None:
    with pytest.raises(ValueError, match=r"'fast'.*eager-sft"):
        build("fast", TOY, 8)
