"""`ibft eval` from the command line: what it does at once, and every mistake a sentence, with nothing lost or left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from snapshot import contents

import ibft.evaluate.execute
from ibft.cli import main
from ibft.evaluate.sandbox import Limits

GENERATE = "generate --task {task} --model {base} --output {here}/out --num_samples 1 --max_new_tokens 8"
RUN = "run --task {task} --samples {here}/samples.jsonl --output {here}/out"


@dataclass(frozen=True)
class Wrong:
    """A command line, a part of the sentence that must come of it, and the samples file that there is."""

    command: str
    sentence: str
    samples: str = '{"task_id": "add/0", "completion": "    return x\\n"}\n'


def generate(more: str, sentence: str) -> Wrong:
    return Wrong(f"{GENERATE} {more}", sentence)


WRONG = [
    Wrong("humanevl --model x", "'humanevl' is not a command of `ibft eval`, a task, nor a file"),
    Wrong("humanevl --model x", "Did you mean humaneval?"),
    Wrong("genrate", "Did you mean generate?"),
    Wrong("--task humaneval", "takes a task or a command first, not --task"),
    Wrong("generate --task humaneval", "--output must be given"),
    Wrong("generate --output x", "--task must be given"),
    Wrong("generate --task {task} --output {here}/out", "--model must be given, or an --adapter"),
    generate("--task verilogeval-human", "is not on the Hub; name its file or folder with --data"),
    generate("--task mbbp", "Did you mean 'mbpp'?"),
    generate("--task {here}/none.jsonl", "There is no file"),
    generate("--task humaneval --data {here}/none", "there is no such file or folder"),
    generate("--split tests", "--split takes all or test or train"),
    generate("--split test", "only mbpp is"),
    generate("--model {here}/none", "none' is not a folder; name one that holds a model"),
    generate("--adapter {here}/none", "is not a folder; name the output_dir of a run"),
    generate("--adapter {here}", "holds no adapter_config.json, so it is no adapter"),
    generate("--num_samples 0", "--num_samples must be at least 1, not 0"),
    generate("--temperature hot", "--temperature takes finite numbers, not ['hot']"),
    generate("--temperature -1", "--temperature must be at least 0, not -1.0"),
    generate("--temperature 0.2 0.2", "--temperature names one twice: 0.2, 0.2"),
    generate("--temperature none", "takes one number or several, not none"),
    generate("--temperature 0 --num_samples 5", "5 samples tell no more than one; use --num_samples 1"),
    generate("--top_p 0", "--top_p must be greater than 0 and at most 1, not 0.0"),
    generate("--top_p 1.5", "--top_p must be greater than 0 and at most 1, not 1.5"),
    generate("--max_new_tokens 1000", "positions; --max_new_tokens can be"),
    generate("--prompt_format chat", "has no chat template"),
    generate("--question fixed", "--question must hold {prompt} or {description}"),
    generate("--endpoint localhost:8000", "--endpoint 'localhost:8000' is no address; one is http://localhost:8000/v1"),
    generate("--batchsize 3", "--batchsize is not an option of `ibft eval generate`. Did you mean --batch_size?"),
    generate("--output {task}", "is a file; name a folder"),
    generate("humaneval", "'humaneval' has no flag before it"),
    Wrong(
        "generate --task {task} --output {here}/out --adapter {here}/x --endpoint http://a/v1",
        "--model must be given with --endpoint",
    ),
    Wrong("{task} --model {here}/none", "is not a folder; name one that holds a model"),
    Wrong("{task}", "--model must be given"),
    Wrong("run --task {task}", "--samples and --output must be given"),
    Wrong(f"{RUN} --samples {{here}}/none.jsonl", "There is no file"),
    Wrong(f"{RUN} --samples {{here}}", "is a folder; name a file of JSON lines"),
    Wrong(f"{RUN} --task nothing", "'nothing' is not a task, nor a file"),
    Wrong(
        f"{RUN} --completion_format bodies",
        "--completion_format takes auto or body or full, not 'bodies'. Did you mean body?",
    ),
    Wrong(f"{RUN} --header mine", "--header takes dataset or model, not 'mine'"),
    Wrong(f"{RUN} --rule v3", "--rule takes"),
    Wrong(RUN, "line 2: the file is cut off in this line", '{"task_id": "add/0", "completion": ""}\n{"task_id": "ad'),
    Wrong(RUN, "line 1: there is no problem 'add/9' in this task", '{"task_id": "add/9", "completion": ""}\n'),
    Wrong(
        RUN,
        "line 2: sample 3 of 'add/0' occurs a second time, after line 1",
        2 * '{"task_id": "add/0", "completion": "", "sample": 3}\n',
    ),
    Wrong(RUN, "line 1 has no 'completion'; it has 'task_id', 'solution'", '{"task_id": "add/0", "solution": ""}\n'),
    Wrong(RUN, "holds no sample", "\n"),
    Wrong(f"{RUN} --extract_again", "line 1 has no 'raw'"),
    Wrong(f"{RUN} --workers 0", "--workers must be at least 1, not 0"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.command[:40]} {wrong.sentence[:30]}")
def test_what_users_get_wrong(
    wrong: Wrong, own_task: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.jsonl").write_text(wrong.samples)
    before = contents(tmp_path)
    command = wrong.command.format(task=own_task, base=base_folder, here=tmp_path)
    assert main(["eval", *command.split()]) == 2
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert "Traceback" not in err and last.startswith("ibft: error") and wrong.sentence in last
    assert contents(tmp_path) == before


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs `ibft eval ...`, which must succeed; what it prints."""

    def run(command: str) -> str:
        assert main(["eval", *command.split()]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_all_at_once(
    shell: Callable[[str], str], own_task: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = "--num_samples 2 --max_new_tokens 8 --temperature 0.2 1.0 --allow_unsafe"
    out = shell(f"{own_task} --model {base_folder} {few}")
    folder = tmp_path / "evaluation" / "own" / base_folder.name
    assert out.count("| pass@1 | 0.0000 | 0.0000 to 0.0000 |") == 2 and out.count("6 problems, 12 samples.") == 2
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 24
    both = json.loads(shell(f"report {folder} --json"))["runs"]
    assert [each["name"] for each in both] == ["temperature-0.2", "temperature-1.0"]
    assert (folder / "temperature-0.2" / "report.md").read_text() in out
    kept = (folder / "temperature-0.2" / "results.jsonl").read_bytes()
    assert shell(f"{own_task} --model {base_folder} {few}") == out  # nothing is done twice
    assert (folder / "temperature-0.2" / "results.jsonl").read_bytes() == kept
    # Fewer, of what is there.
    one = shell(f"{own_task} --model {base_folder} {few} --temperature 1.0 --num_samples 1 --limit 2 --output {folder}")
    assert "2 problems, 2 samples." in one


def test_samples_from_elsewhere(
    shell: Callable[[str], str], own_task: Path, own_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Two of three samples of five problems are right in A, all of four in B; the sixth has none in either."""

    def write(name: str, solved: int, right: int) -> None:
        rows = [
            {"task_id": row["task_id"], "completion": row["canonical_solution"] if n < right else "    return None\n"}
            for row in own_rows[:solved]
            for n in range(3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shell(f"run --task {own_task} --samples {tmp_path}/{name}.jsonl --output {tmp_path}/{name} --allow_unsafe")

    write("a", 5, 2)
    write("b", 4, 3)
    found = json.loads(shell(f"report {tmp_path}/a --json"))
    assert found["metrics"] == {"pass@1": pytest.approx(5 / 6 * 2 / 3)}
    assert found["categories"] == {"passed": 10, "wrong_output": 5, "missing": 3}
    assert found["completion_format"] == "auto" and found["tools"]["python"] and found["tools"]["rules"]
    assert found["limits"] == asdict(Limits())
    compared = json.loads(shell(f"compare {tmp_path}/a {tmp_path}/b --json"))
    assert compared["metrics"]["pass@1"]["difference"] == pytest.approx(4 / 6 - 10 / 18)
    assert compared["wins"] == {"a": ["add/4"], "b": [f"add/{n}" for n in range(4)], "ties": 1}
    shell(f"run --task {own_task} --samples {tmp_path}/b.jsonl --output {tmp_path}/b --subset --allow_unsafe")
    assert json.loads(shell(f"report {tmp_path}/b --json"))["metrics"] == {"pass@1": 1.0}


def test_doctor(shell: Callable[[str], str], own_task: Path) -> None:
    assert "6 of 6 canonical solutions pass" in shell(f"doctor {own_task} --allow_unsafe")
    found = json.loads(shell(f"doctor {own_task} --json --allow_unsafe"))[str(own_task)]
    assert (found["problems"], found["passed"], found["failing"], found["together"]) == (6, 6, {}, [])
    assert found["sandbox_tier"] in shell("doctor --allow_unsafe")


def test_interrupted(
    own_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ibft.evaluate.execute, "run_samples", interrupted)
    (tmp_path / "samples.jsonl").write_text('{"task_id": "add/0", "completion": "x"}\n')
    assert main(["eval", *RUN.format(task=own_task, here=tmp_path).split()]) == 130
    assert capsys.readouterr().err == "ibft: interrupted; the same command goes on where it stopped.\n"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--help",
        "generate --help",
        "run --help",
        "report --help",
        "compare --help",
        "doctor --help",
        "humaneval --help",
    ],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["eval", *command.split()]) == 0
    except SystemExit as leaving:  # argparse's way
        assert leaving.code == 0
    out, err = capsys.readouterr()
    assert "usage: ibft eval" in out and err == "" and max(map(len, out.splitlines())) < 125
