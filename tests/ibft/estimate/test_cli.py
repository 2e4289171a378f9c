"""`ibft estimate`, and what it makes of a measured run."""

import json
import re
from pathlib import Path

import pytest
from outlines import TINY, published

from ibft.cli import main
from ibft.estimate.step import GIB

ROOT = Path(__file__).parents[3]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with nothing but a config.json; what fits and what does not, and the options that make it fit."""
    published("deepseek-coder-1.3b").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    command = f"estimate --base_model {tmp_path} --max_length 2048 --tokens_per_batch 65536 --gpus 16 --gpu l4 h200"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "1.35B parameters, 24 layers of 2048, 32,256 words, bfloat16" in printed
    assert "= 1,048,576 tokens; ddp" in printed and "15.8 GiB a GPU are never made" in printed
    assert re.search(r"^l4 +yes +2\d\.\d of 22 +on ", printed, re.MULTILINE)
    assert re.search(r"^h200 +yes +\d+\.\d of 140 +on ", printed, re.MULTILINE)
    assert main(f"{command} --no_gradient_checkpointing --method sft".split()) == 0
    printed = capsys.readouterr().out
    assert "0 of bottleneck" in printed and "7.9 GiB a GPU are never made" in printed
    assert re.search(r"^l4 +no ", printed, re.MULTILINE)
    flash, eager = (
        float(re.search(r"^without checkpointing.* ([\d.]+)$", text, re.MULTILINE)[1])  # type: ignore[index]
        for text in (printed, eager_of(f"{command} --method sft", capsys))
    )
    # 24 layers of 16 heads of 2048 scores a token, in float32 and in bfloat16; and of what is handed out 4% is lost.
    assert eager - flash == pytest.approx(1.04 * 24 * 16 * 2048 * 6 * 65536 / GIB, rel=0.01)
    assert "l4: does not fit as it is; it does with --gradient_checkpointing." in printed


def eager_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(f"{command} --attn_implementation eager".split()) == 0
    return capsys.readouterr().out


def test_the_example_of_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/scaling.md shows what the command that it names prints."""
    published("deepseek-coder-6.7b").save_pretrained(tmp_path)
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = re.search(r"DeepSeek-Coder 6\.7B with\s`([^`]*)`:\n\n```text\n(.*?)\n```", page, re.DOTALL)
    assert found
    assert main(f"estimate --base_model {tmp_path} {found[1]}".split()) == 0
    printed, shown = capsys.readouterr().out, found[2].split("\n\n")
    assert len(shown) == 3 and all(paragraph in printed for paragraph in shown)
    without = re.search(r"^without checkpointing.* ([\d.]+)$", shown[0], re.MULTILINE)
    said = re.search(r"a step without it would take about (\d+) GiB of 79", page)  # of a run of the same size
    assert without and said and abs(float(said[1]) - float(without[1])) <= 0.55


def test_every_size_up_to_a_thousand_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published("llama-2-70b").save_pretrained(tmp_path)
    command = f"estimate --base_model {tmp_path} --gpus 1024 --gpu h100-80gb --engine"
    few = "--lora_target_modules q_proj"  # the wrapping of 560 modules takes seconds
    for engine, fit in (("fsdp2", "yes"), ("zero3", "yes"), ("zero2", "no"), ("ddp", "no")):
        assert main(f"{command} {engine} {few}".split()) == 0
        assert re.search(rf"^h100-80gb +{fit} ", capsys.readouterr().out, re.MULTILINE), engine


def test_measured_beside_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    """The record in benchmarks/: every variant's memory within 5%, and what IB-FT adds to the time within 10%."""
    assert main(f"estimate --measured {ROOT / 'benchmarks' / 'results' / 'step.json'}".split()) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 3
    for line in lines:
        error, flops, seconds = re.fullmatch(r".* ([+-][\d.]+)% +([\d.]+) +([\d.]+) +\d+", line).groups()  # type: ignore[union-attr]
        assert abs(float(error)) < 5 and abs(float(flops) / float(seconds) - 1) < 0.1


def test_what_the_documentation_says_of_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"estimate --measured {ROOT / 'benchmarks' / 'results' / 'step.json'}".split()) == 0
    rows = re.findall(r" ([+-][\d.]+)% +([\d.]+) ", capsys.readouterr().out)
    page = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    error, (_, narrow, wide) = max(float(error) for error, _ in rows), (flops for _, flops in rows)
    assert f"puts a step's memory {error:.0f}% above what was measured" in page
    assert f"By the FLOPs IB-FT costs {narrow} and {wide} times SFT at K=64 and 256" in page


def test_measured_of_a_run(
    base_folder: Path, tasks_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--max_length 128 --bottleneck_dim 8 --lora_r 2 --max_steps 4 --logging_steps 2 --peak_tflops 0.5"
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'} {small}"
    assert main(command.split()) == 0
    capsys.readouterr()
    assert main(f"estimate --measured {tmp_path / 'out'}".split()) == 0
    printed = capsys.readouterr().out
    assert "steps         3 to 4 of" in printed and "of 0.5 TFLOP/s" in printed and "% padding" in printed
    record = json.loads((tmp_path / "out" / "ibft.json").read_text())
    (tmp_path / "out" / "ibft.json").write_text(json.dumps({**record, "device": "NVIDIA H200"}))
    assert main(f"estimate --measured {tmp_path / 'out'}".split()) == 0
    assert re.search(r"allocated at the peak, [\d.]+ estimated", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "give --base_model, to estimate a training, or --measured, to compare with one"),
        ("--base_model {tmp} --measured x", "give --base_model, to estimate a training, or --measured"),
        ("--base_model ./nowhere", "base_model './nowhere' is not a folder"),
        ("--base_model {tmp}", "is a folder without config.json"),
        ("--base_model x --gpu h100", r"--gpu takes a10, .* not 'h100'\. Did you mean h200\?|Did you mean h100"),
        ("--base_model x --gpus 1025", "--gpus must be between 1 and 1,024, not 1025"),
        ("--base_model x --engine zero1", "--engine takes ddp or fsdp2 or zero2 or zero3, not 'zero1'"),
        ("--base_model x --tokens_per_batch 3000", r"must be a multiple of --max_length \(2048\), not 3000"),
        ("--base_model x --document_length 4096", r"must be at most --max_length \(2048\), not 4096"),
        ("--base_model x --load_in_4bit --engine fsdp2 --gpus 2", "fsdp2 cannot shard bitsandbytes' weights"),
        ("--measured {tmp}/nothing.json", "nothing.json' cannot be read: No such file"),
        ("--measured {tmp}", "metrics.jsonl' cannot be read: No such file"),
        ("--measured {tmp}/other.json", "holds neither the metrics of a run nor a record"),
        ("--base_modle x", "Did you mean --base_model"),
    ],
)
def test_wrong_inputs(line: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "other" in line:
        (tmp_path / "other.json").write_text('{"seconds": 3}')
    assert main(["estimate", *line.format(tmp=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ibft: error: ") and error.count("\n") == 1 and re.search(sentence, error)


def test_an_adapter_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save_pretrained(tmp_path)
    assert main(f"estimate --base_model {tmp_path} --lora_target_modules nothing".split()) == 2
    assert "the adapter does not fit the base model" in capsys.readouterr().err
