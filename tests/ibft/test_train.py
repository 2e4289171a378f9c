"""`ibft train` from the command line: what it leaves, that it repeats itself exactly, and how it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ibft.train
from ibft.cli import main
from ibft.config import Scheduler
from ibft.run import Run

QUICK = "--max_length 128 --bottleneck_dim 16 --lora_r 4 --max_steps 4 --logging_steps 2"
LEFT = ("adapter_model.safetensors", "ib_head.safetensors", "adapter_config.json")


@pytest.fixture
def run(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[..., int]:
    """`run("out", "--flag value ...")`: trains a few steps into tmp_path/out, returns the exit code."""

    def train(name: str, more: str = "", dataset: Path = tasks_file, base: Path = base_folder) -> int:
        command = f"train --base_model {base} --dataset {dataset} --output_dir {tmp_path / name} {QUICK} {more}"
        return main(command.split())

    return train


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_it_leaves(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("out") == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *LEFT,
        "ib_config.json",
        "ibft.json",
        "metrics.jsonl",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    record = json.loads((out / "ibft.json").read_text())
    assert record["ib"]["target_layer"] == 1 and record["config"]["bottleneck_dim"] == 16
    assert record["prompt_format"] == {"kind": "text", "separator": "\n", "bos": False, "eos": True}
    assert record["data"]["rows"] == 24 and len(record["data"]["fingerprint"]) == 64
    assert record["versions"]["torch"]
    metrics = records(out)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    for values in metrics:
        total = values["ce"] + 0.2 * (values["kl"] + 0.01 * values["ce_ib"])
        assert values["loss"] == pytest.approx(total, rel=1e-5)
        assert values["kl_nats"] == pytest.approx(16 * values["kl"])
    assert [values["active_share"] is not None for values in metrics] == [False, True, False, True]
    printed = capsys.readouterr().out
    assert "rows of up to 128 tokens a step" in printed and "step 4/4" in printed


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_a_warm_up_may_take_every_step(run: Callable[..., int], tmp_path: Path, scheduler: str) -> None:
    assert run("out", f"--lr_scheduler_type {scheduler} --warmup_steps 4 --learning_rate 4e-3 --logging_steps 1") == 0
    rates = [record["learning_rate"] for record in records(tmp_path / "out")]
    assert rates == pytest.approx([4e-3] * 4 if scheduler == "constant" else [0, 1e-3, 2e-3, 3e-3])


def test_a_collapsed_posterior_is_told_once(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    more = "--alpha 10 --beta 0 --learning_rate 1e-2 --max_steps 12 --warmup_ratio 0"
    assert run("out", more) == 0
    printed = capsys.readouterr().out
    assert printed.count("the posterior has collapsed") == 1 and "--beta" in printed


def test_a_posterior_that_has_only_begun_is_not_called_collapsed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", "--beta 30 --learning_rate 3e-3 --warmup_ratio 0") == 0
    metrics = records(tmp_path / "out")
    assert metrics[1]["active_share"] == metrics[3]["active_share"] == 0 and metrics[3]["kl"] > metrics[1]["kl"]
    assert "the posterior has collapsed" not in capsys.readouterr().out


def test_sft_leaves_a_plain_adapter(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("out", "--method sft") == 0
    assert not any(path.name.startswith("ib_") for path in (tmp_path / "out").iterdir())
    assert all(values["kl"] is None and values["loss"] == values["ce"] for values in records(tmp_path / "out"))


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(
    run: Callable[..., int], tmp_path: Path, base_folder: Path, tasks_file: Path
) -> None:
    assert run("first") == 0
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'second'} {QUICK}"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", "ibft", *command.split()], env=environment, check=True, capture_output=True)
    for name in LEFT:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert run("third", "--seed 43") == 0
    assert (tmp_path / "first" / LEFT[0]).read_bytes() != (tmp_path / "third" / LEFT[0]).read_bytes()


_PLAIN_PEFT = """
import sys, warnings
sys.modules["ibft"] = sys.modules["ibkernels"] = None  # importing either fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    model = PeftModel.from_pretrained(base, sys.argv[2])
print(sorted({str(w.message) for w in caught}))
print(model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().item())
"""


def test_plain_peft_loads_it_without_ibft(run: Callable[..., int], tmp_path: Path, base_folder: Path) -> None:
    """And warns of nothing that it does not warn of for an adapter of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    assert run("out") == 0
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    plain.save_pretrained(tmp_path / "plain")
    outputs = []
    for name in ("out", "plain"):
        command = [sys.executable, "-c", _PLAIN_PEFT, str(base_folder), str(tmp_path / name)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        outputs.append(result.stdout.splitlines())
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][1] != outputs[1][1]  # it was trained


