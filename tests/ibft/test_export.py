"""`ibft export`: every form of a trained model gives the same text, and nothing of the user's is lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ibft
import ibft.export
from ibft.cli import main
from ibft.lab.tasks import generate_tasks
from ibft.lab.tiny import build_llama, build_tokenizer, save_base

PROMPT = "Write a function.\n"
ADAPTER_FILES = {
    *("adapter_model.safetensors", "adapter_config.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json"),
}
TRAINING = (
    "--max_length 128 --bottleneck_dim 16 --lora_r 4 --max_steps 8 --save_steps 4 --learning_rate 2e-2 "
    "--lr_scheduler_type constant --warmup_ratio 0"
)


@pytest.fixture(scope="module", params=["untied", "tied"])
def head(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def make_run(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with `base` and a finished `run` on it, the base model with a tied or an untied head."""
    made: dict[str, Path] = {}

    def make(head: str) -> Path:
        if head not in made:
            folder = tmp_path_factory.mktemp(head)
            shutil.copytree(base_folder, folder / "base")
            if head == "tied":
                model = AutoModelForCausalLM.from_pretrained(base_folder)
                model.config.tie_word_embeddings = True
                model.tie_weights()
                model.save_pretrained(folder / "base")
            command = f"train --base_model {folder}/base --dataset {tasks_file} --output_dir {folder}/run {TRAINING}"
            assert main(command.split()) == 0
            made[head] = folder
        return made[head]

    return make


@pytest.fixture
def trained(make_run: Callable[[str], Path]) -> Path:
    return make_run("untied")


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ibft.export, "get_token", lambda: os.environ.get("HF_TOKEN"))  # and no login


def export(run: Path, output: Path, more: str = "") -> int:
    return main(f"export --adapter {run} --output_dir {output} {more}".split())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def text_of(model: Any, folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return tokenizer.decode(model.eval().generate(**inputs, max_new_tokens=40, do_sample=False)[0])


_WITHOUT_PEFT = """
import sys
sys.modules["peft"] = sys.modules["ibft"] = sys.modules["ibkernels"] = None  # importing one of them fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (cls.from_pretrained(sys.argv[1]) for cls in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer(sys.argv[2], return_tensors="pt")
sys.stdout.write(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))
"""


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_every_form_of_the_model_gives_the_same_text(
    make_run: Callable[[str], Path], head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model in memory as training left it, the run's adapter, the exported one, and the merged model."""
    folder = make_run(head)
    kept: list[Any] = []
    real = ibft.train.save_result
    monkeypatch.setattr(
        ibft.train, "save_result", lambda out, model, *rest: kept.append(model) or real(out, model, *rest)
    )
    config = json.loads((folder / "run" / "ibft.json").read_text())["config"]
    again = {**config, "output_dir": str(tmp_path / "again")}
    ibft.train.train(ibft.config.TrainConfig.from_dict(again))
    kept[0].get_base_model().set_attn_implementation("sdpa")  # attention by documents knows no cache
    expected = text_of(kept[0], folder / "run")
    assert isinstance(kept[0], ibft.IBModel) and expected != text_of(base_of(folder), folder / "base")

    assert export(folder / "run", tmp_path / "adapter") == 0
    assert export(folder / "run", tmp_path / "merged", "--merge") == 0
    for place in (folder / "run", tmp_path / "adapter"):
        assert text_of(PeftModel.from_pretrained(base_of(folder), place), place) == expected
    command = [sys.executable, "-c", _WITHOUT_PEFT, str(tmp_path / "merged"), PROMPT]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == expected


def test_logits_of_the_merged_model(make_run: Callable[[str], Path], head: str, tmp_path: Path) -> None:
    folder = make_run(head)
    assert export(folder / "run", tmp_path / "merged", "--merge") == 0
    ids = torch.arange(5, 45)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(base_of(folder), folder / "run")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(weights) == set(load_file(folder / "base" / "model.safetensors"))
    assert ("lm_head.weight" in weights) == (head == "untied")
    assert merged.config.tie_word_embeddings == (head == "tied")


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["adapted", "retrained"],
)
def test_a_tied_head_keeps_its_weights_when_the_embeddings_are_merged(
    make_run: Callable[[str], Path], tasks_file: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    base = make_run("tied") / "base"
    (tmp_path / "adapter.json").write_text(json.dumps({"r": 4, **adapter}))
    command = f"train --base_model {base} --dataset {tasks_file} --output_dir {tmp_path}/run {TRAINING}"
    assert main([*command.split(), "--adapter_config", str(tmp_path / "adapter.json")]) == 0
    assert export(tmp_path / "run", tmp_path / "merged", "--merge") == 0
    ids = torch.arange(5, 45)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(base_of(base.parent), tmp_path / "run")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
    assert not merged.config.tie_word_embeddings


def test_what_a_clean_adapter_holds(trained: Path, tmp_path: Path) -> None:
    assert export(trained / "run", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ADAPTER_FILES
    assert names(tmp_path) == {"out"}
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base_of(trained), lora).save_pretrained(tmp_path / "plain")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "plain"))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "plain")]
    assert settings[0].keys() == settings[1].keys()
    assert settings[0]["base_model_name_or_path"] == str(trained / "base")


