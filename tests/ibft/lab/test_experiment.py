"""`ibft lab` from end to end at toy sizes: what it leaves, that it goes on where it stopped, that it repeats itself."""

import dataclasses
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ibft.cli import main
from ibft.errors import FailedElsewhere, InputError
from ibft.estimate.devices import cpu_name
from ibft.evaluate.metrics import pass_at_k_m
from ibft.lab import experiment
from ibft.lab.experiment import LabConfig, run_lab
from ibft.lab.jobs import RESULT_NAME, Tasks
from ibft.lab.plan import MIXED, NONE, Plan, full_plan

TRAINING, MEMORISED, HELD_OUT, SAMPLES = 12, 6, 5, 5
ARMS = ("sft", "sft-reference", "sft-filtered", "sft-unmemorised", "sft-half", "ib-published", "no-kl-0.002")


def toy_plan(**changes: object) -> Plan:
    full = full_plan((3,))
    regimes = (
        dataclasses.replace(MIXED, tasks=TRAINING, memorised=MEMORISED, decoys=6, repeats=2, steps=4),
        dataclasses.replace(NONE, tasks=TRAINING, decoys=12, repeats=2, steps=3),
    )
    sizes = {
        "held_out": HELD_OUT,
        "samples": SAMPLES,
        "hidden_size": 16,
        "num_layers": 2,
        "first_reading": 20,
        "documented": 20,
        "other_programs": 20,
        "second_reading": 60,
        "lora_r": 2,
        "bottleneck_dim": 4,
    }
    arms = tuple(arm for arm in full.arms if arm.name in ARMS)
    return dataclasses.replace(full, regimes=regimes, arms=arms, **{**sizes, **changes})


def run(folder: Path, plan: Plan, *, workers: int = 1, overwrite: bool = False) -> dict:
    return run_lab(LabConfig(full=True, output_dir=str(folder), workers=workers, overwrite=overwrite), plan)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "out"
    run(folder, toy_plan(), workers=2)
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_what_a_finished_experiment_holds(finished: Path) -> None:
    results = read(finished)
    ran = {(run["regime"], run["arm"]) for run in results["runs"]}
    assert ran == {
        *(("mixed", arm.name) for arm in toy_plan().arms),
        *(("none", arm) for arm in ("sft", "ib-published", "no-kl-0.002")),
    }
    assert results["pieces"] == {"planned": 12, "done": 12}
    kinds = {(base["regime"], base["kind"]): base for base in results["bases"]}
    assert set(kinds) == {("mixed", "memorised"), ("mixed", "reference"), ("none", "reference")}
    assert kinds["mixed", "reference"]["file"] == kinds["none", "reference"]["file"]
    shared = {run["arm"]: run for run in results["runs"] if "shared" in run}
    (plain,) = (run for run in results["runs"] if (run["regime"], run["arm"]) == ("none", "sft"))
    assert shared == {"sft-reference": {**plain, "regime": "mixed", "arm": "sft-reference", "shared": "none"}}
    pieces = [json.loads(file.read_text()) for file in finished.rglob(RESULT_NAME)]
    assert results["processor_seconds"] == pytest.approx(sum(piece["processor_seconds"] for piece in pieces))
    assert torch.__version__.startswith(results["versions"]["torch"]) and cpu_name() in results["device"]
    ends = [piece["made"]["finished"] for piece in pieces]
    assert results["finished"] == {"first": min(ends), "last": max(ends)}
    assert results["command"] == "ibft lab --full --seed 3 --seeds 1"
    for each in (*results["runs"], *results["bases"]):  # every number is traceable to a file
        assert (finished / each["file"]).is_file()
    for run in results["runs"]:
        held_out = run["held_out"]
        assert len(held_out["correct_greedy"]) == len(held_out["correct"]) == HELD_OUT
        by_hand = sum(pass_at_k_m(SAMPLES, c, 5, 2) for c in held_out["correct"]) / HELD_OUT
        assert held_out["metrics"]["pass@5^(2)"] == float(by_hand)
        assert len(run["crossed"]) == TRAINING and set(run["crossed"]) <= {"description", "name", "neither"}
        assert sum(run["kinds"].values()) == pytest.approx(1)
        assert run["curve"][-1]["step"] == {"mixed": 4, "none": 3}[run.get("shared", run["regime"])]
        assert (run["curve"][-1]["kl_nats"] is None) == run["arm"].startswith("sft")
    assert "<html" in (finished / "report.html").read_text()


