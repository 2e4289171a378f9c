"""What users get wrong: one table of situations, command lines, and the sentence that each must end in.

Every entry goes through `ibft.cli.main`, as a user's command does. It must end with exit code 2 and a line on stderr
that begins with "ibft: error" and says what was wrong, the value and what is accepted; without a traceback, and with
every file and folder as it was.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet
import pytest
import transformers
from safetensors.torch import load_file, save_file
from snapshot import contents

import ibft.cli
import ibft.tracking
import ibft.train
from ibft.cli import main

QUICK = "--max_length 128 --bottleneck_dim 8 --lora_r 2 --max_steps 3 --save_steps 2 --logging_steps 1 --use_cpu"
ROWS = [{"instruction": f"number {index}", "output": f"x = {index}"} for index in range(6)]
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ALTERNATING = "{% if messages|length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML


@dataclass
class World:
    """A test's own folder, and the things that users have in theirs."""

    here: Path
    base_folder: Path
    run_folder: Path
    monkeypatch: pytest.MonkeyPatch

    def text(self, name: str, content: str | bytes) -> Path:
        """A file."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def json(self, name: str, value: Any) -> Path:
        """A JSON file."""
        return self.text(name, json.dumps(value))

    def rows(self, name: str, *rows: Any) -> Path:
        """A file of JSON lines."""
        return self.text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def chat(self, *conversations: Any) -> Path:
        """chat.jsonl, with one conversation a row."""
        return self.rows("chat.jsonl", *({"messages": messages} for messages in conversations))

    def base(self, **changed: Any) -> Path:
        """A copy of the base model in base/, with values of a JSON file changed: config={"vocab_size": 3}."""
        folder = self.here / "base"
        shutil.copytree(self.base_folder, folder, dirs_exist_ok=True)
        for name, values in changed.items():
            file = folder / f"{name}.json"
            merged = {**json.loads(file.read_text()), **values}
            file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
        return folder

    def run(self, *, finished: bool = True) -> Path:
        """A copy of a run in run/, with its checkpoint of step 2; unfinished, as a power cut would leave it."""
        folder = self.here / "run"
        shutil.copytree(self.run_folder, folder)
        if not finished:
            record = json.loads((folder / "ibft.json").read_text())
            (folder / "ibft.json").write_text(json.dumps({**record, "result": None}))
        return folder


Setting = Callable[[World], Any]


@dataclass(frozen=True)
class Wrong:
    """A command line, a pattern of the sentence that must come of it, and what there must be for it to be wrong."""

    command: str  # {base}, {data}, {out}, {here} are filled in
    sentence: str  # regular expression
    make: Setting | None = None


def train(more: str, sentence: str, make: Setting | None = None) -> Wrong:
    """A wrong `ibft train`, which would be right without `more` (flags given twice: the last one counts)."""
    return Wrong(f"train --base_model {{base}} --dataset {{data}} --output_dir {{out}} {QUICK} {more}", sentence, make)


def data(name: str, content: str | bytes, sentence: str, more: str = "") -> Wrong:
    """A dataset file that cannot be trained on."""
    return train(f"--dataset {{here}}/{name} {more}", sentence, lambda world: world.text(name, content))


def rows(row: Any, sentence: str, more: str = "") -> Wrong:
    """A good row and then this one."""
    content = "".join(json.dumps(each) + "\n" for each in (ROWS[0], row))
    return data("rows.jsonl", content, f"rows.jsonl.*{sentence}", more)


def chat(messages: Any, sentence: str, more: str = "") -> Wrong:
    """A conversation for a base model that has a chat template."""

    def make(world: World) -> None:
        world.base(tokenizer_config={"chat_template": CHATML})
        world.chat(messages)

    return train(f"--base_model {{here}}/base --dataset {{here}}/chat.jsonl {more}", sentence, make)


def base(sentence: str, make: Setting, more: str = "") -> Wrong:
    """A base model, made in the folder `base`, that cannot be trained."""
    return train(f"--base_model {{here}}/base {more}", sentence, make)


def settings(flag: str, name: str, content: str, sentence: str, more: str = "") -> Wrong:
    """A file of settings."""
    return train(f"--{flag} {{here}}/{name} {more}", sentence, lambda world: world.text(name, content))


def resume(more: str, sentence: str, make: Setting | None = None) -> Wrong:
    """`--resume` of an unfinished run that is not to be resumed so."""
    return train(
        f"--output_dir {{here}}/run --resume {more}",
        sentence,
        lambda world: (world.run(finished=False), make and make(world)),
    )


def export(more: str, sentence: str, make: Setting | None = None) -> Wrong:
    """A wrong `ibft export` of a finished run."""
    return Wrong(
        f"export --adapter {{here}}/run --output_dir {{out}} {more}",
        sentence,
        lambda world: (world.run(), make and make(world)),
    )


def environment(**variables: str) -> Setting:
    return lambda world: [world.monkeypatch.setenv(name, value) for name, value in variables.items()]


def adapter_json(**values: Any) -> str:
    return json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **values})


def not_installed(name: str) -> str:
    """What importlib.metadata.version does of a package that is missing."""
    raise PackageNotFoundError(name)


def parquet(world: World, table: pa.Table) -> None:
    pyarrow.parquet.write_table(table, world.here / "rows.parquet")


def other_model(kind: str, **sizes: Any) -> Setting:
    """A model of transformers' class `kind` in the folder base, with the tokenizer of the base model."""

    def make(world: World) -> None:
        config = getattr(transformers, re.sub("(Model|ForCausalLM)$", "Config", kind))(**sizes)
        getattr(transformers, kind)(config).save_pretrained(world.here / "base")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(world.base_folder / name, world.here / "base")

    return make


GPT2_OF_64_POSITIONS = other_model("GPT2Model", vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=64)


def cut(file: str, size: int) -> Setting:
    """The file `file`, below the test's folder, cut off as an interrupted copy leaves it."""
    return lambda world: os.truncate(world.here / file, size)


DISK = resource.getrlimit(resource.RLIMIT_FSIZE)


