"""A folder of the test's own in which `ibft` is run."""

import resource
import shlex
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from wrong_inputs import DISK, QUICK, World

from ibft.cli import main


@pytest.fixture(scope="session")
def run_folder(base_folder: Path, tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = f"train --base_model {base_folder} --dataset {tasks_file} --output_dir {folder} {QUICK}"
    assert main(command.split()) == 0
    return folder


@pytest.fixture
def world(base_folder: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A folder of the test's own, which is the current one; without network, and nobody logged in."""
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ibft.export.get_token", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read at import, by both
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, base_folder, run_folder, monkeypatch)


@pytest.fixture
def ibft_command(world: World, tasks_file: Path) -> Callable[[str], int]:
    """Runs a command line in which {base}, {data}, {here} and {out} stand for what is in this world."""

    def run(command: str) -> int:
        places = {"base": world.base_folder, "data": tasks_file, "here": world.here, "out": world.here / "out"}
        words = shlex.split(command)
        for name, path in places.items():
            words = [word.replace(f"{{{name}}}", str(path)) for word in words]
        try:
            return main(words)
        finally:  # at once: pytest itself writes between a test and the end of its fixtures, to a log perhaps
            resource.setrlimit(resource.RLIMIT_FSIZE, DISK)

    return run
