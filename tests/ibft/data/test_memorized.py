"""What a training leaves out as memorised: which rows, by which scores, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from ibft.config import TrainConfig
from ibft.data import load_data
from ibft.data.columns import ColumnChoice
from ibft.data.memorized import SCHEMA, Drop, ScoreTable, record_path, row_digests
from ibft.data.sources import load_source
from ibft.errors import InputError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def digests(path: str, **choice: Any) -> list[str]:
    return row_digests(load_source(path, ColumnChoice(**choice), split="train"))


def score_file(path: Path, found: list[str], min_k: list[float | None], **columns: list[Any]) -> str:
    """A file of scores for rows of these digests; a row without a score gave no document."""
    count = len(found)
    values: dict[str, list[Any]] = {
        "example_id": [None if score is None else row for row, score in enumerate(min_k)],
        "source": ["elsewhere.jsonl"] * count,
        "row": list(range(count)),
        "digest": found,
        "min_k": min_k,
        "min_k_plus_plus": [None if score is None else -score for score in min_k],
        "mean_log_prob": min_k,
        "tokens": [None if score is None else 3 for score in min_k],
        **columns,
    }
    table = pa.table({name: pa.array(values[name], SCHEMA.field(name).type) for name in SCHEMA.names})
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return str(path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", [{"text": f"p{i}", "code": f"r{i}"} for i in range(10)])


@pytest.fixture
def load(tokenizer):
    """The prompts that are trained on, in order, those validated on, and the data."""

    def run(dataset: list[str], **changes: Any) -> tuple[list[str], list[str], Any]:
        data, validation = load_data(TrainConfig(base_model="m", dataset=dataset, **changes), tokenizer)

        def prompts(encoded: Any) -> list[str]:
            documents = [encoded.document(index) for index in range(len(encoded))]
            return [tokenizer.decode(d.tokens[~d.is_label]).removesuffix("\n") for d in documents]

        return prompts(data), [] if validation is None else prompts(validation), data

    return run


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_highest_scores_are_left_out(load, rows: str, tmp_path: Path, ending: str) -> None:
    scores = [-1.0, -5.0, -0.5, -3.0, -0.1, -4.0, -2.0, -6.0, -7.0, -8.0]
    file = score_file(tmp_path / f"s.{ending}", digests(rows), scores)
    plain, _, before = load([rows])
    left, _, data = load([rows], memorization_scores=file, drop_memorized="20%")
    assert left == [prompt for prompt in plain if prompt not in ("p2", "p4")]
    assert data.report.memorized == 2 and data.report.rows == 8
    whose = f"min_k in {file!r}, which no record says the model of"
    assert f"2 rows left out as the most memorised, by {whose}" in data.report.lines()
    assert data.fingerprint != before.fingerprint
    assert load([rows], memorization_scores=file, drop_memorized="3")[0] == [p for p in left if p != "p0"]
    assert load([rows], memorization_scores=file, drop_memorized="above -0.5")[0] == [p for p in plain if p != "p4"]
    inverse = load([rows], memorization_scores=file, drop_memorized="1", memorization_measure="min_k_plus_plus")
    assert inverse[0] == [prompt for prompt in plain if prompt != "p9"]


def test_the_report_says_whose_scores_they_were(load, rows: str, tmp_path: Path) -> None:
    file = score_file(tmp_path / "s.jsonl", digests(rows), list(np.linspace(-9, -1, 10)))
    record: dict[str, Any] = {"model": "models/base", "adapter": None, "k": 0.3, "span": "full"}
    for adapter, words in ((None, ""), ("runs/sft", " with 'runs/sft'")):
        record_path(Path(file)).write_text(json.dumps({**record, "adapter": adapter}))
        report = load([rows], memorization_scores=file, drop_memorized="1", memorization_measure="min_k_plus_plus")[
            2
        ].report
        assert report.memorized_by == f"min_k_plus_plus (k 0.3, span full) under 'models/base'{words}"
        assert f"1 rows left out as the most memorised, by {report.memorized_by}" in report.lines()
    assert load([rows])[2].report.memorized_by == ""


def test_scores_find_their_rows_wherever_these_lie(load, rows: str, tmp_path: Path) -> None:
    """In another order, another file, another format, among other scores; a pair as text or as a conversation."""
    scores = dict(zip(digests(rows), np.linspace(-9, -1, 10), strict=True))
    shuffled = [{"code": f"r{i}", "text": f"p{i}", "more": i} for i in (3, 9, 0)]
    other = write(tmp_path / "other.parquet", shuffled)
    assert set(digests(other)) < set(scores)
    file = score_file(tmp_path / "s.jsonl", list(scores), list(scores.values()))
    assert load([other], memorization_scores=file, drop_memorized="1")[0] == ["p3", "p0"]
    pairs = [[{"role": "user", "content": f"p{i}"}, {"content": f"r{i}", "role": "assistant"}] for i in (3, 9, 0)]
    chats = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in pairs])
    assert digests(chats) == digests(other) == digests(other, format="chat")
    named = write(tmp_path / "named.jsonl", [{"a": "p3", "b": "r3"}])
    assert digests(named, named=("a", "b")) == digests(other)[:1]
    assert digests(named, named=("b", "a")) != digests(other)[:1]


def test_several_datasets_are_ranked_together_and_weights_come_after(load, rows: str, tmp_path: Path) -> None:
    more = write(tmp_path / "more.jsonl", [{"text": f"q{i}", "code": "r"} for i in range(4)])
    scores = [*np.linspace(-9, -8, 10), -1, -2, -8.5, -9.5]
    file = score_file(tmp_path / "s.jsonl", digests(rows) + digests(more), scores)
    left, _, data = load([rows, more], dataset_weights=[1, 2], memorization_scores=file, drop_memorized="3")
    assert left == [f"p{i}" for i in range(9)] + ["q2", "q3"] * 2
    assert data.report.memorized == 3


def test_rows_to_validate_on_are_the_same_and_stay(load, rows: str, tmp_path: Path) -> None:
    file = score_file(tmp_path / "s.jsonl", digests(rows), list(np.linspace(-9, -1, 10)))
    plain, held_out, _ = load([rows], validation_split="0.3")
    left, still, data = load([rows], validation_split="0.3", memorization_scores=file, drop_memorized="3")
    assert still == held_out and len(held_out) == 3
    assert left == sorted(plain)[:-3] and data.report.memorized == 3


def test_rows_without_a_score_stay_and_equal_rows_share_theirs(load, tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl", [{"text": name, "code": "r"} for name in "abcab"])
    found = digests(file)
    assert found[0] == found[3] and len(set(found)) == 3
    scores = score_file(tmp_path / "s.jsonl", found[:3], [-1.0, -2.0, None])
    assert load([file], memorization_scores=scores, drop_memorized="50%")[0] == ["b", "c", "b"]
    assert load([file], memorization_scores=scores, drop_memorized="4")[0] == ["c"]
    with pytest.raises(InputError, match="--drop_memorized 5 drops 5 rows; there are 5, of which 4 have a score"):
        load([file], memorization_scores=scores, drop_memorized="5")


def test_a_row_of_several_documents_has_their_mean_by_tokens(tmp_path: Path) -> None:
    path = score_file(tmp_path / "s.jsonl", ["a", "a", "b"], [-1.0, -4.0, -3.0], tokens=[2, 1, 7])
    assert ScoreTable(Path(path)).of_digests("min_k") == {"a": pytest.approx(-2.0), "b": -3.0}


def test_a_row_that_was_not_scored_is_named(load, rows: str, tmp_path: Path) -> None:
    found = digests(rows)
    file = score_file(tmp_path / "s.jsonl", [*found[:6], *found[8:]], list(np.linspace(-9, -1, 8)))
    with pytest.raises(InputError, match=r"no score of 2 of the 10 rows of .*, the first being row 6 \(counted from 0"):
        load([rows], memorization_scores=file, drop_memorized="1")


@pytest.mark.parametrize(
    ("text", "count", "chosen"),
    [
        ("25%", 10, [9, 8]),
        ("29%", 100, list(range(99, 70, -1))),  # 0.29 * 100 is 28.999999999999996
        (" 3 ", 10, [9, 8, 7]),
        ("above 6.5", 10, [9, 8, 7]),
        ("above 1e1", 13, [12, 11]),
    ],
)
def test_what_is_dropped(text: str, count: int, chosen: list[int]) -> None:
    assert Drop.read(text, "--drop").choose(np.arange(count, dtype=float), text).tolist() == chosen


def test_of_equal_scores_the_first_go() -> None:
    scores = np.array([1.0, 2.0, np.nan, 2.0, 2.0, 0.0])
    assert Drop.read("2", "").choose(scores, "").tolist() == [1, 3]
    assert Drop.read("40%", "").choose(scores, "").tolist() == [1, 3]  # of five
    assert Drop.read("above 0.5", "").choose(scores, "").tolist() == [1, 3, 4, 0]


def test_a_number_from_a_file_of_settings_counts_rows() -> None:
    values: dict[str, Any] = {"base_model": "m", "dataset": ["d"], "memorization_scores": "s", "drop_memorized": 5}
    assert TrainConfig(**values).drop_memorized == "5"
    with pytest.raises(InputError, match=r"--drop_memorized takes text, not 0\.1"):
        TrainConfig(**{**values, "drop_memorized": 0.1})
