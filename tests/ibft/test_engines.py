"""Every engine takes the steps of one process: gradients, losses, and the adapter that it leaves."""

import importlib.util
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from processes import Training
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibft.config import TrainConfig
from ibft.engines.zero_config import fit_bucket, zero_config
from ibft.errors import InputError
from ibft.lab.tasks import generate_tasks, write_jsonl

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
ROWS = 9  # with 4 rows a step, the last step has one: every rank but the first is idle
LEFT = ("adapter_model.safetensors", "ib_head.safetensors")
STEPS = "--packing none --num_train_epochs 1 --logging_steps 1 --save_strategy no"
SIZES = "--max_length 128 --bottleneck_dim 16 --lora_r 4 --lora_dropout 0 --alpha 1"


class Step(dict[str, Tensor]):
    """The gradients of a step, by parameter name."""


@pytest.fixture(scope="module")
def bases(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base model with a head of its own, and with one that is the embedding."""
    tied = tmp_path_factory.mktemp("tied")
    config = AutoModelForCausalLM.from_pretrained(base_folder).config
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tied)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tied)
    return {"untied": base_folder, "tied": tied}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every run of this file goes, with the data and DeepSpeed's files."""
    folder = tmp_path_factory.mktemp("engines")
    write_jsonl(generate_tasks(ROWS, seed=2), folder / "rows.jsonl")
    for stage in (1, 2, 3):
        # Else stage 3 would leave parameters as small as these whole in every process.
        settings = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": settings}))
    return folder


Train = Callable[..., tuple[list[Step], list[dict[str, Any]], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def train(bases: dict[str, Path], folder: Path) -> Train:
    """`train("untied", "fsdp2", 2, "--flag value ...")`: every step's gradients and record, and the weights saved.

    The same arguments give what they gave before.
    """
    done: dict[tuple[str, str, int, str], Any] = {}
    numbers = itertools.count()  # so that after a run that failed the next has a folder of its own

    def train(base: str, engine: str, world_size: int, more: str) -> Any:
        key = (base, engine, world_size, more)
        if key not in done:
            out = folder / f"run-{next(numbers)}"
            Training(
                f"--base_model {bases[base]} --dataset {folder}/rows.jsonl --output_dir {out} {STEPS} {SIZES} "
                f"{flags(engine, folder)} {more}",
                folder / f"{out.name}.log",
                world_size=world_size,
                before=planted.record_gradients,
                before_arguments=(f"{out}.pt",),
            ).succeed()
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            weights = load_file(out / "adapter_model.safetensors")
            if (out / "ib_head.safetensors").exists():
                weights |= load_file(out / "ib_head.safetensors")
            done[key] = torch.load(f"{out}.pt"), records, weights
        return done[key]

    return train


def flags(engine: str, folder: Path) -> str:
    """The flags that ask for an engine."""
    if engine.startswith("zero"):
        return f"--engine deepspeed --deepspeed_config {folder}/{engine}.json"
    return f"--engine {engine}" if engine != "one process" else ""


def assert_same_run(actual: Any, expected: Any) -> None:
    """Gradients to 1e-6, which is what issue-sized models need to end alike; losses and weights to what that leaves."""
    assert len(actual[0]) == len(expected[0]) >= 2
    for mine, theirs in zip(actual[0], expected[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).abs().max() <= 1e-6, name
    for mine, theirs in zip(actual[1], expected[1], strict=True):
        for term in ("loss", "ce", "kl", "ce_ib", "grad_norm", "learning_rate"):
            assert mine[term] == pytest.approx(theirs[term], abs=2e-6), term
        assert mine["tokens"] == theirs["tokens"]
    assert actual[2].keys() == expected[2].keys()
    for name, weight in expected[2].items():
        torch.testing.assert_close(actual[2][name], weight, rtol=0, atol=1e-5, msg=name)


def needs_deepspeed(engine: str) -> None:
    if engine.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("base", "world_size", "method"), [("untied", 2, "ib"), ("tied", 4, "ib")])
def test_an_engine_equals_one_process(train: Train, engine: str, base: str, world_size: int, method: str) -> None:
    """With accumulation on two processes, a ragged last step, and ranks that have no token in it."""
    needs_deepspeed(engine)
    rows, accumulation = 1, 4 // world_size
    dealt = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation} --method {method}"
    expected = train(base, "one process", 1, f"--per_device_train_batch_size 4 --method {method}")
    assert len(expected[0]) == 3
    assert_same_run(train(base, engine, world_size, dealt), expected)


@pytest.mark.parametrize("engine", ["one process", *ENGINES])
def test_weights_that_vary_take_the_rate_of_all_processes(train: Train, engine: str) -> None:
    """Of the whole step, with accumulation, and a last step in which one process has no token."""
    needs_deepspeed(engine)
    more = "--alpha_warmup_steps 2 --ib_rate_target 0.16 --kl_weight 0.5 --beta 0.1 --kl_reduction sum"
    expected = train("untied", "one process", 1, f"--per_device_train_batch_size 4 {more}")
    world_size = 1 if engine == "one process" else 2
    dealt = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {4 // world_size} {more}"
    actual = train("untied", engine, world_size, dealt)
    assert_same_run(actual, expected)
    weight, found = 0.5, [record["kl_weight"] for record in expected[1]]
    assert found[0] == 0.5
    for record, following in zip(expected[1], found[1:], strict=False):  # the formula, from the rates in metrics.jsonl
        ratio = record["kl_nats"] / 0.16
        assert 0.5 < ratio < 2 and abs(ratio - 1) > 1e-3
        weight *= ratio**0.1
        assert following == pytest.approx(weight * ratio**4, rel=1e-5)
    for mine, theirs in zip(actual[1], expected[1], strict=True):
        assert mine["alpha"] == theirs["alpha"] == min(1, (theirs["step"] - 1) / 2)
        assert mine["kl_weight"] == pytest.approx(theirs["kl_weight"], rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_free_bits_on_two_processes(train: Train, engine: str) -> None:
    more = "--free_bits 0.09 --beta 0 --kl_reduction sum"
    expected = train("untied", "one process", 1, f"--per_device_train_batch_size 4 {more}")
    dealt = f"--per_device_train_batch_size 1 --gradient_accumulation_steps 2 {more}"
    assert_same_run(train("untied", engine, 2, dealt), expected)
    for record in expected[1]:  # some tokens pay, and not for all they have
        assert 0 < record["loss"] - record["ce"] < record["kl"]
        assert "alpha" not in record and "kl_weight" not in record


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "zero1"])
@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "more",
    [
        "--method ib",
        "--method sft",
        "--method ib --packing best-fit --kl_tokens labels --target_layer 2 --encoder lora",
        "--method ib --gradient_checkpointing --validation_split 2 --max_grad_norm 0 --weight_decay 0.1",
    ],
)
def test_every_engine_on_two_and_four_processes(
    train: Train, engine: str, base: str, world_size: int, more: str
) -> None:
    needs_deepspeed(engine)
    more = f"--num_train_epochs 3 {more}"
    expected = train(base, "one process", 1, f"--per_device_train_batch_size 8 {more}")
    dealt = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {8 // world_size} {more}"
    assert_same_run(train(base, engine, world_size, dealt), expected)
    for mine, theirs in zip(train(base, engine, world_size, dealt)[1], expected[1], strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=2e-6)


# --- what was asked for is what runs


@pytest.mark.parametrize(("engine", "share"), [("fsdp2", 0.5), ("zero3", 0.5)])
def test_the_model_is_spread_over_the_processes(
    bases: dict[str, Path], folder: Path, tmp_path: Path, engine: str, share: float
) -> None:
    """What is frozen, too: else a large model would not fit, and nothing else would tell."""
    needs_deepspeed(engine)
    Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} {flags(engine, folder)}",
        tmp_path / "log",
        world_size=2,
        before=planted.measure_share,
        before_arguments=(str(tmp_path / "share"),),
    ).succeed()
    assert float((tmp_path / "share").read_text()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_processes_that_build_another_model_are_told(
    bases: dict[str, Path], folder: Path, tmp_path: Path, engine: str
) -> None:
    """Where the weights' file gives a model that its config.json does not: a broadcast would mix up its tensors."""
    needs_deepspeed(engine)
    training = Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} {flags(engine, folder)}",
        tmp_path / "log",
        world_size=2,
        before=planted.another_outline,
    )
    assert training.wait() == [2, 2]
    assert "do not give the model that its config.json describes" in training.output()


