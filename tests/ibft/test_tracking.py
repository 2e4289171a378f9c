"""Trackers: told every number, and never a reason for a run to stop."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibft.cli import main
from ibft.tracking import TENSORBOARD_FOLDER, Metrics, start_trackers, usable_trackers

RECORDS = [{"step": step, "loss": 1 / step, "kl": None} for step in (1, 2, 3)]


class FakeRun:
    """What `wandb.init` and `trackio.init` return."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(autouse=True)
def no_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine has none, and no key, whatever is installed."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("ibft.tracking.find_spec", lambda name: None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakeRun]]:
    """`install("wandb", init=...)`: a module of that name; the runs that it starts, as they come."""

    def install(name: str, init: Callable[..., Any] = FakeRun) -> list[FakeRun]:
        runs: list[FakeRun] = []

        def start(**options: Any) -> Any:
            runs.append(init(**options))
            return runs[-1]

        module = types.ModuleType(name)
        module.init = start  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return runs

    return install


def start(report_to: list[str], folder: Path, **options: Any) -> tuple[list[Any], list[str]]:
    options = {"run_name": "a-name", "config": {"alpha": 0.2}, "start_step": 0, **options}
    return start_trackers(report_to, folder, **options)


def test_both_are_told_their_project_and_name(
    install: Callable[..., list[FakeRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    runs = {name: install(name) for name in ("wandb", "trackio")}
    trackers, notices = start(["trackio", "wandb"], tmp_path)
    assert notices == [] and [tracker.name for tracker in trackers] == ["wandb", "trackio"]
    for name, project in (("wandb", "ibft"), ("trackio", "mine")):
        assert runs[name][0].options == {"project": project, "name": "a-name", "config": {"alpha": 0.2}}
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    start(["wandb"], tmp_path)
    assert runs["wandb"][1].options["project"] == "theirs"


def test_numbers_go_to_each(install: Callable[..., list[FakeRun]], tmp_path: Path) -> None:
    runs = install("trackio")
    trackers, _ = start(["trackio"], tmp_path)
    metrics = Metrics(tmp_path / "metrics.jsonl", total_steps=3, start_step=0, trackers=trackers)
    metrics.write(RECORDS)
    metrics.close()
    assert runs[0].logged == [(step, {"loss": 1 / step}) for step in (1, 2, 3)] and runs[0].finished


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_one_that_is_not_installed_is_a_note(name: str, tmp_path: Path) -> None:
    trackers, notices = start([name], tmp_path)
    assert trackers == [] and len(notices) == 1
    assert f"{name}, which is not installed (pip install {name}); metrics.jsonl has every number" in notices[0]


def test_a_folder_of_that_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves one where it runs, which Python takes for a package without content."""
    from importlib.util import find_spec

    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("ibft.tracking.find_spec", find_spec)
    spec = find_spec("trackio")
    if spec is not None and spec.origin is not None:
        pytest.skip("trackio is installed, and wins over the folder")
    assert "not installed" in usable_trackers(["trackio"])[1][0]


def test_wandb_without_a_key_is_a_note_and_offline_needs_none(
    install: Callable[..., list[FakeRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = install("wandb")
    trackers, notices = start(["wandb"], tmp_path)
    assert trackers == [] and "there is no key (wandb login, or WANDB_API_KEY)" in notices[0] and runs == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert len(start(["wandb"], tmp_path)[0]) == 1
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert usable_trackers(["wandb"]) == (["wandb"], [])


def test_all_means_what_is_installed(install: Callable[..., list[FakeRun]], tmp_path: Path) -> None:
    assert usable_trackers(["all"]) == ([], []) == usable_trackers([])
    install("trackio")
    assert usable_trackers(["all"]) == (["trackio"], [])
    ready, notices = usable_trackers(["all", "wandb"])
    assert ready == ["trackio"] and "wandb, which is not installed" in notices[0]


def test_one_that_cannot_start_leaves_the_others(install: Callable[..., list[FakeRun]], tmp_path: Path) -> None:
    def unreachable(**_: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    install("wandb", unreachable)
    install("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "key")
        trackers, notices = start(["wandb", "trackio"], tmp_path)
    assert [tracker.name for tracker in trackers] == ["trackio"]
    assert notices == ["wandb could not start (no route to host); metrics.jsonl has every number."]


class Failing(FakeRun):
    """Takes the first step, and no other."""

    def log(self, values: dict[str, Any], step: int) -> None:
        if step > 1:
            raise OSError
        super().log(values, step)

    def finish(self) -> None:
        raise RuntimeError("must not be asked any more")


def test_one_that_fails_in_between_is_dropped_with_one_warning(
    install: Callable[..., list[FakeRun]], base_folder: Path, tasks_file: Path, tmp_path: Path, capsys: Any
) -> None:
    failing, sound = install("wandb", Failing), install("trackio")
    command = (
        f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'} --max_length 128 "
        "--bottleneck_dim 16 --lora_r 4 --max_steps 4 --logging_steps 1 --report_to wandb trackio"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("wandb stopped taking metrics (OSError); metrics.jsonl has every number from here on.") == 1
    assert [step for step, _ in failing[0].logged] == [1]
    assert [step for step, _ in sound[0].logged] == [1, 2, 3, 4] and sound[0].finished
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4
    record = json.loads((tmp_path / "out" / "ibft.json").read_text())
    assert record["config"]["report_to"] == ["wandb", "trackio"] and record["result"]["step"] == 4


def test_one_that_cannot_finish_is_a_warning(
    install: Callable[..., list[FakeRun]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("trackio", Failing)
    trackers, _ = start(["trackio"], tmp_path)
    Metrics(tmp_path / "metrics.jsonl", total_steps=3, start_step=0, trackers=trackers).close()
    assert "trackio did not finish cleanly (must not be asked any more)" in capsys.readouterr().out


class FakeWriter:
    """What tensorboard's SummaryWriter is asked for."""

    made: "list[FakeWriter]" = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: dict[str, str] = {}
        self.open = True
        FakeWriter.made.append(self)

    def add_text(self, name: str, text: str) -> None:
        self.texts[name] = text

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        self.scalars.append((name, value, global_step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.open = False


def test_tensorboard_is_told_what_it_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setattr(FakeWriter, "made", [])
    for start_step, purged in ((0, None), (4, 5)):
        trackers, notices = start(["tensorboard"], tmp_path, start_step=start_step)
        assert notices == [] and FakeWriter.made[-1].purge_step == purged
        metrics = Metrics(tmp_path / "metrics.jsonl", total_steps=3, start_step=0, trackers=trackers)
        metrics.write(RECORDS)
        metrics.close()
    writer = FakeWriter.made[0]
    assert writer.folder == str(tmp_path / TENSORBOARD_FOLDER) and not writer.open
    assert ("loss", 0.5, 2) in writer.scalars and all(name != "kl" for name, *_ in writer.scalars)
    assert '"alpha": 0.2' in writer.texts["config"] and "a-name" in writer.texts["config"]


def test_tensorboards_own_files(
    base_folder: Path, tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.util import find_spec

    pytest.importorskip("tensorboard")
    monkeypatch.setattr("ibft.tracking.find_spec", find_spec)
    command = (
        f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {tmp_path / 'out'} --max_length 128 "
        "--bottleneck_dim 16 --lora_r 4 --max_steps 2 --report_to tensorboard"
    )
    assert main(command.split()) == 0
    (first,) = (tmp_path / "out" / TENSORBOARD_FOLDER).iterdir()
    assert main([*command.split(), "--overwrite"]) == 0
    (second,) = (tmp_path / "out" / TENSORBOARD_FOLDER).iterdir()
    assert first != second  # nothing of the earlier run is left among the curves
