"""The command line: what is accepted, which source wins, and that each refusal says what to do."""

import dataclasses
import json
import subprocess
import sys
import typing
from importlib.machinery import ModuleSpec

import pytest

from ibft.adapter import lora_config
from ibft.arguments import PUBLISHED, check_engine, parse_args
from ibft.config import Scheduler, TrainConfig
from ibft.errors import InputError

READ_WHEN_PARSED = (
    "adapter_config",
    "training_config",
    "use_deepspeed",
    "engine",
    "deepspeed_config",
    "streaming",
)  # their own tests are below
BASE = {"base_model": "m", "dataset": "d"}
REQUIRED = ["--base_model", "m", "--dataset", "d"]


def parse(line="", **kwargs):
    return parse_args([*REQUIRED, *line.split()], **kwargs)[0]


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


# --- flags


def test_defaults():
    config, notices = parse_args(REQUIRED)
    assert config == TrainConfig(**BASE)
    assert notices == []
    assert (config.alpha, config.beta, config.bottleneck_dim, config.learning_rate) == (0.2, 0.01, 256, 1e-4)
    assert (config.target_layer, config.report_to, config.lora_target_modules) == (None, [], ["all-linear"])


@pytest.mark.parametrize("respell", [str, lambda flag: "--" + flag[2:].replace("_", "-")], ids=["as_is", "dashes"])
@pytest.mark.parametrize("name", [name for name in TrainConfig.__dataclass_fields__ if name not in READ_WHEN_PARSED])
def test_every_field_is_a_flag_in_both_spellings(name, respell):
    kind = TrainConfig.__dataclass_fields__[name].type
    required = [*REQUIRED, "--encoder", "lora"]  # lora, so that encoder_rank is allowed
    required += ["--validation_split", "0.1"] if name == "eval_steps" else []
    required += ["--drop_memorized", "10%"] if name == "memorization_scores" else []
    required += ["--memorization_scores", "x"] if name == "drop_memorized" else []
    if kind.removesuffix(" | None") == "bool":
        for flag, value in ((f"--{name}", True), (f"--no_{name}", False)):
            assert getattr(parse_args([*required, respell(flag)])[0], name) is value
        return
    samples = {
        "str": "x",
        "int": "4096",
        "float": "0.5",
        "list[str]": "wandb",
        "list[float]": "0.5",
        "Scheduler": "linear",
        "Measure": "min_k",
    }
    text = samples.get(kind.removesuffix(" | None")) or kind.split("'")[1]  # or the first of its choices
    text = "10%" if name == "drop_memorized" else text
    config = parse_args([*required, respell(f"--{name}"), text])[0]
    value = getattr(config, name)
    assert str(value[0] if isinstance(value, list) else value) == text
    assert parse_args([*required, respell(f"--{name}") + f"={text}"])[0] == config


@pytest.mark.parametrize("text", ["a,b,c", "a b c", "a, b c"])
def test_lists_take_commas_and_spaces(text):
    assert parse(f"--lora_target_modules {text}").lora_target_modules == ["a", "b", "c"]
    joined = parse_args([*REQUIRED, "--lora-target-modules", text])[0]  # one quoted argument
    assert joined.lora_target_modules == ["a", "b", "c"]


def test_none_empties():
    assert parse("--save_total_limit none").save_total_limit is None
    assert parse("--report_to none").report_to == []
    assert parse("--run_name none").run_name == "none"  # a name is a name