@pytest.mark.parametrize(
    ("options", "codes", "sentence"),
    [
        ({"dataset": ["{folder}/other.jsonl"]}, [2, 2], r"\(data is one of fingerprint \w{12}, and one of fingerprint"),
        ({"validation_split": "3"}, [2, 2], r"\(validation_split is '3', and '2' in the main process\)"),
        ({"save_steps": 7}, [2, 2], r"\(save_steps is 7, and 500 in the main process\); all processes must be started"),
        ({"dataset": ["{folder}/none.jsonl"]}, [1, 2], r"(?s)another process could not go on.*none.jsonl"),
    ],
    ids=["other_data", "other_rows_held_out", "another_option", "data_that_is_missing"],
)
def test_processes_that_were_started_otherwise_are_told(
    bases: dict[str, Path], folder: Path, tmp_path: Path, options: dict[str, Any], codes: list[int], sentence: str
) -> None:
    """Before anything is trained: they would wait for each other, or count other tokens in a step."""
    write_jsonl(generate_tasks(ROWS, seed=3), folder / "other.jsonl")
    if "dataset" in options:
        options = {"dataset": [options["dataset"][0].format(folder=folder)]}
    training = Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} --validation_split 2",
        tmp_path / "log",
        world_size=2,
        before=planted.start_otherwise,
        before_arguments=(1, options),
    )
    assert training.wait() == codes, training.output()
    assert re.search(sentence, training.output()), training.output()
    assert "Traceback" not in training.output() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["clear_output", "Metrics.write"])