def fill_the_disk(size: int) -> None:
    """No file may grow beyond `size` bytes: the libraries meet what they meet on a full disk, but for the errno."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, DISK[1]))


def weights_of_another_shape(world: World) -> None:
    file = world.base() / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name][:8].clone()}, file, metadata={"format": "pt"})


DATA = {
    "dataset_misspelt": train(
        "--dataset {here}/taks.jsonl",
        "There is no file or folder '.*/taks.jsonl'. Near by there is 'tasks.jsonl'. Accepted are files ending in",
        lambda world: world.rows("tasks.jsonl", *ROWS),
    ),
    "dataset_in_no_folder": train("--dataset {here}/dta/x.jsonl", "There is no folder '.*/dta' either"),
    "dataset_pdf": data("book.pdf", b"%PDF-1.7\n\xff", "book.pdf' is not a kind of file that can be read. Accepted"),
    "dataset_pdf_renamed": data("book.jsonl", b"%PDF-1.7\n\xe2\xff", "book.jsonl.* (not UTF-8 text|not valid JSON)"),
    "dataset_excel": data("rows.xlsx", b"PK\x03\x04", "rows.xlsx' is not a kind of file that can be read"),
    "dataset_gzip_that_is_none": data("rows.jsonl.gz", "{}\n", "rows.jsonl.gz could not be read .*Not a gzipped file"),
    "dataset_gzip_cut_off": data("a.jsonl.gz", gzip.compress(b'{"instruction": "a"}' * 99)[:40], "could not be read"),
    "dataset_parquet_that_is_none": data("rows.parquet", "x" * 99, "rows.parquet could not be read as .parquet"),
    "dataset_empty_folder": train(
        "--dataset {here}/data", "folder '.*/data' holds no data", lambda world: (world.here / "data").mkdir()
    ),
    "dataset_saved_and_damaged": train(
        "--dataset {here}/data",
        "folder '.*/data' could not be read as a saved dataset",
        lambda world: world.text("data/state.json", "{"),
    ),
    "dataset_empty_file": data("rows.jsonl", "", "rows.jsonl' has no rows"),
    "dataset_blank_lines": data("rows.jsonl", "\n\n", "rows.jsonl' has no rows"),
    "dataset_empty_list": data("rows.json", "[]", "rows.json' has no rows"),
    "jsonl_trailing_comma": data(
        "rows.jsonl", '{"instruction": "a", "output": "b"},\n', "rows.jsonl, line 1 is not valid JSON: Extra data"
    ),
    "jsonl_cut_off": data("rows.jsonl", '{"instruction": "a", "outp', "line 1 is not valid JSON: Unterminated string"),
    "json_trailing_comma": data(
        "rows.json", '[\n{"instruction": "a", "output": "b"},\n]', "rows.json, line [23] is not valid JSON"
    ),
    "json_one_pretty_object": data("rows.json", '{\n "a": 1\n}', "may also be one list of objects"),
    "json_nested_too_deeply": data("rows.json", "[" * 100_000, "rows.json.* nested too deeply"),
    "jsonl_of_lists": data("rows.jsonl", '["a", "b"]\n', "line 1 holds .*, not an object with columns"),
    "csv_semicolons": data("rows.csv", "instruction;output\na;b\n", "'instruction;output'.*comma"),
    "csv_ragged": data("rows.csv", "instruction,output\na,b\na,b,c\n", "rows.csv could not be read.*[Rr]ow"),
    "csv_header_alone": data("rows.csv", "instruction,output\n", "rows.csv' has no rows"),
    "csv_latin1": data("rows.csv", "instruction,output\na,caf\xe9\n".encode("latin-1"), "rows.csv.*UTF-?8"),
    "csv_column_twice": data("rows.csv", "instruction,output,output\na,b,c\n", "rows.csv.*output"),
    "csv_of_messages": data("rows.csv", "messages\nhello\n", "CSV file are text and hold no messages"),
    "cell_number": rows({"instruction": "a", "output": 7}, r"row 1 .*column 'output' holds 7 \(int\).*must be text"),
    "cell_none": rows({"instruction": "a", "output": None}, "column 'output' holds None .*must be text"),
    "cell_list": rows({"instruction": "a", "output": ["b"]}, "column 'output' holds .*list.*must be text"),
    "cell_absent": rows({"instruction": "a"}, r"row 1 .*column 'output' holds nothing \(no such key\)"),
    "cell_number_in_parquet": train(
        "--dataset {here}/rows.parquet",
        "column 'output' holds 1 .*must be text",
        lambda world: parquet(world, pa.table({"instruction": ["a", "b"], "output": [1, 2]})),
    ),
    "cell_null_in_parquet": train(
        "--dataset {here}/rows.parquet",
        "row 1 .*column 'output' holds None",
        lambda world: parquet(world, pa.table({"instruction": ["a", "b"], "output": ["c", None]})),
    ),
    "column_near_miss": train(
        "--prompt_column Instuction --response_column output", "not 'Instuction'. Did you mean 'instruction'"
    ),
    "columns_unknown": data(
        "rows.jsonl",
        '{"question": "a", "answer": "b"}\n',
        "'question', 'answer'; among them is none of the known pairs",
    ),
    "column_alone": train("--prompt_column instruction", "--response_column is missing"),
    "column_twice": train("--prompt_column output --response_column output", "both name 'output'; they must differ"),
    "columns_of_two_kinds": data(
        "rows.jsonl", '{"messages": [], "prompt": "a", "completion": "b"}\n', "both a conversation .* and a pair"
    ),
    "responses_empty": data(
        "rows.csv", "instruction,output\na,\nb, \n", "None of the 2 rows .*2 have an empty response"
    ),
    "responses_too_long": train(
        "--max_length 4", "None of the 24 rows .*24 do not fit into max_length 4,.*Raise --max_length.$"
    ),
    "max_length_one": train("--max_length 1", "--max_length must be at least 2, not 1"),
    "split_unknown": train("--dataset_split trian", "has no split 'trian'; --dataset_split can be 'train'"),
    "split_that_the_folder_lacks": train(
        "--dataset {here}/data --dataset_split test",
        "has no split 'test'; --dataset_split can be 'train'",
        lambda world: world.rows("data/train.jsonl", *ROWS),
    ),
    "formats_mixed": train(
        "--dataset {data} {here}/chat.jsonl",
        "holds text .* conversations .*--format chat makes conversations of both",
        lambda world: world.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ),
    "separators_mixed": train(
        "--dataset {data} {here}/rows.jsonl",
        "joins prompt and response with .*--separator sets one for both",
        lambda world: world.rows("rows.jsonl", {"prompt": "a", "completion": "b"}),
    ),
    "dataset_twice": train("--dataset {data} {data}", "names '.*' twice; .*--dataset_weights"),
    "weights_of_wrong_number": train("--dataset_weights 1 2", "gives 2 weights for 1 datasets; give one for each"),
    "weight_zero": train("--dataset_weights 0", "--dataset_weights must be greater than 0, not 0.0"),
    "weight_no_number": train("--dataset_weights half", r"--dataset_weights takes finite numbers, not \['half'\]"),
    "weight_too_small": train("--dataset_weights 0.001", "of weight 0.001 gives no row to train on"),
    "streaming": train("--streaming", "streaming is not supported"),
    "validation_share": train("--validation_split 1.5", "share of the rows between 0 and 1.*not '1.5'"),
    "validation_of_all": train("--validation_split 24", "holds out 24 rows, and the data has 24"),
    "validation_split_unknown": train("--validation_split dev", "has no split 'dev'; --validation_split can be"),
    "validation_split_trained_on": train("--validation_split train", "is the split that is trained on"),
    "validation_twice": train(
        "--validation_split 0.1 --validation_dataset {data}", "both say what to validate on; give one"
    ),
    "eval_steps_without_validation": train("--eval_steps 2", "--eval_steps needs data to validate on"),
    "validation_dataset_missing": train("--validation_dataset {here}/v.jsonl", "no file or folder '.*/v.jsonl'"),
    "validation_dataset_trained_on": train("--validation_dataset {data}", "is trained on; name another"),
    "validation_dataset_of_another_kind": train(
        "--validation_dataset {here}/v.jsonl",
        "a run needs one format",
        lambda world: world.rows("v.jsonl", {"prompt": "a", "completion": "b"}),
    ),
    "validation_column_near_miss": rows({**ROWS[0], "spilt": "train"}, "not the 'splt'", "--validation_column splt"),
    "validation_column_of_other_words": train(
        "--dataset {here}/rows.jsonl --validation_column split",
        "column 'split' holds 'yes'; accepted are train",
        lambda world: world.rows("rows.jsonl", {**ROWS[0], "split": "train"}, {**ROWS[1], "split": "yes"}),
    ),
    "no_room_for_the_tokens": train("", "tokens cannot be written to .*: .*TMPDIR", lambda world: fill_the_disk(500)),
    "hub_dataset_offline": train(
        "--dataset nobody/nothing", "'nobody/nothing' is no local file or folder, and .*if it is private, HF_TOKEN"
    ),
}

CHAT = {
    "chat_without_template": train(
        "--dataset {here}/chat.jsonl",
        "has no chat template, which conversations need",
        lambda world: world.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ),
    "chat_format_without_template": train("--format chat", "has no chat template, which conversations need"),
    "chat_as_text": chat([{"role": "user", "content": "a"}], "which are no plain text", "--format text"),
    "chat_separator": train("--format chat --separator :", "--separator has no place in --format chat"),
    "chat_unknown_role": chat([{"role": "bot", "content": "a"}], "of the role 'bot'; the roles are system, user"),
    "chat_sharegpt_keys": chat([{"from": "human", "value": "a"}], 'one is {"role": ..., "content": ...}'),
    "chat_one_message_alone": chat({"role": "user", "content": "a"}, "a conversation is a list of messages"),
    "chat_content_number": chat([{"role": "user", "content": 5}], "content is 5; it must be text"),
    "chat_without_assistant": chat([{"role": "user", "content": "a"}], "None of the 1 rows.* no answer to learn"),
    "chat_empty_conversation": chat([], "None of the 1 rows.* no answer to learn"),
    "chat_all_masked": chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
        "None of the 1 rows.* no answer to learn",
    ),
    "chat_tool_calls": chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": 1}]}], "tool_calls"
    ),
    "chat_template_refuses": train(
        "--base_model {here}/base --dataset {here}/chat.jsonl",
        r"chat.jsonl, row 0 \(counted from 0\): the chat template refuses it: roles must alternate",
        lambda world: (
            world.base(tokenizer_config={"chat_template": ALTERNATING}),
            world.chat([{"role": role, "content": "a"} for role in ("user", "user", "assistant")]),
        ),
    ),
    "chat_template_broken": train(
        "--base_model {here}/base --dataset {here}/chat.jsonl",
        "chat template refuses it",
        lambda world: (
            world.base(tokenizer_config={"chat_template": "{% for m in messages %}"}),
            world.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        ),
    ),
}

MODEL = {
    "base_missing": train("--base_model ./nowhere", "base_model './nowhere' is not a folder; name one that holds"),
    "base_offline": train("--base_model nobody/nothing", "base_model 'nobody/nothing'"),
    "base_no_name": train("--base_model 'my model'", "base_model 'my model'"),
    "base_file": train("--base_model {data}", "base_model '.*' is a file; name the folder"),
    "base_file_here": train(
        "--base_model model.safetensors",
        "base_model 'model.safetensors' is a file; name the folder",
        lambda world: world.text("model.safetensors", "x"),
    ),
    "base_empty_folder": base("folder without config.json", lambda world: (world.here / "base").mkdir()),
    "base_adapter": train(
        "--base_model {here}/run", r"so not a model \(it holds an adapter: name the base model\)", World.run
    ),
    "base_without_tokenizer": base(
        "no tokenizer can be loaded from base_model .* it has no tokenizer.json",
        lambda world: [file.unlink() for file in world.base().glob("tokenizer*")],
    ),
    "base_tokenizer_damaged": base(
        "no tokenizer can be loaded from base_model .* one of its .json files is damaged",
        lambda world: (world.base(), cut("base/tokenizer.json", 99)(world)),
    ),
    "base_tokenizer_no_json_object": base(
        "no tokenizer can be loaded from base_model .*do not hold what transformers looks for",
        lambda world: (world.base(), world.text("base/tokenizer_config.json", "[]")),
    ),
    "base_encoder": base(
        "BertModel lets a token see the ones after it, as an encoder does",
        other_model(
            "BertModel",
            vocab_size=400,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.2,
        ),
    ),
    "base_encoder_decoder": base(
        "base_model '.*' cannot be loaded as a causal LM",
        other_model("T5Model", vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    ),
    "base_config_no_json": base(
        "base/config.json' is not a valid JSON file", lambda world: (world.base(), world.text("base/config.json", "{"))
    ),
    "base_config_of_unknown_type": base("model type `zzz`", lambda world: world.base(config={"model_type": "zzz"})),
    "base_config_with_code_of_its_own": base(
        "runs no code",
        lambda world: world.base(
            config={"model_type": "zzz", "auto_map": {"AutoConfig": "a.C", "AutoModelForCausalLM": "a.M"}}
        ),
    ),
    "base_without_weights": base(
        "cannot be loaded as a causal LM.*model.safetensors",
        lambda world: (world.base() / "model.safetensors").unlink(),
    ),
    "base_weights_damaged": base(
        "cannot be loaded as a causal LM: one of its .safetensors files is damaged",
        lambda world: (world.base(), cut("base/model.safetensors", 5000)(world)),
    ),
    "base_weights_empty": base(
        "cannot be loaded as a causal LM: one of its .safetensors files is damaged",
        lambda world: (world.base(), cut("base/model.safetensors", 0)(world)),
    ),
    "base_weights_of_another_shape": base("not of the shapes that its config.json asks for", weights_of_another_shape),
    "base_fewer_tokens_than_its_tokenizer": base(
        "holds token .*, but .* has embeddings for 100",
        other_model(
            "LlamaForCausalLM",
            vocab_size=100,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
    ),
    "base_fewer_positions_than_a_packed_row": base(
        r"a row has 128 tokens, and model .* has 64 positions; --max_length can be 64", GPT2_OF_64_POSITIONS
    ),
    "base_fewer_positions_than_a_document": base(
        "positions; --max_length can be 64 at most", GPT2_OF_64_POSITIONS, "--packing none"
    ),
    "tokenizer_without_eos": base("has no EOS token", lambda world: world.base(tokenizer_config={"eos_token": None})),
    "tokenizer_without_bos": base(
        "bos='yes' needs a tokenizer with a BOS token",
        lambda world: world.base(tokenizer_config={"bos_token": None}),
        "--bos yes",
    ),
    "dtype_float16": train("--dtype float16", "--dtype takes auto or float32 or bfloat16, not 'float16'"),
    "dtype_misspelt": train("--dtype bfloat61", "Did you mean bfloat16"),
    "layer_zero": train("--target_layer 0", "--target_layer must be at least 1, not 0"),
    "layer_too_large": train("--target_layer 20", "target_layer is 20, but the model has 2 layers"),
    "layer_negative": train("--target_layer -1", "--target_layer must be at least 1, not -1"),
    "layer_word": train("--target_layer last", "--target_layer takes an integer, not 'last'"),
    "bottleneck_zero": train("--bottleneck_dim 0", "--bottleneck_dim must be at least 1, not 0"),
    "rate_target_without_kl": train("--ib_rate_target 5 --kl_weight 0", "ib_rate_target 5 needs kl_weight above 0"),
    "rate_target_free_bits": train("--ib_rate_target 5 --free_bits 2", "ib_rate_target 5 and free_bits 2 exclude each"),
    "encoder_rank_alone": train("--encoder_rank 4", "--encoder_rank 4 needs --encoder lora"),
    "rank_zero": train("--lora_r 0", "--lora_r must be at least 1, not 0"),
    "rank_fraction": train("--lora_r 2.5", "--lora_r takes an integer, not '2.5'"),
    "dropout_one": train("--lora_dropout 1", "--lora_dropout must be at least 0 and below 1, not 1.0"),
    "modules_that_match_nothing": train("--lora_target_modules query value", "query.*not found in the base model"),
    "modules_that_cannot_be_adapted": train("--lora_target_modules input_layernorm", "adapter does not fit"),
    "modules_with_the_head": train("--lora_target_modules q_proj,lm_head", "the output head is a .*take it out"),
    "modules_and_all": train("--lora_target_modules all-linear q_proj", "all-linear or module names, not both"),
    "modules_none": train("--lora_target_modules none", "must name at least one module"),
    "flash_attention_on_the_cpu": train(
        "--attn_implementation flash_attention_2", "needs a GPU; with --use_cpu take auto"
    ),
    "attention_unknown": train("--attn_implementation flash", "--attn_implementation takes auto or flash_attention_3"),
    "liger_on_the_cpu": train("--liger", "--liger needs a GPU"),
    "bitsandbytes_missing": train(
        "--load_in_4bit",
        r"--load_in_4bit needs bitsandbytes, which is not installed: pip install \"ibft\[quantized\]\"",
        lambda world: world.monkeypatch.setattr("ibft.loading.version", not_installed),
    ),
    "peak_of_nothing": train("--peak_tflops 0", "--peak_tflops must be greater than 0, not 0"),
}

FILES = {
    "adapter_config_missing": train("--adapter_config {here}/a.json", "a.json cannot be read: No such file"),
    "adapter_config_no_json": settings("adapter_config", "a.json", '{"r": 2,}', "a.json is not valid JSON: .* line 1"),
    "adapter_config_list": settings("adapter_config", "a.json", "[]", r"must hold a JSON object {...}, not \[\]"),
    "adapter_config_unknown_key": settings(
        "adapter_config", "a.json", adapter_json(lora_dropuot=0.1), r"lora_dropuot .*Did you mean lora_dropout"
    ),
    "adapter_config_of_another_kind": settings(
        "adapter_config", "a.json", adapter_json(peft_type="IA3"), "peft_type must be \"LORA\", not 'IA3'"
    ),
    "adapter_config_rank_text": settings("adapter_config", "a.json", adapter_json(r="two"), "a.json: .*--?lora_r"),
    "adapter_config_rank_zero": settings("adapter_config", "a.json", adapter_json(r=0), "a.json: .*must be at least 1"),
    "adapter_config_modules_no_names": settings(
        "adapter_config", "a.json", adapter_json(target_modules=["q_proj", 3]), "a.json: target_modules takes names"
    ),
    "adapter_config_modules_no_expression": settings(
        "adapter_config", "a.json", adapter_json(target_modules="(("), r"a.json: .*does not fit.*missing \)"
    ),
    "adapter_config_ranks_no_numbers": settings(
        "adapter_config", "a.json", adapter_json(rank_pattern={"q_proj": "a"}), "a.json: .*does not fit.*TypeError"
    ),
    "adapter_config_token_out_of_range": settings(
        "adapter_config", "a.json", adapter_json(trainable_token_indices=[9999]), "a.json: .*does not fit.*index 9999"
    ),
    "adapter_config_layers_out_of_range": settings(
        "adapter_config", "a.json", adapter_json(layers_to_transform=[9]), "adapter does not fit the base model"
    ),
    "adapter_config_above_the_bottleneck": settings(
        "adapter_config",
        "a.json",
        adapter_json(layers_to_transform=[1]),
        "no adapter is at or below target_layer 1",
        "--target_layer 1",
    ),
    "adapter_config_and_flag": settings(
        "adapter_config", "a.json", adapter_json(), "--lora_r and --adapter_config .* give one", "--lora_r 8"
    ),
    "training_config_misspelt": settings(
        "training_config",
        "t.json",
        '{"learning_rat": 1e-4}',
        "'learning_rat' is not a field .*Did you mean learning_rate",
    ),
    "training_config_trailing_comma": settings(
        "training_config", "t.json", '{\n"seed": 1,\n}', "t.json is not valid JSON: .* at line [23]"
    ),
    "training_config_type": settings(
        "training_config", "t.json", '{"seed": "1"}', 't.json: seed takes an integer, not "1"'
    ),
    "training_config_unsupported": settings(
        "training_config", "t.json", '{"neftune_noise_alpha": 5}', "neftune_noise_alpha is 5, which .* does not support"
    ),
    "training_config_folder": train("--training_config {here}", "cannot be read: Is a directory"),
    "training_config_latin1": train(
        "--training_config {here}/t.json",
        "t.json cannot be read: it is not UTF-8 text",
        lambda world: world.text("t.json", b'{"run_name": "caf\xe9"}'),
    ),
    "config_missing": train("--config {here}/run.yaml", "run.yaml cannot be read: No such file"),
    "config_tab": settings("config", "run.yaml", "seed:\t1\n\tmax_steps: 2\n", "not valid YAML: .*line"),
    "config_unknown_key": settings("config", "run.yaml", "sede: 1\n", "'sede' is not an option. Did you mean seed"),
    "config_key_twice": settings("config", "run.yaml", "seed: 1\nseed: 2\n", "gives seed twice"),
    "config_list": settings("config", "run.yaml", "- seed\n", "must hold a mapping"),
    "config_type": settings(
        "config", "run.yaml", "weight_decay: much\n", "weight_decay takes a finite number, not 'much'"
    ),
    "config_of_another_ending": settings("config", "run.toml", "seed = 1", "--config takes a .yaml, .yml or .json"),
}

FLAGS = {
    "flag_misspelt": train("--learning-rat 1e-4", "--learning_rat is not an option .*Did you mean --learning_rate"),
    "flag_shortened": train("--learn 1e-4", "--learn is not an option"),
    "flag_without_value": train("--seed", "--seed: expected one argument"),
    "flag_with_a_dash_of_a_word_processor": train("—seed 1", "'—seed' begins with a long dash, .*write --name"),
    "value_without_flag": train("7", "'7' has no flag before it"),
    "switch_with_value": train(
        "--gradient_checkpointing true", "'true' has no flag before it: a switch takes no value"
    ),
    "required_missing": Wrong("train --output_dir {out}", "--base_model and --dataset must be given"),
    "learning_rate_negative": train("--learning_rate -1e-4", "--learning_rate must be greater than 0, not -0.0001"),
    "learning_rate_zero": train("--learning_rate 0", "--learning_rate must be greater than 0"),
    "learning_rate_nan": train("--learning_rate nan", "--learning_rate takes a finite number, not nan"),
    "learning_rate_comma": train("--learning_rate 1,5", "--learning_rate takes a finite number, not '1,5'"),
    "alpha_negative": train("--alpha -1", "--alpha must be at least 0, not -1.0"),
    "warmup_ratio": train("--warmup_ratio 2", "--warmup_ratio must be between 0 and 1, not 2.0"),
    "max_steps_zero": train("--max_steps 0", "--max_steps must be at least 1, or -1 for no limit"),
    "epochs_zero": train("--num_train_epochs 0", "--num_train_epochs must be greater than 0"),
    "seed_negative": train("--seed -1", "--seed must be between 0 and"),
    "save_steps_zero": train("--save_steps 0", "--save_steps must be at least 1, not 0"),
    "scheduler_ends_higher": train(
        "--lr_scheduler_type polynomial --learning_rate 1e-7", "ends at a learning rate of 1e-07, so --learning_rate"
    ),
    "scheduler_unknown": train("--lr_scheduler_type cosin", "Did you mean cosine"),
    "preset_unknown": train("--preset publishd", "--preset takes published, not 'publishd'"),
    "tokens_per_batch": train("--tokens_per_batch 1000", "must be a multiple of --max_length .128., not 1000"),
    "batch_twice": train("--tokens_per_batch 256 --per_device_train_batch_size 2", "set the same thing; give one"),
    "num_proc_zero": train("--num_proc 0", "--num_proc must be at least 1, not 0"),
    "tracker_unknown": train("--report_to wand", "not 'wand'. Did you mean wandb"),
    "deepspeed_and_fsdp2": train(
        "--use_deepspeed --engine fsdp2", "--use_deepspeed and --engine fsdp2 name two engines"
    ),
    "deepspeed_config_without_deepspeed": train(
        "--deepspeed_config ds.json", "--deepspeed_config ds.json needs --engine deepspeed; the engine is auto"
    ),
    "deepspeed_config_missing": train("--use_deepspeed --deepspeed_config nowhere.json", "nowhere.json"),
    "engine_unknown": train(
        "--engine fsdp", "--engine takes auto or ddp or fsdp2 or deepspeed, not 'fsdp'. Did you mean"
    ),
    "ddp_in_one_process": train("--engine ddp", "--engine ddp spreads a run over processes.*torchrun --nproc_per_node"),
    "fsdp2_in_one_process": train("--engine fsdp2", "--engine fsdp2 spreads a run over processes.*torchrun"),
    "world_size_word": train("", "WORLD_SIZE is 'two'; torchrun sets it, to a number", environment(WORLD_SIZE="two")),
    "world_size_zero": train("", "WORLD_SIZE is '0'; .* at least 1", environment(WORLD_SIZE="0")),
    "world_size_without_torchrun": train(
        "", "WORLD_SIZE is 2, but RANK is not set.*torchrun", environment(WORLD_SIZE="2")
    ),
    "local_rank_word": train("", "LOCAL_RANK is 'x'", environment(LOCAL_RANK="x")),
    "command_unknown": Wrong(
        "trian",
        "'trian' is not a command of ibft; there are: train, eval, estimate, memorization, represent, export, lab",
    ),
}

FOLDERS = {
    "output_file": train("--output_dir {here}/x", "output_dir .*/x is a file", lambda world: world.text("x", "mine")),
    "output_below_a_file": train(
        "--output_dir {here}/x/run",
        "output_dir .*/x/run cannot be written to: Not a directory",
        lambda world: world.text("x", "mine"),
    ),
    "output_below_a_file_dry": train(
        "--dry_run --output_dir {here}/x/run",
        "cannot be written to: Not a directory",
        lambda world: world.text("x", "mine"),
    ),
    "output_name_too_long": train("--output_dir {here}/" + "x" * 300, "cannot be written to: File name too long"),
    "output_empty_name": train("--output_dir ''", "--output_dir must be a name or path"),
    "output_in_the_dataset": train(
        "--dataset {here}/rows --output_dir {here}/rows/runs/first",
        "output_dir .*/first lies in the dataset '.*/rows', whose files are all read as data",
        lambda world: world.rows("rows/a.jsonl", *ROWS),
    ),
    "output_in_the_validation_dataset": train(
        "--validation_dataset {here}/rows --output_dir {here}/rows",
        "output_dir .*/rows lies in the dataset",
        lambda world: world.rows("rows/a.jsonl", *ROWS),
    ),
    "output_holds_a_model": train("--output_dir {here}/base", "holds a model", World.base),
    "output_holds_a_run": train("--output_dir {here}/run", "holds a finished run; .*--overwrite", World.run),
    "output_holds_half_a_run": train(
        "--output_dir {here}/run", "holds an unfinished run; pass --resume", lambda world: world.run(finished=False)
    ),
    "output_holds_another_adapter": train(
        "--output_dir {here}/a", "holds another adapter", lambda world: world.json("a/adapter_config.json", {})
    ),
    "resume_nothing": train("--resume", "there is no checkpoint in .* to continue from"),
    "resume_a_finished_run": train("--output_dir {here}/run --resume", "holds a finished run", World.run),
    "resume_and_overwrite": resume("--overwrite", "--resume and --overwrite exclude each other"),
    "resume_another_seed": resume("--seed 5", "is of a different run; .*seed was 42, is 5"),
    "resume_another_dataset": resume(
        "--dataset {here}/rows.jsonl",
        "different run; .*data was one of fingerprint [0-9a-f]{12}, is one of",
        lambda world: world.rows("rows.jsonl", *ROWS),
    ),
    "resume_a_damaged_state": resume(
        "", "checkpoint-2/state.pt is damaged: it is not what was", cut("run/checkpoint-2/state.pt", 99)
    ),
    "resume_a_damaged_adapter": resume(
        "", "adapter_model.safetensors is damaged: it is not", cut("run/checkpoint-2/adapter_model.safetensors", 99)
    ),
    "resume_a_checkpoint_without_its_bottleneck": resume(
        "",
        "ib_head.safetensors cannot be read: No such file.*Remove that checkpoint to continue from the one before",
        lambda world: (world.here / "run/checkpoint-2/ib_head.safetensors").unlink(),
    ),
}

EXPORT = {
    "export_nothing": Wrong("export --output_dir {out}", "--adapter must be given"),
    "export_missing": Wrong("export --adapter {here}/rnu --output_dir {out}", "--adapter '.*/rnu' is not a folder"),
    "export_file": Wrong("export --adapter {data} --output_dir {out}", "is not a folder; name the output_dir of a run"),
    "export_base_model": Wrong(
        "export --adapter {base} --output_dir {out}", "holds no adapter_config.json, so it is no"
    ),
    "export_unfinished": export(
        "",
        "The run has not finished; its checkpoints are checkpoint-2",
        lambda world: (world.here / "run/adapter_model.safetensors").unlink(),
    ),
    "export_damaged_weights": export(
        "", "adapter_model.safetensors cannot be read", cut("run/adapter_model.safetensors", 99)
    ),
    "export_damaged_config": export("", "adapter_config.json is not valid JSON", cut("run/adapter_config.json", 9)),
    "export_prompt_tuning": export(
        "", "peft_type is 'IA3'; only LORA", lambda world: world.json("run/adapter_config.json", {"peft_type": "IA3"})
    ),
    "export_damaged_record": export("", "ibft.json is not valid JSON", cut("run/ibft.json", 9)),
    "export_record_of_another_tool": export(
        "", "ibft.json is no record of `ibft train`", lambda world: world.json("run/ibft.json", {"config": 5})
    ),
    "export_into_itself": export("--output_dir {here}/run", "is or holds .*/run, which is needed"),
    "export_into_a_full_folder": export(
        "--output_dir {here}/full", "is not empty; choose another", lambda world: world.text("full/mine.txt", "")
    ),
    "export_over_what_is_not_ours": export(
        "--output_dir {here}/full --overwrite", "did not write", lambda world: world.text("full/mine.txt", "")
    ),
    "export_into_a_file": export("--output_dir {here}/x", "is a file", lambda world: world.text("x", "")),
    "export_below_a_file": export(
        "--output_dir {here}/x/y",
        "output_dir .*/x/y cannot be written: Not a directory",
        lambda world: world.text("x", ""),
    ),
    "export_dtype_alone": export("--dtype float16", "--dtype float16 needs --merge"),
    "export_dtype_unknown": export("--merge --dtype int8", "--dtype takes auto or float32"),
    "export_private_alone": export("--private", "--private needs --push_to_hub"),
    "export_push_without_namespace": export("--push_to_hub mine", "takes NAMESPACE/NAME"),
    "export_push_no_name": export("--push_to_hub 'me/my model'", "is no name for a repository"),
    "export_push_without_token": export("--push_to_hub me/mine", "needs a token"),
    "export_base_gone": export(
        "--merge",
        "base_model '/gone/base' is not a folder.*--base_model names another place",
        lambda world: world.json(
            "run/adapter_config.json",
            {
                **json.loads((world.here / "run/adapter_config.json").read_text()),
                "base_model_name_or_path": "/gone/base",
            },
        ),
    ),
    "export_other_base": export(
        "--merge --base_model {here}/base",
        "is not the model that the adapter was trained on",
        lambda world: world.base(config={"rms_norm_eps": 0.1}),
    ),
    "export_base_of_another_size": export(
        "--merge --allow_other_base --base_model {here}/base",
        "cannot be merged into base_model",
        other_model(
            "LlamaForCausalLM",
            vocab_size=400,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
    ),
    "export_flag_misspelt": export("--merg", "--merg is not an option of `ibft export`. Did you mean --merge"),
}

LAB = {
    "lab_no_mode": Wrong("lab --output_dir {out}", r"`ibft lab` takes one of --quick \(.*\) and --full"),
    "lab_both_modes": Wrong("lab --quick --full --output_dir {out}", "takes one of --quick"),
    "lab_word": Wrong("lab quick", "'quick' has no flag before it"),
    "lab_flag": Wrong("lab --quikc", "--quikc is not an option of `ibft lab`. Did you mean --quick"),
    "lab_workers_zero": Wrong("lab --quick --output_dir {out} --workers 0", "--workers must be at least 1, not 0"),
    "lab_seeds_zero": Wrong("lab --full --output_dir {out} --seeds 0", "--seeds must be at least 1, not 0"),
    "lab_seeds_of_quick": Wrong("lab --quick --output_dir {out} --seeds 2", "--seeds 2 needs --full"),
    "lab_seed_negative": Wrong("lab --quick --output_dir {out} --seed -1", "--seed must be between 0 and"),
    "lab_seed_word": Wrong("lab --quick --output_dir {out} --seed x", "--seed takes an integer, not 'x'"),
    "lab_other_plan": Wrong(
        "lab --quick --output_dir {here}/lab",
        "lab holds an experiment with other settings .mode, seeds",
        lambda world: world.json("lab/lab.json", {}),
    ),
    "lab_something_else": Wrong(
        "lab --quick --overwrite --output_dir {here}/lab",
        "lab holds results.json, which is of no experiment",
        lambda world: world.json("lab/results.json", {}),
    ),
    "lab_report_without_folder": Wrong("lab report", "`ibft lab report` takes one folder"),
    "lab_report_of_nothing": Wrong("lab report {here}/none", "none' holds no results.json"),
    "lab_output_file": Wrong(
        "lab --quick --output_dir {here}/x", "output_dir .*/x is a file", lambda world: world.text("x", "")
    ),
    "lab_output_below_a_file": Wrong(
        "lab --quick --output_dir {here}/x/y",
        "output_dir .*/x/y cannot be written to: Not a directory",
        lambda world: world.text("x", ""),
    ),
}

WRONG = DATA | CHAT | MODEL | FILES | FLAGS | FOLDERS | EXPORT | LAB


@pytest.fixture(scope="module")
def run_folder(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {folder} {QUICK}"
    assert main(command.split()) == 0
    return folder


@pytest.fixture
def world(base_folder: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A folder of the test's own, which is the current one; without network, and nobody logged in."""
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ibft.export.get_token", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read at import, by both
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, base_folder, run_folder, monkeypatch)


