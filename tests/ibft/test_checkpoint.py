"""Runs that are killed end as if they had not been, on whatever processes they go on; no checkpoint is half-written."""

import json
import random
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from processes import Training
from safetensors.torch import load_file

import ibft.train
from ibft.checkpoint import Checkpoint, check_shared, newest_checkpoint
from ibft.cli import main
from ibft.engines import Engine
from ibft.errors import InputError
from ibft.run_folder import checkpoints

SIZES = "--max_length 64 --bottleneck_dim 8 --lora_r 2 --target_layer 1"
LEFT = ("adapter_model.safetensors", "ib_head.safetensors")
MEASURED = ("tokens_per_second", "mfu", "peak_memory_gib")


def command(base_folder: Path, tasks_file: Path, out: Path, more: str) -> str:
    return f"--base_model {base_folder} --dataset {tasks_file} --output_dir {out} {SIZES} {more}"


def records(folder: Path) -> list[dict[str, float]]:
    """Every step's numbers but for those of the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED and "seconds" not in k} for line in lines]


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_ten_times_at_any_moment_it_ends_with_the_same_adapter(
    tmp_path: Path, base_folder: Path, tasks_file: Path, world_size: int
) -> None:
    """With dropout on. Started again by nobody but the same command, with --resume as soon as there is a run."""
    more = "--max_steps 60 --save_steps 3 --logging_steps 4 --lora_dropout 0.1 --gradient_accumulation_steps 2"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Training(command(base_folder, tasks_file, whole, more), tmp_path / "log", world_size=world_size).succeed()

    moments = random.Random(world_size)
    for kill in range(10):
        resume = "--resume" if (cut / "ibft.json").exists() else ""
        training = Training(
            command(base_folder, tasks_file, cut, f"{more} {resume}"),
            tmp_path / f"log-{kill}",
            world_size=world_size,
            before=planted.die,
            # Up to five steps, so that ten of them do not reach the end; or while it sets up.
            before_arguments=(moments.randrange(world_size), moments.randrange(11), moments.uniform(0, 0.05)),
        )
        assert -9 in training.wait_for_one(), training.output()
    resume = "--resume" if (cut / "ibft.json").exists() else ""
    training = Training(
        command(base_folder, tasks_file, cut, f"{more} {resume}"), tmp_path / "last", world_size=world_size
    )
    training.succeed()
    assert "resuming      after step" in training.output()
    for name in LEFT:
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert records(cut) == records(whole)


@pytest.mark.parametrize("event", [1, 2, 3, 5, 8, 12, 16, 20, 24, 28])
def test_killed_while_a_checkpoint_is_written_there_is_a_whole_one(
    tmp_path: Path, base_folder: Path, tasks_file: Path, event: int
) -> None:
    """At that access to a file, from the third checkpoint on, when the first is removed."""
    more = "--max_steps 5 --save_steps 1 --save_total_limit 2"
    training = Training(
        command(base_folder, tasks_file, tmp_path / "out", more),
        tmp_path / "log",
        before=planted.die_while_saving,
        before_arguments=(3, event),
    )
    assert training.wait() == [-9], training.output()
    newest = newest_checkpoint(tmp_path / "out")
    assert newest is not None and newest.step >= 2 and newest.path.name == f"checkpoint-{newest.step}"
    for older in checkpoints(tmp_path / "out"):
        assert (older / "state.pt").exists()


def test_it_goes_on_with_other_engines_and_numbers_of_processes(
    tmp_path: Path, base_folder: Path, tasks_file: Path
) -> None:
    """The order of the data and the noise stay: without dropout, every loss is that of one process to the end."""
    pytest.importorskip("deepspeed")
    zero3 = tmp_path / "zero3.json"
    zero3.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    steps = "--max_steps 10 --logging_steps 1 --save_strategy no --lora_dropout 0 --learning_rate 1e-3"
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    Training(
        command(base_folder, tasks_file, whole, f"{steps} --per_device_train_batch_size 4"), tmp_path / "log"
    ).succeed()

    dealt = f"{steps} --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    stages = [
        (2, "--engine ddp"),
        (4, "--engine fsdp2"),
        (3, f"--engine deepspeed --deepspeed_config {zero3}"),
        (2, "--use_deepspeed"),
        (1, ""),
    ]
    for index, (world_size, engine) in enumerate(stages):
        training = Training(
            command(base_folder, tasks_file, moved, f"{dealt} {engine} {'--resume' if index else ''}"),
            tmp_path / f"log-{index}",
            world_size=world_size,
            before=planted.receive,
            # The last rank is told in the second step; the last training is told nothing, and goes on to the end.
            before_arguments=(world_size - 1 if world_size > 1 else 9, 3 if index == 0 else 2, 15),
        )
        expected = 0 if world_size == 1 else 128 + 15
        assert training.wait() == [expected] * world_size, training.output()
    assert "= 4, as it was begun, packed rows" in training.output()
    for mine, theirs in zip(records(moved), records(whole), strict=True):
        for term in ("loss", "ce", "kl", "ce_ib", "grad_norm", "learning_rate"):
            assert mine[term] == pytest.approx(theirs[term], abs=1e-5), term
        assert mine["label_tokens"] == theirs["label_tokens"]
    for name in LEFT:
        mine, theirs = load_file(moved / name), load_file(whole / name)
        for key, weight in theirs.items():
            torch.testing.assert_close(mine[key], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_saved_in_a_step_that_evaluated_it_ends_with_the_same_adapter(
    tmp_path: Path, base_folder: Path, tasks_file: Path, engine: str
) -> None:
    """FSDP2's outermost group, with the bottleneck, is not sharded after an evaluation: no state of it was saved."""
    more = f"--max_steps 6 --save_steps 2 --eval_steps 2 --validation_split 4 --lora_dropout 0.1 --engine {engine}"
    more += " --learning_rate 1e-3 --logging_steps 1"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Training(command(base_folder, tasks_file, whole, more), tmp_path / "log", world_size=2).succeed()
    training = Training(
        command(base_folder, tasks_file, cut, more),
        tmp_path / "log-cut",
        world_size=2,
        before=planted.die,
        before_arguments=(0, 3, 0.0),
    )
    assert -9 in training.wait_for_one(), training.output()
    [checkpoint] = checkpoints(cut)
    states = torch.load(checkpoint / "state.pt")["optimizer"]
    assert any(name.startswith("bottleneck.") for name in states)
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in states.values())
    resumed = command(base_folder, tasks_file, cut, f"{more} --resume")
    Training(resumed, tmp_path / "log-resumed", world_size=2).succeed()
    for name in LEFT:
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert records(cut) == records(whole)


