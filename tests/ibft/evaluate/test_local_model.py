"""Sampling in this process: the right distribution, the same samples in any batch, and nothing made twice or lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

import ibft.evaluate.local_model as local_model
from ibft.errors import InputError
from ibft.evaluate.config import GenerateFlags
from ibft.evaluate.generate import generate_samples
from ibft.evaluate.local_model import SeededSampling, uniforms
from ibft.evaluate.problems import Problem, load_problems
from ibft.evaluate.sampling import Request, SamplesFile, Sampling, plan, sample_seed
from ibft.export import read_source

PROBLEM = Problem("p", "python", "def f():\n", "")


def requests(temperatures: list[float], seeds: list[int] | None = None) -> list[Request]:
    return [
        Request(PROBLEM, PROBLEM.prompt, temperature, index, seeds[index] if seeds else index)
        for index, temperature in enumerate(temperatures)
    ]


def chosen(processor: SeededSampling, logits: torch.Tensor, step: int = 0, width: int = 3) -> torch.Tensor:
    """The token of each row [B] that greedy decoding takes after the processor, which must leave only one."""
    scores = processor(torch.zeros(len(logits), width + step, dtype=torch.long), logits)
    assert (scores > -torch.inf).sum(1).eq(1).all()
    return scores.argmax(-1)


class TestSeededSampling:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_the_distribution(self, temperature: float) -> None:
        logits = torch.tensor([1.0, -1.0, 0.3, 2.0, -torch.inf, 0.0])
        rows = 20_000
        processor = SeededSampling(requests([temperature] * rows), Sampling(4), 3)
        probabilities = (logits.double() / temperature).softmax(0)
        for step in (0, 3):
            counts = chosen(processor, logits.expand(rows, -1), step).bincount(minlength=6)
            assert counts[4] == 0
            kept = probabilities > 0
            expected = probabilities[kept] * rows
            assert stats.chisquare(counts[kept], expected * (rows / expected.sum())).pvalue > 1e-4

    def test_top_p_and_top_k(self) -> None:
        logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(4_000, -1)
        for sampling, allowed in (
            (Sampling(1, top_p=0.7), {0, 1}),  # 0.5 is not enough, 0.75 is
            (Sampling(1, top_k=3), {0, 1, 2}),
            (Sampling(1, top_k=3, top_p=0.5), {0}),
            (Sampling(1), {0, 1, 2, 3}),
        ):
            found = chosen(SeededSampling(requests([1.0] * 4_000), sampling, 3), logits)
            assert set(found.tolist()) == allowed
        counts = chosen(SeededSampling(requests([1.0] * 4_000), Sampling(1, top_p=0.7), 3), logits).bincount()
        assert counts[0] / counts.sum() == pytest.approx(2 / 3, abs=0.03)

    def test_a_row_does_not_see_its_batch(self) -> None:
        """Bit for bit: given the same logits, any batch, any place in it, and any temperature beside it."""
        torch.manual_seed(3)
        logits = torch.randn(1, 1_000)
        alone = [
            chosen(SeededSampling(requests([0.8], [seed]), Sampling(6), 3), logits, 5).item() for seed in range(50)
        ]
        together = SeededSampling(requests([0.8] * 50, list(range(50))), Sampling(6), 3)
        assert chosen(together, logits.expand(50, -1), 5).tolist() == alone
        mixed = SeededSampling(requests([0.0, 0.8, 1.5], [9, 4, 9]), Sampling(6), 3)
        assert chosen(mixed, torch.cat([torch.randn(1, 1_000), logits, torch.randn(1, 1_000)]), 5)[1] == alone[4]

    def test_temperature_0_takes_the_most_probable(self) -> None:
        logits = torch.randn(5, 40)
        assert chosen(SeededSampling(requests([0.0] * 5), Sampling(1), 3), logits).equal(logits.argmax(-1))

    @pytest.mark.parametrize("number", [0.0, 1.0])  # below 1, but float32 rounds 1 - 2^-53 to it
    def test_the_ends_of_the_interval_draw_possible_tokens(
        self, number: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local_model, "uniforms", lambda seed, steps: np.full(steps, number))
        logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
        assert chosen(SeededSampling(requests([1.0]), Sampling(1), 3), logits).item() == (2 if number else 1)

    def test_logits_that_are_not_finite(self) -> None:
        with pytest.raises(InputError, match="not finite; try --dtype float32"):
            chosen(SeededSampling(requests([1.0]), Sampling(1), 3), torch.full((1, 4), torch.nan))

    def test_the_numbers_are_philox_and_do_not_depend_on_how_many_are_drawn(self) -> None:
        assert (uniforms(7, 100)[:10] == uniforms(7, 10)).all()
        assert (uniforms(7, 10) == np.random.Generator(np.random.Philox(7)).random(10)).all()
        assert stats.kstest(np.concatenate([uniforms(seed, 20) for seed in range(500)]), "uniform").pvalue > 1e-4


def test_a_seed_is_of_the_sample_alone() -> None:
    problems = [replace(PROBLEM, task_id=name) for name in "abc"]
    prompts = dict.fromkeys("abc", "x")
    many = {r.identity: r.seed for r in plan(problems, prompts, temperatures=[0.2, 1.0], num_samples=50, seed=1)}
    few = {r.identity: r.seed for r in plan(problems[1:], prompts, temperatures=[1.0], num_samples=2, seed=1)}
    assert few.items() <= many.items() and len(set(many.values())) == len(many) == 300
    assert all(0 <= seed < 2**31 for seed in many.values())
    assert sample_seed(1, "a", 1, 0) == sample_seed(1, "a", 1.0, 0) != sample_seed(2, "a", 1.0, 0)


Generate = Callable[..., dict[tuple[str, float, int], dict[str, Any]]]


@pytest.fixture
def generate(own_task: Path, base_folder: Path, tmp_path: Path) -> Generate:
    """Generates into a folder of tmp_path; the rows of its samples.jsonl by task, temperature and sample."""

    def run(output: str = "out", **options: Any) -> dict[tuple[str, float, int], dict[str, Any]]:
        common = {"model": str(base_folder), "num_samples": 2, "temperature": [0.2, 1.0], "max_new_tokens": 24}
        config = GenerateFlags(task=str(own_task), output=str(tmp_path / output), **{**common, **options})
        file = generate_samples(config, load_problems(str(own_task)))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found = {(row["task_id"], row["temperature"], row["sample"]): row for row in rows}
        assert len(found) == len(rows)
        return found

    return run


def test_batches(generate: Generate) -> None:
    """Padding and company change neither prompt nor seed, nor, in float32 here, a single character."""
    alone, mixed, together = (generate(f"size-{size}", batch_size=size) for size in (1, 5, 100))
    assert alone == mixed == together and len(alone) == 24
    assert len({row["raw"] for row in alone.values()}) > 20


def test_against_the_plain_loop(generate: Generate, base_folder: Path, own_rows: list[dict[str, Any]]) -> None:
    """No padding, no cache, no transformers sampling: the whole text goes through the model for every token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
    rows = generate(batch_size=8, top_p=0.9, max_new_tokens=12, stop=["none"])
    prompts = {row["task_id"]: row["prompt"] for row in own_rows}
    for (task_id, temperature, _), row in rows.items():
        ids = tokenizer(prompts[task_id])["input_ids"]
        new: list[int] = []
        for number in np.random.Generator(np.random.Philox(row["seed"])).random(12):
            with torch.no_grad():
                logits = model(torch.tensor([ids + new])).logits[0, -1].double().numpy() / temperature
            p = np.exp(logits - logits.max())
            p /= p.sum()
            order = np.argsort(-p, kind="stable")
            kept = order[: int((np.cumsum(p[order]) < 0.9).sum()) + 1]  # the smallest set of 0.9 or more
            nucleus = np.zeros_like(p)
            nucleus[kept] = p[kept] / p[kept].sum()
            new.append(int((np.cumsum(nucleus) <= number).sum()))
            if new[-1] == tokenizer.eos_token_id:
                break
        assert row["raw"] == tokenizer.decode(new, skip_special_tokens=True), (task_id, temperature)
        assert row["finish_reason"] == ("stop" if new[-1] == tokenizer.eos_token_id else "length")