def test_where_the_main_process_alone_fails_all_end_with_a_sentence(
    bases: dict[str, Path], folder: Path, tmp_path: Path, name: str
) -> None:
    training = Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 4 "
        f"{SIZES} --logging_steps 1",
        tmp_path / "log",
        world_size=2,
        before=planted.fill_the_disk,
        before_arguments=(name, 1 if name == "clear_output" else 2),
    )
    assert training.wait() == [1, 1], training.output()
    main, other = (log.read_text() for log in training.logs)
    assert "could not be written: No space left on device." in main
    assert other.splitlines()[-1] == ("ibft: error (process 1): another process could not go on; its message says why.")
    assert "Traceback" not in main + other


def test_where_the_process_that_reads_the_weights_cannot_all_end_with_a_sentence(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["untied"], base)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    training = Training(
        f"--base_model {base} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} {SIZES} --engine fsdp2",
        tmp_path / "log",
        world_size=2,
    )
    assert training.wait() == [2, 1], training.output()
    assert "another process could not go on" in training.output() and "Traceback" not in training.output()


def test_nothing_but_python_holds_the_process_group_when_it_is_left(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """DDP's reducer would wait for gloo's threads with the GIL held, which they may need: processes never ended."""
    Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} --engine ddp",
        tmp_path / "log",
        before=planted.count_owners_of_reducer,
        before_arguments=(str(tmp_path / "owners"),),
    ).succeed()
    assert json.loads((tmp_path / "owners").read_text()) == [0, 0]


def test_deepspeeds_published_file(
    base_folder: Path,
    tasks_file: Path,
    tmp_path: Path,
    published_config: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one process, from the command line as it was: its stage is taken, its batch and precision are overruled."""
    pytest.importorskip("deepspeed")
    file = published_config("ds_config.json")
    Training(
        f"--base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'} {SIZES} --max_steps 2 "
        f"--use_deepspeed --deepspeed_config {file}",
        tmp_path / "log",
        world_size=1,
    ).succeed()
    printed = (tmp_path / "log.0").read_text()
    assert "ZeRO-3, 1 process (gloo)" in printed
    assert f"{file}: train_micro_batch_size_per_gpu is 1, set to 2 (by --per_device_train_batch_size" in printed
    assert f"{file}: gradient_accumulation_steps is 8, set to 1 (by --gradient_accumulation_steps)" in printed
    assert f"{file}: bf16 is enabled: True, set to enabled: False (by --dtype" in printed
    assert f"{file}: activation_checkpointing has no effect; --gradient_checkpointing" in printed
    assert "fp16" not in printed.replace("--dtype; float16", "")
    trained = sum(weight.numel() for file in LEFT for weight in load_file(tmp_path / "out" / file).values())
    assert f"zero_optimization.reduce_bucket_size is 500,000,000, set to {trained:,} (by the number of" in printed


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_buffer_is_as_large_as_the_gradients(
    bases: dict[str, Path], folder: Path, tmp_path: Path, stage: int
) -> None:
    """And not of its default of 5e8 elements, 1.9 GiB: nothing else would tell."""
    needs_deepspeed("zero")
    Training(
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --output_dir {tmp_path / 'out'} --max_steps 1 "
        f"{SIZES} {flags(f'zero{stage}', folder)}",
        tmp_path / "log",
        world_size=1,
        before=planted.bucket_size,
        before_arguments=(str(tmp_path / "size"),),
    ).succeed()
    trained = sum(weight.numel() for file in LEFT for weight in load_file(tmp_path / "out" / file).values())
    assert int((tmp_path / "size").read_text()) == trained
    assert "reduce_bucket_size" not in (tmp_path / "log.0").read_text()  # the file says nothing of it


def test_a_buffer_that_is_too_small_stays_so() -> None:
    """It is a user's to say how often gradients are sent."""
    config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e3}}
    assert fit_bucket(config, 20_000) == [] and config["zero_optimization"]["reduce_bucket_size"] == 5000


