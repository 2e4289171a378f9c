"""What a run trains and validates on: datasets mixed by weight, rows held out, and how wrong requests are refused."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest

from ibft.arguments import parse_args
from ibft.cli import run_command
from ibft.config import TrainConfig
from ibft.data import EncodedDataset, load_data
from ibft.errors import InputError
from ibft.legacy import read_training_config


def write(path: Path, prompts: list[str], **columns: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [{"text": prompt, "code": "r", **cell} for prompt, cell in zip(prompts, cells or [{}] * 999, strict=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def load(tokenizer):
    """`load([paths], **config)`: train and validation, each as its prompts in order, and the two datasets."""

    def run(dataset: list[str], **changes: Any) -> tuple[list[str], list[str] | None, Any, Any]:
        config = TrainConfig(base_model="m", dataset=dataset, **{"max_length": 64, **changes})
        train, validation = load_data(config, tokenizer)

        def prompts(data: EncodedDataset) -> list[str]:
            documents = [data.document(index) for index in range(len(data))]
            return [tokenizer.decode(d.tokens[~d.is_label]).removesuffix("\n") for d in documents]

        return prompts(train), None if validation is None else prompts(validation), train, validation

    return run


@pytest.fixture
def files(tmp_path) -> list[str]:
    sizes = {"a": 10, "b, c": 8, "d": 5}  # a path may hold a comma and a space
    return [write(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(n)]) for name, n in sizes.items()]


def test_weights_are_passes(load, files) -> None:
    prompts, _, data, validation = load(files, dataset_weights=[1, 0.5, 2.4])
    assert validation is None
    counts = Counter(prompts)
    assert [counts[f"a{i}"] for i in range(10)] == [1] * 10
    assert sorted(counts[f"b, c{i}"] for i in range(8)) == [0] * 4 + [1] * 4
    assert sorted(counts[f"d{i}"] for i in range(5)) == [2, 2, 2, 3, 3]
    groups = [name[0] for name, _ in itertools.groupby(prompts, key=lambda prompt: prompt[0])]
    assert groups == ["a", "b", "d"]  # in the order in which they are named
    assert prompts[14:24] == [f"d{i}" for i in range(5)] * 2
    assert [data.document(index).example_id for index in range(len(data))] == list(range(26))
    assert data.report.datasets == ((files[0], 10, 1.0), (files[1], 4, 0.5), (files[2], 12, 2.4))
    assert f"{files[1]}: 4 rows, weight 0.5" in data.report.lines()
    assert (data.report.rows, data.report.tokens) == (26, sum(len(prompt) + 3 for prompt in prompts))
    assert data.places(np.array([0, 2, 14, 19])) == f"rows 0, 2 of {files[0]} and 0 of {files[2]} (from 0)"
    again = load(files, dataset_weights=[1, 0.5, 2.4])
    assert again[2].fingerprint == data.fingerprint
    other = load(files, dataset_weights=[1, 0.5, 2.4], seed=7)
    assert other[2].fingerprint != data.fingerprint and Counter(p[0] for p in other[0]) == Counter(
        p[0] for p in prompts
    )


def test_without_weights_every_row_once_and_dropped_rows_keep_their_place(load, tmp_path, files) -> None:
    assert load(files)[0] == [f"{name}{i}" for name, n in (("a", 10), ("b, c", 8), ("d", 5)) for i in range(n)]
    path = tmp_path / "gaps.jsonl"
    path.write_text("".join(json.dumps({"text": f"p{i}", "code": "" if i % 2 else "r"}) + "\n" for i in range(6)))
    _, _, data, _ = load([str(path)], dataset_weights=[2])
    assert [data.document(i).example_id for i in range(len(data))] == [0, 2, 4, 6, 8, 10]
    assert (data.report.rows, data.report.kept, data.report.dropped_empty) == (12, 6, 6)
    assert data.places(np.arange(6)) == f"rows 0, 2, 4 of {path} (from 0)"


def test_repeats_share_their_tokens_but_not_their_noise(load, files) -> None:
    _, _, once, _ = load(files[:1])
    _, _, thrice, _ = load(files[:1], dataset_weights=[3])
    assert thrice.report.tokens == 3 * once.report.tokens and len(thrice) == 30
    assert len({thrice.document(i).example_id for i in range(30)}) == 30
    assert thrice.fingerprint != once.fingerprint


@pytest.mark.parametrize(("wanted", "count"), [("0.25", 6), ("3", 3), (3, 3), (0.01, 1)])
def test_rows_held_out_are_never_trained_on(load, files, wanted, count) -> None:
    weights = [1, 0.5, 3]
    train, held_out, _, validation = load(files, dataset_weights=weights, validation_split=wanted)
    assert len(held_out) == len(set(held_out)) == count and not set(held_out) & set(train)
    everything = {f"{name}{i}" for name, n in (("a", 10), ("b, c", 8), ("d", 5)) for i in range(n)}
    assert {p for p in everything if p[0] != "b"} - set(held_out) == {p for p in train if p[0] != "b"}
    assert all(number == 3 for prompt, number in Counter(train).items() if prompt[0] == "d")
    assert [validation.document(i).example_id for i in range(count)] == list(range(count))
    assert load(files, dataset_weights=weights, validation_split=wanted)[1] == held_out
    assert any(load(files, validation_split=wanted, seed=seed)[1] != held_out for seed in range(5))


def test_a_split_by_name(load, tmp_path) -> None:
    write(tmp_path / "d" / "train.jsonl", ["t0", "t1"])
    write(tmp_path / "d" / "dev.jsonl", ["v0"])
    train, held_out, _, _ = load([str(tmp_path / "d")], validation_split="validation")
    assert (train, held_out) == (["t0", "t1"], ["v0"])
    with pytest.raises(InputError, match=r"no split 'test'; --validation_split can be 'train', 'validation', or a sh"):
        load([str(tmp_path / "d")], validation_split="test")
    saved = {split: datasets.Dataset.from_dict({"text": [split], "code": ["r"]}) for split in ("train", "held_out")}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    assert load([str(tmp_path / "saved")], validation_split="held_out")[:2] == (["train"], ["held_out"])
    with pytest.raises(InputError, match=r"no split 'dev'; --validation_split can be 'held_out', 'train', or a share"):
        load([str(tmp_path / "saved")], validation_split="dev")


def test_a_split_of_the_hub(load, monkeypatch) -> None:
    splits = {"train": ["t"], "held_out": ["v"]}

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": splits[split], "code": ["r"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load(["owner/name"], validation_split="held_out")[:2] == (["t"], ["v"])


def test_a_column_says_what_a_row_is_for(load, tmp_path) -> None:
    words = ["train", "test", "Validation", "dev", "training", "eval"]
    path = write(tmp_path / "a.jsonl", [f"p{i}" for i in range(6)], split=words)
    table = datasets.Dataset.from_json(path, cache_dir=str(tmp_path / "cache"))
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        train, held_out, data, _ = load([str(tmp_path / name)], validation_column="split", dataset_weights=[2])
        assert (train, held_out) == (["p0", "p4"] * 2, ["p2", "p3"])
        assert data.report.left_out == 2 and "2 rows left out" in "".join(data.report.lines())
    apart = write(tmp_path / "v.jsonl", ["v0", "v1"], split=["val", "val"])
    train, held_out, data, _ = load([path, apart], validation_column="split")
    assert (train, held_out) == (["p0", "p4"], ["p2", "p3", "v0", "v1"])
    assert data.report.datasets == ((path, 2, 1.0), (apart, 0, 1.0))
    bad = write(tmp_path / "b.jsonl", ["p0", "p1"], split=["train", "holdout"])
    with pytest.raises(InputError, match=r"b\.jsonl, row 1 .*'split' holds 'holdout'; accepted are train, training"):
        load([bad], validation_column="split")
    with pytest.raises(InputError, match=r"not the 'splat' that --validation_column names\. Did you mean 'split'"):
        load([bad], validation_column="splat")
    none = write(tmp_path / "c.jsonl", ["p0", "p1"], split=["train", "train"])
    with pytest.raises(InputError, match=r"--validation_column split: no row says 'validation'"):
        load([none], validation_column="split")


def test_a_dataset_to_validate_on(load, tmp_path, files) -> None:
    assert load(files[:1], validation_dataset=files[2])[1] == [f"d{i}" for i in range(5)]
    write(tmp_path / "v" / "validation.jsonl", ["v0"])
    assert load(files[:1], validation_dataset=str(tmp_path / "v"))[1] == ["v0"]
    write(tmp_path / "two" / "train.jsonl", ["t0"])
    write(tmp_path / "two" / "test.jsonl", ["t1"])
    with pytest.raises(InputError, match=r"has the splits 'test', 'train', of which none is 'validation'"):
        load(files, validation_dataset=str(tmp_path / "two"))
    with pytest.raises(InputError, match="is trained on; name another"):
        load(files, validation_dataset=files[1])
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"text": "p", "code": ""}))
    with pytest.raises(InputError, match="The data to validate on: None of the 1 rows can be trained on"):
        load(files, validation_dataset=str(empty))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "p", "completion": "c"}))
    with pytest.raises(InputError, match="--separator sets one for both"):
        load(files, validation_dataset=str(other))


def test_datasets_of_different_format_are_named(load, tmp_path, files) -> None:
    chat, pair = tmp_path / "chat.jsonl", tmp_path / "pair.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat.write_text(json.dumps({"messages": messages}))
    pair.write_text(json.dumps({"prompt": "p", "completion": "c"}))
    with pytest.raises(InputError, match=r"a\.jsonl' holds text .*chat\.jsonl' conversations .*--format chat"):
        load([files[0], str(chat)])
    with pytest.raises(InputError, match=r"a\.jsonl' .* with '\\n', and .*pair\.jsonl' .* with ''; .*--separator"):
        load([files[0], str(pair)])
    assert len(load([files[0], str(pair)], separator="\n")[0]) == 11
    folder = tmp_path / "both"
    folder.mkdir()
    for path in (chat, pair):
        path.rename(folder / path.name)
    with pytest.raises(InputError, match=r"chat\.jsonl and .*pair\.jsonl hold rows of different form"):
        load([str(folder)])


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ([0, 0], {}, r"--dataset names .*a\.jsonl' twice; .*--dataset_weights"),
        ([0, 1], {"dataset_weights": [0.01, 1]}, r"weight 0\.01 gives no row to train on: its 10 rows times 0\.01"),
        (
            [0],
            {"dataset_weights": [1e9]},
            r"weight 1e\+09 makes 1e\+10 examples of its 10 rows; an epoch holds at most",
        ),
        ([0], {"validation_split": "10"}, r"--validation_split 10 holds out 10 rows, and the data has 10"),
        ([0], {"validation_split": "validation"}, r"no split 'validation'; --validation_split can be 'train'"),
    ],
)
def test_what_the_rows_do_not_allow(load, files, names, changes, message) -> None:
    with pytest.raises(InputError, match=message):
        load([files[index] for index in names], **changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset_weights 1 2", r"gives 2 weights for 1 datasets"),
        ("--dataset_weights 0", r"--dataset_weights must be greater than 0, not 0\.0"),
        ("--dataset_weights -1", r"--dataset_weights must be greater than 0, not -1\.0|expected"),
        ("--dataset_weights nan", r"--dataset_weights takes finite numbers, not \[nan\]"),
        ("--dataset_weights many", r"--dataset_weights takes finite numbers, not \['many'\]"),
        ("--validation_split 0", r"takes the name of a split, a share .*, not '0'"),
        ("--validation_split 1.5", r"not '1\.5'"),
        ("--validation_split 1.0", r"not '1\.0'"),
        ("--validation_split=-3", r"not '-3'"),
        ("--validation_split 5%", r"not '5%'"),
        ("--validation_split train", r"is the split that is trained on"),
        ("--validation_split dev --validation_column x", r"--validation_split and --validation_column both"),
        ("--validation_column x --validation_dataset y", r"--validation_column and --validation_dataset both"),
        ("--format chat --separator x", r"--separator has no place in --format chat"),
        ("--format tool", r"--format takes auto or text or chat, not 'tool'"),
        ("--streaming", r"streaming is not supported: the plan .* exact position"),
        ("--eval_steps 0", r"--eval_steps must be at least 1"),
    ],
)
def test_flags_that_are_refused(line, message) -> None:
    with pytest.raises(InputError, match=message):
        parse_args(["--base_model", "m", "--dataset", "d", *line.split()])


def test_paths_are_not_split_and_weights_are_numbers(tmp_path) -> None:
    line = ["--base_model", "m", "--dataset", "one, two.jsonl", "a b", "~/c", "--dataset_weights", "1", "0.5,3"]
    config = parse_args(line)[0]
    assert config.dataset == ["one, two.jsonl", "a b", os.path.expanduser("~/c")]
    assert config.dataset_weights == [1.0, 0.5, 3.0]
    assert TrainConfig(base_model="m", dataset="one, two.jsonl").dataset == ["one, two.jsonl"]
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert parse_args([*line[:4], "--separator", ""])[0].separator == ""


@pytest.mark.parametrize("streaming", [True, False])
def test_streaming_in_a_file(tmp_path, streaming) -> None:
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"streaming": streaming, "seed": 3}))
    if streaming:
        with pytest.raises(InputError, match=r"args\.json: streaming is not supported"):
            read_training_config(path)
    else:
        assert read_training_config(path)[0] == {"seed": 3}


@pytest.mark.parametrize(
    ("ours", "published", "expected"),
    [(None, "theirs", "theirs"), ("", "theirs", "theirs"), ("ours", "theirs", "ours"), ("ours", None, "ours")],
)
def test_the_token_reaches_what_loads_from_the_hub(monkeypatch, ours, published, expected) -> None:
    for name, value in (("HF_TOKEN", ours), ("HUGGINGFACE_TOKEN", published)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    seen = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        seen.append(huggingface_hub.get_token())  # what tokenizer, model and datasets send
        return datasets.Dataset.from_dict({"text": ["p"], "code": ["r"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from ibft.data import load_rows

    assert run_command(lambda argv: load_rows("owner/private") and None, []) == 0
    assert seen == [expected]
