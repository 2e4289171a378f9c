"""TrainingArguments files: the published one, dumps of transformers 4 and 5, and everything that must be refused."""

import json

import pytest
from transformers import TrainingArguments

from ibft.errors import InputError
from ibft.legacy import DEPENDENT, EVALUATION, INERT, REMOVED, SETTLED, SUPPORTED, read_training_config

KNOWN = {*TrainingArguments.__dataclass_fields__, *REMOVED}


@pytest.fixture
def read(tmp_path):
    def read(values):
        path = tmp_path / "args.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return read_training_config(path)

    return read


def test_published_file_unchanged(published_config):
    settings, notices = read_training_config(published_config("training_args.json"))
    assert settings == {
        "output_dir": "./", "overwrite": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0, "num_train_epochs": 3.0, "max_steps": -1, "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1, "logging_steps": 5, "save_strategy": "steps", "save_steps": 1000, "save_total_limit": 3,
        "seed": 42, "gradient_checkpointing": False, "ddp_timeout": 1800, "report_to": ["wandb"], "run_name": "test",
    }  # fmt: skip
    assert len(notices) == 2
    assert notices[0].startswith("fp16 in ") and "bfloat16 on a GPU, float32 on a CPU" in notices[0]
    assert all(name in notices[1] for name in ("do_eval", "eval_steps", "per_device_eval_batch_size", "fp16_full_eval"))


def test_the_table_of_removed_fields_covers_the_published_file(published_config):
    fields = json.loads(published_config("training_args.json").read_text())
    gone = set(fields) - set(TrainingArguments.__dataclass_fields__)
    assert gone <= set(REMOVED)
    assert len(gone) >= 14


def test_every_name_in_our_tables_is_a_field_and_in_one_table():
    tables = [*SUPPORTED, *SETTLED, *EVALUATION, *INERT, *DEPENDENT]
    assert set(tables) <= KNOWN
    assert len(tables) == len(set(tables))


def test_a_dump_of_the_installed_transformers(read):
    dump = json.loads(TrainingArguments(output_dir="x").to_json_string()) | {"do_train": True}
    settings, notices = read(dump)
    assert notices == []
    assert settings["output_dir"] == "x" and settings["learning_rate"] == 5e-5
    assert settings["warmup_ratio"] == 0.0 and settings["save_total_limit"] is None and settings["report_to"] == []


def test_defaults_of_transformers_4_pass_in_silence(read):
    values = {**REMOVED, "optim": "adamw_torch", "average_tokens_across_devices": False, "fsdp": [], "debug": ""}
    settings, notices = read(values)
    assert notices == []
    assert settings == {"overwrite": False, "warmup_ratio": 0.0}


