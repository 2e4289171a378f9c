"""`pytest benchmarks [--size toy] [--records DIR]`: how pytest-benchmark gets samples, and the tables at the end.

The suites time their variants interleaved, which pytest-benchmark cannot: it is given the samples through its timer, so
that its statistics, files and comparisons work as always.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import write_record
from benchmarks.report import tables

Record = dict[str, Any]
_RECORDS = pytest.StashKey[dict[str, Record]]()
_TICKS: list[float] = []


def clock() -> float:
    """What pytest-benchmark reads before and after a round."""
    return _TICKS.pop(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--size and --records."""
    parser.addoption("--size", choices=("toy", "full"), default="full", help="toy: runs in seconds, tells nothing")
    parser.addoption("--records", metavar="DIR", type=Path, help="write records there, ops.json and one of the step")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every benchmark here replays its samples."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture(scope="session")
def size_name(request: pytest.FixtureRequest) -> str:
    """toy or full."""
    return request.config.getoption("--size")


@pytest.fixture(scope="session")
def command(request: pytest.FixtureRequest) -> str:
    """What a record says of how it was made."""
    return " ".join(["python -m pytest", *map(str, request.config.invocation_params.args)])


@pytest.fixture(scope="session", autouse=True)
def fixed_threads(size_name: str) -> Iterator[None]:
    """Two threads, whatever the machine has, so that records compare; one at toy size, which only has to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if size_name == "toy" else 2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save(request: pytest.FixtureRequest) -> Callable[[str, Record], None]:
    """save(name, record) keeps it for the tables and, with --records, on disk: a late failure costs one case."""

    def keep(name: str, record: Record) -> None:
        request.config.stash.setdefault(_RECORDS, {})[name] = record
        if (folder := request.config.getoption("--records")) is not None:
            write_record(folder / f"{name}.json", record)

    return keep


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """say(line) shows it at once: the ops are all measured before the first test of one ends."""
    reporter, capture = map(request.config.pluginmanager.getplugin, ("terminalreporter", "capturemanager"))

    def show(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)

    return show


@pytest.fixture
def replay(benchmark: Any) -> Callable[..., None]:
    """replay(samples, group, **info) makes them this benchmark's, in seconds."""

    def run(samples: list[float], group: str, **info: Any) -> None:
        _TICKS[:] = [tick for sample in samples for tick in (0.0, sample)]
        benchmark.group = group
        benchmark.extra_info |= info
        benchmark.pedantic(lambda: None, rounds=len(samples))
        _TICKS.clear()

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The tables of what was measured."""
    for name, record in config.stash.get(_RECORDS, {}).items():
        terminalreporter.section(name)
        terminalreporter.write_line(tables(record))