def test_what_each_arm_trains_on(finished: Path) -> None:
    tasks = Tasks.of(toy_plan(), 3)
    known = json.loads((finished / "bases/seed-3" / MIXED_BASE / RESULT_NAME).read_text())["training"]["min_k_named"]
    best_known = {
        tasks.training[index].name for index in sorted(range(TRAINING), key=lambda i: known[i])[TRAINING // 2 :]
    }

    def names(arm: str) -> set[str]:
        rows = (finished / f"runs/mixed/{arm}/seed-3/rows.jsonl").read_text().splitlines()
        return {json.loads(row)["instruction"].splitlines()[1] for row in rows}

    everything = {task.name for task in tasks.training}
    assert names("sft") == names("ib-published") == names("no-kl-0.002") == everything
    assert names("sft-filtered") == everything - best_known
    assert names("sft-unmemorised") == {task.name for task in tasks.training[MEMORISED:]}
    assert len(names("sft-half")) == TRAINING // 2 and names("sft-half") < everything
    memorised = {task.name for task in tasks.training[:MEMORISED]}
    for run in read(finished)["runs"]:
        if run["regime"] == "mixed" and "shared" not in run:
            assert run["trained_rows"] == len(names(run["arm"]))
            assert run["trained_memorised_rows"] == len(names(run["arm"]) & memorised)


MIXED_BASE = f"memorised-{MEMORISED}-decoys-6x2"


def test_what_each_base_has_read(finished: Path) -> None:
    tasks = Tasks.of(toy_plan(), 3)
    memorised = {task.program for task in tasks.training[:MEMORISED]}
    decoys = [task.program for task in tasks.decoys]
    hidden = {task.program for task in (*tasks.training[MEMORISED:], *tasks.held_out)}
    first, second = MIXED_BASE, "decoys-12x2"
    for name, expected in (
        ("first-reading", set()),
        (first, {*memorised, *decoys[:6]}),
        (second, set(decoys)),
    ):
        read_by = {
            json.loads(row)["output"]
            for file in (finished / "bases/seed-3" / name).glob("*.jsonl")
            if file.name in ("documents.jsonl", "programs.jsonl")
            for row in file.read_text().splitlines()
        }
        assert read_by & {*memorised, *decoys, *hidden} == expected


def test_what_is_missing_is_run_again_and_comes_out_the_same(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(finished)
    weights = load_file(finished / f"bases/seed-3/{MIXED_BASE}/model.safetensors")
    for lost in (f"bases/seed-3/{MIXED_BASE}", "runs/mixed/ib-published/seed-3"):
        (finished / lost / RESULT_NAME).unlink()
    run(finished, toy_plan())
    assert "2 of them to do" in capsys.readouterr().out
    again = load_file(finished / f"bases/seed-3/{MIXED_BASE}/model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    after = read(finished)
    for results in (before, after):
        for each in (results, *results["runs"], *results["bases"]):
            del each["processor_seconds"]
        del results["finished"]
        for each in results["runs"]:
            del each["training_processor_seconds"], each["made"]["finished"]
    assert after == before


def test_another_plan_is_refused_and_the_files_are_left(finished: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    with pytest.raises(InputError, match=r"other settings \(temperature\)"):
        run(finished, toy_plan(temperature=0.5))
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="holds runs, which is of no experiment"):
        run(tmp_path, toy_plan(), overwrite=True)
    (tmp_path / "lab.json").write_text("{")
    with pytest.raises(InputError, match=r"lab\.json cannot be read"):
        run(tmp_path, toy_plan())


def test_a_piece_that_fails_ends_the_experiment_with_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="number of tasks"):
        run(tmp_path / "out", toy_plan(other_programs=10**8, seeds=(2, 3)))
    assert not list(tmp_path.rglob(RESULT_NAME))
    assert "trials on the seeds 0, 1, 2; what they gain on seed 2 flatters them" in capsys.readouterr().err


def test_the_report_is_made_of_what_did_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = toy_plan()
    arms = [
        dataclasses.replace(arm, settings={"target_layer": 9}) if arm.name == "sft-half" else arm for arm in plan.arms
    ]
    with pytest.raises(InputError, match="target_layer"):
        run(tmp_path, dataclasses.replace(plan, arms=tuple(arms[:3] + [arm for arm in arms if arm.name == "sft-half"])))
    results = read(tmp_path)
    assert results["pieces"] == {"planned": 7, "done": 6}
    assert {run["arm"] for run in results["runs"]} == {"sft", "sft-reference", "sft-filtered"}
    assert "6 of the 7 pieces" in (tmp_path / "report.html").read_text()
    error = capsys.readouterr().err
    assert "failed: " in error and "trials on the seeds" not in error


def test_a_report_of_what_there_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = read(folder)
    assert main(["lab", "report", str(folder)]) == 0
    assert read(folder) == before
    (folder / "results.json").unlink()
    (folder / "runs/mixed/ib-published/seed-3" / RESULT_NAME).unlink()
    assert main(["lab", "report", str(folder)]) == 0
    assert "11 of the 12 pieces" in " ".join(capsys.readouterr().out.split())
    assert "11 of the 12 pieces" in (folder / "report.html").read_text()
    after = read(folder)
    assert after["pieces"] == {"planned": 12, "done": 11}
    assert after["runs"] == [run for run in before["runs"] if (run["regime"], run["arm"]) != ("mixed", "ib-published")]
    for part in ("bases", "runs"):  # as results are handed on: without the pieces
        shutil.rmtree(folder / part)
    assert main(["lab", "report", str(folder)]) == 0
    assert read(folder) == after


def test_a_folder_without_anything_to_report_is_left_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bases").mkdir()
    plan = json.loads((finished / "lab.json").read_text())
    for found, message in (
        (plan, "holds no finished fine-tuning yet"),
        ({**plan, "sedes": [1]}, "an experiment that this version cannot read (TypeError: "),
        ([], "an experiment that this version cannot read (TypeError: "),
    ):
        (tmp_path / "lab.json").write_text(json.dumps(found))
        assert main(["lab", "report", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bases", "lab.json"]


def test_a_run_goes_on_after_one_of_its_processes_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = toy_plan()
    plan = dataclasses.replace(
        plan,
        regimes=(dataclasses.replace(plan.regimes[0], reference=None),),
        arms=tuple(arm for arm in plan.arms if arm.name in ("sft", "sft-half")),
    )
    killed = {"run": exec, "arguments": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {})}
    pieces = [
        piece._replace(**killed) if piece.folder.parent.name == "sft-half" else piece
        for piece in experiment._pieces(plan, tmp_path)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_pieces", lambda *_: iter(pieces))
        with pytest.raises(FailedElsewhere, match=r"was killed .*memory.* the same command goes on where it stopped"):
            run(tmp_path, plan)
    assert read(tmp_path)["pieces"] == {"planned": 4, "done": 3}
    capsys.readouterr()
    run(tmp_path, plan)
    assert "1 of them to do" in capsys.readouterr().out
    assert read(tmp_path)["pieces"] == {"planned": 4, "done": 4}


def test_a_folder_that_is_in_use_is_refused(finished: Path) -> None:
    lock = os.open(finished, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="in use by another `ibft lab`"):
            run(finished, toy_plan())
    finally:
        os.close(lock)
