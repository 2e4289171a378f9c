"""`ibft represent` from end to end: its numbers against transformers, PEFT and numpy, and what users get wrong."""

import json
import re
import shlex
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ibft.represent.analysis
from ibft.cli import main
from ibft.config import TrainConfig
from ibft.data import load_data
from ibft.memorization.config import ScoreFlags
from ibft.memorization.score import score
from ibft.represent.distances import between
from ibft.represent.plot import draw

TRAINING = (
    "--max_length 128 --lora_r 4 --max_steps 6 --learning_rate 2e-2 --lr_scheduler_type constant --warmup_ratio 0 "
    "--per_device_train_batch_size 4 --save_strategy no --use_cpu"
)


@pytest.fixture(scope="module")
def place(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, 24 rows, their scores, an SFT run and an IB run."""
    folder = tmp_path_factory.mktemp("represent")
    shutil.copytree(base_folder, folder / "base")
    shutil.copy(tasks_file, folder / "data.jsonl")
    for name, more in (("sft", "--method sft"), ("ib", "--bottleneck_dim 8 --target_layer 1 --alpha 0.1 --beta 1")):
        command = f"train --base_model {folder}/base --dataset {folder}/data.jsonl --output_dir {folder}/{name}"
        assert main(f"{command} {TRAINING} {more}".split()) == 0
    score(
        ScoreFlags(
            model=str(folder / "base"),
            dataset=[str(folder / "data.jsonl")],
            max_length=128,
            output=str(folder / "scores.parquet"),
            use_cpu=True,
        )
    )
    return folder


@pytest.fixture(scope="module")
def represent(place: Path) -> Callable[[str], int]:
    """Runs `ibft represent` with what is in that folder; later flags take the place of these."""
    command = (
        f"represent --base_model {place}/base --adapters sft={place}/sft ib={place}/ib --dataset {place}/data.jsonl "
        f"--scores {place}/scores.parquet --share 25% --max_length 128 --output_dir {place}/out --use_cpu "
    )
    return lambda more: main(shlex.split(command + more.replace("{place}", str(place))))


@pytest.fixture(scope="module")
def result(represent: Callable[[str], int], place: Path) -> dict[str, Any]:
    assert represent("") == 0
    return json.loads((place / "out" / "representation.json").read_text())


def states(model: Any, rows: list[dict[str, str]], tokenizer: Any, layer: int) -> list[np.ndarray]:
    """[n, H] float64 for each row: hidden states where a token of the response is predicted."""
    found = []
    for row in rows:
        prompt = tokenizer(row["instruction"] + "\n")["input_ids"]
        response = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
        found.append(output.hidden_states[layer][0, len(prompt) - 1 : -1].double().numpy())
    return found


def test_the_numbers_are_those_of_the_models(place: Path, result: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    scores = pyarrow.parquet.read_table(place / "scores.parquet")["min_k"].to_numpy()
    order = np.argsort(-scores)
    most, least = order[:6].tolist(), order[::-1][:6].tolist()
    assert result["most"] == {"example_ids": most, "lowest_score": pytest.approx(scores[most[-1]])}
    assert result["least"] == {"example_ids": least, "highest_score": pytest.approx(scores[least[-1]])}
    assert (result["layer"], result["scored_rows"]) == (1, 24)
    assert [entry["name"] for entry in result["models"]] == ["base", "sft", "ib"]

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    points = []
    for entry in result["models"]:
        model = AutoModelForCausalLM.from_pretrained(place / "base")
        if entry["name"] != "base":
            model = PeftModel.from_pretrained(model, place / entry["name"])
        groups = [states(model.eval(), [rows[row] for row in group], tokenizer, 1) for group in (most, least)]
        means = [np.stack([tokens.mean(0) for tokens in group]) for group in groups]
        points.append(means)
        difference = means[0].mean(0) - means[1].mean(0)
        assert entry["hidden"]["l2"] == pytest.approx(np.linalg.norm(difference), rel=1e-4)
        squares = sum(((mean - mean.mean(0)) ** 2).sum() for mean in means)
        assert entry["hidden"]["spread"] == pytest.approx(np.sqrt(squares / 10), rel=1e-4)
        (a, b) = (mean.mean(0) / np.linalg.norm(mean.mean(0)) for mean in means)
        assert entry["hidden"]["angle_degrees"] == pytest.approx(np.degrees(np.arccos(a @ b)), rel=1e-3)
        assert (entry["bottleneck"] is not None) == (entry["name"] == "ib")

    head = {name: tensor.double().numpy() for name, tensor in load_file(place / "ib" / "ib_head.safetensors").items()}
    of_tokens = [
        [np.split(tokens @ head["weight"].T + head["bias"], 2, axis=1) for tokens in group] for group in groups
    ]
    kept = result["models"][2]["bottleneck"]
    mu, logvar = (np.concatenate([each[part] for group in of_tokens for each in group]) for part in (0, 1))
    kl = 0.5 * (mu**2 + np.exp(logvar) - 1 - logvar)
    assert (kept["layer"], kept["dimensions"], kept["tokens"]) == (1, 8, len(mu))
    np.testing.assert_allclose(kept["kl_per_dimension"], kl.mean(0), rtol=1e-4)
    np.testing.assert_allclose(kept["mu_variance_per_dimension"], mu.var(0, ddof=1), rtol=1e-4)
    assert kept["active_dimensions"] == (mu.var(0, ddof=1) > 0.01).sum()
    assert kept["kl_nats"] == pytest.approx(kl.sum(1).mean(), rel=1e-4)
    tokens_of_most = sum(len(tokens) for tokens in groups[0])
    assert kept["kl_nats_most"] == pytest.approx(kl[:tokens_of_most].sum(1).mean(), rel=1e-4)
    assert kept["kl_nats_least"] == pytest.approx(kl[tokens_of_most:].sum(1).mean(), rel=1e-4)
    mu_means = [np.stack([each[0].mean(0) for each in group]) for group in of_tokens]  # token by token, then the mean
    np.testing.assert_allclose(kept["mu"]["l2"], between(*mu_means).l2, rtol=1e-4)

    # The projection: one PCA of all models' rows, each centred between its own groups.
    centred = [np.concatenate(pair) - (pair[0].mean(0) + pair[1].mean(0)) / 2 for pair in points]
    _, _, axes = np.linalg.svd(np.concatenate(centred), full_matrices=False)
    for entry, own in zip(result["models"], centred, strict=True):
        flat = np.array(entry["projection"]["most"] + entry["projection"]["least"])
        np.testing.assert_allclose(np.abs(flat), np.abs(own @ axes[:2].T), rtol=0, atol=1e-5)
        np.testing.assert_allclose(entry["projection"]["explained"], flat.var(0) / own.var(0).sum(), rtol=1e-4)


def test_every_model_is_loaded_afresh_and_alone(
    represent: Callable[[str], int], place: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = ibft.represent.analysis.load_base_model

    def watched(*arguments: Any) -> Any:
        assert not any(reference() is not None for reference in loaded), "two models are in memory"
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ibft.represent.analysis, "load_base_model", watched)
    assert represent("--adapters ib={place}/ib sft={place}/sft --output_dir {place}/other --no_plot") == 0
    other = json.loads((place / "other" / "representation.json").read_text())
    assert len(loaded) == 3 and not (place / "other" / "representation.png").exists()
    for here, there in ((0, 0), (1, 2), (2, 1)):
        assert other["models"][here]["hidden"] == result["models"][there]["hidden"]
        assert other["models"][here]["bottleneck"] == result["models"][there]["bottleneck"]


def test_the_layer_given_is_that_of_the_states_alone(
    represent: Callable[[str], int], place: Path, result: dict[str, Any]
) -> None:
    more = "--layer 2 --batch_tokens 1 --span full --output_dir {place}/layer --no_plot"
    assert represent(more) == 0
    other = json.loads((place / "layer" / "representation.json").read_text())
    assert other["layer"] == 2 and other["models"][2]["bottleneck"]["layer"] == 1
    assert other["models"][0]["hidden"]["l2"] != result["models"][0]["hidden"]["l2"]
    assert other["models"][2]["bottleneck"]["tokens"] > result["models"][2]["bottleneck"]["tokens"]


def test_planted_rows_are_told_apart_and_random_ones_are_not(
    represent: Callable[[str], int], place: Path, result: dict[str, Any]
) -> None:
    """Responses of two kinds, and scores that follow the kind, or nothing."""
    rows = [
        {"instruction": f"number {i}", "output": f"x = {i} + {i}" if i % 2 else "def solve(xs):\n    return xs"}
        for i in range(60)
    ]
    (place / "planted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ScoreFlags(
        model=str(place / "base"),
        dataset=[str(place / "planted.jsonl")],
        max_length=128,
        output=str(place / "planted.parquet"),
        use_cpu=True,
    )
    table = pyarrow.parquet.read_table(score(flags))
    noise = np.random.default_rng(0).normal(size=60)
    found = {}
    for name, values in (("planted", noise - 10 * (np.arange(60) % 2)), ("random", noise)):
        changed = table.set_column(table.column_names.index("min_k"), "min_k", pa.array(values))
        pyarrow.parquet.write_table(changed, place / f"{name}.scores.parquet")
        data = f"--dataset {{place}}/planted.jsonl --scores {{place}}/{name}.scores.parquet --share 0.5 --no_plot"
        assert represent(f"{data} --output_dir {{place}}/{name}") == 0
        found[name] = json.loads((place / name / "representation.json").read_text())["models"]
    assert all(entry["hidden"]["p_l2"] < 0.01 for entry in found["planted"])
    base = found["planted"][0]["hidden"], found["random"][0]["hidden"]
    assert base[0]["p_l2"] == pytest.approx(1 / 1001) and base[1]["p_l2"] > 0.05
    assert base[0]["separation"][1] > base[1]["separation"][2]  # the intervals do not touch


def test_repeated_rows_change_nothing(represent: Callable[[str], int], place: Path, result: dict[str, Any]) -> None:
    """Rows that occur five times prove no more than rows that occur once, whatever lies between them."""
    (place / "repeated.jsonl").write_text((place / "data.jsonl").read_text() * 5)
    assert represent("--dataset {place}/repeated.jsonl --output_dir {place}/repeated --no_plot") == 0
    other = json.loads((place / "repeated" / "representation.json").read_text())
    for key in ("models", "most", "least", "scored_rows"):
        assert other[key] == result[key], key


def test_a_row_of_several_documents_is_one_observation(base_folder: Path, tasks_file: Path, tmp_path: Path) -> None:
    """A template that writes earlier answers differently makes each conversation a document for each answer."""
    folder = tmp_path / "chat"
    shutil.copytree(base_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ ('' if loop.last else '~') + m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    tasks = [json.loads(line) for line in tasks_file.read_text().splitlines()]
    rows = []
    for first, second in zip(tasks[::2], tasks[1::2], strict=True):
        turns = [(task["instruction"], task["output"]) for task in (first, second)]
        pairs = [[("user", question), ("assistant", answer)] for question, answer in turns]
        rows.append([{"role": role, "content": text} for pair in pairs for role, text in pair])
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    output = tmp_path / "scores.jsonl"
    score(ScoreFlags(model=str(folder), dataset=[str(data)], output=str(output), use_cpu=True))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 * len(rows)
    command = f"represent --base_model {folder} --dataset {data} --scores {output} --share 50% --use_cpu --no_plot"
    assert main([*command.split(), "--output_dir", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "representation.json").read_text())
    assert result["scored_rows"] == len(rows) == 12
    assert len(result["most"]["example_ids"]) == len(result["least"]["example_ids"]) == 6
    assert sorted(result["most"]["example_ids"] + result["least"]["example_ids"]) == list(range(0, 24, 2))

    encoded = _documents(folder, data)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    vectors = []
    for pair in zip(encoded[::2], encoded[1::2], strict=True):
        with torch.no_grad():
            found = [
                model(input_ids=torch.from_numpy(each.tokens)[None], output_hidden_states=True).hidden_states[
                    result["layer"]
                ][0, np.flatnonzero(each.is_label) - 1]
                for each in pair
            ]
        vectors.append(torch.cat(found).double().mean(0).numpy())
    most, least = ([vectors[example // 2] for example in result[name]["example_ids"]] for name in ("most", "least"))
    expected = np.linalg.norm(np.mean(most, 0) - np.mean(least, 0))
    assert result["models"][0]["hidden"]["l2"] == pytest.approx(expected, rel=1e-4)


def _documents(folder: Path, data: Path) -> list[Any]:
    config = TrainConfig(base_model=str(folder), dataset=[str(data)])
    encoded, _ = load_data(config, AutoTokenizer.from_pretrained(folder))
    return [encoded.document(index) for index in range(len(encoded))]


def test_the_table_and_the_figure(
    represent: Callable[[str], int], place: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (place / "out" / "representation.json").read_bytes()
    assert (place / "out" / "representation.png").read_bytes().startswith(b"\x89PNG")
    assert represent("") == 2
    assert "holds a representation.json; choose another folder, or pass --overwrite" in capsys.readouterr().err
    assert represent("--overwrite") == 0
    printed = capsys.readouterr().out
    again = json.loads((place / "out" / "representation.json").read_text())
    assert again["models"] == json.loads(before)["models"]
    ib = result["models"][2]
    assert "Layer 1: the 6 most against the 6 least memorised of 24 scored rows" in printed
    for value in (f"{ib['hidden']['l2']:.4g}", f"{ib['hidden']['angle_degrees']:.2f}°", "8 dimensions active"):
        assert value in printed

    (place / "out" / "representation.png").unlink()
    assert main(["represent", "plot", f"{place}/out", "--plot", f"{place}/out/figure.svg"]) == 0
    assert "<svg" in (place / "out" / "figure.svg").read_text()


def test_the_figure_of_a_base_model_alone(result: dict[str, Any], tmp_path: Path) -> None:
    draw({**result, "models": result["models"][:1]}, tmp_path / "base.pdf")
    assert (tmp_path / "base.pdf").read_bytes().startswith(b"%PDF")


def test_a_separation_without_an_interval_is_drawn(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.subfigs[1].axes[0]))
    base = result["models"][0]
    hidden = {**base["hidden"], "separation": [2.5, None, None]}
    draw({**result, "models": [{**base, "hidden": hidden}]}, tmp_path / "figure.png")
    assert [2.5] in [np.asarray(line.get_ydata()).tolist() for line in drawn[0].lines]


WRONG = {
    "share_zero": ("--share 0", "--share takes a share of the rows above 0 and at most 50%, as 10% or 0.1, not '0'"),
    "share_too_large": ("--share 60%", "at most 50%, as 10% or 0.1, not '60%'"),
    "share_no_number": ("--share ten", "at most 50%, as 10% or 0.1, not 'ten'"),
    "share_one_percent_as_one": ("--share 1", "as 10% or 0.1, not '1'"),
    "layer_too_high": ("--layer 3", "--layer must be in 1..2, the layers of '.*base', not 3"),
    "layer_zero": ("--layer 0", "--layer must be at least 1, not 0"),
    "span_unknown": ("--span prompt", "--span takes response or full, not 'prompt'"),
    "measure_unknown": ("--measure mink", "--measure takes .*, not 'mink'. Did you mean min_k?"),
    "adapter_missing": ("--adapters ib={place}/bi", "/bi' is not a folder; name the output_dir of a run"),
    "adapter_twice": ("--adapters a={place}/ib a={place}/sft", "--adapters names 'a' twice"),
    "adapter_called_base": ("--adapters base={place}/ib", "must be neither empty nor 'base'"),
    "adapter_without_a_name": ("--adapters ={place}/ib", "must be neither empty nor 'base'"),
    "adapter_that_is_a_base_model": ("--adapters a={place}/base", "holds no adapter_config.json, so it is no adapter"),
    "scores_missing": ("--scores {place}/score.parquet", "There is no file of scores '.*score.parquet'"),
    "scores_of_another_kind": ("--scores {place}/data.jsonl", "data.jsonl (has no score|is no file|cannot be read)"),
    "scores_of_other_rows": ("--dataset {place}/other.jsonl", "has no score of 1 of the 2 rows of '.*other.jsonl'"),
    "too_few_rows": ("--dataset {place}/few.jsonl", "3 rows have a score, and two groups of 2 need 4"),
    "base_missing": ("--base_model {place}/bass", "'.*bass' is not a folder"),
    "base_of_another_shape": ("--base_model {place}/wide", "is not the model that the adapter 'sft' .* was trained on"),
    "output_is_a_file": ("--output_dir {place}/data.jsonl", "is a file; name a folder"),
    "output_holds_a_model": ("--output_dir {place}/base", "holds a model"),
    "batch_tokens_zero": ("--batch_tokens 0", "--batch_tokens must be at least 1, not 0"),
    "flag_unknown": (
        "--adapter ib={place}/ib",
        "--adapter is not an option of `ibft represent`. Did you mean --adapters",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(
    name: str, represent: Callable[[str], int], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (place / "data.jsonl").read_text().splitlines()
    (place / "few.jsonl").write_text("\n".join(lines[:3]) + "\n")
    (place / "other.jsonl").write_text(lines[0] + '\n{"instruction": "new", "output": "row"}\n')
    if not (place / "wide").exists():
        shutil.copytree(place / "base", place / "wide")
        model = AutoModelForCausalLM.from_pretrained(place / "base")
        model.model.norm.weight.data[0] += 1
        model.save_pretrained(place / "wide")
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    more, sentence = WRONG[name]
    assert represent(f"--output_dir {{place}}/wrong {more}") == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("ibft: error: ") and re.search(sentence, last), last
    assert "Traceback" not in error
    assert sorted(place.rglob("*")) == before, "something was written, or is gone"


def test_bottlenecks_at_different_layers_ask_for_one(
    represent: Callable[[str], int], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "ib", tmp_path / "ib2")
    config = json.loads((tmp_path / "ib2" / "ib_config.json").read_text())
    (tmp_path / "ib2" / "ib_config.json").write_text(json.dumps({**config, "target_layer": 2}))
    more = f"--adapters ib={{place}}/ib {tmp_path}/ib2 --output_dir {tmp_path}/out --no_plot"
    assert represent(more) == 2
    assert "at different layers (ib at layer 1, ib2 at layer 2); choose with --layer" in capsys.readouterr().err
    assert represent(f"{more} --layer 2") == 0


def test_too_little_memory_for_the_model_says_what_to_do(
    represent: Callable[[str], int], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ibft.represent.analysis, "load_base_model", exhausted)
    assert represent("--output_dir {place}/memory --no_plot") == 2
    assert re.search("too little memory for .*/base' in float32; --dtype bf", capsys.readouterr().err)
    assert not (place / "memory").exists()


def test_plot_refusals(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    (tmp_path / "other.json").write_text("[1]")
    for command, sentence in (
        (f"{tmp_path} --plot x.png", "There is no file"),
        (f"{tmp_path}/other.json --plot x.png", "is no result of `ibft represent`"),
        (f"{tmp_path} --plot x.jpeg", "--plot takes a file that ends in .png, .svg or .pdf, not 'x.jpeg'"),
        (f"{tmp_path}", "--plot must be given"),
        ("--plot x.png", "takes the output_dir of one `ibft represent`"),
    ):
        assert main(["represent", "plot", *command.split()]) == 2
        assert sentence in capsys.readouterr().err


def test_without_matplotlib(
    represent: Callable[[str], int], place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert represent("--output_dir {place}/bare") == 2
    assert 'not installed: pip install "ibft[plot]" (--no_plot does without)' in capsys.readouterr().err
    assert not (place / "bare").exists()
