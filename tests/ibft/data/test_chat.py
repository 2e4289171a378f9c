"""Conversations: what is learnt of them, and that it stands behind the prompt that inference builds."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ibft.cli import main
from ibft.config import TrainConfig
from ibft.data import EncodedDataset, encode, load_data
from ibft.data.chat import ChatTemplate, HistoryRewritten, conversation_cell
from ibft.errors import InputError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def say(*parts: str, **extra: Any) -> list[dict[str, Any]]:
    """say("u:question", "a:answer"): a conversation."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[part[0]], "content": part[2:], **extra} for part in parts]


TWO = say("s:be brief", "u:first", "a:one", "u:second", "a:two\nlines")


def rows_of(*conversations: list[dict[str, Any]]) -> datasets.Dataset:
    cells = [conversation_cell([messages], "here") for messages in conversations]
    return datasets.Dataset.from_dict({"messages": cells, "example_id": range(len(cells))})


def learnt(tokenizer: PreTrainedTokenizerFast, data: EncodedDataset, index: int = 0) -> list[str]:
    """The text of each stretch of labels."""
    tokens, is_label, _ = data.document(index)
    found: list[list[int]] = []
    for at, token in enumerate(tokens.tolist()):
        if is_label[at]:
            found = [*found, []] if not is_label[at - 1] else found
            found[-1].append(token)
    return [tokenizer.decode(part) for part in found]