def test_values_keep_their_dashes():
    assert parse("--output-dir=my-run --run-name a-b").output_dir == "my-run"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rte 1", r"--learning_rte is not an option of `ibft train`\. Did you mean --learning_rate\?"),
        ("--learning-rte=1", r"--learning_rte is not an option .* Did you mean --learning_rate\?"),
        ("--alph 0.1", r"--alph is not an option .* Did you mean --alpha\?"),  # no abbreviations
        ("--seed 1 stray", r"'stray' has no flag before it"),
        ("--alpha", r"--alpha: expected one argument.*--help"),
        ("--alpha much", r"--alpha takes a finite number, not 'much'\."),
        ("--alpha nan", r"--alpha takes a finite number, not nan\."),
        ("--alpha inf", r"--alpha takes a finite number"),
        ("--alpha=-0.1", r"--alpha must be at least 0, not -0\.1\."),
        ("--beta=-1", r"--beta must be at least 0"),
        ("--method ibb", r"--method takes ib or sft, not 'ibb'\. Did you mean ib\?"),
        ("--preset publishd", r"--preset takes published, not 'publishd'"),
        ("--max_length 1", r"--max_length must be at least 2, not 1\."),
        ("--max_length 2.5", r"--max_length takes an integer, not '2\.5'\."),
        ("--max_steps 0", r"--max_steps must be at least 1, or -1"),
        ("--tokens_per_batch 3000", r"--tokens_per_batch must be a multiple of --max_length \(2048\), not 3000\."),
        ("--target_layer 0", r"--target_layer must be at least 1"),
        ("--bottleneck_dim 0", r"--bottleneck_dim must be at least 1"),
        ("--alpha_warmup_steps=-1", r"--alpha_warmup_steps must be at least 0, not -1\."),
        ("--kl_weight=-1", r"--kl_weight must be at least 0, not -1\.0\."),
        ("--free_bits nan", r"--free_bits takes a finite number, not nan\."),
        ("--ib_rate_target 0", r"--ib_rate_target must be greater than 0, not 0\.0\."),
        ("--ib_rate_target 3 --kl_weight 0", r"ib_rate_target 3 needs kl_weight above 0"),
        ("--ib_rate_target 3 --alpha 0", r"ib_rate_target 3 needs alpha above 0"),
        ("--ib_rate_target 3 --beta 0", r"ib_rate_target 3 needs beta above 0"),
        ("--free_bits 2 --kl_weight 0", r"free_bits 2 needs kl_weight above 0"),
        ("--ib_rate_target 3 --free_bits 2", r"ib_rate_target 3 and free_bits 2 exclude each other"),
        ("--encoder_rank 8", r"--encoder_rank 8 needs --encoder lora"),
        ("--encoder lora --encoder_rank 0", r"--encoder_rank must be at least 1"),
        ("--lora_r 0", r"--lora_r must be at least 1"),
        ("--lora_dropout 1", r"--lora_dropout must be at least 0 and below 1, not 1\.0\."),
        ("--lora_target_modules all-linear q_proj", r"all-linear or module names, not both"),
        ("--lora_target_modules none", r"must name at least one module"),
        ("--learning_rate 0", r"--learning_rate must be greater than 0"),
        ("--adam_beta2 1", r"--adam_beta2 must be at least 0 and below 1"),
        ("--warmup_ratio 1.5", r"--warmup_ratio must be between 0 and 1"),
        ("--lr_scheduler_type cosin", r"--lr_scheduler_type takes linear or cosine .* Did you mean cosine\?"),
        ("--seed -1", r"--seed must be between 0 and 2\*\*63 - 1, not -1"),
        (f"--seed {2**63}", r"--seed must be between 0"),
        ("--save_steps 0", r"--save_steps must be at least 1"),
        ("--save_total_limit 0", r"--save_total_limit must be at least 1"),
        ("--save_strategy epoch", r"--save_strategy takes no or steps, not 'epoch'"),
        ("--report_to wandb tensorbord", r"--report_to takes wandb, .* not 'tensorbord'\. Did you mean tensorboard\?"),
        ("--report_to none wandb", r"--report_to takes wandb, tensorboard, trackio, all, or none alone, not 'none'"),
        ("--output_dir=", r"--output_dir must be a name or path, not ''"),
        ("--resume --overwrite", r"--resume and --overwrite exclude each other"),
        ("--attn_implementation flash_attention_3 --use_cpu", r"flash_attention_3 needs a GPU; with --use_cpu take"),
        ("--load_in_4bit --engine fsdp2", r"--load_in_4bit: fsdp2 cannot distribute bitsandbytes' weights; take one"),
        ("--load_in_4bit --use_deepspeed", r"--load_in_4bit: deepspeed cannot distribute"),
        ("--liger --use_cpu", r"--liger needs a GPU"),
        ("--overwrite=yes", r"--overwrite/--no_overwrite: ignored explicit argument 'yes'"),
    ],
)
def test_refusals_name_the_flag_and_what_it_takes(line, message):
    with pytest.raises(InputError, match=message):
        parse(line)