def test_a_parameter_that_the_optimizer_does_not_hold_is_no_state_to_save() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([model.weight])
    with pytest.raises(RuntimeError, match="bias of the model is not the parameter that the optimizer holds"):
        Engine(torch.device("cpu")).optimizer_state(model, optimizer)


@pytest.mark.parametrize(
    ("before", "after"), [((1, ""), (1, "")), ((2, ""), (2, "")), ((1, ""), (2, "--engine fsdp2"))]
)
def test_weights_of_the_objective_go_on_where_they_were(
    tmp_path: Path, base_folder: Path, tasks_file: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    """Stopped by a signal in the middle of alpha's warm-up, with a KL weight that has moved."""
    more = "--max_steps 10 --logging_steps 1 --save_strategy no --learning_rate 1e-3 --alpha_warmup_steps 8"
    more += f" --ib_rate_target 0.1 --kl_reduction sum --lora_dropout {0.1 if before == after else 0}"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    dealt = f"{more} --per_device_train_batch_size 1 --gradient_accumulation_steps"
    Training(
        command(base_folder, tasks_file, whole, f"{dealt} {2 // before[0]}"), tmp_path / "log", world_size=before[0]
    ).succeed()
    stopped = Training(
        command(base_folder, tasks_file, cut, f"{dealt} {2 // before[0]} {before[1]}"),
        tmp_path / "log-cut",
        world_size=before[0],
        before=planted.receive,
        before_arguments=(0, 8 // before[0], 15),
    )
    assert set(stopped.wait()) == {128 + 15}, stopped.output()
    (saved,) = checkpoints(cut)
    state = json.loads((saved / "ib_state.json").read_text())
    Training(
        command(base_folder, tasks_file, cut, f"{dealt} {2 // after[0]} {after[1]} --resume"),
        tmp_path / "log-resumed",
        world_size=after[0],
    ).succeed()
    lines = records(cut)
    assert [line["alpha"] for line in lines] == pytest.approx([0.2 * min(1, step / 8) for step in range(10)])
    assert lines[state["steps"]]["kl_weight"] == state["kl_weight"] != 1
    if before == after:
        assert lines == records(whole)
        for name in (*LEFT, "ib_state.json"):
            assert (whole / name).read_bytes() == (cut / name).read_bytes()
    for mine, theirs in zip(lines, records(whole), strict=True):  # where another process's weight was not read, too
        for term in ("loss", "grad_norm", "kl_weight"):
            assert mine[term] == pytest.approx(theirs[term], rel=1e-4), term


def test_a_checkpoint_from_before_an_option_was_there(
    interrupted: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run was as the option's default has it."""
    line, out = interrupted
    mark = checkpoints(out)[-1] / "checkpoint.json"
    content = json.loads(mark.read_text())
    for name in ("alpha_warmup_steps", "kl_weight", "free_bits", "ib_rate_target"):
        del content["run"][name], content["run"]["ib"][name]
    mark.write_text(json.dumps(content))
    assert main(["train", *line.split(), "--resume", "--free_bits", "2"]) == 2
    assert "free_bits was 0.0, is 2.0" in capsys.readouterr().err
    assert main(["train", *line.split(), "--resume"]) == 0


@pytest.fixture
def interrupted(tmp_path: Path, base_folder: Path, tasks_file: Path) -> tuple[str, Path]:
    """The command and the folder of a run that was cut off after checkpoint-4 of 6 steps."""
    line = command(base_folder, tasks_file, tmp_path / "out", "--max_steps 6 --save_steps 2")
    training = Training(line, tmp_path / "log", before=planted.die, before_arguments=(0, 5, 0.0))
    assert training.wait() == [-9]
    return line, tmp_path / "out"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_a_resumed_run_maps_no_file_of_its_checkpoint(
    interrupted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, a mapped file of a folder that is rotated away would stay there under another name."""
    line, out = interrupted
    mapped: list[str] = []
    loop = ibft.train._loop

    def recorded_loop(*arguments: Any) -> Any:
        mapped.append(Path("/proc/self/maps").read_text())
        return loop(*arguments)

    monkeypatch.setattr(ibft.train, "_loop", recorded_loop)
    assert main(["train", *line.split(), "--resume"]) == 0
    assert len(mapped) == 1 and str(out) not in mapped[0]


def test_rotation_counts_steps_as_numbers(tmp_path: Path, base_folder: Path, tasks_file: Path) -> None:
    """checkpoint-9 is older than checkpoint-10, and the newest is never removed."""
    line = command(base_folder, tasks_file, tmp_path / "out", "--max_steps 12 --save_steps 1 --save_total_limit 1")
    assert main(["train", *line.split()]) == 0
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-11"]


@pytest.mark.parametrize("name", ["state.pt", "adapter_model.safetensors", "ib_head.safetensors"])
def test_one_flipped_bit_is_noticed(
    interrupted: tuple[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which the formats themselves do not notice in the numbers. The checkpoint before it is as good as it was."""
    line, out = interrupted
    newest = checkpoints(out)[-1]
    content = bytearray((newest / name).read_bytes())
    content[-40] ^= 1
    (newest / name).write_bytes(content)
    assert main(["train", *line.split(), "--resume"]) == 2
    assert f"{newest / name} is damaged: it is not what was written. Remove that" in capsys.readouterr().err
    assert newest.is_dir()


def test_a_mark_that_is_damaged(interrupted: tuple[str, Path]) -> None:
    _, out = interrupted
    newest = checkpoints(out)[-1]
    (newest / "checkpoint.json").write_text('{"step": 4}')
    with pytest.raises(InputError, match=r"checkpoint.json cannot be read: .*Remove that checkpoint to continue from"):
        newest_checkpoint(out)


def test_a_machine_that_does_not_have_the_checkpoint(tmp_path: Path) -> None:
    elsewhere = Checkpoint(tmp_path / "checkpoint-4", step=4, run={}, rows_per_process=2, files={})
    with pytest.raises(InputError, match=r"checkpoint-4 is not to be found on .*must share its output_dir"):
        check_shared(elsewhere)


def test_a_folder_without_its_mark_is_no_checkpoint(interrupted: tuple[str, Path]) -> None:
    _, out = interrupted
    newest = checkpoints(out)[-1]
    (newest / "checkpoint.json").unlink()
    assert newest not in checkpoints(out)


def test_killed_before_its_first_checkpoint_resume_starts_over(
    tmp_path: Path, base_folder: Path, tasks_file: Path
) -> None:
    line = command(base_folder, tasks_file, tmp_path / "out", "--max_steps 3 --save_steps 2")
    training = Training(line, tmp_path / "log", before=planted.die, before_arguments=(0, 1, 0.0))
    assert training.wait() == [-9]
    assert main(["train", *line.split(), "--resume"]) == 0
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2, 3]
