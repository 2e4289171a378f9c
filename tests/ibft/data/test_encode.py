import dataclasses
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ibft.data import EncodedDataset, encode, load_rows
from ibft.errors import InputError

BOS, EOS, FIRST_BYTE = 0, 1, 3


def naive(prompt: str, response: str, bos: bool, max_length: int, overlong: str) -> tuple[str, list[int], int]:
    """What must become of a row under the byte tokenizer, written from the contract: (outcome, tokens, label start)."""
    if not response.strip():
        return "empty", [], 0
    head = [FIRST_BYTE + byte for byte in (prompt + "\n").encode()]
    tail = [FIRST_BYTE + byte for byte in response.encode()] + [EOS]
    start = [BOS] if bos else []
    if len(start + head + tail) <= max_length:
        return "kept", start + head + tail, len(start + head)
    if overlong == "shorten" and 1 + len(tail) <= max_length:
        while len(start + head + tail) > max_length:
            head = head[1:]
        return "shortened", start + head + tail, len(start + head)
    return "too long", [], 0


def random_pairs(seed: int, count: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(rng.choice("ab \n\té和🙂") for _ in range(rng.randint(0, longest)))

    return [(text(24), text(12)) for _ in range(count)]


def documents(encoded: EncodedDataset) -> list[tuple[list[int], int, int]]:
    """Tokens, the first of those that are learnt up to the end, and the id of each document."""
    found = []
    for tokens, is_label, example_id in map(encoded.document, range(len(encoded))):
        start = is_label.tolist().index(True)
        assert is_label[start:].all() and is_label.dtype == bool
        found.append((tokens.tolist(), start, example_id))
    return found


@pytest.mark.parametrize("overlong", ["shorten", "drop"])
@pytest.mark.parametrize("bos", ["yes", "no"])
@pytest.mark.parametrize("max_length", [2, 3, 12, 30, 1000])
def test_documents_equal_the_naive_construction(make_rows, tokenizer, overlong, bos, max_length) -> None:
    pairs = [*random_pairs(max_length, 300), ("p", "x"), ("", "x")]
    expected = [naive(prompt, response, bos == "yes", max_length, overlong) for prompt, response in pairs]
    if not any(tokens for _, tokens, _ in expected):
        with pytest.raises(InputError, match="None of the 302 rows"):
            encode(make_rows(*pairs), tokenizer, max_length=max_length, bos=bos, overlong=overlong)
        return
    encoded = encode(make_rows(*pairs), tokenizer, max_length=max_length, bos=bos, overlong=overlong)
    kept = [(tokens, max(start, 1), 7 * i + 100) for i, (_, tokens, start) in enumerate(expected) if tokens]
    assert documents(encoded) == kept
    assert encoded.lengths.tolist() == [len(tokens) for tokens, _, _ in kept]
    # A label is a token at or after the label start that some earlier token of its document predicts.
    labels = [sum(1 for at in range(len(tokens)) if at >= start and at >= 1) for tokens, start, _ in kept]
    assert encoded.label_tokens.tolist() == labels and min(labels) >= 1
    assert encoded.lengths.dtype == encoded.label_tokens.dtype == encoded.document(0).tokens.dtype == np.int64
    outcomes = [outcome for outcome, _, _ in expected]
    assert dataclasses.asdict(encoded.report) == {
        "rows": 302,
        "kept": len(kept),
        "shortened": outcomes.count("shortened"),
        "dropped_too_long": outcomes.count("too long"),
        "dropped_empty": outcomes.count("empty"),
        "tokens": sum(len(tokens) for tokens, _, _ in kept),
        "label_tokens": sum(labels),
        "bos": bos == "yes",
        "max_length": max_length,
        "chat": False,
        "datasets": (),
        "left_out": 0,
        "memorized": 0,
        "memorized_by": "",
        "split_conversations": 0,
    }
    if max_length == 12 and overlong == "shorten":
        assert set(outcomes) == {"kept", "shortened", "too long", "empty"}  # the cases above are really exercised


def test_shortening_takes_the_start_of_the_prompt_and_nothing_else(make_rows, tokenizer) -> None:
    encoded = encode(make_rows(("abcdef", "xyz")), tokenizer, max_length=8, bos="yes")
    tokens, is_label, _ = encoded.document(0)
    assert tokenizer.decode(tokens) == "<s>ef\nxyz</s>"
    assert tokenizer.decode(tokens[is_label]) == "xyz</s>"


def test_a_response_that_just_fits_keeps_one_token_before_it(make_rows, tokenizer) -> None:
    rows = make_rows(("abc", "1234"), ("abc", "12345"))
    without = encode(rows, tokenizer, max_length=6, bos="no")
    assert [tokenizer.decode(without.document(i).tokens) for i in range(len(without))] == ["\n1234</s>"]
    with_bos = encode(rows, tokenizer, max_length=6, bos="yes")
    assert [tokenizer.decode(with_bos.document(i).tokens) for i in range(len(with_bos))] == ["<s>1234</s>"]
    assert (with_bos.report.shortened, with_bos.report.dropped_too_long) == (1, 1)


def test_response_that_the_tokenizer_turns_into_nothing_is_dropped(make_rows) -> None:
    backend = Tokenizer(models.BPE({"</s>": 0, "k": 1}, merges=[]))  # no unknown token: other characters vanish
    letters = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoded = encode(make_rows(("", "other"), ("", "k")), letters, max_length=8)
    assert documents(encoded) == [([1, 0], 1, 107)]
    assert encoded.label_tokens.tolist() == [1] and encoded.report.dropped_empty == 1


@pytest.mark.parametrize("puts_bos", [True, False])
@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
def test_bos(make_rows, make_tokenizer, puts_bos, bos) -> None:
    encoded = encode(make_rows(("p", "r")), make_tokenizer(puts_bos=puts_bos), max_length=8, bos=bos)
    expected = {"auto": puts_bos, "yes": True, "no": False}[bos]
    assert encoded.document(0).tokens.tolist().count(BOS) == expected
    assert encoded.report.bos is expected
    assert encoded.prompt_format == {"kind": "text", "separator": "\n", "bos": expected, "eos": True}
    assert json.loads(json.dumps(encoded.prompt_format)) == encoded.prompt_format


def test_prompt_format_rebuilds_what_the_model_saw(make_rows, make_tokenizer) -> None:
    tokenizer = make_tokenizer(puts_bos=True)
    encoded = encode(make_rows(("prompt", "response")), tokenizer, max_length=99)
    tokens, is_label, _ = encoded.document(0)
    form = encoded.prompt_format
    prompt = [BOS] * form["bos"] + tokenizer("prompt" + form["separator"], add_special_tokens=False)["input_ids"]
    assert tokens[~is_label].tolist() == prompt


def test_bad_arguments(make_rows, make_tokenizer, tokenizer, monkeypatch) -> None:
    rows = make_rows(("p", "r"))
    monkeypatch.setattr(datasets.Dataset, "map", lambda *_, **__: pytest.fail("refused only after the work"))
    for bad in (1, 0, -3, 2.0, "2", True, None):
        with pytest.raises(InputError, match="max_length must be an integer of at least 2"):
            encode(rows, tokenizer, max_length=bad)
    with pytest.raises(InputError, match="bos must be"):
        encode(rows, tokenizer, max_length=8, bos="maybe")
    with pytest.raises(InputError, match="overlong must be"):
        encode(rows, tokenizer, max_length=8, overlong="cut")
    for bad in (0, -1, 1.0, True):
        with pytest.raises(InputError, match="num_proc must be"):
            encode(rows, tokenizer, max_length=8, num_proc=bad)
    with pytest.raises(InputError, match=r"no EOS token.*tokenizer\.eos_token"):
        encode(rows, make_tokenizer(eos=False), max_length=8)
    with pytest.raises(InputError, match="needs a tokenizer with a BOS token"):
        encode(rows, make_tokenizer(bos=False), max_length=8, bos="yes")


def test_no_row_left_says_why(make_rows, tokenizer) -> None:
    with pytest.raises(InputError, match=r"None of the 3 rows.*2 do not fit into max_length 8, 1 have an empty"):
        encode(make_rows(("p", "x" * 8), ("p", "x" * 9), ("p", " \n")), tokenizer, max_length=8)
    with pytest.raises(InputError, match="no rows to encode"):
        encode(make_rows(("p", "r")).select([]), tokenizer, max_length=8)


def test_report_in_words(make_rows, tokenizer) -> None:
    rows = make_rows(("p", "1234"), ("long prompt", "r"), ("p", "x" * 99), ("p", ""), ("p", "ok"))
    assert encode(rows, tokenizer, max_length=8, bos="yes").report.lines() == [
        "5 rows: 3 kept (1 of them with the prompt shortened from the left), 1 dropped as longer than 8 tokens, "
        "1 dropped with an empty response",
        "22 tokens, 10 of them labels (45%); every document ends with EOS and begins with BOS",
    ]


def test_fingerprint_is_that_of_the_content(make_rows, tokenizer) -> None:
    pairs = random_pairs(3, 2500)  # three chunks of the Arrow file
    encoded = encode(make_rows(*pairs), tokenizer, max_length=24)
    found = documents(encoded)
    digest = hashlib.sha256()
    for column in ([len(tokens) for tokens, _, _ in found], [start for _, start, _ in found], [e for _, _, e in found]):
        digest.update(struct.pack(f"<{len(column)}q", *column))
    flat = [token for tokens, _, _ in found for token in tokens]
    digest.update(struct.pack(f"<{len(flat)}i", *flat))
    assert encoded.fingerprint == digest.hexdigest()


def test_worker_processes_change_nothing_and_warn_of_nothing(tmp_path: Path) -> None:
    # In a process of its own: the tokenizers library warns on the file descriptor, at a fork after threads were used.
    script = """
import importlib.util, os, pathlib, sys
spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1])
fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
import datasets
from ibft.data import encode
rows = datasets.Dataset.from_dict({
    "prompt": [f"prompt {i}" * (i % 5) for i in range(2001)],
    "response": ["" if i % 7 == 0 else f"response {i}" for i in range(2001)],
    "example_id": range(2001),
})
results = [encode(rows, fixtures.byte_tokenizer(), max_length=40, num_proc=n) for n in (None, 1, 2, 3)]
assert len({result.fingerprint for result in results}) == 1
assert len({result.report for result in results}) == 1
for i in range(len(results[0])):
    a, b = results[0].document(i), results[3].document(i)
    assert (a.tokens == b.tokens).all() and (a.is_label == b.is_label).all() and a.example_id == b.example_id
few = encode(rows.select(range(2)), fixtures.byte_tokenizer(), max_length=40, num_proc=8)
assert few.report.kept == 1 and "TOKENIZERS_PARALLELISM" not in os.environ
assert not list(pathlib.Path(os.environ["TMPDIR"]).glob("*tokens*"))
print("fine")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).with_name("conftest.py"))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**environment, "TMPDIR": str(tmp_path), "PYTHONPATH": "."},
    )
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)
    assert list(tmp_path.iterdir()) == []  # nor is anything left behind


def test_no_stale_tokens_and_no_files_beside_the_data(make_rows, make_tokenizer, tokenizer, tmp_path) -> None:
    make_rows(("prompt", "response"), ("p", "r")).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    rows = datasets.load_from_disk(str(tmp_path / "saved"))  # a dataset with files: what `datasets` would cache beside

    def tokens(**changes) -> list:
        return documents(encode(rows, **{"tokenizer": tokenizer, "max_length": 32} | changes))

    first = tokens()
    assert tokens() == first
    assert tokens(max_length=12) != first
    assert tokens(bos="yes") != first
    assert tokens(tokenizer=make_tokenizer(first_byte=100)) != first
    assert len(tokens(max_length=12, overlong="drop")) == 1
    assert tokens() == first
    tokenizer.add_tokens(["response"])  # the same object, changed in place
    assert tokens() != first
    assert sorted(tmp_path.rglob("*")) == before


def test_two_results_live_side_by_side_and_leave_no_file(make_rows, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = encode(make_rows(("p", "first")), tokenizer, max_length=32)
    two = encode(make_rows(("p", "second")), tokenizer, max_length=32)
    assert list(tmp_path.iterdir()) == []  # while both are in use: even a process that is killed leaves nothing
    assert tokenizer.decode(one.document(0).tokens) == "p\nfirst</s>"
    assert tokenizer.decode(two.document(0).tokens) == "p\nsecond</s>"
    assert one.fingerprint != two.fingerprint


def test_document_tokens_can_be_changed_without_harm(make_rows, tokenizer) -> None:
    encoded = encode(make_rows(("p", "r")), tokenizer, max_length=32)
    encoded.document(0).tokens[:] = 0
    assert tokenizer.decode(encoded.document(0).tokens) == "p\nr</s>"


def test_quiet_when_small_and_bars_left_as_they_were(make_rows, tokenizer, capfd) -> None:
    assert not datasets.are_progress_bars_disabled()
    encode(make_rows(("p", "r" * 2000)), tokenizer, max_length=2048)
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        encode(make_rows(("p", "r")), tokenizer, max_length=32)
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()
    assert capfd.readouterr() == ("", "")


def test_long_prompt_gives_no_length_warning(make_rows, make_tokenizer, caplog, capfd) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    assert encode(make_rows(("p" * 100, "r")), tokenizer, max_length=16).report.shortened == 1
    assert not caplog.records and capfd.readouterr().err == ""


@pytest.mark.parametrize("relative", ["mbpp/mbpp.jsonl", "rtllm/rtllm_train.jsonl"])
def test_real_data_comes_back_as_text(test_data, tokenizer, relative) -> None:
    rows = load_rows(str(test_data(relative)))
    encoded = encode(rows, tokenizer, max_length=2**15)
    assert encoded.report.kept == encoded.report.rows == len(rows)
    for index in range(len(encoded)):
        tokens, is_label, example_id = encoded.document(index)
        assert example_id == index
        assert bytes((tokens[~is_label] - FIRST_BYTE).tolist()).decode() == rows[index]["prompt"] + "\n"
        assert bytes((tokens[is_label][:-1] - FIRST_BYTE).tolist()).decode() == rows[index]["response"]
        assert tokens[-1] == EOS
    short = encode(rows, tokenizer, max_length=512)
    report = short.report
    assert report.kept + report.dropped_too_long == len(rows) and report.dropped_too_long > 0
    assert short.lengths.max() <= 512 and short.label_tokens.min() >= 1
