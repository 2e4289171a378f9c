"""Which columns and cells become text, and which conversations; and what is refused, by its row."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import trl

from ibft.config import TrainConfig
from ibft.data import load_data, load_rows
from ibft.errors import InputError


def say(*parts: str, **extra: Any) -> list[dict[str, Any]]:
    """say("u:question", "a:answer"): a conversation."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[part[0]], "content": part[2:], **extra} for part in parts]


TWO = say("s:be brief", "u:first", "a:one", "u:second", "a:two\nlines")


def config_for(path: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(base_model="m", dataset=[str(path)], **{"max_length": 2048, **changes})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_messages_and_pairs_of_messages_are_recognised_in_every_kind_of_file(tmp_path) -> None:
    rows = [{"messages": TWO, "id": 1}, {"messages": say("u:q", "a:x", name="kim"), "id": 2}]
    expected = [rows[0]["messages"], rows[1]["messages"]]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.json", "a.parquet", "saved"):
        loaded = load_rows(str(tmp_path / name))
        assert loaded.column_names == ["messages", "example_id"]
        assert [json.loads(cell) for cell in loaded["messages"]] == expected
    pairs = [{"prompt": TWO[:4], "completion": TWO[4:]}]
    datasets.Dataset.from_list(pairs).save_to_disk(tmp_path / "pairs")
    for path in (write(tmp_path / "pairs.jsonl", pairs), tmp_path / "pairs"):
        (cell,) = load_rows(str(path))["messages"]
        assert [(m["content"], m.get("weight", 1)) for m in json.loads(cell)] == [
            ("be brief", 0), ("first", 0), ("one", 0), ("second", 0), ("two\nlines", 1),
        ]  # fmt: skip


def test_text_pairs_are_joined_as_their_columns_say(tmp_path, make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    for columns, separator in ((("prompt", "completion"), ""), (("text", "code"), "\n")):
        path = write(tmp_path / f"{columns[0]}.jsonl", [dict(zip(columns, ("p", "c"), strict=True))])
        for given, expected in ((None, separator), ("", ""), ("\n### ", "\n### ")):
            data, validation = load_data(config_for(path, separator=given), tokenizer)
            assert validation is None
            assert tokenizer.decode(data.document(0).tokens) == f"p{expected}c</s>"
            assert data.prompt_format["separator"] == expected
        named, _ = load_data(config_for(path, prompt_column=columns[0], response_column=columns[1]), tokenizer)
        assert named.prompt_format["separator"] == separator


def test_format_chat_makes_conversations_of_text(tmp_path, chat_tokenizer) -> None:
    tokenizer = chat_tokenizer()
    for columns in (("prompt", "completion"), ("instruction", "output")):
        path = write(tmp_path / "a.jsonl", [dict(zip(columns, ("p", "c"), strict=True))])
        data, _ = load_data(config_for(path, format="chat"), tokenizer)
        assert tokenizer.decode(data.document(0).tokens) == (
            "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nc<|im_end|>"
        )
        assert tokenizer.decode(data.document(0).tokens[data.document(0).is_label]) == "c<|im_end|>"


BAD = [
    ({"messages": "text"}, {}, r"column 'messages' holds 'text'; a conversation is a list of messages"),
    ({"messages": None}, {}, r"holds None; a conversation is a list"),
    ({"messages": ["hello"]}, {}, r"holds the message 'hello'; one is"),
    ({"messages": [{"from": "human", "value": "x"}]}, {}, r"holds the message .*'from'"),
    ({"messages": [*say("u:q"), {"role": "gpt", "content": "x"}]}, {}, r"role 'gpt'; the roles are system, user"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {}, r"content is \[.*it must be text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, {}, r"tool_calls, which"),
    ({"messages": TWO, "tools": [{"name": "f"}]}, {}, r"column 'tools' holds .*not supported"),
    ({"messages": say("u:q", "a:x", weight=0.5)}, {}, r"weight 0\.5; 0 \(not learnt\) and 1"),
    ({"messages": say("u:\ud800", "a:x")}, {}, r"surrogate"),
    ({"prompt": TWO[:4], "completion": "text"}, {}, r"column 'prompt' \+ 'completion' holds 'text'; a conversation"),
    ({"prompt": "text", "completion": TWO[4:]}, {}, r"column 'completion' holds .*list.*must be text"),
    ({"messages": TWO}, {"format": "text"}, r"holds messages, in 'messages', which are no plain text"),
    ({"messages": TWO}, {"separator": "\n"}, r"--separator is for text"),
    ({"messages": TWO, "prompt": "p", "completion": "c"}, {}, r"both a conversation .* and a pair"),
]


@pytest.mark.parametrize(("row", "changes", "message"), BAD)
def test_cells_that_are_no_conversation_are_named(tmp_path, chat_tokenizer, row, changes, message) -> None:
    first = {"messages": TWO} if set(row) == {"messages"} and not changes and isinstance(row["messages"], list) else row
    path = write(tmp_path / "a.jsonl", [first, row])
    with pytest.raises(InputError, match=message) as caught:
        load_data(config_for(path, **changes), chat_tokenizer())
    if first is not row:
        assert "row 1 (counted from 0)" in str(caught.value)


def test_csv_holds_no_messages(tmp_path, chat_tokenizer) -> None:
    (tmp_path / "a.csv").write_text('messages\n"[]"\n')
    with pytest.raises(InputError, match=r"CSV file are text and hold no messages; use \.jsonl or \.parquet"):
        load_data(config_for(tmp_path / "a.csv"), chat_tokenizer())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TWO},
        {"prompt": TWO[:4], "completion": TWO[4:]},
        {"prompt": "p", "completion": "c"},
    ],
)
def test_formats_are_those_of_trl(tmp_path, row) -> None:
    rows = load_rows(str(write(tmp_path / "a.jsonl", [row])))
    assert ("messages" in rows.column_names) == trl.is_conversational(row)


def test_tools_of_a_typed_table_are_refused(tmp_path) -> None:
    rows = datasets.Dataset.from_dict({"messages": [say("u:q", "a:x")], "tools": ["[]"]})
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 0 .*column 'tools' holds '\[\]'"):
        load_rows(str(tmp_path / "a.parquet"))


def test_json_that_is_nested_too_deeply(tmp_path) -> None:
    deep = "[" * 200_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "p", "code": "r"}}\n{{"text": {deep}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2 is nested too deeply"):
        load_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text(f"\n  {deep}")  # white space before a list is none of it
    with pytest.raises(InputError, match=r"a\.json is nested too deeply"):
        load_rows(str(tmp_path / "a.json"))
