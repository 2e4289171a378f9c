"""`ibft memorization` from the command line: every mistake a sentence, with nothing lost or left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from snapshot import contents

from ibft.cli import main

SCORE = "memorization score --model {base} --dataset {data} --output {here}/new.jsonl --use_cpu"
FILTER = "memorization filter --scores {here}/scores.jsonl --dataset {data} --output {here}/new.jsonl"
TRAIN = "train --base_model {base} --dataset {data} --output_dir {here}/out --max_length 128 --use_cpu"


@dataclass(frozen=True)
class Wrong:
    """A command line, a part of the sentence that must come of it, and files that there are: name -> content."""

    command: str
    sentence: str
    files: dict[str, str] | None = None


def score(more: str, sentence: str, **files: str) -> Wrong:
    return Wrong(f"{SCORE} {more}", sentence, files)


def plot(more: str, sentence: str, **files: str) -> Wrong:
    return Wrong(f"memorization plot {more}", sentence, files)


def filtered(more: str, sentence: str, **files: str) -> Wrong:
    return Wrong(f"{FILTER} {more}", sentence, files)


def train(more: str, sentence: str, **files: str) -> Wrong:
    return Wrong(f"{TRAIN} {more}", sentence, files)


LONG = json.dumps({"instruction": "a " * 300, "output": "b"})
OTHER = json.dumps({"instruction": "another row", "output": "b"})

WRONG = [
    Wrong("memorization scroe", "'scroe' is not a command of `ibft memorization`; there are score, plot, filter. Did"),
    Wrong("memorisation score", "'memorisation' is not a command of ibft; there are: train, eval, estimate, memoriz"),
    Wrong("memorization score --model m", "--dataset and --output must be given"),
    Wrong("memorization score --dataset d --output o.jsonl", "--model must be given, or an --adapter that names its"),
    score("--modle m", "--modle is not an option of `ibft memorization score`. Did you mean --model?"),
    score("--model {here}/none", "none' is not a folder; name one that holds a model"),
    score("--adapter {here}", "holds no adapter_config.json, so it is no adapter"),
    score("--dataset {here}/none.jsonl", "There is no file or folder"),
    score("--dataset {data} {data}", "twice; to pass over it"),
    score("--dataset_split test", "has no split 'test'"),
    score("--prompt_column a", "--response_column is missing"),
    score("--format chat", "has no chat template"),
    score("--k 20", "--k must be greater than 0 and at most 1, as 0.2 for Min-20%, not 20.0"),
    score("--k 0", "--k must be greater than 0"),
    score("--span answer", "--span takes response or full, not 'answer'"),
    score("--batch_tokens 0", "--batch_tokens must be at least 1, not 0"),
    score("--dtype int8", "--dtype takes float32 or bfloat16 or float16, not 'int8'"),
    score("--output {here}/new.csv", "--output takes a file that ends in .jsonl or .parquet, not"),
    score("--output {here}/x.jsonl/y.jsonl", "cannot be written to", **{"x.jsonl": ""}),
    score("--dataset {here}/x.jsonl", "positions; --max_length can be 256 at most", **{"x.jsonl": f"{LONG}\n{OTHER}"}),
    score("--output {data} --overwrite", "is what is read; name another file"),
    score("--dataset {here}", "lies in the folder of the dataset", **{"x.jsonl": OTHER}),
    score("--output {here}/x.jsonl", "exists, and nothing says by which model it was made", **{"x.jsonl": "{}"}),
    score("--output {here}/scores.jsonl --k 0.3", "holds scores made with --k 0.2, not 0.3; choose another --output"),
    score("--output {here}/scores.jsonl --span full", "holds scores made with --span response, not full"),
    score("--output {here}/scores.jsonl --max_length 30", "holds the scores of another data than is named now"),
    score("", "new.jsonl.partial is none that `ibft memorization score` wrote", **{"new.jsonl.partial": "x\n"}),
    score("", "nothing says by which model it was made", **{"new.jsonl.partial": "{}\n"}),
    plot("", "takes files of scores: ibft memorization plot FILE... --output PNG"),
    plot("{here}/none.jsonl", "There is no file of scores"),
    plot(
        "{here}/new.jsonl",
        "has not finished: the same `ibft memorization score`, without --overwrite, goes on",
        **{"new.jsonl.partial": ""},
    ),
    plot("{data}", "is no file of `ibft memorization score`: not every row has a 'digest'"),
    plot("{here}/x.jsonl", "cannot be read as a file of `ibft memorization score`", **{"x.jsonl": "no JSON"}),
    plot("{here}/x.parquet", "cannot be read as a file of `ibft memorization score`", **{"x.parquet": "PAR1"}),
    plot("{here}/x.jsonl", "cannot be read as a file of", **{"x.jsonl": ""}),
    plot("{here}/scores.jsonl --labels a b", "--labels gives 2 labels for 1 files"),
    plot("{here}/scores.jsonl --output {here}/p.gif", "takes a file that ends in .png, .svg or .pdf"),
    plot("{here}/scores.jsonl --measure auc", "--measure takes min_k or min_k_plus_plus or mean_log_prob, not 'auc'"),
    plot(
        "{here}/scores.jsonl {here}/x.jsonl",
        "was scored with --k 0.2 and",
        **{"x.jsonl": "{scores}", "x.jsonl.record.json": '{"k": 0.1}'},
    ),
    plot("{here}/x.jsonl", "record.json is not valid JSON", **{"x.jsonl": "{scores}", "x.jsonl.record.json": "{"}),
    filtered("", "--drop_top must be given"),
    filtered("--drop_top 0%", "--drop_top takes a share of the rows, their number, or the score above which they are"),
    filtered("--drop_top 100%", "not '100%'"),
    filtered("--drop_top 0.1", "(10%, 200, or 'above -0.5'), not '0.1'"),
    filtered("--drop_top=-3", "not '-3'"),
    filtered("--drop_top 'above it'", "not 'above it'"),
    filtered("--drop_top 'above nan'", "not 'above nan'"),
    filtered("--drop_top 1%", "--drop_top 1% drops none of the 24 rows that have a score"),
    filtered("--drop_top 'above 1'", "drops none of the 24 rows that have a score; the highest score is -"),
    filtered("--drop_top 24", "--drop_top 24 drops 24 rows; there are 24, of which 24 have a score, and at least one"),
    filtered("--drop_top 10% --dataset {here}/none.jsonl", "There is no file or folder"),
    filtered("--drop_top 10% --scores {here}/none.jsonl", "There is no file of scores"),
    filtered("--drop_top 10% --output {here}/new.csv", "--output takes a file that ends in .jsonl or .parquet"),
    filtered("--drop_top 10% --output {data} --overwrite", "is what is read; name another file"),
    filtered("--drop_top 10% --output {here}/scores.jsonl --overwrite", "is what is read; name another file"),
    filtered("--drop_top 10% --dataset {here}/../", "and would be read as its data; name a file elsewhere"),
    filtered(
        "--drop_top 10% --output {here}/x.jsonl", "exists; choose another, or pass --overwrite", **{"x.jsonl": ""}
    ),
    filtered(
        "--drop_top 10% --dataset {here}/x.jsonl",
        "has no score of 1 of the 1 rows of '",
        **{"x.jsonl": OTHER},
    ),
    filtered(
        "--drop_top 10% --dataset {here}/x.jsonl",
        "the first being row 0 (counted from 0): its scores are of other data, or of other columns",
        **{"x.jsonl": OTHER},
    ),
    train("--drop_memorized 10%", "--memorization_scores FILE and --drop_memorized 10% belong together"),
    train("--memorization_scores x.jsonl", "--memorization_scores FILE and --drop_memorized 10% belong together"),
    train("--memorization_scores x --drop_memorized many", "--drop_memorized takes a share of the rows, their number"),
    train("--memorization_scores x --drop_memorized 10%", "There is no file of scores 'x'"),
    train("--memorization_scores {here}/scores.jsonl --drop_memorized 1%", "--drop_memorized 1% drops none of the 24"),
    train(
        "--memorization_scores {here}/scores.jsonl --drop_memorized 2 --dataset {data} {here}/x.jsonl",
        "has no score of 1 of the 1 rows of",
        **{"x.jsonl": OTHER},
    ),
]


@pytest.fixture(scope="module")
def scored(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished file of scores."""
    file = tmp_path_factory.mktemp("scored") / "scores.jsonl"
    command = f"memorization score --model {base_folder} --dataset {tasks_file} --output {file} --use_cpu"
    assert main(command.split()) == 0
    return file


