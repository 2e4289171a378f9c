"""Prompts are those of training, token for token, and servers are sent what they turn into the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ibft.data import EncodedDataset, encode
from ibft.data.sources import load_rows
from ibft.errors import InputError
from ibft.evaluate.problems import Problem
from ibft.evaluate.prompts import Prompter, PromptFormat, choose_format, question_of
from ibft.lab.tasks import generate_tasks, write_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PYTHON = Problem("p", "python", 'def f(x):\n    """Doc."""\n', "", test="def check(c): pass", entry_point="f")
LISTED = Problem("l", "python", '"""\nWrite f.\nassert f()\n"""\n', "", description="Write f.", tests=("assert f()",))
VERILOG = Problem("v", "verilog", "module top_module(input a);\n", "", description="\nTwo\nlines.\n")


@pytest.fixture
def tokenizer(base_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_folder)


def adding_bos(tokenizer: Any) -> Any:
    """The tokenizer with the habit of putting BOS before a text."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def trained(tokenizer: Any, folder: Path, format: str, **options: Any) -> EncodedDataset:
    """What `ibft train` makes of rows of one question and answer."""
    write_jsonl(generate_tasks(3, seed=1), folder / "rows.jsonl")
    rows: datasets.Dataset = load_rows(str(folder / "rows.jsonl"), format=format)
    return encode(rows, tokenizer, max_length=200, **options)


def asks_as_trained(encoded: EncodedDataset, tokenizer: Any) -> None:
    """A prompt of each row's question has the tokens of that row up to the answer."""
    prompter = Prompter(choose_format("auto", {"prompt_format": encoded.prompt_format}), tokenizer, "{prompt}")
    for index, task in enumerate(generate_tasks(3, seed=1)):
        document = encoded.document(index)
        before = document.tokens[: document.is_label.argmax()].tolist()
        text = prompter.text(Problem("t", "python", task.description, ""))
        assert prompter.tokens(text) == before
        assert tokenizer(prompter.for_server(text))["input_ids"] == before  # as a server tokenises


@pytest.mark.parametrize("habit", [False, True])
@pytest.mark.parametrize("bos", ["auto", "yes"])
def test_text(tokenizer: Any, tmp_path: Path, habit: bool, bos: str) -> None:
    tokenizer = adding_bos(tokenizer) if habit else tokenizer
    for separator in ("\n", "", " ### "):
        asks_as_trained(trained(tokenizer, tmp_path, "text", bos=bos, separator=separator), tokenizer)


@pytest.mark.parametrize("habit", [False, True])
@pytest.mark.parametrize("template", [CHATML, "<bos>" + CHATML])
def test_chat(tokenizer: Any, tmp_path: Path, habit: bool, template: str) -> None:
    tokenizer = adding_bos(tokenizer) if habit else tokenizer
    tokenizer.chat_template = template
    encoded = trained(tokenizer, tmp_path, "chat")
    if habit and not template.startswith("<bos>"):  # a server would put BOS where training had none
        form = choose_format("auto", {"prompt_format": encoded.prompt_format})
        assert tokenizer.bos_token_id not in Prompter(form, tokenizer).tokens(Prompter(form, tokenizer).text(PYTHON))
        return
    asks_as_trained(encoded, tokenizer)


def test_a_plain_prompt_is_tokenised_as_the_tokenizer_does(tokenizer: Any) -> None:
    form = choose_format("auto", {})
    assert form.kind == "plain" and "no record" in form.reason
    for one in (tokenizer, adding_bos(tokenizer)):
        prompter = Prompter(form, one)
        assert prompter.text(PYTHON) == PYTHON.prompt == prompter.for_server(PYTHON.prompt)
        assert prompter.tokens(PYTHON.prompt) == one(PYTHON.prompt)["input_ids"]


def test_a_choice_goes_before_the_record(tokenizer: Any) -> None:
    record = {"prompt_format": {"kind": "text", "separator": " ->", "bos": True, "eos": True}}
    assert choose_format("auto", record).separator == " ->"
    assert choose_format("text", record).separator == " ->"  # of the same kind, the record knows more
    assert choose_format("plain", record) == PromptFormat("plain", "--prompt_format")
    assert choose_format("text", {}).separator == "\n"
    with pytest.raises(InputError, match="has no chat template"):
        Prompter(choose_format("chat", record), tokenizer).text(PYTHON)


def test_another_template_than_the_trained_one(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    form = choose_format("auto", {"prompt_format": trained(tokenizer, tmp_path, "chat").prompt_format})
    assert form.end_of_turn == "<eos>" and Prompter(form, tokenizer).notes() == []
    tokenizer.chat_template = CHATML.replace("<|assistant|>", "<|model|>")
    assert "is not the one that the adapter was trained with" in Prompter(form, tokenizer).notes()[0]


def test_a_template_that_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('system message first') }}"
    with pytest.raises(InputError, match=r"problem 'p': .*system message first"):
        Prompter(PromptFormat("chat", ""), tokenizer).text(PYTHON)


@pytest.mark.parametrize(
    ("problem", "kind", "question"),
    [
        (PYTHON, "plain", PYTHON.prompt),
        (PYTHON, "text", PYTHON.prompt),
        (PYTHON, "chat", 'Complete this Python function:\n\n```python\ndef f(x):\n    """Doc."""\n```'),
        (LISTED, "plain", LISTED.prompt),
        (LISTED, "text", "Write f.\nThe code must pass these tests:\n\nassert f()"),
        (VERILOG, "plain", "// Two\n// lines.\nmodule top_module(input a);\n"),
        (VERILOG, "text", "Two\nlines.\n\nComplete this Verilog module:\n\nmodule top_module(input a);\n"),
    ],
)
def test_questions(problem: Problem, kind: Any, question: str) -> None:
    assert question_of(problem, kind) == question


def test_a_question_of_the_users_own() -> None:
    problem = Problem("p", "verilog", "module {description}", "", description="say {prompt}")
    prompter = Prompter(PromptFormat("text", "", separator="\n"), None, "Q: {description} | {prompt} {x}")
    assert prompter.text(problem) == "Q: say {prompt} | module {description} {x}\n"
    with pytest.raises(InputError, match=r"--question must hold \{prompt\} or \{description\}"):
        Prompter(PromptFormat("text", ""), None, "{text}")
