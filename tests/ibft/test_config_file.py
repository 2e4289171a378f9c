"""`--config`: YAML and JSON read as the flags are, what wins over what, and that every refusal names the file."""

import json
import random

import pytest

from ibft.arguments import parse_args
from ibft.cli import main
from ibft.config import TrainConfig
from ibft.config_file import read_config_file
from ibft.errors import InputError
from ibft.reference import EXAMPLE

REQUIRED = "base_model: m\ndataset: d\n"


@pytest.fixture
def parse(tmp_path):
    """`parse(text, flags)`: the configuration that a file of this text and these flags give."""

    def parse(text, line="", name="run.yaml", required=REQUIRED):
        path = tmp_path / name
        path.write_text(text if name.endswith("json") else required + text, encoding="utf-8")
        return parse_args(["--config", str(path), *line.split()])[0]

    return parse


# --- what is read


def test_a_file_alone_is_enough(parse):
    config = parse("")
    assert config == parse_args(["--base_model", "m", "--dataset", "d"])[0]
    assert parse(EXAMPLE, required="").learning_rate == 5e-5


def test_the_example_of_the_reference(parse):
    config = parse(EXAMPLE, required="")
    assert (config.dataset, config.target_layer, config.alpha) == (["data/train.jsonl"], 15, 0.1)
    assert config.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config.gradient_checkpointing is True and config.save_total_limit is None


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # a string in YAML 1.1
        ("learning-rate: 1E-4", "learning_rate", 1e-4),
        ("alpha: 1", "alpha", 1.0),
        ("seed: 010", "seed", 10),  # eight in YAML 1.1
        ("seed: 1_000", "seed", 1000),
        ("save_total_limit: none", "save_total_limit", None),
        ("save_total_limit: null", "save_total_limit", None),
        ("save_total_limit: ~", "save_total_limit", None),
        ("save_total_limit:", "save_total_limit", None),
        ("run_name: null", "run_name", None),
        ("run_name: none", "run_name", "none"),  # a name is a name, as for the flag
        ("run_name: 2024", "run_name", "2024"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),  # a date in YAML
        ("run_name: yes", "run_name", "yes"),
        ("run_name: 1:30", "run_name", "1:30"),  # ninety in YAML 1.1
        ("run_name: 'it''s'", "run_name", "it's"),
        ("overwrite: true", "overwrite", True),
        ("overwrite: on", "overwrite", True),
        ("sample: No", "sample", False),
        ("packing: none", "packing", "none"),
        ("bos: no", "bos", "no"),  # false in YAML 1.1
        ("bos: NO", "bos", "no"),
        ("bos: 'yes'", "bos", "yes"),
        ("save_strategy: no", "save_strategy", "no"),
        ("preset: none", "preset", None),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules:\n- q_proj\n- 'v'", "lora_target_modules", ["q_proj", "v"]),
        ("lora_target_modules: q_proj, v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("report_to: none", "report_to", []),
        ("report_to: [none]", "report_to", []),
        ("report_to: []", "report_to", []),
        ("report_to: wandb", "report_to", ["wandb"]),
        ("x: &a 3\n", None, None),
        ("lora_r: &a 3\nlora_alpha: *a", "lora_alpha", 3),
    ],
)
def test_values_in_yaml(parse, text, name, value):
    if name is None:
        with pytest.raises(InputError, match=r"run\.yaml: 'x' is not an option"):
            parse(text)
        return
    found = getattr(parse(text), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("values", "name", "value"),
    [
        ({"learning-rate": 1e-4}, "learning_rate", 1e-4),
        ({"save_steps": 5e2}, "save_steps", 500),
        ({"overwrite": True}, "overwrite", True),
        ({"save_total_limit": None}, "save_total_limit", None),
        ({"run_name": 7}, "run_name", "7"),
        ({"report_to": "wandb,trackio"}, "report_to", ["wandb", "trackio"]),
        ({"report_to": ["none"]}, "report_to", []),
    ],
)
def test_values_in_json(parse, values, name, value):
    found = getattr(parse(json.dumps({"base_model": "m", "dataset": "d", **values}), name="run.json"), name)
    assert found == value and type(found) is type(value)