def test_required_flags_and_misspelt_required_flags():
    with pytest.raises(InputError, match="--base_model and --dataset must be given"):
        parse_args([])
    with pytest.raises(InputError, match=r"--base_modle is not an option .* Did you mean --base_model\?"):
        parse_args(["--base_modle", "m", "--dataset", "d"])
    with pytest.raises(InputError, match=r"`ibft train --help`"):
        parse_args(["--dataset", "d"])


def test_boundaries_that_are_allowed():
    parse(f"--seed {2**63 - 1} --alpha 0 --beta 0 --lora_dropout 0 --adam_beta1 0 --max_grad_norm 0 --max_length 2")
    parse("--attn_implementation flash_attention_2 --packing none")
    parse("--attn_implementation varlen --use_cpu --no_gradient_checkpointing")
    parse("--encoder lora --encoder_rank 1 --warmup_ratio 1 --num_train_epochs 0.5")


@pytest.mark.parametrize("name", typing.get_args(Scheduler))
def test_schedules_need_no_more_than_we_give(name):
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    get_scheduler(parse(f"--lr_scheduler_type {name}").lr_scheduler_type, optimizer, 2, 10)


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    kinds = {name: field.type for name, field in TrainConfig.__dataclass_fields__.items()}
    words = set(shown.split())
    assert {f"--{'[no_]' if kind.startswith('bool') else ''}{name}" for name, kind in kinds.items()} <= words
    assert "--config FILE" in shown and "(default: 0.0001)" in shown and "%%" not in shown and "%(" not in shown


def test_help_fits_a_terminal_of_80_columns_and_ends_with_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    groups = ("model", "data", "method", "bottleneck", "adapter", "optimisation", "run", "settings from files")
    starts = [shown.index(f"\n{group}") for group in groups]
    assert starts == sorted(starts)
    example = shown.partition("\nexample")[2].replace("\\\n", " ")
    commands = [line.partition("#")[0].split() for line in example.splitlines() if line.startswith("  ibft train")]
    assert len(commands) == 2
    assert parse_args(commands[0][2:])[0].dry_run  # it is accepted, and starts nothing


# --- the object


def test_dict_round_trip_through_json():
    config = parse("--lora_target_modules a,b --target_layer 3 --report_to wandb --num_train_epochs 2")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_normalises_and_refuses():
    config = TrainConfig.from_dict({**BASE, "save_steps": 5e2, "num_train_epochs": 2})
    assert type(config.save_steps) is int and type(config.num_train_epochs) is float
    for values, message in [
        ({"lerning_rate": 1.0}, r"'lerning_rate' is not an option .* Did you mean learning_rate\?"),
        ({"seed": True}, r"--seed takes an integer, not True"),
        ({"seed": "1"}, r"--seed takes an integer, not '1'"),
        ({"overwrite": 1}, r"--overwrite takes true or false, not 1"),
        ({"max_steps": None}, r"--max_steps takes an integer, not None"),
        ({"report_to": "wandb"}, r"--report_to takes names"),
        ({"lora_target_modules": [1]}, r"--lora_target_modules takes names"),
    ]:
        with pytest.raises(InputError, match=message):
            TrainConfig.from_dict({**BASE, **values})
    with pytest.raises(InputError, match="--dataset must be given"):
        TrainConfig.from_dict({"base_model": "m"})


