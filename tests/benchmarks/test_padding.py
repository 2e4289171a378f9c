"""What padding costs: layouts that train the same, and their record. No test asserts a time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import padding
from benchmarks.measure import can_measure_memory
from ibft.data import document_lengths

ROOT = Path(__file__).parents[2]


def check_record(record: dict[str, Any], rounds: int) -> None:
    size = padding.Size(**{name: value for name, value in record["size"].items() if name != "name"})
    assert record["command"].startswith("python -m benchmarks.padding") and str(ROOT) not in record["command"]
    assert {"torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["seconds"].keys() == record["positions"].keys() <= padding.LAYOUTS.keys()
    assert all(len(times) == rounds and min(times) > 0 for times in record["seconds"].values())
    assert max(record["relative_error"].values()) < 1e-4
    assert record["real_tokens"] == padding.lengths(size).sum()
    assert record["positions"]["published"] == size.documents * size.max_length
    assert (
        record["positions"]["packed, mask"] == record["positions"]["packed, varlen"] < size.documents * size.max_length
    )


def test_padding_command_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "padding.json"
    padding.main(["--size", "toy", "--rounds", "2", "--threads", "1", "--record", str(file)])
    record = json.loads(file.read_text())
    assert padding.table(record) in capsys.readouterr().out
    check_record(record, rounds=2)
    assert record["seconds"].keys() == padding.LAYOUTS.keys()
    assert record["peak_mib"].keys() == (padding.LAYOUTS.keys() if can_measure_memory() else set())
    checked = {name for _, *others in padding.GROUPS for name in others}
    assert record["relative_error"].keys() == checked and len(checked) == len(padding.LAYOUTS) - len(padding.GROUPS)


def test_published_record_is_whole() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "padding.json").read_text())
    check_record(record, rounds=len(record["seconds"]["published"]))


def test_a_layout_that_trains_something_else_is_not_measured() -> None:
    size = padding.SIZES["toy"]
    model, documents = padding.build_model("ibft-ib", size), padding.build_documents(size)
    expected = padding.gradients(padding.Step("published", size, model, documents))
    step = padding.Step("packed, varlen", size, model, documents)
    assert padding.check(step, expected, "published") < 1e-5
    for batch in step.batches:  # the row taken for one document: they see each other
        row = batch["input_ids"].shape[1]
        batch |= document_lengths([row] * batch["input_ids"].shape[0], "host")
    with pytest.raises(RuntimeError, match=r"packed, varlen: .* differs from that of 'published'"):
        padding.check(step, expected, "published")


@pytest.mark.parametrize("documents", [32, 2001])
def test_lengths_are_spread_as_they_say(documents: int) -> None:
    lengths = padding.lengths(replace(padding.SIZES["full"], documents=documents))
    assert abs(np.median(lengths) - 400) < 5 and lengths.max() <= 2048 and (np.diff(lengths) >= 0).all()
    if documents > 1000:
        assert (lengths >= 2047).mean() == pytest.approx(0.005, abs=0.0011)