def test_empty_file_and_every_kind_of_nothing(read):
    assert read({}) == ({}, [])
    for nothing in ("", None, [], {}, False):
        assert read(dict.fromkeys(["fsdp", "debug", "push_to_hub", "label_names", "data_seed"], nothing)) == ({}, [])


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"overwrite_output_dir": True}, {"overwrite": True}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"use_cpu": True, "no_cuda": False}, {"use_cpu": True}),
        ({"save_steps": 5e2, "num_train_epochs": 3}, {"save_steps": 500, "num_train_epochs": 3.0}),
        ({"warmup_steps": 100}, {"warmup_steps": 100}),
        ({"warmup_steps": 0.05}, {"warmup_ratio": 0.05}),
        ({"warmup_steps": 0}, {"warmup_ratio": 0.0}),
        ({"warmup_steps": 0, "warmup_ratio": 0.2}, {"warmup_ratio": 0.2}),
        ({"save_total_limit": None}, {"save_total_limit": None}),
        ({"save_total_limit": 0}, {"save_total_limit": None}),
        ({"max_steps": 0}, {"max_steps": -1}),
        ({"resume_from_checkpoint": True}, {"resume": True}),
        ({"resume_from_checkpoint": None}, {}),
        ({"deepspeed": "ds_config.json"}, {"engine": "deepspeed", "deepspeed_config": "ds_config.json"}),
        ({"run_name": "", "output_dir": ""}, {}),
        ({"report_to": "none"}, {"report_to": []}),
        ({"report_to": None}, {"report_to": []}),
        ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
        ({"report_to": ["tensorboard", "wandb", "wandb"]}, {"report_to": ["wandb", "tensorboard"]}),
        ({"report_to": "all"}, {"report_to": ["all"]}),
        ({"do_train": True, "local_rank": 3, "metric_for_best_model": "loss"}, {}),
    ],
)
def test_translations(read, values, settings):
    assert read(values) == (settings, [])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fp16": True}, ["fp16", "float16 training is not supported", "--dtype"]),
        ({"bf16": True}, ["bf16", "bfloat16 on a GPU"]),
        ({"do_eval": True}, ["do_eval", "--validation_split"]),
        ({"eval_strategy": "steps", "eval_steps": 50}, ["eval_strategy, eval_steps"]),
        ({"evaluation_strategy": "epoch"}, ["evaluation_strategy"]),
        ({"dataloader_num_workers": 4, "save_safetensors": False}, ["dataloader_num_workers, save_safetensors"]),
        ({"report_to": ["mlflow", "wandb"]}, ["mlflow not supported", "metrics.jsonl"]),
    ],
)
def test_notices(read, values, words):
    _, notices = read(values)
    assert len(notices) == 1
    assert all(word in notices[0] for word in words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1e-4}, r"'lerning_rate' is not a field of TrainingArguments\. Did you mean learning_rate\?"),
        ({"alpha": 0.1}, r"'alpha' is not a field .* given as flags"),
        ({"learning_rate": "1e-4"}, r'learning_rate takes a number, not "1e-4"'),
        ({"seed": True}, r"seed takes an integer, not true"),
        ({"seed": 1.5}, r"seed takes an integer, not 1\.5"),
        ({"logging_steps": 0.1}, r"logging_steps takes an integer, not 0\.1"),
        ({"warmup_steps": 10.5}, r"warmup_steps takes an integer"),
        ({"warmup_steps": True}, r"warmup_steps takes a number, not true"),
        ({"fp16": "true"}, r'fp16 takes true or false, not "true"'),
        ({"gradient_checkpointing": 1}, r"gradient_checkpointing takes true or false, not 1"),
        ({"save_total_limit": "3"}, r"save_total_limit takes an integer"),
        ({"output_dir": 3}, r"output_dir takes a string"),
        ({"report_to": 3}, r"report_to takes a name or a list of names, not 3"),
        ({"do_train": False}, r"do_train is false, but `ibft train` only trains"),
        ({"logging_strategy": "epoch"}, r'logging_strategy is "epoch"; only "steps"'),
        ({"resume_from_checkpoint": "run/checkpoint-5"}, r"newest checkpoint in its own output_dir"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor is 0\.1, which .* default, 0\.0"),
        ({"group_by_length": True}, r"group_by_length is true.* default, false"),
        ({"optim": "adafactor"}, r'optim is "adafactor"'),
        ({"load_best_model_at_end": True}, r"load_best_model_at_end is true"),
        ({"push_to_hub": True}, r"push_to_hub is true"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, r"lr_scheduler_kwargs is"),
        ({"past_index": 0}, r"past_index is 0.* default, -1"),
        ({"use_mps_device": True}, r"use_mps_device is true"),
        ({"fsdp": "full_shard"}, r"fsdp is"),
        ({"accelerator_config": {"split_batches": True}}, r"accelerator_config is"),
        ("[]", r"must hold a JSON object"),
        ('{"seed": 1,}', r"not valid JSON: .* at line 1, column 1[12]"),
        ("", r"not valid JSON"),
    ],
)
def test_refusals(read, values, message):
    with pytest.raises(InputError, match=message) as caught:
        read(values)
    assert "args.json" in str(caught.value)


def test_unreadable(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_training_config(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"run_name": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_training_config(tmp_path / "latin.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_training_config(tmp_path)


def test_secrets_are_not_printed(read):
    secret = "hf_secret"
    assert secret not in str(read({"hub_token": secret, "push_to_hub_token": secret}))
