"""`ibft memorization filter`: the rows that are left are the original ones, whatever the data lies in."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from ibft.cli import main
from ibft.data.columns import ColumnChoice
from ibft.data.memorized import SCHEMA, row_digests
from ibft.data.sources import load_source
from ibft.memorization.config import FilterFlags
from ibft.memorization.filter import describe, filter_rows

# Columns that are not learnt, and text that a careless writer would change.
ROWS: list[dict[str, Any]] = [
    {"id": n, "text": f"p{n} é\u2028 \"'", "code": f"r{n}\r\n\t", "tags": ["a", None], "meta": {"x": n / 3, "y": None}}
    for n in range(10)
]
FLAT = [{"id": str(n), "text": f'p{n}, "é"', "code": f"r{n}\n\n007", "note": "null"} for n in range(10)]
DROPPED = {2, 3, 7}


def scores_for(path: Path, split: str = "train") -> str:
    """A file of scores in which the rows DROPPED have the highest."""
    found = row_digests(load_source(str(path), ColumnChoice(), split=split))
    scores = [1.0 / (1 + n) if n in DROPPED else -1.0 - n for n in range(len(found))]
    file = path.parent / "scores.parquet"
    values: dict[str, list[Any]] = {
        **dict.fromkeys(("min_k", "min_k_plus_plus", "mean_log_prob"), scores),
        "example_id": list(range(len(found))),
        "row": list(range(len(found))),
        "source": [str(path)] * len(found),
        "digest": found,
        "tokens": [1] * len(found),
    }
    pa.parquet.write_table(pa.table({name: values[name] for name in SCHEMA.names}, schema=SCHEMA), file)
    return str(file)


@pytest.fixture
def left(tmp_path: Path) -> Callable[..., Path]:
    """Filters a dataset by such scores into out/left.<ending>."""

    def run(path: Path, ending: str, **changes: Any) -> Path:
        output = tmp_path / "out" / f"left{ending}"
        split = changes.get("dataset_split", "train")
        options: dict[str, Any] = {"dataset": str(path), "output": str(output), "drop_top": "30%", **changes}
        filter_rows(FilterFlags(scores=scores_for(path, split), **options))
        assert not list(output.parent.glob(".*")), "nothing half-written is left"
        return output

    return run


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for number, row in enumerate(rows) if number not in DROPPED]


def test_lines_stay_as_they_are(left: Callable[..., Path], tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS)]
    lines[4] = lines[4].replace(": ", ":   ").replace("1.3333333333333333", "1.33333333333333330e0")
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n \n", encoding="utf-8", newline="")
    output = left(path, ".jsonl").read_text(encoding="utf-8")
    assert output == "".join(f"{line}\n" for n, line in enumerate(lines) if n not in DROPPED)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "list.json", "a.parquet", "saved", "hub"])
def test_all_columns_stay(
    left: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: str
) -> None:
    path = tmp_path / name
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if name == "a.parquet":
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif name == "hub":
        loaded = datasets.Dataset.from_list(ROWS)
        monkeypatch.setattr(datasets, "load_dataset", lambda dataset, *, split: loaded)
        monkeypatch.chdir(tmp_path)
        path = Path("owner/name")
        Path("owner").mkdir()
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(json.dumps(ROWS) if name == "list.json" else text)
    assert read(left(path, ending)) == kept(ROWS)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_cells_of_a_csv_file_stay_text(left: Callable[..., Path], tmp_path: Path, ending: str) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(FLAT[0]))
        writer.writeheader()
        writer.writerows(FLAT)
    assert read(left(path, ending)) == kept(FLAT)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_folder_of_files_and_splits(left: Callable[..., Path], tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(FLAT[:4]), folder / "validation-0.parquet")
    (folder / "validation-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FLAT[4:]))
    (folder / "validation-2.jsonl").touch()
    (folder / "train.jsonl").write_text(json.dumps({"text": "a", "code": "b"}) + "\n")
    assert read(left(folder, ending, dataset_split="validation")) == kept(FLAT)


def test_what_json_and_parquet_cannot_hold(left: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    day = datetime.date(2024, 2, 29)
    pa.parquet.write_table(pa.Table.from_pylist([{**row, "day": day} for row in FLAT]), path)
    assert {row["day"] for row in read(left(path, ".jsonl"))} == {"2024-02-29"}
    pa.parquet.write_table(pa.Table.from_pylist([{**row, "raw": b"\xff"} for row in FLAT]), path)
    with pytest.raises(ValueError, match=r"JSON cannot hold the value b'.*\(bytes\); write to a .parquet file"):
        left(path, ".jsonl", overwrite=True)
    assert {row["raw"] for row in read(left(path, ".parquet"))} == {b"\xff"}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({**row, "any": row["id"] if n else 3}) + "\n" for n, row in enumerate(FLAT)))
    before = (tmp_path / "out" / "left.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"column 'any' holds values of several types.* write to a .jsonl file"):
        left(mixed, ".parquet", overwrite=True)
    assert (tmp_path / "out" / "left.parquet").read_bytes() == before, "the one that is there stays whole"


def test_what_is_said_of_what_was_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = {"dataset": str(path), "output": str(tmp_path / "left.jsonl"), "scores": scores_for(path)}
    result = filter_rows(FilterFlags(**flags, drop_top="above 0"))
    assert [each["row"] for each in result["dropped_rows"]] == [2, 3, 7]
    assert (result["lowest_dropped"], result["highest_kept"], result["without_score"]) == (1 / 8, -1.0, 0)
    text = describe(result)
    assert "10 rows: 3 dropped, whose min_k is 0.125 or more; 7 written to " in text
    assert "(row, counted from 0: score): 2: 0.3333, 3: 0.25, 7: 0.125" in text


def test_a_filtered_file_trains_as_a_filtered_training(
    base_folder: Path, tasks_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two ways lead to the same data, and so to the same run; which is resumed only with the same rows left out."""
    scores, rows = tmp_path / "known.jsonl", tmp_path / "left.jsonl"
    model = f"--model {base_folder} --dataset {tasks_file}"
    assert main(f"memorization score {model} --output {scores} --use_cpu".split()) == 0
    filtering = f"--scores {scores} --dataset {tasks_file} --output {rows} --drop_top 25%"
    assert main(f"memorization filter {filtering}".split()) == 0
    train = (
        f"train --base_model {base_folder} --max_length 128 --bottleneck_dim 8 --use_cpu --max_steps 3 --save_steps 2"
    )
    direct = f"{train} --dataset {tasks_file} --memorization_scores {scores} --output_dir {tmp_path}/direct"
    assert main(f"{train} --dataset {rows} --output_dir {tmp_path}/file".split()) == 0
    assert main(f"{direct} --drop_memorized 25%".split()) == 0
    records = [json.loads((tmp_path / name / "ibft.json").read_text()) for name in ("file", "direct")]
    assert records[0]["data"]["fingerprint"] == records[1]["data"]["fingerprint"]
    assert records[1]["data"]["memorized"] == 6 and records[1]["data"]["rows"] == 18
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("file", "direct")]
    assert weights[0] == weights[1]

    record = {**records[1], "result": None}
    (tmp_path / "direct" / "ibft.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(f"{direct} --drop_memorized 10% --resume".split()) == 2
    assert "is of a different run; resuming would mix them: data was one of fingerprint" in capsys.readouterr().err
    scores.rename(tmp_path / "moved.jsonl")
    moved = direct.replace("known.jsonl", "moved.jsonl")
    assert main(f"{moved} --drop_memorized 6 --resume".split()) == 0
    assert (tmp_path / "direct" / "adapter_model.safetensors").read_bytes() == weights[0]