@pytest.mark.parametrize(
    ("template", "end", "document"),
    [
        (
            CHATML,
            "<|im_end|>",
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\n[one"
            "<|im_end|>]\n<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n[two\nlines<|im_end|>]",
        ),
        (
            LLAMA,
            "<|eot_id|>",
            "<s><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nfirst<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[one<|eot_id|>]"
            "<|start_header_id|>user<|end_header_id|>\n\nsecond<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\n[two\nlines<|eot_id|>]",
        ),
        (PLAIN, "</s>", "system: be brief\n\nuser: first\n\nassistant: [one]\n\nuser: second\n\nassistant: "
                        "[two\nlines</s>]"),
    ],
    ids=["chatml", "llama", "no special tokens"],
)  # fmt: skip
@pytest.mark.parametrize("puts_bos", [True, False])
def test_every_answer_through_its_end_of_turn_and_nothing_else(
    chat_tokenizer, template, end, document, puts_bos
) -> None:
    tokenizer = chat_tokenizer(template, puts_bos=puts_bos)
    data = encode(rows_of(TWO), tokenizer, max_length=999)
    tokens, is_label, _ = data.document(0)
    pieces = re.split(r"(\[[^\]]*\])", document)
    expected = [(token, piece.startswith("[")) for piece in pieces for token in ids(tokenizer, piece.strip("[]"))]
    assert list(zip(tokens.tolist(), is_label.tolist(), strict=True)) == expected
    assert learnt(tokenizer, data) == ["one" + end * (end != "</s>"), "two\nlines" + end]
    assert tokens.tolist().count(tokenizer.bos_token_id) == (template is LLAMA)  # never a second one
    assert data.prompt_format == {
        "kind": "chat",
        "separator": None,
        "bos": template is LLAMA,
        "eos": template is PLAIN,
        "end_of_turn": end,
        "template": "tokenizer's own",
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    assert json.loads(json.dumps(data.prompt_format)) == data.prompt_format


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def merging_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One that merges line breaks with each other, and a line break with a letter, across the end of a header."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ċ", "o"), ("ĊĊ", "Ċ"), (":", "Ġ"), (":Ġ", "o")]
    words = [*alphabet, *(a + b for a, b in merges), "<s>", "</s>"]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    special = sorted(set(re.findall(r"<\|\w+\|>", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, LLAMA, PLAIN], ids=["chatml", "llama", "plain"])
@pytest.mark.parametrize("answer", ["one", "\none", "\n\none"])
def test_the_prompt_of_training_is_that_of_inference(template, answer) -> None:
    tokenizer = merging_tokenizer(template)
    tokens, is_label, _ = encode(rows_of(say("u:q", f"a:{answer}")), tokenizer, max_length=99).document(0)
    prompt = tokenizer.apply_chat_template(say("u:q"), add_generation_prompt=True, return_dict=False)
    assert tokens[: is_label.argmax()].tolist() == prompt
    whole = tokenizer.apply_chat_template(say("u:q", f"a:{answer}"), tokenize=False)
    assert whole.startswith(tokenizer.decode(tokens.tolist()).removesuffix("</s>"))


def test_sentencepiece_puts_no_space_before_an_answer() -> None:
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "a", "q", "▁q", "\n", "]", ":", "▁\n"]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ']' }}{% else %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    tokens, is_label, _ = encode(rows_of(say("u:q", "a:a")), tokenizer, max_length=9).document(0)
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == ["▁q", "]", "a", "</s>"]
    assert is_label.tolist() == [False, False, True, True]


# Oracle: the masks of transformers for trl's templates, which mark what the assistant generates. Some of them count the
# white space around an answer too, and Phi's the EOS after a whole conversation.
MARKED = [
    "llama3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "phi3_5", "cohere", "cohere2",
    "lfm2", "glm4moe",
]  # fmt: skip
if (TRL_TEMPLATES / "lfm2_v2_training.jinja").exists():  # from trl 1.15 on
    MARKED.append("lfm2_v2")


@pytest.mark.parametrize("name", MARKED)
def test_masks_equal_those_of_generation_markers(chat_tokenizer, name) -> None:
    tokenizer = chat_tokenizer((TRL_TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8"))
    messages = say("u:first", "a:one", "u:second", "a:two", "u:third", "a:3\n4")
    marked = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    data = encode(rows_of(messages), tokenizer, max_length=9999)
    tokens, is_label, _ = data.document(0)
    assert tokens.tolist() == marked["input_ids"][: len(tokens)]
    spans = re.finditer("1+", "".join(map(str, marked["assistant_masks"])))
    expected = [tokenizer.decode(marked["input_ids"][span.start() : span.end()]) for span in spans]
    assert [text.strip() for text in learnt(tokenizer, data)] == [
        text.removesuffix("</s>").strip() for text in expected
    ]
    assert not (is_label & (marked_array(marked, len(tokens)) == 0)).any()  # nothing that the marks leave out


def marked_array(marked: Any, length: int) -> Any:
    return np.array(marked["assistant_masks"][:length])


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "qwen3", "qwen3_5_think", "cohere2", "lfm2"])
def test_a_template_and_its_marked_version_agree_on_one_turn(chat_tokenizer, name) -> None:
    source = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = chat_tokenizer(source)
    messages = say("u:question", "a:answer")
    tokens, is_label, _ = encode(rows_of(messages), tokenizer, max_length=9999).document(0)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert tokens[: is_label.argmax()].tolist() == prompt and is_label[is_label.argmax() :].all()
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(tokenizer.decode(tokens))


def config_for(path: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(base_model="m", dataset=[str(path)], **{"max_length": 2048, **changes})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_template_that_rewrites_history_gives_one_document_for_each_answer(chat_tokenizer, tmp_path) -> None:
    tokenizer = chat_tokenizer((TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"))
    messages = say("u:first", "a:<think>\nhm\n</think>\n\none", "u:second", "a:two")
    with pytest.raises(HistoryRewritten):
        ChatTemplate(tokenizer).render(messages)
    rows = [{"messages": say("u:only", "a:answer")}, {"messages": messages}]
    data, _ = load_data(config_for(write(tmp_path / "a.jsonl", rows)), tokenizer)
    assert len(data) == 3 and data.report.split_conversations == 1
    assert [data.document(index).example_id for index in range(3)] == [0, 1, 2]
    assert data.places([0]).startswith("rows 0 of") and data.places([1, 2]).startswith("rows 1 of")
    for index, (history, answer) in enumerate(
        [
            (say("u:only"), "<think>\n\n</think>\n\nanswer<|im_end|>"),
            (messages[:1], "<think>\nhm\n</think>\n\none<|im_end|>"),
            (messages[:3], "<think>\n\n</think>\n\ntwo<|im_end|>"),
        ]
    ):
        tokens, is_label, _ = data.document(index)
        prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
        assert tokens[~is_label].tolist() == prompt  # as inference builds it, without the earlier reasoning
        assert tokenizer.decode(tokens[is_label]) == answer
    assert "1 conversations became one for each answer" in "\n".join(data.report.lines())


def test_a_system_message_that_wanders_to_the_last_question(chat_tokenizer, tmp_path) -> None:
    """As in some of Mistral's templates: the first question had it when it was asked."""
    tokenizer = chat_tokenizer(
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|user|>' }}{% set last = messages[loop.index0 + 1:] | selectattr('role', 'eq', "
        "'user') | list | length == 0 %}{{ system if last }}{{ m.content + '<|end|>' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    data, _ = load_data(config_for(write(tmp_path / "a.jsonl", [{"messages": TWO}])), tokenizer)
    assert [tokenizer.decode(data.document(index).tokens) for index in range(len(data))] == [
        "<|user|>be brieffirst<|end|>one</s>",
        "<|user|>first<|end|>one</s><|user|>be briefsecond<|end|>two\nlines</s>",
    ]
    assert [learnt(tokenizer, data, index) for index in range(2)] == [["one</s>"], ["two\nlines</s>"]]


def test_a_template_whose_prompt_of_inference_leads_elsewhere_is_refused(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer((TRL_TEMPLATES / "deepseek_r1_distill.jinja").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match=r"row 0 .*prompt of inference with '.*<think>\\n', but goes on differently"):
        encode(rows_of(say("u:q", "a:x")), tokenizer, max_length=99)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", say("u:q", "a:x"), "roles must alternate"),
        (CHATML.replace("m['content']", "m['nothing']"), say("u:q", "a:x"), "chat template refuses it"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", say("u:q", "a:x"), "does not write the content"),
        (
            CHATML + "{{ '!' if messages[-1].content == 'x' }}",
            say("u:q", "a:x"),
            "the end of an answer cannot be found",
        ),
    ],
)
def test_what_a_template_refuses_names_the_row(chat_tokenizer, template, messages, message) -> None:
    with pytest.raises(InputError, match=rf"the dataset, row 1 \(counted from 0\): .*{message}"):
        encode(rows_of(say("u:nothing to learn"), messages), chat_tokenizer(template), max_length=99)


def test_no_chat_template(make_tokenizer) -> None:
    with pytest.raises(InputError, match=r"no chat template.*instruct version.*tokenizer\.chat_template"):
        encode(rows_of(TWO), make_tokenizer(), max_length=99)


@pytest.mark.parametrize(("template", "bos", "fine"), [(CHATML, "no", True), (CHATML, "yes", False),
                                                      (LLAMA, "yes", True), (LLAMA, "no", False)])  # fmt: skip
def test_the_template_decides_on_bos(chat_tokenizer, template, bos, fine) -> None:
    rows, tokenizer = rows_of(TWO), chat_tokenizer(template)
    if fine:
        assert encode(rows, tokenizer, max_length=999, bos=bos).report.bos == (bos == "yes")
    else:
        with pytest.raises(InputError, match=f"--bos {bos}: the chat template decides.*--bos auto"):
            encode(rows, tokenizer, max_length=999, bos=bos)


def test_what_is_not_learnt(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer(CHATML)
    weighted = say("u:q", "a:bad", "u:again", "a:good", "u:thanks")
    weighted[1]["weight"] = 0
    data = encode(
        rows_of(
            weighted,  # and what follows the last answer is left out
            say("s:sys", "a:welcome", "u:q", "a:x"),  # an opening answers nothing
            say("u:q", "a: ", "u:q", "a:y"),
            say("u:q", "a:\n"),
            say("u:q"),
            [],
        ),
        tokenizer,
        max_length=999,
    )
    assert [learnt(tokenizer, data, index) for index in range(len(data))] == [
        ["good<|im_end|>"], ["x<|im_end|>"], ["y<|im_end|>"],
    ]  # fmt: skip
    assert tokenizer.decode(data.document(0).tokens).endswith("good<|im_end|>")
    assert (data.report.rows, data.report.kept, data.report.dropped_empty) == (6, 3, 3)
    assert "3 dropped without an answer" in data.report.lines()[0]


def test_overlong_conversations_lose_whole_exchanges_from_the_oldest(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer(CHATML)
    messages = say("s:sys", *(part for i in range(6) for part in (f"u:question {i}", f"a:answer {i}")))

    def text(first: int) -> str:
        return tokenizer.apply_chat_template([messages[0], *messages[1 + 2 * first :]], tokenize=False).strip()

    sizes = [len(ids(tokenizer, text(first))) for first in range(6)]
    for first in range(6):
        data = encode(rows_of(messages), tokenizer, max_length=sizes[first])
        assert tokenizer.decode(data.document(0).tokens) == text(first)
        assert learnt(tokenizer, data) == [f"answer {i}<|im_end|>" for i in range(first, 6)]
        assert (data.report.shortened, data.report.dropped_too_long) == (first > 0, 0)
        if first:
            data = encode(rows_of(messages), tokenizer, max_length=sizes[first] + 1)
            assert tokenizer.decode(data.document(0).tokens) == text(first)
    assert "1 of them without their oldest exchanges" in data.report.lines()[0]
    with pytest.raises(InputError, match="1 do not fit into max_length"):
        encode(rows_of(messages), tokenizer, max_length=sizes[-1] - 1)
    with pytest.raises(InputError, match="1 do not fit into max_length"):
        encode(rows_of(messages), tokenizer, max_length=sizes[0] - 1, overlong="drop")


def test_processes_give_the_same_documents(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer(CHATML)
    conversations = [say(*(f"{'ua'[i % 2]}:{'x' * (n % 7)}{i}" for i in range(2 + n % 5))) for n in range(60)]
    results = [encode(rows_of(*conversations), tokenizer, max_length=90, num_proc=n) for n in (None, 2)]
    assert results[0].fingerprint == results[1].fingerprint and results[0].report == results[1].report
    several = [results[0].document(index) for index in range(len(results[0]))]
    assert results[0].label_tokens.tolist() == [int(d.is_label.sum()) for d in several]
    with pytest.raises(InputError, match=r"row 59 .*no, thanks"):
        refusing = CHATML + "{% if messages[-1].content == 'stop' %}{{ raise_exception('no, thanks') }}{% endif %}"
        tokenizer.chat_template = refusing
        encode(rows_of(*conversations[:59], say("u:q", "a:stop")), tokenizer, max_length=90, num_proc=2)


def test_the_fingerprint_tells_what_is_learnt(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer(CHATML)
    first, second = [dict(message) for message in TWO], [dict(message) for message in TWO]
    second[2]["weight"] = 0
    one, two = (encode(rows_of(messages), tokenizer, max_length=999) for messages in (first, second))
    assert (one.document(0).tokens == two.document(0).tokens).all() and one.fingerprint != two.fingerprint


def test_a_template_that_insists_on_a_system_message(chat_tokenizer) -> None:
    check = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
    tokenizer = chat_tokenizer(check + CHATML)
    assert encode(rows_of(TWO), tokenizer, max_length=999).prompt_format["end_of_turn"] == "<|im_end|>"
    with pytest.raises(InputError, match=r"row 1 .*a system message must come first"):
        encode(rows_of(TWO, say("u:q", "a:x")), tokenizer, max_length=999)


def test_a_run_on_conversations(base_folder, tasks_file, tmp_path, capsys) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(base)
    chats = write(tmp_path / "chats, two.jsonl", [{"messages": TWO}] * 6)
    flags = "--format chat --dataset_weights 2 0.5 --validation_split 4 --max_length 128 --bottleneck_dim 16 --lora_r 4"
    line = [*flags.split(), "--dataset", str(chats), str(tasks_file), "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--base_model", str(base), *line, "--max_steps", "2"]) == 0
    record = json.loads((tmp_path / "out" / "ibft.json").read_text())
    assert record["prompt_format"]["kind"] == "chat" and record["prompt_format"]["end_of_turn"] == tokenizer.eos_token
    held_out = {name: rows for name, rows, _ in record["validation"]["datasets"]}
    assert sum(held_out.values()) == record["validation"]["rows"] == 4
    weights = {str(chats): (2, 6), str(tasks_file): (0.5, 24)}
    for name, rows, weight in record["data"]["datasets"]:
        expected, size = weights[name]
        assert weight == expected and rows == round(weight * (size - held_out.get(name, 0)))
    shown = capsys.readouterr().out
    assert f"{chats}: {2 * (6 - held_out.get(str(chats), 0))} rows, weight 2" in shown
    assert "validation    " in shown


def test_bos_that_the_template_cannot_be_asked_for(chat_tokenizer) -> None:
    tokenizer = chat_tokenizer("{{ raise_exception('never') }}")
    with pytest.raises(InputError, match=r"A conversation of one question and one answer: .*never"):
        encode(rows_of(say("u:q", "a:x")), tokenizer, max_length=99, bos="no")
