import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from ibft.data import load_rows
from ibft.data.columns import KNOWN_COLUMNS, ColumnChoice
from ibft.errors import InputError

# Text that a reader could take for something else, and text that breaks careless line splitting.
ROWS = [
    {"Instruction": "add 'é', \"ü\" 和", "Response": "line 1\r\nline 2\u2028, and\ttab", "extra": 1},
    {"Instruction": "007", "Response": "null", "extra": 2},
    {"Instruction": "2020-01-01", "Response": "NA", "extra": 3},
    {"Instruction": "", "Response": " ", "extra": 4},
]
EXPECTED = [(row["Instruction"], row["Response"], index) for index, row in enumerate(ROWS)]


def write(path: Path, rows: list) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif name.endswith(".json"):
            json.dump(rows, file, indent=1)
        else:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def triples(dataset: datasets.Dataset) -> list[tuple[str, str, int]]:
    return list(zip(dataset["prompt"], dataset["response"], dataset["example_id"], strict=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.JSONL", "a.csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    if name == "a.JSONL":
        rows = load_rows(str(write(tmp_path / "a.jsonl", ROWS).rename(tmp_path / name)))
    else:
        rows = load_rows(str(write(tmp_path / name, ROWS)))
    assert triples(rows) == EXPECTED
    assert rows.column_names == ["prompt", "response", "example_id"]
    assert rows.features["example_id"].dtype == "int64"


def test_csv_rows_with_line_breaks_may_straddle_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibft.data.readers.CSV_BLOCK_BYTES", 200)
    rows = [{"text": f"prompt {i}\n" * (i % 5), "code": f'"{i}",\n\n{i}'} for i in range(100)]
    expected = [(row["text"], row["code"], i) for i, row in enumerate(rows)]
    assert triples(load_rows(str(write(tmp_path / "a.csv", rows)))) == expected


def test_json_file_with_an_object_a_line_bom_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n \n", encoding="utf-8")
    assert triples(load_rows(str(path))) == EXPECTED


def test_typed_but_empty(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.null()), "code": pa.array([])}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has no rows"):
        load_rows(str(tmp_path / "a.parquet"))


def test_saved_dataset_and_dict_and_indices(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.select([2, 0]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([3])).save_to_disk(tmp_path / "both")
    assert [row[0] for row in triples(load_rows(str(tmp_path / "one")))] == ["2020-01-01", "add 'é', \"ü\" 和"]
    assert triples(load_rows(str(tmp_path / "both"))) == EXPECTED
    assert triples(load_rows(str(tmp_path / "both"), split="test")) == [("", " ", 0)]
    with pytest.raises(InputError, match=r"no split 'dev'; --dataset_split can be 'test', 'train'\."):
        load_rows(str(tmp_path / "both"), split="dev")
    before = sorted(tmp_path.rglob("*"))
    load_rows(str(tmp_path / "both"))
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_is_read_in_path_order_and_by_split(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", ROWS[2:])
    write(tmp_path / "a" / "part.jsonl", ROWS[:2])
    assert triples(load_rows(str(tmp_path))) == EXPECTED
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    write(tmp_path / ".hidden.jsonl", ROWS)
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert triples(load_rows(str(tmp_path))) == EXPECTED  # test rows never join the training rows
    assert triples(load_rows(str(tmp_path), split="test")) == EXPECTED[:1]
    with pytest.raises(InputError, match="'test', 'train'"):
        load_rows(str(tmp_path), split="validation")


@pytest.mark.parametrize("pair", [("Instruction", "Response"), ("instruction", "output"), ("text", "code")])
def test_known_columns_are_recognised(tmp_path: Path, pair: tuple[str, str]) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": 3, pair[1]: "r", pair[0]: "p"}])
    assert triples(load_rows(str(path))) == [("p", "r", 0)]


def test_the_input_of_alpaca_is_not_lost(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"instruction": "i", "input": "x", "output": "o"}]))
    with pytest.raises(InputError, match=r"'instruction', 'output' without 'input' would lose"):
        load_rows(path)
    assert triples(load_rows(path, prompt_column="instruction", response_column="output")) == [("i", "o", 0)]