@pytest.fixture
def shell(scored: Path, base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[[str], int]:
    """Runs `ibft ...` where {here} holds a finished scores.jsonl; {base} and {data} are what it was made of."""
    for name in ("scores.jsonl", "scores.jsonl.record.json"):
        (tmp_path / name).write_text(scored.with_name(name).read_text())

    def run(command: str) -> int:
        places = {"{base}": base_folder, "{data}": tasks_file, "{here}": tmp_path}
        words = shlex.split(command)
        for name, path in places.items():
            words = [word.replace(name, str(path)) for word in words]
        return main(words)

    return run


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.command[-40:]} {wrong.sentence[:30]}")
def test_what_users_get_wrong(
    wrong: Wrong,
    shell: Callable[[str], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (wrong.files or {}).items():
        whole = (tmp_path / "scores.jsonl").read_text() if content == "{scores}" else content
        (tmp_path / name).write_text(whole)
    before = contents(tmp_path)
    capsys.readouterr()
    assert shell(wrong.command) == 2
    output = capsys.readouterr()
    last = output.err.strip().splitlines()[-1]
    assert "Traceback" not in output.err and last.startswith("ibft: error") and wrong.sentence in last, last
    assert len(last) < 700 and output.out == ""
    assert contents(tmp_path) == before


def test_all_commands_one_after_the_other(
    shell: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell(SCORE) == 0
    assert capsys.readouterr().out == f"scores in {tmp_path}/new.jsonl\n"
    assert shell("memorization plot {here}/scores.jsonl {here}/new.jsonl --output {here}/plot.svg") == 0
    assert "0.500" in capsys.readouterr().out and (tmp_path / "plot.svg").stat().st_size > 1000
    assert shell(f"{FILTER} --output {{here}}/left.jsonl --drop-top 25%") == 0
    assert "24 rows: 6 dropped, whose min_k, by '" in capsys.readouterr().out
    assert len((tmp_path / "left.jsonl").read_text().splitlines()) == 18
    assert shell(f"{FILTER} --output {{here}}/left.parquet --drop-top 6 --json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["kept"], result["dropped"], result["without_score"]) == (24, 18, 6, 0)
    assert result["lowest_dropped"] >= result["highest_kept"]


@pytest.mark.parametrize("command", ["memorization", "memorization --help", "memorization help"])
def test_help(shell: Callable[[str], int], capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert shell(command) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in ("score", "plot", "filter"))


@pytest.mark.parametrize("command", ["score", "plot", "filter"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["memorization", command, "--help"])
    assert ended.value.code == 0 and f"usage: ibft memorization {command}" in capsys.readouterr().out
