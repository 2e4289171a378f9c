"""The model card: what it says, that its metadata is valid, what it keeps to itself, and what it never replaces."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibft.cli import main
from ibft.model_card import hub_names, is_ours, may_replace, render_card

RECORD: dict[str, Any] = {
    "config": {
        "base_model": "Org/Base-1B",
        "dataset": ["Org/Data", "/home/jane/secret-client/rows.jsonl"],
        "output_dir": "/home/jane/runs/a",
        "lora_target_modules": ["q_proj", "v_proj"],
        "max_length": 512,
        "sample": False,
        "debug": True,
        "run_name": None,
    },
    "hub": ["Org/Base-1B", "Org/Data"],
    "ib": {"target_layer": 20, "bottleneck_dim": 256, "encoder": "linear", "encoder_rank": 32, "alpha": 0.1},
    "adapter": {"r": 32, "lora_alpha": 16, "target_modules": ["layers.0.v_proj", "layers.0.q_proj", "layers.1.q_proj"]},
    "base": "f" * 64,
    "prompt_format": {"separator": "\n", "bos": True, "eos": True},
    "data": {
        "fingerprint": "d" * 64,
        "summary": ["10 rows: 9 kept, 1 dropped", "/home/jane/secret-client/rows.jsonl: 3 rows"],
    },
    "dtype": "bfloat16",
    "engine": "ddp",
    "attention": "sdpa",
    "steps": 6,
    "result": {"step": 6, "loss": 1.2345678, "ce": 1.25, "kl_nats": 3.5, "ce_ib": 2.0, "active_share": None},
    "command": ["/home/jane/.venv/bin/ibft", "train"],
    "versions": {"ibft": "0.1.0", "torch": "2.13.0", "triton": None},
}
SFT = {**RECORD, "ib": None, "result": {"step": 6, "loss": 1.25, "ce": 1.25, "kl_nats": None}}


def test_what_it_says() -> None:
    text = render_card(RECORD, "run")
    card = ModelCard(text)
    assert card.data.base_model == "Org/Base-1B" and card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["Org/Data"]
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert {"ib-ft", "lora"} <= set(card.data.tags)
    for part in (
        "# Adapter for Base-1B",
        "[Org/Base-1B](https://huggingface.co/Org/Base-1B)",
        "f" * 64,
        "d" * 64,
        "10 rows: 9 kept, 1 dropped",
        "- path/to/rows.jsonl: 3 rows",
        "`loss = CE + alpha * (KL + beta * CE_ib)`",
        "| target_layer | 20 |",
        "| alpha | 0.1 |",
        "| r | 32 |",
        "on the modules q_proj, v_proj.",
        "| loss | 1.23457 |",
        "| kl_nats | 3.5 |",
        "ibft 0.1.0, torch 2.13.0; engine ddp, attention sdpa, base model in bfloat16.",
        "https://arxiv.org/abs/2510.16022",
        'AutoModelForCausalLM.from_pretrained("Org/Base-1B", dtype="auto")',
        "--base_model Org/Base-1B --dataset Org/Data path/to/rows.jsonl",
        "--lora_target_modules q_proj v_proj",
        "--max_length 512",
        "--no_sample",
    ):
        assert part in text, part
    assert "encoder_rank" not in text  # a linear encoder has none
    assert "active_share" not in text  # was not known
    assert "--debug" not in text and "--run_name" not in text


@pytest.mark.parametrize("kind", ["run", "adapter", "merged"])
def test_no_path_of_the_machine(kind: Any) -> None:
    for base_model in (None, "/home/jane/models/base"):
        text = render_card(RECORD, kind, base_model=base_model)
        assert "jane" not in text and "secret-client" not in text
    assert ModelCard(text).data.base_model is None  # a path there makes the Hub refuse the card
    assert "`path/to/base`, a local folder" in text


@pytest.mark.parametrize("kind", ["run", "adapter", "merged"])
def test_plain_fine_tuning_has_no_bottleneck(kind: Any) -> None:
    text = render_card(SFT, kind)
    assert not re.search(r"bottleneck|ib-ft|IB-FT|CE_ib|KL|2510\.16022|ib_head", text)
    assert "supervised fine-tuning (SFT)" in text and "`loss = CE`" in text


def test_validation() -> None:
    assert "validat" not in render_card(RECORD, "run")
    text = render_card({**RECORD, "validation": {"kept": 12}, "result": {"ce": 1.0, "eval_loss": 2.0}}, "run")
    assert "- validated on 12 rows" in text and "| eval_loss | 2 |" in text
    assert "training data; eval_loss on the validation data:" in text


def test_variants_of_lora() -> None:
    assert "with use_" not in render_card(RECORD, "run")
    adapter = {**RECORD["adapter"], "use_rslora": True, "use_dora": True}
    assert "with use_rslora, use_dora." in render_card({**RECORD, "adapter": adapter}, "run")


def test_a_merged_models_card() -> None:
    text = render_card(RECORD, "merged", dtype="bfloat16")
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.base_model_relation == "finetune"
    assert "- weights in bfloat16" in text
    assert "import PeftModel" not in text and "ib_head" not in text


def test_an_adapter_that_ibft_did_not_train() -> None:
    card = ModelCard(text := render_card({}, "adapter", base_model="Org/Base"))
    assert card.data.tags is None and card.data.base_model == "Org/Base"
    assert "ibft train" not in text and "trained" not in text.split("## Use")[0]
    assert "base model: not recorded" in render_card({}, "adapter")


@pytest.fixture
def chat_base(base_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(base_folder, tmp_path / "chat-base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat-base")
    return tmp_path / "chat-base"


CHAT = {"kind": "chat", "separator": None, "bos": False}


@pytest.mark.parametrize("form", [RECORD["prompt_format"], CHAT, {**CHAT, "end_of_turn": "<bos>"}, {}])
@pytest.mark.parametrize("kind", ["run", "merged"])
def test_its_code_runs(
    train: Callable[..., int], tmp_path: Path, chat_base: Path, form: dict[str, Any], kind: Any
) -> None:
    assert train() == 0
    config = {"base_model": str(chat_base), "dataset": ["rows.jsonl"]}
    text = render_card({**RECORD, "config": config, "prompt_format": form}, kind)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = code.replace("path/to/base/model", str(chat_base)).replace("max_new_tokens=200", "max_new_tokens=2")
    code = code.replace(
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"',
        f'model = AutoModelForCausalLM.from_pretrained("{chat_base}"',
    )
    code = code.replace(
        'AutoTokenizer.from_pretrained("path/to/this/folder")', f'AutoTokenizer.from_pretrained("{chat_base}")'
    )
    names: dict[str, Any] = {}
    exec(compile(code.replace("path/to/this/folder", str(tmp_path / "out")), "card", "exec"), names)
    assert names.get("end") == (1 if "end_of_turn" in form else None)  # <bos>: no EOS of the base model's
    assert ("eos_token_id=end" in code) == ("end_of_turn" in form)


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "rows").mkdir(parents=True)
    config = {"base_model": "gpt2", "dataset": ["data/rows", "Org/Data", "a/b/c", "./x"], "validation_dataset": None}
    assert hub_names(config) == ["gpt2", "Org/Data"]


def test_whose_words_they_are(tmp_path: Path, base_folder: Path) -> None:
    file = tmp_path / "README.md"
    assert may_replace(file) and not is_ours(file)
    file.write_text(render_card(RECORD, "run"), encoding="utf-8")
    assert may_replace(file) and is_ours(file)
    file.write_text(file.read_text().replace("library_name: peft", "library_name: peft\nlicense: mit"))
    assert not may_replace(file) and is_ours(file)
    file.write_bytes(b"my words, \xff no UTF-8")
    assert not may_replace(file) and not is_ours(file)

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    template = tmp_path / "peft" / "README.md"
    assert may_replace(template)
    filled = template.read_text().replace("[More Information Needed]", "My model of tides.", 1)
    template.write_text(filled)
    assert not may_replace(template)
    template.unlink()
    template.mkdir()
    assert not may_replace(template)


@pytest.fixture
def train(base_folder: Path, tasks_file: Path, tmp_path: Path) -> Callable[..., int]:
    def run(more: str = "") -> int:
        quick = "--max_length 128 --bottleneck_dim 16 --lora_r 4 --max_steps 2"
        command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'} {quick}"
        return main(f"{command} {more}".split())

    return run


def test_training_writes_it_and_keeps_what_is_not_its_own(
    train: Callable[..., int], tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "out" / "README.md"
    assert train() == 0
    text = readme.read_text()
    record = json.loads((tmp_path / "out" / "ibft.json").read_text())
    assert is_ours(readme) and text == render_card(record, "run")
    assert str(base_folder) not in text and str(tmp_path) not in text
    assert "24 rows: 24 kept" in text and f"| ce | {record['result']['ce']:.6g} |" in text

    assert train("--overwrite --method sft") == 0
    assert "bottleneck" not in readme.read_text() and "yours and stays" not in capsys.readouterr().out
    readme.write_text("my words")
    assert train("--overwrite") == 0
    assert readme.read_text() == "my words"
    assert "README.md is yours and stays" in capsys.readouterr().out


def test_its_command_repeats_the_run(
    train: Callable[..., int], tmp_path: Path, base_folder: Path, tasks_file: Path
) -> None:
    assert train("--learning_rate 3e-3 --no_sample --lora_target_modules q_proj v_proj") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    (command,) = re.findall(r"\$ ibft (train .*)", text)
    for name, path in ((base_folder.name, base_folder), (tasks_file.name, tasks_file), ("out", tmp_path / "again")):
        assert f"path/to/{name}" in command
        command = command.replace(f"path/to/{name}", str(path))
    assert main(command.split()) == 0
    names = ("adapter_model.safetensors", "ib_head.safetensors")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
