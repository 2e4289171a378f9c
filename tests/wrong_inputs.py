"""What users get wrong: a command line, the sentence that it must end in, and what there must be for it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import transformers
from safetensors.torch import load_file, save_file

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