def test_what_a_row_says(generate: Generate, base_folder: Path, tmp_path: Path) -> None:
    row = generate(temperature=[0.7], max_new_tokens=5, stop=["none"])["add/2", 0.7, 1]
    assert row["seed"] == sample_seed(0, "add/2", 0.7, 1)
    assert row["finish_reason"] == "length" and row["completion"] == row["raw"]
    settings = row["settings"]
    assert (settings["model"], settings["adapter"]) == (str(base_folder), None)
    assert (settings["max_new_tokens"], settings["top_p"], settings["stop"]) == (5, 0.95, [])
    record = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert record["prompts"]["add/2"].startswith("def add_2(x):") and record["num_samples"] == 2
    assert set(record["versions"]) == {"python", "torch", "transformers"}


def test_greedy(generate: Generate, base_folder: Path, own_rows: list[dict[str, Any]]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
    rows = generate(temperature=[0.0], num_samples=1, stop=["none"], batch_size=4)
    for own in own_rows:
        inputs = tokenizer(own["prompt"], return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        assert rows[own["task_id"], 0.0, 0]["raw"] == tokenizer.decode(output, skip_special_tokens=True)


def test_habits_of_the_model_are_not_mixed_in(generate: Generate, base_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.generation_config.update(do_sample=True, repetition_penalty=5.0, temperature=9.0, top_k=1, num_beams=1)
    model.save_pretrained(tmp_path / "habits")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "habits")
    plain, habits = generate("plain"), generate("odd", model=str(tmp_path / "habits"))
    assert {key: row["raw"] for key, row in plain.items()} == {key: row["raw"] for key, row in habits.items()}


def test_stop_sequences(generate: Generate) -> None:
    free = generate("free", stop=["none"], max_new_tokens=40)
    letter = "e"
    stopped = generate("stopped", stop=[letter, "\\nxx"], max_new_tokens=40)
    cut = 0
    for key, row in stopped.items():
        before, found, _ = free[key]["raw"].partition(letter)
        assert row["raw"] == before + found
        assert row["finish_reason"] == ("stop" if found else free[key]["finish_reason"])
        assert row["completion"] == before
        assert row["settings"]["stop"] == [letter, "\nxx"]
        cut += bool(found)
    assert cut > 5


def test_a_row_ends_with_the_token_that_completes_a_stop_sequence(base_folder: Path) -> None:
    """No later, or the batch would go on for nothing; and what the prompt ends with is no part of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("see end", "module, then: endmodule\nand on"))
    criterion = local_model._StopText(tokenizer, ("endmodule", "never"), len(prompt))
    for count in range(1, len(answer) + 1):
        so_far = answer[:count]
        found = criterion(torch.tensor([prompt + so_far, prompt + so_far[:1] * count]), None).tolist()
        text = tokenizer.decode(so_far)
        just_now = "endmodule" in text and "endmodule" not in tokenizer.decode(so_far[:-1])
        assert found[1] is False
        assert found[0] or not just_now
        assert "endmodule" in text or not found[0]


class TestGoingOn:
    def test_a_run_that_was_cut_off(
        self, generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = generate("whole", batch_size=3)
        add, left = SamplesFile.add, [10]

        def failing(self: SamplesFile, *arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            add(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(SamplesFile, "add", failing)
            with pytest.raises(KeyboardInterrupt):
                generate("cut", batch_size=3)
        file = tmp_path / "cut" / "samples.jsonl"
        assert file.read_text().count("\n") == 10
        file.write_text(file.read_text() + '{"task_id": "add/1", "comp')  # a power cut, on top
        made: list[int] = []
        monkeypatch.setattr(SamplesFile, "add", lambda self, *a: (made.append(1), add(self, *a)))
        assert generate("cut", batch_size=5) == whole
        assert len(made) == 14
        assert "10 of 24 samples are there already" in capsys.readouterr().err
        assert generate("cut", batch_size=5) == whole and len(made) == 14

    def test_more_samples_and_temperatures(self, generate: Generate) -> None:
        first = generate(num_samples=1, temperature=[0.2])
        more = generate(num_samples=3, temperature=[1.0, 0.2])
        assert first.items() <= more.items() and len(more) == 36
        assert generate("fresh", num_samples=3, temperature=[0.2, 1.0]) == more

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"max_new_tokens": 25}, "was generated with max_new_tokens 24, not 25"),
            ({"top_p": 0.5}, "top_p 0.95, not 0.5"),
            ({"seed": 1}, "seed 0, not 1"),
            ({"question": "{prompt} "}, "samples of 'add/0' for another prompt"),
            ({"prompt_format": "text"}, "was generated with prompt_format"),
        ],
    )
    def test_other_settings(self, generate: Generate, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
        generate(num_samples=1, temperature=[0.2])
        before = (tmp_path / "out" / "samples.jsonl").read_bytes()
        with pytest.raises(InputError, match=sentence):
            generate(num_samples=1, temperature=[0.2], **options)
        assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before
        assert len(generate(num_samples=1, temperature=[0.2], overwrite=True, **options)) == 6

    def test_another_model_in_the_same_place(self, generate: Generate, base_folder: Path, tmp_path: Path) -> None:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
        tokenizer.save_pretrained(tmp_path / "moving")
        model.save_pretrained(tmp_path / "moving")
        generate(model=str(tmp_path / "moving"))
        model.model.layers[1].self_attn.v_proj.weight.data[0, 0] += 0.5
        model.save_pretrained(tmp_path / "moving")
        with pytest.raises(InputError, match="holds samples of another model"):
            generate(model=str(tmp_path / "moving"))

    def test_a_file_of_others(self, generate: Generate, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "samples.jsonl").write_text('{"task_id": "add/0", "completion": "x"}\n')
        with pytest.raises(InputError, match="line 1 is none that `ibft eval generate` wrote"):
            generate()


class TestAdapter:
    def test_it_answers_in_the_format_it_was_trained_with(
        self,
        generate: Generate,
        adapter_folder: Path,
        base_folder: Path,
        tmp_path: Path,
        own_rows: list[dict[str, Any]],
    ) -> None:
        adapted = generate("adapted", adapter=str(adapter_folder), model=None, batch_size=4)
        plain = generate("plain")
        assert sum(adapted[key]["raw"] != plain[key]["raw"] for key in plain) > 12
        assert {key: row["seed"] for key, row in adapted.items()} == {key: row["seed"] for key, row in plain.items()}
        prompts = json.loads((tmp_path / "adapted" / "generation.json").read_text())["prompts"]
        assert prompts == {row["task_id"]: row["prompt"] + "\n" for row in own_rows}
        row = next(iter(adapted.values()))
        assert row["settings"]["prompt_format"]["kind"] == "text" and row["settings"]["stop"] == []

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter_folder)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "merged")
        merged = generate("of-merged", model=str(tmp_path / "merged"), prompt_format="text")
        assert {key: row["raw"] for key, row in merged.items()} == {key: row["raw"] for key, row in adapted.items()}

    def test_another_base_model(
        self, generate: Generate, adapter_folder: Path, base_folder: Path, tmp_path: Path
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.5
        model.save_pretrained(tmp_path / "other")
        with pytest.raises(InputError, match=r"is not the model that the adapter .* was trained on"):
            generate(adapter=str(adapter_folder), model=str(tmp_path / "other"))
        assert not (tmp_path / "out").exists()

    def test_a_run_in_4_bits_knows_another_fingerprint(
        self, generate: Generate, adapter_folder: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(adapter_folder, tmp_path / "run")
        record = json.loads((tmp_path / "run" / "ibft.json").read_text())
        for load_in_4bit in (True, False):
            changed = {**record, "base": "0", "config": {**record["config"], "load_in_4bit": load_in_4bit}}
            (tmp_path / "run" / "ibft.json").write_text(json.dumps(changed))
            if load_in_4bit:
                assert len(generate(adapter=str(tmp_path / "run"), num_samples=1)) == 12
            else:
                with pytest.raises(InputError, match="is not the model that"):
                    generate("again", adapter=str(tmp_path / "run"))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_dtypes(self, generate: Generate, adapter_folder: Path, base_folder: Path, dtype: str) -> None:
        """The base model is known again in another dtype than it was trained in."""
        source = read_source(adapter_folder)
        model, _ = local_model.load_model(str(base_folder), source, dtype, torch.device("cpu"))
        assert model.model.embed_tokens.weight.dtype == getattr(torch, dtype)
        assert len(generate(adapter=str(adapter_folder), dtype=dtype, num_samples=1)) == 12


class TestRefusals:
    def test_a_prompt_without_room_for_an_answer(self, generate: Generate, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"The prompt of 'add/5' .* 250 more .* 256 positions; --max_new_tokens can be"
        ):
            generate(max_new_tokens=250)
        assert not (tmp_path / "out" / "samples.jsonl").exists()

    def test_too_little_memory_keeps_what_is_made(
        self, generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch, calls = local_model._generate_batch, []

        def failing(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError
            return batch(*arguments)

        monkeypatch.setattr(local_model, "_generate_batch", failing)
        with pytest.raises(InputError, match=r"8 samples are in .* smaller --batch_size than 4 goes on"):
            generate(batch_size=4)
        assert (tmp_path / "out" / "samples.jsonl").read_text().count("\n") == 8