@pytest.mark.parametrize("name", ["mbpp/mbpp.jsonl", "rtllm/rtllm_train.jsonl"])
def test_real_data(run: Callable[..., int], test_data: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    more = "--max_length 512 --learning_rate 2e-3 --max_steps 6 --per_device_train_batch_size 4"
    assert run("out", more, dataset=test_data(name)) == 0
    record = json.loads((tmp_path / "out" / "ibft.json").read_text())
    assert record["data"]["rows"] == {"mbpp/mbpp.jsonl": 974, "rtllm/rtllm_train.jsonl": 50}[name]
    metrics = records(tmp_path / "out")
    assert metrics[-1]["ce"] < metrics[0]["ce"]


def test_the_published_command_line(
    base_folder: Path,
    tasks_file: Path,
    published_config: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its flags and its JSON files, unchanged; what they ask for and the machine lacks is settled with a note."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "README.md").write_text("my project")
    files = published_config("training_args.json").parent
    command = (
        f"train --base_model {base_folder} --dataset {tasks_file} --training_config {files / 'training_args.json'} "
        f"--adapter_config {files / 'adapter_config.json'} --alpha 0.1 --beta 0.02 --target_layer 1 --num_proc 1 "
        "--max_length 256 --seed 3 --max_steps 2"
    )
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "note: " in printed and "fp16" in printed and "wandb" in printed and "--validation_split" in printed
    assert (tmp_path / "README.md").read_text() == "my project"  # the file's output_dir is the current folder
    record = json.loads((tmp_path / "ibft.json").read_text())
    assert record["config"]["seed"] == 3  # a flag wins over the file's 42
    assert record["config"]["logging_steps"] == 5  # the file wins over the default
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base_folder)
    assert adapter["r"] == 32 and len(adapter["target_modules"]) == 7


def test_a_run_cut_off_resumes_to_the_same_adapter(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and noise on; the checkpoint is rotated, the metrics have every step once."""
    more = "--max_steps 7 --save_steps 2 --save_total_limit 1 --lora_dropout 0.1 --logging_steps 3"
    assert run("whole", more) == 0

    real = ibft.train.save_checkpoint

    def crash_at_six(run: Run, step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt
        real(run, step)

    monkeypatch.setattr(ibft.train, "save_checkpoint", crash_at_six)
    assert run("cut", more) == 130
    monkeypatch.setattr(ibft.train, "save_checkpoint", real)
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    assert run("cut", f"{more} --resume") == 0
    for name in LEFT:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert [record["step"] for record in records(tmp_path / "cut")] == list(range(1, 8))


def test_resuming_a_different_run_is_refused(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", "--save_steps 2") == 0
    (tmp_path / "out" / "ibft.json").unlink()
    for changed, difference in (
        ("--learning_rate 3e-4", "learning_rate was 0.0001, is 0.0003"),
        ("--per_device_train_batch_size 1", "rows_per_step was 2, is 1"),
        ("--seed 5", "seed was 42, is 5"),
    ):
        assert run("out", f"--save_steps 2 --resume {changed}") == 2
        assert difference in capsys.readouterr().err


def test_resuming_on_another_base_model_is_refused(
    run: Callable[..., int], tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(base_folder, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert run("out", "--save_steps 2") == 0
    (tmp_path / "out" / "ibft.json").unlink()
    assert run("out", "--save_steps 2 --resume", base=tmp_path / "other") == 2
    assert "base was" in capsys.readouterr().err


def test_an_output_dir_beside_what_is_read_of_a_dataset(
    run: Callable[..., int], tasks_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    shutil.copy(tasks_file, tmp_path / "rows")
    for name in ("rows-and-more", "rows/.runs/first"):
        assert run(name, dataset=tmp_path / "rows") == 0
    saved = datasets.Dataset.from_list([{"instruction": f"number {index}", "output": "x"} for index in range(9)])
    saved.save_to_disk(str(tmp_path / "saved"))
    assert run("saved/run", dataset=tmp_path / "saved") == 0


def test_overwriting_leaves_nothing_of_the_earlier_run(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("out", "--save_steps 2") == 0
    assert run("out", "--method sft --overwrite") == 0
    assert not any(path.name.startswith(("ib_", "checkpoint-")) for path in (tmp_path / "out").iterdir())


def test_another_trainers_checkpoint_is_left_alone(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    assert run("out", "--resume") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert run("out", "--overwrite") == 0
    assert (tmp_path / "out" / "checkpoint-5").is_dir()
    (tmp_path / "out" / "checkpoint-2" / "global_step2").mkdir(parents=True)
    for more in ("--overwrite --save_steps 2", "--overwrite --dry_run"):
        assert run("out", more) == 2
        assert "out/checkpoint-2 is in the way of the checkpoint after step 2" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint-2" / "global_step2").is_dir()


def test_a_model_that_does_not_keep_packed_documents_apart(
    run: Callable[..., int], tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256))
    model.save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    assert run("out", "--attn_implementation sdpa", base=tmp_path / "opt") == 2
    assert "does not keep the documents of a packed row apart; use --packing none" in capsys.readouterr().err
    assert run("out", "--attn_implementation sdpa --packing none", base=tmp_path / "opt") == 0
    assert run("by-document", base=tmp_path / "opt") == 0  # whose attention does not rely on the model's mask


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    run: Callable[..., int],
    tmp_path: Path,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rows = [{"instruction": f"number {index}", "output": "x = 1"} for index in range(8)]
    rows[5]["output"] = "~"  # a token of its own, whose embedding is not a number
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.get_input_embeddings().weight.data[tokenizer("~")["input_ids"][0]] = float("nan")
    shutil.copytree(base_folder, tmp_path / "bad")
    model.save_pretrained(tmp_path / "bad")

    kept: dict[str, Any] = {}
    real = ibft.train.what_diverged
    monkeypatch.setattr(
        ibft.train, "what_diverged", lambda current, *rest: kept.update(run=current) or real(current, *rest)
    )
    more = (
        "--packing none --per_device_train_batch_size 1 --lr_scheduler_type constant --warmup_ratio 0 --lora_dropout 0"
    )
    sizes = "--max_steps 12 --logging_steps 12"  # steps follow the bad one, too
    assert run("bad-run", f"{more} {sizes}", dataset=tmp_path / "rows.jsonl", base=tmp_path / "bad") == 1
    error = capsys.readouterr().err
    order = [int(kept["run"].plan.documents(step)[0]) for step in range(8)]
    step = order.index(5) + 1
    assert step > 1, "the seed must put good steps before the bad one"
    assert f"step {step} is not finite" in error and "Traceback" not in error
    assert f"its batch holds rows 5 of {tmp_path / 'rows.jsonl'} (from 0)" in error
    assert json.loads((tmp_path / "bad-run" / "ibft.json").read_text())["result"] is None
    assert [values["step"] for values in records(tmp_path / "bad-run")] == list(range(1, step))

    more = f"{more} --max_steps {step - 1}"
    assert run("before", more, dataset=tmp_path / "rows.jsonl", base=tmp_path / "bad") == 0
    before = load_file(tmp_path / "before" / "adapter_model.safetensors")
    now = {name: p for name, p in kept["run"].model.named_parameters() if p.requires_grad}
    assert len(before) > 4
    for name, tensor in before.items():
        assert torch.equal(tensor, now[name.replace(".weight", ".default.weight")])


def test_a_finished_run_is_not_overwritten(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out") == 0
    before = (tmp_path / "out" / LEFT[0]).read_bytes()
    assert run("out", "--seed 1") == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (tmp_path / "out" / LEFT[0]).read_bytes() == before
    assert run("out", "--seed 1 --overwrite --dataset missing.jsonl") == 2  # nothing is lost to a wrong flag
    assert (tmp_path / "out" / "ibft.json").exists()
    assert run("out", "--seed 1 --overwrite") == 0
    assert (tmp_path / "out" / LEFT[0]).read_bytes() != before
    assert len(records(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--dataset missing.jsonl", "missing.jsonl"),
        ("--base_model ./nowhere", "base_model './nowhere' is not a folder"),
        ("--target_layer 20", "target_layer is 20, but the model has 2 layers; it must be in 1..2"),
        ("--prompt_column Question --response_column output", "Question"),
        ("--max_length 4", "None of the 24 rows can be trained on"),
        ("--lora_target_modules q_proj,lm_head", "the output head is a"),
        (
            "--attn_implementation flash_attention_2",
            "flash_attention_2: it needs a CUDA GPU, and this run is on the cpu; varlen",
        ),
        ("--resume", "there is no checkpoint in"),
        ("--tokens_per_batch 256 --per_device_train_batch_size 2", "set the same thing"),
        ("--targt_layer 3", "Did you mean --target_layer?"),
        ("--alpha -1", "--alpha must be at least 0, not -1.0"),
    ],
)
def test_wrong_input_is_a_sentence(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, sentence: str
) -> None:
    assert run("out", more) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not (tmp_path / "out" / "ibft.json").exists()


def test_a_tokenizer_without_eos(
    run: Callable[..., int], tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    assert run("out", base=tmp_path / "base") == 2
    assert "has no EOS token" in capsys.readouterr().err


def test_an_output_dir_that_is_a_file(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert run("out") == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_wandb_is_told_every_step(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    logged: list[tuple[int, float]] = []
    fake = types.ModuleType("wandb")
    tracker = types.SimpleNamespace(log=lambda values, step: logged.append((step, values["loss"])), finish=lambda: None)
    fake.init = lambda **_: tracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run("out", "--report_to wandb") == 0
    assert [step for step, _ in logged] == [1, 2, 3, 4]


def test_gradient_checkpointing_changes_nothing(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("plain", "--lora_dropout 0") == 0
    assert run("checkpointed", "--lora_dropout 0 --gradient_checkpointing") == 0
    for name in LEFT[:2]:
        first, second = (load_file(tmp_path / folder / name) for folder in ("plain", "checkpointed"))
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, rtol=0, atol=1e-6)


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and main(["--version"]) == 0
    assert "ibft train" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "'trian' is not a command" in capsys.readouterr().err
    assert main(["lab", "demos"]) == 2


def test_a_mixture_of_experts(
    run: Callable[..., int], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of its parameters a token meets its router decides, so no FLOPs are counted."""
    shutil.copytree(base_folder, tmp_path / "experts")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 2}
    vocabulary = AutoConfig.from_pretrained(base_folder).vocab_size
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = AutoConfig.for_model("mixtral", vocab_size=vocabulary, **heads, **sizes)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "experts")
    assert run("out", "--lora_target_modules q_proj --free_bits 0.5", base=tmp_path / "experts") == 0
    printed = capsys.readouterr().out
    assert "no MFU: the FLOPs of a mixture of experts depend on its router" in printed
    assert "by the size of the model, which there is no estimate for" in printed
    assert "0.5 nats of KL per token free" in printed
    assert all(record["flops"] is None and record["mfu"] is None for record in records(tmp_path / "out"))


def test_names_of_modules_by_a_regular_expression(run: Callable[..., int], tmp_path: Path) -> None:
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps({"r": 4, "target_modules": r".*\.1\..*q_proj"}))
    assert run("out", f"--target_layer 2 --adapter_config {file}") == 0
    assert all(".layers.1." in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_a_tokenizer_of_several_chat_templates(run: Callable[..., int], base_folder: Path, tmp_path: Path) -> None:
    """Which it keeps in a folder; a second run replaces that too."""
    shutil.copytree(base_folder, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "base")
    folder = tmp_path / "out" / "additional_chat_templates"
    assert run("out", base=tmp_path / "base") == 0
    (folder / "tool_use.jinja").write_text("of another run")
    assert run("out", "--overwrite", base=tmp_path / "base") == 0
    assert [file.read_text() for file in folder.iterdir()] == ["{{ tools }}"]