def test_frozen_and_independent():
    config, other = TrainConfig(**BASE), TrainConfig(**BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 1.0
    config.to_dict()["lora_target_modules"].append("x")
    config.report_to.append("x")
    assert config.lora_target_modules == ["all-linear"] and other.report_to == []


def test_rows_per_batch():
    assert parse("--per_device_train_batch_size 3").rows_per_batch == 3
    assert parse("--tokens_per_batch 4096 --max_length 1024").rows_per_batch == 4
    with pytest.raises(InputError, match="set the same thing; give one of them"):
        parse("--per_device_train_batch_size 3 --tokens_per_batch 4096 --max_length 1024")


# --- where values come from


def test_precedence(tmp_path):
    file = write(tmp_path / "t.json", {"learning_rate": 3e-4, "num_train_epochs": 5, "warmup_ratio": 0.2})
    assert parse().num_train_epochs == 3.0 and parse().packing == "best-fit"
    preset = parse("--preset published")
    assert (preset.packing, preset.bos, preset.target_layer) == ("none", "no", 20)
    both = parse(f"--preset published --training_config {file} --learning_rate 7e-4")
    assert (both.learning_rate, both.num_train_epochs, both.warmup_ratio) == (7e-4, 5.0, 0.2)  # flag, file, file
    assert (both.packing, both.target_layer) == ("none", 20)  # preset
    # A flag that repeats the default is still a flag.
    assert parse(f"--training_config {file} --warmup_ratio 0.1 --num_train_epochs 3").num_train_epochs == 3.0
    assert parse("--preset published --packing best-fit").packing == "best-fit"


def test_a_flag_is_not_outranked_by_the_file(tmp_path):
    file = write(tmp_path / "t.json", {"warmup_steps": 50, "max_steps": 900, "no_cuda": True})
    untouched = parse(f"--training_config {file}")
    assert (untouched.warmup_steps, untouched.max_steps, untouched.use_cpu) == (50, 900, True)
    config = parse(f"--training_config {file} --warmup_ratio 0.3 --num_train_epochs 1 --no_use_cpu")
    assert (config.warmup_steps, config.max_steps, config.use_cpu) == (0, -1, False)


def test_a_bad_value_in_the_file_names_the_file_unless_a_flag_replaces_it(tmp_path):
    file = write(tmp_path / "t.json", {"save_strategy": "epoch", "learning_rate": -1.0})
    with pytest.raises(InputError, match=r"t\.json: learning_rate must be greater than 0, not -1\.0"):
        parse(f"--training_config {file}")
    assert parse(f"--training_config {file} --learning_rate 1e-4 --save_strategy no").save_strategy == "no"


def test_preset_is_what_the_published_code_ran():
    assert PUBLISHED == {
        "bottleneck_dim": 256, "target_layer": 20, "encoder": "linear", "alpha": 0.2, "beta": 0.01, "lora_r": 32,
        "lora_alpha": 32, "lora_dropout": 0.05, "learning_rate": 1e-4, "weight_decay": 0.0,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "num_train_epochs": 3.0, "per_device_train_batch_size": 2,
        "packing": "none", "bos": "no", "max_length": 2048,
    }  # fmt: skip
    assert parse("--preset published").lora_r == 32
    with pytest.raises(InputError, match="--preset takes published, not 'paper'"):
        parse("--preset paper")


def test_notices():
    def notices(line):
        return parse_args([*REQUIRED, *line.split()])[1]

    assert notices("--method ib --alpha 0.5") == []
    assert notices("--method sft --preset published") == []
    assert notices("--method sft --alpha 0.5 --encoder lora") == [
        "--alpha, --encoder: no effect, because --method sft trains without a bottleneck."
    ]
    assert notices("--save_strategy no --save_steps 5") == ["--save_steps: no effect with save_strategy no."]
    assert "current folder" in notices("--output_dir ./")[0]


def test_published_command_line(published_config):
    files = published_config("training_args.json").parent
    line = f"--training_config {files}/training_args.json --adapter_config {files}/adapter_config.json"
    config, notices = parse_args(
        [*REQUIRED, *line.split(), "--alpha", "0.1", "--num_proc", "8", "--target_layer", "20", "--seed", "1"]
    )
    assert (config.save_steps, config.logging_steps, config.report_to, config.seed) == (1000, 5, ["wandb"], 1)
    assert config.lora_target_modules == sorted(PUBLISHED["lora_target_modules"])
    assert len(notices) == 3  # fp16, evaluation, output_dir "./"


def test_deepspeed_names_the_extra(monkeypatch):
    check_engine(TrainConfig(**BASE))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flags in ("--use_deepspeed", "--engine deepspeed"):
        with pytest.raises(InputError, match=r'pip install "ibft\[deepspeed\]"'):
            parse(flags)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    assert parse("--use-deepspeed").chosen_engine == "deepspeed"


# --- the adapter


def test_lora_from_flags():
    lora = lora_config(parse("--lora_r 8 --lora_alpha 16 --lora_dropout 0.1 --lora_target_modules q_proj,v_proj"))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.1)
    assert lora.target_modules == {"q_proj", "v_proj"}
    assert (lora.task_type, lora.base_model_name_or_path, lora.inference_mode) == ("CAUSAL_LM", "m", False)
    assert lora_config(parse()).target_modules == "all-linear"