@pytest.fixture
def ibft_command(world: World, tasks_file: Path) -> Callable[[str], int]:
    """Runs a command line in which {base}, {data}, {here} and {out} stand for what is in this world."""

    def run(command: str) -> int:
        places = {"base": world.base_folder, "data": tasks_file, "here": world.here, "out": world.here / "out"}
        words = shlex.split(command)
        for name, path in places.items():
            words = [word.replace(f"{{{name}}}", str(path)) for word in words]
        try:
            return main(words)
        finally:  # at once: pytest itself writes between a test and the end of its fixtures, to a log perhaps
            resource.setrlimit(resource.RLIMIT_FSIZE, DISK)

    return run


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_a_sentence(
    world: World, ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    wrong = WRONG[name]
    if wrong.make is not None:
        wrong.make(world)
    before = contents(world.here)
    capsys.readouterr()
    code = ibft_command(wrong.command)
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("ibft: error")]
    assert (code, len(said)) == (2, 1), error
    assert error.endswith(f"{said[0]}\n"), "the sentence is the last word"
    assert "Traceback" not in error
    assert re.search(wrong.sentence, said[0]), said[0]
    assert len(said[0]) < 900, said[0]
    assert contents(world.here) == before


@pytest.mark.parametrize(
    "command",
    [
        "train --base_model {base} --dataset {here}/none.jsonl --output_dir {out} --debug",
        "export --adapter {here}/none --output_dir {out} --debug",
        "lab --quick --output_dir {out} --workers 0 --debug",
    ],
)
def test_debug_shows_the_traceback(
    ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert ibft_command(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith("ibft: error: ")


def test_the_terminal_shows_the_sentence_and_nothing_else(world: World, tasks_file: Path) -> None:
    """What the libraries log, too, in a process of its own."""
    weights_of_another_shape(world)
    command = f"train --base_model {world.here}/base --dataset {tasks_file} --output_dir {world.here}/out {QUICK}"
    places = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-m", "ibft", *command.split()],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("ibft: error: base_model ") and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda world: world.base(tokenizer_config={"pad_token": None}),
        lambda world: world.base(tokenizer_config={"bos_token": None}),
    ],
    ids=["without_pad", "without_bos"],
)
def test_what_a_tokenizer_may_lack(world: World, ibft_command: Callable[[str], int], make: Setting) -> None:
    make(world)
    more = "--packing none --per_device_train_batch_size 3"  # rows of unequal length, which are padded
    assert ibft_command(f"train --base_model {{here}}/base --dataset {{data}} --output_dir {{out}} {QUICK} {more}") == 0