def test_a_file_of_another_editor(tmp_path):
    path = tmp_path / "run.YML"
    path.write_bytes(b"\xef\xbb\xbf---\r\nbase_model: m\r\ndataset: d\r\n# a remark\r\nseed: 7\r\n...\r\n")
    assert parse_args(["--config", str(path)])[0].seed == 7


def test_yaml_and_json_mean_the_same_for_any_configuration(tmp_path):
    """Values drawn at random: the resolved configuration, saved either way, comes back as it was."""
    yaml = pytest.importorskip("yaml")
    draw = random.Random(0)
    choices = {
        "alpha": lambda: draw.choice([0.0, 1e-4, 1e-20, 0.3, 12.0]),
        "seed": lambda: draw.choice([0, 8, 2**62]),
        "run_name": lambda: draw.choice([None, "no", "1e-4", "null", "~", "a: b", "# c", " d ", "é\n", "'", "none"]),
        "bos": lambda: draw.choice(["auto", "yes", "no"]),
        "sample": lambda: draw.random() < 0.5,
        "save_total_limit": lambda: draw.choice([None, 1, 20]),
        "lora_target_modules": lambda: draw.choice([["all-linear"], ["a", "no"], ["1"], ["a,b", "null"]]),
        "report_to": lambda: draw.choice([[], ["wandb"], ["wandb", "trackio"]]),
        "warmup_steps": lambda: draw.choice([0, 5]),
        "tokens_per_batch": lambda: draw.choice([None, 4096]),
        "preset": lambda: draw.choice([None, "published"]),
    }
    for _ in range(50):
        config = TrainConfig(base_model="m", dataset=["d"], **{name: pick() for name, pick in choices.items()})
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict(), allow_unicode=True), encoding="utf-8")
        (tmp_path / "run.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
        for name in ("run.yaml", "run.json"):
            assert parse_args(["--config", str(tmp_path / name)])[0] == config


# --- what wins


def test_precedence(parse, tmp_path):
    training = tmp_path / "t.json"
    training.write_text(json.dumps({"learning_rate": 3e-4, "logging_steps": 7, "save_steps": 11}))
    text = f"preset: published\ntraining_config: {training}\nlearning_rate: 4e-4\nlogging_steps: 8\n"
    config = parse(text, "--learning_rate 5e-4")
    assert (config.learning_rate, config.logging_steps, config.save_steps) == (5e-4, 8, 11)
    assert (config.target_layer, config.warmup_ratio) == (20, 0.1)  # the preset, the default
    assert parse(text, "--preset published --packing best-fit").packing == "best-fit"


def test_a_stronger_source_is_not_outranked_by_a_weaker_one(parse, tmp_path):
    training = tmp_path / "t.json"
    training.write_text(json.dumps({"warmup_steps": 50, "max_steps": 900}))
    file = f"training_config: {training}\n"
    assert (parse(file).warmup_steps, parse(file).max_steps) == (50, 900)
    config = parse(f"{file}warmup_ratio: 0.3\nnum_train_epochs: 1\n")
    assert (config.warmup_steps, config.max_steps) == (0, -1)
    config = parse("warmup_steps: 9\nmax_steps: 9\n", "--warmup_ratio 0.3 --num_train_epochs 1")
    assert (config.warmup_steps, config.max_steps) == (0, -1)
    assert parse("tokens_per_batch: 4096\n", "--per_device_train_batch_size 5").rows_per_batch == 5
    assert parse("tokens_per_batch: 4096\nper_device_train_batch_size: 3\n").rows_per_batch == 2


def test_a_flag_replaces_a_bad_value(parse):
    with pytest.raises(InputError, match=r"run\.yaml: seed must be between 0"):
        parse("seed: -1")
    assert parse("seed: -1", "--seed 1").seed == 1


def test_the_adapters_file_and_its_parts(parse, tmp_path):
    adapter = tmp_path / "a.json"
    adapter.write_text(json.dumps({"r": 4, "lora_alpha": 9, "target_modules": ["q", "v"]}))
    assert parse(f"adapter_config: {adapter}\nlora_r: 4\n").lora_alpha == 9  # they agree
    assert parse("lora_r: 8\n", f"--adapter_config {adapter}").lora_r == 4  # the flag is the stronger
    for text, line in ((f"adapter_config: {adapter}\nlora_r: 8\n", ""), (f"adapter_config: {adapter}\n", "--lora_r 8")):
        with pytest.raises(InputError, match=r"--lora_r and --adapter_config .*a\.json both set the adapter"):
            parse(text, line)
    config = parse(f"adapter_config: {adapter}\n")
    assert parse(json.dumps(config.to_dict()), name="run.json") == config


# --- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"'learning_rte' is not an option\. Did you mean learning_rate\?"),
        ("learning-rte: 1", r"'learning-rte' is not an option\. Did you mean learning_rate\?"),
        ("qqqq: 1", r"'qqqq' is not an option\.$"),
        ("no_sample: true", r"'no_sample' is not an option\. Write `sample: false`\."),
        ("7: 1", r"'7' is not an option"),
        ("config: other.yaml", r"names 'config', but a file cannot include another one"),
        ("seed: 1\nseed: 2", r"gives seed twice"),
        ("save-steps: 1\nsave_steps: 1", r"gives save_steps twice"),
        ("alpha: -0.1", r"alpha must be at least 0, not -0\.1\."),
        ("alpha: much", r"alpha takes a finite number, not 'much'\."),
        ("alpha: .inf", r"alpha takes a finite number, not '\.inf'\."),
        ("alpha: '0.1'", r"alpha takes a finite number, not '0\.1'\."),
        ("alpha: true", r"alpha takes a finite number, not 'true'\."),
        ("alpha:", r"alpha takes a finite number, not None\."),
        ("seed: 1.5", r"seed takes an integer, not '1\.5'\."),
        ("seed: 1:30", r"seed takes an integer, not '1:30'\."),
        ("seed: [1, 2]", r"seed takes an integer, not \['1', '2'\]\."),
        ("seed: {a: [1]}", r"seed takes an integer, not \{'a': \['\.\.\.'\]\}\."),
        ("overwrite: 1", r"overwrite takes true or false, not '1'\."),
        ("overwrite: 'true'", r"overwrite takes true or false, not 'true'\."),
        ("packing: no", r"packing takes best-fit or none, not 'no'\."),
        ("packing: null", r"packing takes best-fit or none, not None"),
        ("packing: [none]", r"packing takes best-fit or none, not \['none'\]"),
        ("method: ibb", r"method takes ib or sft, not 'ibb'\. Did you mean ib\?"),
        ("output_dir: ''", r"output_dir must be a name or path, not ''\."),
        ("output_dir: null", r"output_dir takes text, not None\."),
        ("lora_target_modules: null", r"lora_target_modules takes names, not None\."),
        ("lora_target_modules: {a: b}", r"lora_target_modules takes names, not \{'a': 'b'\}"),
        ("lora_target_modules: [[a]]\nseed: 1", r"lora_target_modules takes names, not"),
        ("adapter_config: !include a.json", r"line 3: the tag !include is not understood"),
        ("report_to: [!x wandb]", r"line 3: the tag !x is not understood"),
        ("[a]: 1", r"line 3: a key is a name, not a list"),
        ("seed: [1", r"is not valid YAML: .* at line \d, column \d"),
        ("seed: 1\n bad: 2", r"is not valid YAML: .* at line \d"),
        ("seed: *a", r"is not valid YAML: found undefined alias 'a' at line 3, column 7"),
        ("seed: 1\n---\nseed: 2", r"is not valid YAML: .*document.* at line 4"),
        ("seed: \x07", r"is not valid YAML: .*"),
    ],
)
def test_refusals_in_yaml(parse, text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(text)
    assert "run.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["- seed", "seed", "3", "{}: 1", "[" * 5000])
def test_a_file_that_is_no_mapping(parse, text):
    with pytest.raises(InputError, match=r"run\.yaml"):
        parse(text, required="")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1,}', r"is not valid JSON: .* at line 1, column 1[12]"),
        ("[1]", r"must hold a JSON object \{\.\.\.\}, not \[1\]"),
        ("", r"is not valid JSON"),
        ('{"seed": 1, "seed": 2}', r"gives seed twice"),
        ('{"seed": "1"}', r"seed takes an integer, not '1'"),
        ('{"seed": true}', r"seed takes an integer, not True"),
        ('{"alpha": NaN}', r"alpha takes a finite number, not nan"),
        ('{"alpha": {"a": 1}}', r"alpha takes a finite number, not \{'a': 1\}"),
        ('{"report_to": {}}', r"report_to takes names, not \{\}"),
        ('{"bos": false}', r"bos takes auto or yes or no, not False"),
        ('{"a":' * 5000, r"nested too deeply|not valid JSON"),
    ],
)
def test_refusals_in_json(parse, text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(text, name="run.json")
    assert "run.json" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for name, content, message in (
        ("none.yaml", None, r"none\.yaml cannot be read: No such file"),
        ("latin.yaml", b"run_name: \xe9", r"latin\.yaml cannot be read: it is not UTF-8"),
        ("run.toml", b"", r"--config takes a \.yaml, \.yml or \.json file, not '.*run\.toml'"),
        ("run", b"", r"--config takes"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_config_file(str(tmp_path / name), TrainConfig)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_config_file(str(tmp_path / "folder.yaml"), TrainConfig)


def test_what_is_missing_and_a_flag_without_its_value(parse):
    with pytest.raises(InputError, match="--dataset must be given"):
        parse("base_model: m", required="")
    with pytest.raises(InputError, match="--config: expected one argument"):
        parse_args(["--config"])
    with pytest.raises(InputError, match=r"--confg is not an option .* Did you mean --config\?"):
        parse_args(["--confg", "run.yaml"])


def test_a_bomb_of_aliases_is_harmless(parse):
    lines = ["lora_target_modules: &a0 [x, x]"]
    with pytest.raises(InputError):
        parse("\n".join([*lines, "report_to: [*a0, *a0, *a0]", "dataset_weights: &b [*b]"]))


# --- a run


def test_the_configuration_of_a_run_repeats_it(base_folder, tasks_file, tmp_path, monkeypatch, capsys):
    """`config` of ibft.json, saved as a file; relative paths are relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.jsonl").write_bytes(tasks_file.read_bytes())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "run.yaml").write_text(
        f"base_model: {base_folder}\ndataset: tasks.jsonl\noutput_dir: first\nmax_steps: 2\nmax_length: 128\n"
        "lora_r: 4\nbottleneck_dim: 16\nlearning_rate: 1e-3\n"
    )
    assert main(["train", "--config", "deep/run.yaml"]) == 0
    record = json.loads((tmp_path / "first" / "ibft.json").read_text())
    assert record["config"]["learning_rate"] == 1e-3
    (tmp_path / "again.json").write_text(json.dumps(record["config"]))
    assert main(["train", "--config", "again.json", "--output_dir", "second"]) == 0
    for name in ("adapter_model.safetensors", "ib_head.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert main(["train", "--config", "again.json", "--output_dir", "third", "--sed", "1"]) == 2
    assert "Did you mean --seed?" in capsys.readouterr().err


def test_a_file_that_says_nothing_and_a_dataset_that_is_none(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# to be filled in\n")
    assert read_config_file(str(file), TrainConfig) == {}
    file.write_text("base_model: m\ndataset: []\n")
    with pytest.raises(InputError, match="--dataset must name at least one dataset"):
        parse_args(["--config", str(file)])
