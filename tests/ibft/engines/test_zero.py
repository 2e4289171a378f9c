"""DeepSpeed's file: what the run decides replaces its values, and what would change a step is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
from engine_runs import LEFT, SIZES, flags, needs_deepspeed
from processes import Training
from safetensors.torch import load_file

from ibft.config import TrainConfig
from ibft.engines.zero_config import fit_bucket, zero_config
from ibft.errors import InputError


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
    assert fit_bucket(config, 4000)[0].startswith("zero_optimization.reduce_bucket_size is 5,000, set to 4,000 (by ")
    assert config["zero_optimization"]["reduce_bucket_size"] == 4000


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