# ---------------------------------------------------------------------------------------------------------------------
# What the system refuses on the way: exit code 1, because the same command is right another time


def refusing(world: World, module: Any, name: str, call: int, error: OSError) -> None:
    """From its `call`th call on, a function of the module raises this error."""
    real, calls = getattr(module, name), []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) >= call:
            raise error
        return real(*args, **kwargs)

    world.monkeypatch.setattr(module, name, function)


def full_at(world: World, name: str, call: int, size: int) -> None:
    """The disk is full from the `call`th call of a function of ibft.train on: no file may have more than `size`."""
    real, calls = getattr(ibft.train, name), []

    def function(*args: Any) -> Any:
        calls.append(name)
        if len(calls) >= call:
            fill_the_disk(size)
        return real(*args)

    world.monkeypatch.setattr(ibft.train, name, function)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
REFUSALS = {
    "torch_writes_a_checkpoint": ("MiB are free", lambda world: full_at(world, "save_checkpoint", 2, 20_000)),
    "safetensors_writes_a_checkpoint": ("File too large", lambda world: full_at(world, "save_checkpoint", 2, 7000)),
    "a_checkpoint_is_renamed": ("Permission denied", lambda world: refusing(world, Path, "rename", 2, DENIED)),
    "metrics_are_written": (
        "No space left",
        lambda world: refusing(world, ibft.tracking.Metrics, "write", 5, NO_SPACE),
    ),
    "the_adapter_is_written": ("File too large", lambda world: full_at(world, "save_result", 1, 7000)),
    "the_tokenizer_is_written": ("File too large", lambda world: full_at(world, "save_result", 1, 14_000)),
    "the_adapter_is_put_in_place": ("No space left", lambda world: refusing(world, os, "replace", 3, NO_SPACE)),
}
LONGER = f"{QUICK} --max_steps 6"
LEFT = ("adapter_model.safetensors", "ib_head.safetensors", "adapter_config.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def whole_run(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What six steps leave that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {folder} {LONGER}"
    assert main(command.split()) == 0
    return without_times(folder)


def without_times(folder: Path) -> dict[str, str]:
    found = {name: value for name, value in contents(folder).items() if name in LEFT}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    measured = re.compile(r"tokens_per_second|mfu|peak_memory_gib|.*seconds")
    records = [{k: v for k, v in json.loads(line).items() if not measured.fullmatch(k)} for line in lines]
    return {**found, "metrics.jsonl": str(records)}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_run_that_can_no_longer_write_goes_on_from_its_checkpoint(
    world: World,
    ibft_command: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
    whole_run: dict[str, str],
    name: str,
) -> None:
    reason, make = REFUSALS[name]
    command = f"train --base_model {{base}} --dataset {{data}} --output_dir {{out}} {LONGER}"
    with world.monkeypatch.context() as patched:
        make(World(world.here, world.base_folder, world.run_folder, patched))
        code = ibft_command(command)
    error = capsys.readouterr().err
    newest = max(path.name for path in (world.here / "out").glob("checkpoint-*"))
    assert code == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(
        f"ibft: error: the run stopped, because {world.here / 'out'} could not be written: "
    )
    assert reason in error and f"{newest} is whole: when this is mended, --resume continues from it." in error
    assert not list((world.here / "out").glob(".*.partial")), "half-written files fill the disk"

    assert ibft_command(f"{command} --resume") == 0
    assert without_times(world.here / "out") == whole_run


def test_a_disk_that_is_full_before_the_first_checkpoint(
    world: World, ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    full_at(world, "save_checkpoint", 1, 2000)
    assert ibft_command(f"train --base_model {{base}} --dataset {{data}} --output_dir {{out}} {QUICK}") == 1
    assert "No checkpoint had been written, so --resume starts over." in capsys.readouterr().err


def test_an_export_that_finds_the_disk_full(
    world: World, ibft_command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    world.run()
    before = contents(world.here)
    fill_the_disk(9000)
    assert ibft_command("export --adapter {here}/run --output_dir {out} --merge") == 2
    error = capsys.readouterr().err
    assert "cannot be written: " in error and "too large" in error and "Traceback" not in error
    assert contents(world.here) == before


def test_what_the_system_refuses_elsewhere_is_a_sentence_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(argv: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/secret")

    assert ibft.cli.run_command(command, []) == 1
    assert capsys.readouterr().err == (
        "ibft: error: the system refused: '/secret': Permission denied. --debug shows where.\n"
    )
    assert ibft.cli.run_command(command, ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_only_training_speaks_of_resume_when_it_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: Any) -> None:
        raise KeyboardInterrupt

    assert ibft.cli.run_command(command, []) == 130
    assert capsys.readouterr().err == "ibft: interrupted.\n"
    assert ibft.cli.run_command(command, [], interrupted=ibft.train.INTERRUPTED) == 130
    assert "`--resume` continues" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), KeyError("a bug"), OSError("without an errno")])
def test_bugs_keep_their_traceback(bug: Exception) -> None:
    def command(argv: Any) -> None:
        raise bug

    with pytest.raises(type(bug)):
        ibft.cli.run_command(command, [])
