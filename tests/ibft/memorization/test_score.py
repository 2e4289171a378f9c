"""`ibft memorization score`: what it writes, how it goes on after any end, and which scores it never reuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ibft.memorization.score
import ibft.memorization.score_file
from ibft.cli import main
from ibft.data import encode, load_rows
from ibft.data.memorized import SCHEMA, ScoreTable
from ibft.export import read_source
from ibft.memorization.config import ScoreFlags
from ibft.memorization.score import score
from ibft.memorization.scores import Scores, score_batches, score_documents

MEASURES = ("min_k", "min_k_plus_plus", "mean_log_prob", "tokens")
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Run:
    """Scores the tasks into scores.jsonl, in several batches, unless told otherwise; the lines of the file."""

    def command(**changes: Any) -> list[dict[str, Any]]:
        options: dict[str, Any] = {
            "model": str(base_folder),
            "dataset": [str(tasks_file)],
            "output": str(tmp_path / "scores.jsonl"),
            "batch_tokens": 300,
            "use_cpu": True,
        }
        path = score(ScoreFlags(**{**options, **changes}))
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        return [json.loads(line) for line in path.read_text().splitlines()]

    return command


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next scoring ends after so many batches."""

    def cut_off(*arguments: Any, **options: Any) -> Any:
        for number, found in enumerate(score_batches(*arguments, **options)):
            if number == batches:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(ibft.memorization.score, "score_batches", cut_off)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The documents that are scored from now on."""
    seen: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        for documents, scores in score_batches(*arguments, **options):
            seen.extend(documents.tolist())
            yield documents, scores

    monkeypatch.setattr(ibft.memorization.score, "score_batches", watched)
    return seen


def test_a_line_for_each_row(run: Run, base_folder: Path, tasks_file: Path, tmp_path: Path) -> None:
    rows = run()
    assert [row["row"] for row in rows] == [row["example_id"] for row in rows] == list(range(24))
    assert all(list(row) == SCHEMA.names and row["source"] == str(tasks_file) for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    data = encode(load_rows(str(tasks_file)), tokenizer, max_length=2048)
    direct = score_documents(AutoModelForCausalLM.from_pretrained(base_folder), data)
    for name, column in zip(Scores._fields, direct, strict=True):
        np.testing.assert_allclose([row[name] for row in rows], column, rtol=0, atol=1e-5)
    record = ScoreTable(tmp_path / "scores.jsonl").record
    assert (record["k"], record["span"], record["dataset"]) == (0.2, "response", [str(tasks_file)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.jsonl", "scores.jsonl.record.json"]
    assert run(output=str(tmp_path / "new" / "scores.parquet")) == rows


def test_rows_that_give_no_document_have_no_score(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [("", "x = 1"), ("empty", " "), ("long", "y" * 200), ("last", "z = 2")]
    file.write_text("".join(json.dumps({"instruction": a, "output": b}) + "\n" for a, b in rows))
    found = run(dataset=[str(file)], max_length=40)
    assert [row["row"] for row in found] == [0, 1, 2, 3]
    assert [row["example_id"] for row in found] == [0, None, None, 3]
    assert all((row["min_k"] is None) == (row["tokens"] is None) == (row["row"] in (1, 2)) for row in found)
    assert len({row["digest"] for row in found}) == 4


def test_several_datasets_are_told_apart(run: Run, tasks_file: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.jsonl"
    second.write_text("\n".join(reversed(tasks_file.read_text().splitlines()[:5])))
    found = run(dataset=[str(tasks_file), str(second)])
    assert [(row["source"], row["row"]) for row in found] == [(str(tasks_file), row) for row in range(24)] + [
        (str(second), row) for row in range(5)
    ]
    for name in ("digest", *MEASURES):
        assert [row[name] for row in found[24:]] == [row[name] for row in found[4::-1]], name


def test_an_interrupted_run_goes_on_to_the_same_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(output=str(tmp_path / "whole.jsonl"))
    stop_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "scores.jsonl").exists()
    partial = tmp_path / "scores.jsonl.partial"
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    before = sum(len(line["documents"]) for line in kept)
    assert len(kept) == 3 and 0 < before < 24
    with partial.open("a") as file:
        file.write('{"documents": [0, 1], "min')  # cut off by a full disk
    stop_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    assert len(kept) == 4
    before = sum(len(line["documents"]) for line in kept)
    seen = counted(monkeypatch)
    assert run() == whole
    assert len(seen) == 24 - before and not {each for line in kept for each in line["documents"]} & set(seen)
    assert f"note: {before} of 24 rows are scored already" in capsys.readouterr().err
    assert not partial.exists()
    assert run() == whole and len(seen) == 24 - before, "what is finished is not done again"


def test_a_process_that_is_killed_leaves_what_it_had(
    run: Run, base_folder: Path, tasks_file: Path, tmp_path: Path
) -> None:
    whole = run(output=str(tmp_path / "whole.jsonl"), batch_tokens=100)
    plant = (
        "import sys, os, signal, ibft.memorization.score as module\n"
        "from ibft.cli import main\n"
        "real = module.ScoreFile.add\n"
        "def add(self, documents, scores):\n"
        "    real(self, documents, scores)\n"
        "    if self.done.sum() > 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "module.ScoreFile.add = add\n"
        "main(sys.argv[1:])\n"
    )
    command = f"memorization score --model {base_folder} --dataset {tasks_file} --use_cpu --batch_tokens 100"
    output = tmp_path / "scores.jsonl"
    ended = subprocess.run([sys.executable, "-c", plant, *command.split(), "--output", str(output)])
    assert ended.returncode == -signal.SIGKILL and not output.exists()
    assert run(batch_tokens=100) == whole


def test_ctrl_c_says_how_to_go_on(
    base_folder: Path, tasks_file: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(0, monkeypatch)
    command = f"memorization score --model {base_folder} --dataset {tasks_file} --output {tmp_path}/s.jsonl --use_cpu"
    assert main(command.split()) == 128 + signal.SIGINT
    assert capsys.readouterr().err.endswith("ibft: interrupted; the same command goes on where it stopped.\n")
    assert main([*command.split(), "--overwrite"]) == 128 + signal.SIGINT  # which would start over once more
    assert "interrupted; the same command without --overwrite goes on" in capsys.readouterr().err


def test_too_little_memory_says_what_to_do(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any, **options: Any) -> Any:
        yield next(score_batches(*arguments, **options))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ibft.memorization.score, "score_batches", exhausted)
    with pytest.raises(ValueError, match=r"too little memory for 300 tokens at once; \d+ of 24 rows are scored"):
        run()
    with pytest.raises(ValueError, match="and the same command without --overwrite, with a smaller --batch_tokens"):
        run(overwrite=True)
    monkeypatch.undo()
    assert len(run(batch_tokens=100)) == 24


def test_too_little_memory_for_the_model_says_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ibft.memorization.score, "load_model", exhausted)
    with pytest.raises(ValueError, match=r"too little memory for '.*' in float32; --dtype bfloat16 .* --use_cpu"):
        run()


@pytest.fixture
def other_models(base_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """The base model with another weight, and with another setting."""
    folders = {name: tmp_path / name for name in ("weights", "settings")}
    for folder in folders.values():
        shutil.copytree(base_folder, folder)
    file = folders["weights"] / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][-1, -1] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folders["settings"] / "config.json").read_text())
    (folders["settings"] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    return folders


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "other", ["weights", "settings", "adapter", "rows", "text", "max_length", "k", "span", "dtype"]
)
def test_scores_of_anything_else_are_not_reused(
    run: Run,
    other_models: dict[str, Path],
    adapter_folder: Path,
    tasks_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: bool,
    other: str,
) -> None:
    if not finished:
        stop_after(2, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run()
        monkeypatch.undo()
    else:
        run()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("scores*")}
    lines = tasks_file.read_text().splitlines()
    rows, text = tmp_path / "fewer.jsonl", tmp_path / "changed.jsonl"
    rows.write_text("\n".join(lines[:-1]))
    text.write_text("\n".join([*lines[:-1], lines[-1].replace("return", "return 1 +")]))
    changes: dict[str, dict[str, Any]] = {
        "weights": {"model": str(other_models["weights"])},
        "settings": {"model": str(other_models["settings"])},
        "adapter": {"adapter": str(adapter_folder)},
        "rows": {"dataset": [str(rows)]},
        "text": {"dataset": [str(text)]},
        "max_length": {"max_length": 64},
        "k": {"k": 0.25},
        "span": {"span": "full"},
        "dtype": {"dtype": "bfloat16"},
    }
    what = {"rows": "data", "text": "data", "max_length": "data", "weights": "model", "settings": "model"}
    with monkeypatch.context() as patched, pytest.raises(ValueError) as refused:
        if what.get(other) != "model":  # what can be told without the weights is told before they are loaded
            patched.setattr(ibft.memorization.score, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
        run(**changes[other])
    told = f"made with --{other} " if other in ("k", "span", "dtype") else f"of another {what.get(other, other)} "
    assert told in str(refused.value)
    assert str(refused.value).endswith("; choose another --output, or pass --overwrite.")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("scores*")} == before
    fresh = run(**changes[other], output=str(tmp_path / "fresh.jsonl"))
    assert run(**changes[other], overwrite=True) == fresh


def test_too_long_a_row_is_refused_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "a " * 300, "output": "b"}))
    monkeypatch.setattr(ibft.memorization.score, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="--max_length can be 256 at most"):
        run(dataset=[str(tmp_path / "long.jsonl")])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_damaged_file_is_not_taken_for_whole(run: Run, tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"scores.{ending}"
    whole = run(output=str(output))
    content = output.read_bytes()
    output.write_bytes(content[: content.rfind(b"\n", 0, -1) + 1] if ending == "jsonl" else content[:-100])
    with pytest.raises(ValueError, match=r"(of 23 of 24 rows|cannot be read).*choose another --output, or pass --over"):
        run(output=str(output))
    assert run(output=str(output), overwrite=True) == whole


def test_the_file_is_on_the_disk_before_it_bears_its_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the folder, before the partial file goes, which is all that there is until then."""
    flushed: list[tuple[str, bool, bool]] = []

    def watched(path: Path) -> None:
        flushed.append((path.name, (tmp_path / "scores.jsonl").exists(), (tmp_path / "scores.jsonl.partial").exists()))

    monkeypatch.setattr(ibft.memorization.score_file, "flush", watched)
    run()
    assert flushed == [(".scores.jsonl.partial", False, True), (tmp_path.name, True, True)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_command_leaves_the_first_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    whole = run(output=str(tmp_path / "whole.jsonl"))
    real, refusals = ibft.memorization.score.ScoreFile.add, []

    def add(self: Any, documents: np.ndarray, scores: Scores) -> None:
        with (tmp_path / "scores.jsonl.partial").open("ab") as half:
            half.write(b'{"documents": [')  # what a reader may meet while a line is written
        if not refusals:
            with pytest.raises(ValueError, match="another `ibft memorization score` is writing") as refused:
                run(overwrite=overwrite)
            refusals.append(refused)
        content = (tmp_path / "scores.jsonl.partial").read_bytes()
        assert content.endswith(b'{"documents": ['), "the second command cut a line off"
        (tmp_path / "scores.jsonl.partial").write_bytes(content.removesuffix(b'{"documents": ['))
        real(self, documents, scores)

    monkeypatch.setattr(ibft.memorization.score.ScoreFile, "add", add)
    assert run() == whole and refusals


def test_what_another_command_finished_meanwhile_is_not_replaced(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ibft.memorization.score.load_model

    def slow(*arguments: Any) -> Any:
        monkeypatch.undo()
        run(k=0.5)
        return load(*arguments)

    monkeypatch.setattr(ibft.memorization.score, "load_model", slow)
    with pytest.raises(ValueError, match="another `ibft memorization score` has just written"):
        run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.jsonl", "scores.jsonl.record.json"]
    assert ScoreTable(tmp_path / "scores.jsonl").record["k"] == 0.5


def test_other_batches_and_another_name_of_the_data_go_on(
    run: Run, tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    moved = shutil.copy(tasks_file, tmp_path / "moved.jsonl")
    seen = counted(monkeypatch)
    rows = run(dataset=[str(moved)], batch_tokens=1000)
    assert len(rows) == 24 and 0 < len(seen) < 24 and {row["source"] for row in rows} == {str(moved)}


def test_an_adapter_counts_and_names_its_base(run: Run, adapter_folder: Path, tmp_path: Path) -> None:
    base = run(output=str(tmp_path / "base.jsonl"))
    tuned = run(adapter=str(adapter_folder))
    assert max(abs(a["min_k"] - b["min_k"]) for a, b in zip(base, tuned, strict=True)) > 0.1
    assert [row["tokens"] for row in base] == [row["tokens"] for row in tuned]
    record = ScoreTable(tmp_path / "scores.jsonl").record
    assert record["adapter"] == str(adapter_folder) and record["model"] == read_source(adapter_folder).base_model
    assert run(model=None, adapter=str(adapter_folder), output=str(tmp_path / "named.jsonl")) == tuned


def test_planted_rows_come_out_on_top(run: Run, planted: Any, tmp_path: Path) -> None:
    """From the files and the command alone: nearly all of the rows that are known best are the planted ones."""
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(planted.never.read_text() + planted.often.read_text())
    rows = run(model=str(planted.base), dataset=[str(mixed)])
    best = sorted(rows, key=lambda row: -row["min_k"])[:30]
    assert sum(row["row"] >= 60 for row in best) >= 25


def test_bfloat16_is_close(run: Run, tmp_path: Path) -> None:
    exact = run(output=str(tmp_path / "exact.jsonl"))
    rounded = run(dtype="bfloat16")
    differences = [abs(a["min_k"] - b["min_k"]) for a, b in zip(exact, rounded, strict=True)]
    assert 0 < max(differences) < 0.2