@pytest.mark.parametrize("other", [{"messages": []}, {"prompt": "p", "completion": "c"}], ids=["messages", "trl"])
def test_a_known_pair_beside_another_form_is_not_chosen_in_silence(tmp_path: Path, other: dict[str, object]) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"instruction": "i", "output": "o", **other}]))
    with pytest.raises(
        InputError, match=r"both a (conversation|pair) \('(messages|prompt).* and a pair \('instruction'"
    ):
        load_rows(path)
    assert triples(load_rows(path, prompt_column="instruction", response_column="output")) == [("i", "o", 0)]


def test_columns_by_argument_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "t", "code": "c", "Response": "r", "Instruction": "i"}])
    assert triples(load_rows(str(path), prompt_column="code", response_column="text")) == [("c", "t", 0)]
    with pytest.raises(InputError, match=r"'Instruction' \+ 'Response' \(OriGen\), 'text' \+ 'code' \(MBPP\)"):
        load_rows(str(path))


def test_columns_that_cannot_be_settled(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"Question": "q", "response": "r"}]))
    with pytest.raises(InputError, match=r"columns 'Question', 'response';.*--prompt_column and --response_column"):
        load_rows(path)
    with pytest.raises(InputError, match=r"not 'question'\. Did you mean 'Question'\?"):
        load_rows(path, prompt_column="question", response_column="response")
    with pytest.raises(InputError, match="--response_column is missing"):
        load_rows(path, prompt_column="Question")
    with pytest.raises(InputError, match="--prompt_column is missing"):
        load_rows(path, response_column="response")
    with pytest.raises(InputError, match="must differ"):
        load_rows(path, prompt_column="Question", response_column="Question")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (None, r"None \(NoneType\)"),
        (3, r"3 \(int\)"),
        (True, r"True \(bool\)"),
        (["x"], r"\['x'\] \(list\)"),
        ({"a": "x"}, r"\{'a': 'x'\} \(dict\)"),
        ("bad \ud800 text", "surrogate"),
    ],
)
def test_json_cell_that_is_no_text_is_named(tmp_path: Path, suffix: str, cell: object, shown: str) -> None:
    rows = [{"text": "p", "code": "c"}, {"text": "p", "code": cell}]
    path = tmp_path / f"a{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InputError, match=rf"row 1 \(counted from 0\): column 'code' holds .*{shown}"):
        load_rows(str(path))