def test_published_adapter_config_unchanged(published_config, recwarn):
    config = parse(f"--adapter_config {published_config('adapter_config.json')} --preset published")
    lora = lora_config(config)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (32, 32, 0.05, "none")
    assert len(lora.target_modules) == 7
    assert lora.base_model_name_or_path == "m"  # not the file's meta-llama/Meta-Llama-3-8B
    assert not [w for w in recwarn if "peft" in str(w.filename)]


def test_record_says_what_the_file_says(tmp_path):
    file = write(tmp_path / "a.json", {"r": 4, "lora_alpha": 9, "lora_dropout": 0.2, "target_modules": ["v", "q"]})
    config = parse(f"--adapter_config {file} --preset published")
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (4, 9, 0.2)
    assert config.lora_target_modules == ["q", "v"]
    assert TrainConfig.from_dict(config.to_dict()) == config
    defaults = parse(f"--adapter_config {write(file, '{}')}")  # PEFT's own defaults, for it is PEFT's file
    assert (defaults.lora_r, defaults.lora_target_modules) == (8, [])
    assert lora_config(defaults).target_modules is None


def test_options_of_peft_pass_through(tmp_path):
    values = {
        "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 4}, "target_modules": ".*q_proj",
        "inference_mode": True, "some_future_option": None, "another": {}, "third": False,
    }  # fmt: skip
    lora = lora_config(parse(f"--adapter_config {write(tmp_path / 'a.json', values)}"))
    assert lora.use_dora and lora.use_rslora and lora.rank_pattern == {"q_proj": 4}
    assert lora.target_modules == ".*q_proj" and lora.inference_mode is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lora_alfa": 3}, r"lora_alfa \(3\) is not an option of PEFT's LoRA\. Did you mean lora_alpha\?"),
        ({"peft_type": "IA3"}, r'peft_type must be "LORA", not \'IA3\''),
        ({"task_type": "SEQ_CLS"}, r'task_type must be "CAUSAL_LM"'),
        ({"r": 0}, r"a\.json: .*"),
        ({"r": "8"}, r"a\.json: .*"),
        ({"layers_pattern": "h"}, r"a\.json: PEFT does not accept .*layers_to_transform"),
        ({"kasa_config": {"beta": 1e-3}}, r"a\.json: kasa_config needs a term of its own in the loss"),
        ({"init_lora_weights": "pissa_niter_16"}, r"a\.json: init_lora_weights 'pissa_niter_16' .*take \"pissa\""),
        ({"init_lora_weights": "eva"}, r"a\.json: init_lora_weights 'eva' begins from what PEFT computes of data"),
        ({"init_lora_weights": "lora_ga"}, r"a\.json: init_lora_weights 'lora_ga' begins from"),
        ('{"r": 8,\n "lora_alpha" 3}', r"a\.json is not valid JSON: .* at line 2, column 15"),
        ("[1]", r"a\.json must hold a JSON object \{\.\.\.\}, not \[1\]"),
    ],
)
def test_bad_adapter_files(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        parse(f"--adapter_config {write(tmp_path / 'a.json', content)}")


def test_adapter_file_and_flags_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match=r"--lora_alpha and --adapter_config .*a\.json both set the adapter"):
        parse(f"--lora-alpha 32 --adapter_config {write(tmp_path / 'a.json', {})}")
    with pytest.raises(InputError, match=r"missing\.json cannot be read: No such file"):
        parse(f"--adapter_config {tmp_path / 'missing.json'}")


def test_import_is_cheap():
    code = "import sys, ibft.config; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