def test_what_a_merged_model_holds(trained: Path, tmp_path: Path) -> None:
    assert export(trained / "run", tmp_path / "out", "--merge") == 0
    model = {"model.safetensors", "config.json", "generation_config.json"}
    assert names(tmp_path / "out") == model | {"tokenizer.json", "tokenizer_config.json", "README.md"}
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "README.md"):
        assert str(trained) not in (tmp_path / "out" / file).read_text()


def test_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    assert export(trained / "run" / "checkpoint-4", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ADAPTER_FILES
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a checkpoint: after step 4 of 8" in card and "### Result" not in card
    assert export(trained / "run" / "checkpoint-4", tmp_path / "merged", "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(base_of(trained), trained / "run" / "checkpoint-4")
    assert text_of(merged, tmp_path / "merged") == text_of(adapted, trained / "run")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes(trained: Path, tmp_path: Path, stored: torch.dtype) -> None:
    """The base model is known again whatever dtype its file and the merge have."""
    shutil.copytree(trained / "base", tmp_path / "base")
    base_of(trained).to(stored).save_pretrained(tmp_path / "base")
    run = f"--base_model {tmp_path}/base --output_dir {tmp_path}/run --max_steps 1 --dtype bfloat16 --lora_r 2"
    config = json.loads((trained / "run" / "ibft.json").read_text())["config"]
    assert main(f"train --dataset {config['dataset'][0]} --max_length 128 {run}".split()) == 0
    for wanted in ("auto", "float32", "bfloat16", "float16"):
        assert export(tmp_path / "run", tmp_path / "out", f"--merge --overwrite --dtype {wanted}") == 0
        dtype = stored if wanted == "auto" else getattr(torch, wanted)
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
        name = str(dtype).removeprefix("torch.")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
        assert f"- weights in {name}" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_of_pefts_own(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(base_of(trained), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    assert export(tmp_path / "plain", tmp_path / "out") == 0
    assert "has no tokenizer" in capsys.readouterr().out
    assert names(tmp_path / "out") == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert export(tmp_path / "plain", tmp_path / "merged", "--merge") == 0
    assert "no ibft.json" in capsys.readouterr().out
    assert "bottleneck" not in (tmp_path / "merged" / "README.md").read_text()


def test_a_base_model_that_has_moved(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "./gone/base"}))
    assert export(tmp_path / "run", tmp_path / "out", "--merge") == 2
    assert "./gone/base" in (error := capsys.readouterr().err) and "--base_model names another place" in error
    assert names(tmp_path) == {"run"}
    shutil.copytree(trained / "base", tmp_path / "moved")
    assert export(tmp_path / "run", tmp_path / "out", f"--merge --base_model {tmp_path / 'moved'}") == 0
    assert export(tmp_path / "run", tmp_path / "named", "--base_model Org/Base") == 0
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Org/Base"
    assert "base_model: Org/Base" in (tmp_path / "named" / "README.md").read_text()


def test_no_base_model_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(base_of(trained), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    assert export(tmp_path / "plain", tmp_path / "out", "--merge") == 2
    assert f"{file} names no base model; name it with --base_model." in capsys.readouterr().err
    assert names(tmp_path) == {"plain"}


def test_another_base_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "base", tmp_path / "other")
    model = base_of(trained)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    more = f"--merge --base_model {tmp_path / 'other'}"
    assert export(trained / "run", tmp_path / "out", more) == 2
    assert "is not the model that the adapter was trained on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(trained / "run", tmp_path / "out", f"{more} --allow_other_base") == 0
    assert "trained on another base model" in (tmp_path / "out" / "README.md").read_text()


def test_overwriting(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert export(trained / "run", out, "--merge") == 0
    assert export(trained / "run", out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert "model.safetensors" in names(out)
    assert export(trained / "run", out, "--overwrite") == 0
    assert names(out) == ADAPTER_FILES and names(tmp_path) == {"out"}
    card = out / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert export(trained / "run", out, "--merge --overwrite") == 0
    assert card.read_text().endswith("My own words.\n") and "model.safetensors" in names(out)


def test_a_link_stays_a_link(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for more in ("", "--overwrite"):
        assert export(trained / "run", tmp_path / "out", more) == 0
        assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ADAPTER_FILES
        assert names(tmp_path) == {"disk", "out"}


@pytest.mark.parametrize("place", ["run", "base", "above", "mine", "file", "other-run"])
def test_a_folder_that_is_not_an_export_is_never_replaced(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    target = {"run": trained / "run", "base": trained / "base", "above": trained}.get(place, tmp_path / place)
    if place == "mine":
        target.mkdir()
        (target / "README.md").write_text("my words")
    elif place == "file":
        target.write_text("my words")
    elif place == "other-run":
        shutil.copytree(trained / "run", target)
    before = names(target) if target.is_dir() else None
    assert export(trained / "run", target, "--merge --overwrite") == 2
    assert "output_dir" in capsys.readouterr().err
    assert (names(target) if target.is_dir() else None) == before


def test_a_failure_leaves_nothing_half_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert export(trained / "run", tmp_path / "out", "--merge") == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert names(tmp_path) == set()


def test_a_merged_chat_model_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """Its token is the template's, not the base model's EOS."""
    tasks = generate_tasks(12, seed=3)
    tokenizer = build_tokenizer([task.program for task in tasks], vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    save_base(build_llama(tokenizer, hidden_size=16, num_layers=2, num_heads=2), tokenizer, tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": t.description}, {"role": "assistant", "content": t.program}]}
        for t in tasks
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = f"train --base_model {tmp_path}/base --dataset {tmp_path}/chat.jsonl --output_dir {tmp_path}/run --use_cpu"
    assert main([*train.split(), *["--max_length", "256", "--bottleneck_dim", "8", "--max_steps", "1"]]) == 0
    assert main(f"export --adapter {tmp_path}/run --output_dir {tmp_path}/merged --merge".split()) == 0
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--output_dir out", "--adapter must be given"),
        ("--adapter {run} --output_dir .", "'.' is the current folder"),
        ("--adapter nowhere --output_dir out", "--adapter 'nowhere' is not a folder"),
        ("--adapter {base} --output_dir out", "holds no adapter_config.json, so it is no adapter"),
        ("--adapter {run} --output_dir out --merg", "Did you mean --merge?"),
        ("--adapter {run} --output_dir out --merge --dtype float8", "--dtype takes auto or float32"),
        ("--adapter {run} --output_dir out --dtype float32", "--dtype float32 needs --merge"),
        ("--adapter {run} --output_dir out --allow_other_base", "--allow_other_base needs --merge"),
        ("--adapter {run} --output_dir out --private", "--private needs --push_to_hub"),
        ("--adapter {run} --output_dir out --revision v1", "--revision v1 needs --push_to_hub"),
        ("--adapter {run} --output_dir out --push_to_hub a/b/c", "'a/b/c' is no name for a repository"),
        ("--adapter {run} --output_dir out --push_to_hub me/a--b", "'me/a--b' is no name for a repository"),
        ("--adapter {run} --output_dir out --push_to_hub name", "takes NAMESPACE/NAME"),
        ("--adapter {run} --output_dir out --push_to_hub me/name", "needs a token that may write: set HF_TOKEN"),
        ("--adapter {run} --output_dir out --merge --base_model ./gone", "'./gone' is not a folder"),
        ("--adapter {run} --output_dir out --merge --base_model {run}", "it holds an adapter"),
    ],
)
def test_wrong_input_is_a_sentence(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *command.format(run=trained / "run", base=trained / "base").split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert names(tmp_path) == set()


def test_an_unfinished_run_names_its_checkpoints(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert export(tmp_path / "run", tmp_path / "out") == 2
    assert "has not finished; its checkpoints are checkpoint-4" in capsys.readouterr().err


@pytest.mark.parametrize("merge", ["", "--merge"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: (run / "adapter_model.safetensors").write_bytes(b"\0" * 40), "cannot be read"),
        (lambda run: save_file({}, run / "adapter_model.safetensors"), "holds no weights"),
        (lambda run: (run / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda run: (run / "adapter_config.json").write_text("[]"), "must hold a JSON object {...}, not []"),
        (lambda run: (run / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "peft_type is 'IA3'"),
        (lambda run: (run / "ibft.json").write_text("{"), "ibft.json is not valid JSON"),
        (lambda run: (run / "ibft.json").write_text('{"config": {}}'), "is no record of `ibft train`"),
        (lambda run: (run / "tokenizer.json").write_text("{"), "the tokenizer in"),
    ],
)
def test_a_damaged_adapter(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    sentence: str,
    merge: str,
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    damage(tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out", merge) == 2
    assert sentence in capsys.readouterr().err
    assert names(tmp_path) == {"run"}


def test_an_adapter_that_does_not_fit_or_is_not_finite(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    weights = load_file(trained / "run" / "adapter_model.safetensors")
    first = next(iter(weights))
    file = tmp_path / "run" / "adapter_model.safetensors"
    for damaged in (torch.full_like(weights[first], float("nan")), weights[first][:1].contiguous()):
        save_file({**weights, first: damaged}, file)
        assert export(tmp_path / "run", tmp_path / "out", "--merge") == 2
        assert "cannot be merged into base_model" in capsys.readouterr().err