def zero(tmp_path: Path, values: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    """zero_config of such a file, for a run with these options on four processes."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(values))
    config = TrainConfig(base_model="m", dataset=["d"], engine="deepspeed", **options)
    return zero_config(str(file), config, world_size=4)


def test_what_the_run_decides_replaces_the_files_values(tmp_path: Path) -> None:
    settled, notices = zero(
        tmp_path,
        {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
            "train_batch_size": 24,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": 0.5,
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False},
            "optimizer": {"type": "AdamW"},
            "wall_clock_breakdown": False,
            "communication_data_type": "bf16",
        },
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    assert settled["zero_optimization"] == {"stage": 2, "overlap_comm": True}  # "auto" is as if it were not there
    assert settled["communication_data_type"] == "fp32"
    assert settled["train_batch_size"] == 24 and settled["gradient_clipping"] == 1.0
    assert settled["bf16"] == settled["fp16"] == {"enabled": False} and "optimizer" not in settled
    assert len(notices) == 3
    assert "communication_data_type is 'bf16', set to 'fp32' (by gradients, which stay float32" in notices[1]
    assert "gradient_clipping is 0.5, set to 1.0 (by --max_grad_norm)" in notices[0]
    assert "optimizer has no effect; --learning_rate" in notices[2]


@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        ({}, {}, r"zero_optimization.stage is None; accepted are 1, 2 and 3"),
        ({"zero_optimization": {}}, {}, r"zero_optimization.stage is 0; accepted are 1, 2 and 3.*--engine ddp does"),
        ({"zero_optimization": {"stage": 4}}, {}, r"stage is 4"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            {},
            r"zero_optimization.offload_optimizer.device is 'nvme', which is not supported; 'cpu' and 'none' are",
        ),
        *(
            (
                {"zero_optimization": {"stage": 3, name: value}},
                {},
                f"zero_optimization.{name} is .* which changes what a",
            )
            for name, value in (
                ("zero_quantized_weights", True),
                ("zero_quantized_nontrainable_weights", True),
                ("zero_quantized_gradients", True),
                ("zenflow", {"topk_ratio": 0.1}),
            )
        ),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, {}, "every step needs that norm"),
        ({"zero_optimization": {"stage": 1}, "curriculum_learning": {"enabled": True}}, {}, r"curriculum_learning is"),
        ({"zero_optimization": {"stage": 1}, "prescale_gradients": True}, {}, r"prescale_gradients is True, which"),
        ({"zero_optimization": {"stage": 3}}, {"compile": True}, r"--compile does not go with ZeRO stage 3"),
    ],
)
def test_a_file_that_asks_for_something_else_is_refused(
    tmp_path: Path, values: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        zero(tmp_path, values, **options)


def test_settings_that_are_off_are_no_obstacle(tmp_path: Path) -> None:
    _, notices = zero(
        tmp_path,
        {
            "zero_optimization": {"stage": 1, "zero_quantized_gradients": False, "zenflow": None},
            "amp": {"enabled": False},
            "prescale_gradients": False,
            "communication_data_type": None,
        },
    )
    assert notices == []


def test_offloaded_to_the_cpu_deepspeed_takes_the_same_steps(train: Train, folder: Path) -> None:
    """ZeRO-Offload with our own AdamW."""
    needs_deepspeed("zero")
    settings = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (folder / "offload.json").write_text(json.dumps({"zero_optimization": settings}))
    expected = train("untied", "one process", 1, "--per_device_train_batch_size 4 --method ib")
    more = "--per_device_train_batch_size 2 --method ib"
    mine = train("untied", "zero2", 2, f"{more} --deepspeed_config {folder}/offload.json")
    assert [record["loss"] for record in mine[1]] == pytest.approx([record["loss"] for record in expected[1]], abs=2e-6)
    for name, weight in expected[2].items():
        torch.testing.assert_close(mine[2][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "engine", ["fsdp2", "zero2", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("ddp", "zero3"))]
)
def test_a_step_that_is_not_finite_moves_no_weight(
    bases: dict[str, Path], folder: Path, tmp_path: Path, engine: str
) -> None:
    """On one of the processes alone; both stop, with the sentence of one process."""
    needs_deepspeed(engine)
    line = (
        f"--base_model {bases['untied']} --dataset {folder}/rows.jsonl --max_steps 3 --logging_steps 3 {SIZES} "
        f"--warmup_ratio 0 --learning_rate 1e-3 {flags(engine, folder)} --output_dir {tmp_path / 'out'}"
    )
    training = Training(
        line,
        tmp_path / "log",
        world_size=2,
        before=planted.spoil_gradient,
        before_arguments=(1, 2, str(tmp_path / "w")),
    )
    assert training.wait() == [1, 1], training.output()
    assert "step 2 is not finite" in training.output()
    before, after = torch.load(tmp_path / "w.2"), torch.load(tmp_path / "w.3")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [weight.abs().max() > 0 for name, weight in before.items() if "lora_B" in name]
    assert any(moved), "the first step was not taken"