def test_missing_key_beyond_the_first_batch_is_named_by_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibft.data.readers.BATCH", 2)
    path = write(tmp_path / "a.jsonl", [{"text": "p", "code": "c"}] * 5)
    assert triples(load_rows(str(path))) == [("p", "c", index) for index in range(5)]
    path.write_text(path.read_text() + '{"text": "p"}\n')
    with pytest.raises(InputError, match=r"row 5 .*column 'code' holds nothing \(no such key\)"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (pa.array([1, 2]), r"row 0 .*'code' holds 1 \(int\), as Arrow type int64"),
        (pa.array(["a", None]), r"row 1 .*'code' holds None \(NoneType\)"),
        (pa.array([None, None]), r"row 0 .*'code' holds None \(NoneType\)"),
        (pa.array([["a"], ["b"]]), r"row 0 .*'code' holds \['a'\] \(list\)"),
    ],
)
def test_typed_cell_that_is_no_text_is_named(tmp_path: Path, column: pa.Array, shown: str) -> None:
    table = pa.table({"text": pa.array(["p", "q"]), "code": column})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        with pytest.raises(InputError, match=shown):
            load_rows(str(tmp_path / name))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_other_arrow_types_of_text(kind: pa.DataType) -> None:
    from ibft.data.columns import Layout
    from ibft.data.readers import read_columns

    table = pa.table({"text": pa.array(["p", "q"]).cast(kind), "code": pa.array(["a", "b"])})
    source = read_columns(table, Layout(("text", "code"), pair_of_text=True), "x")
    assert source.table.to_pydict() == {"prompt": ["p", "q"], "response": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "code": "b"}\n\n{"text": ', r"line 3 is not valid JSON"),
        ("a.jsonl", b'["text", "code"]\n', r"line 1 holds \['text', 'code'\] \(list\), not an object"),
        ("a.json", b'[{"text": "a", "code": "b"},\n {"text" "a"}]', r"line 2 is not valid JSON"),
        ("a.json", b'[{"text": "a", "code": "b"}, 5]', r"row 1 holds 5 \(int\), not an object"),
        ("a.jsonl", b'{"text": "\xff", "code": "b"}', r"not UTF-8 text"),
        ("a.jsonl.gz", b"not gzip at all", r"could not be read as \.jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a", "code": "b"}\n' * 99)[:-12], r"could not be read as \.jsonl"),
        ("a.csv", b"text,code\n1,2,3\n", r"could not be read as \.csv: .*Row #2: Expected 2 columns, got 3"),
        ("a.csv", b"text,code\n\xff,2\n", r"UTF-?8"),
        ("a.parquet", b"PAR1 not parquet", r"could not be read as \.parquet"),
        ("a.jsonl", b"", r"has no rows"),
        ("a.jsonl", b"\n  \n", r"has no rows"),
        ("a.json", b"[]", r"has no rows"),
        ("a.csv", b"", r"has no rows"),
        ("a.csv", b"text,code\n", r"has no rows"),
        ("a.txt", b"hello", r"not a kind of file that can be read\. Accepted are files ending in \.jsonl"),
        ("state.json/x", b"", r"could not be read as a saved dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # compressed bytes hold the time
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_rows(str(tmp_path if name.startswith("state") else path))


def test_paths_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a path must not be looked up on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    write(tmp_path / "origen.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "origin.jsonl"), "origin.jsonl", "./origin", "../none/origen.jsonl", "a/b/c", "a b"):
        with pytest.raises(InputError, match=r"no file or folder.*save_to_disk"):
            load_rows(name)
    with pytest.raises(InputError, match=r"Near by there is 'origen\.jsonl'"):
        load_rows("origin.jsonl")
    with pytest.raises(InputError, match=r"There is no folder 'none' either"):
        load_rows("none/origen.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no data"):
        load_rows("empty")
    with pytest.raises(InputError, match=r"no split 'test'; --dataset_split can be 'train'"):
        load_rows("origen.jsonl", split="test")


def test_hub_name_goes_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert triples(load_rows("owner/data-v1.5", split="test[:4]")) == EXPECTED
    assert asked == [("owner/data-v1.5", "test[:4]")]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach\nthe Hub"), ValueError("Unknown split"), OSError()])
def test_hub_failure_is_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, tmp_path: Path) -> None:
    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mbpp_rows").mkdir()
    with pytest.raises(InputError) as caught:
        load_rows("mbpp_row")
    reason = " ".join(str(error).split()) or "OSError"
    assert f"could not be loaded: {reason}. Near by there is 'mbpp_rows'." in str(caught.value)
    assert "HF_TOKEN" in str(caught.value) and "\n" not in str(caught.value)


def test_real_data(test_data) -> None:
    mbpp = load_rows(str(test_data("mbpp/mbpp.jsonl")))
    origen = load_rows(str(test_data("rtllm/rtllm_train.jsonl")))
    assert (len(mbpp), len(origen)) == (974, 50)
    lines = test_data("mbpp/mbpp.jsonl").read_text(encoding="utf-8").split("\n")
    assert triples(mbpp)[601] == (json.loads(lines[601])["text"], json.loads(lines[601])["code"], 601)
    assert origen[0]["response"].count("module") >= 2


def test_every_known_pair_is_recognised_by_exact_case_only() -> None:
    for prompt, response in KNOWN_COLUMNS.values():
        with pytest.raises(InputError):
            ColumnChoice()([prompt.swapcase(), response], lambda name: False, "x")
