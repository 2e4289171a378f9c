"""`pytest benchmarks [--size toy]`: how a benchmark is paired with its baseline, and the table of ratios at the end."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.measure import ratio, timed

_ROWS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--size."""
    parser.addoption("--size", choices=("toy", "full"), default="full", help="toy: runs in seconds, tells nothing")


@pytest.fixture(scope="session")
def size_name(request: pytest.FixtureRequest) -> str:
    """toy or full."""
    return request.config.getoption("--size")


@pytest.fixture(autouse=True)
def fixed_threads(size_name: str) -> Iterator[None]:
    """Two threads, whatever the machine has, so that records compare; one at toy size, which only has to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if size_name == "toy" else 2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def paired(benchmark: Any, request: pytest.FixtureRequest, size_name: str) -> Callable[..., None]:
    """paired(step, baseline, **info) times `step`; before each of its rounds `baseline` runs once, timed aside.

    The ratio of each pair is immune to what else the machine was doing for longer than a pair takes; that of the
    baseline with itself shows what noise is left. Ratios, the baseline's samples and `info` go into extra_info.
    """

    def run(step: Callable[[], object], baseline: Callable[[], object], **info: Any) -> None:
        rounds = 2 if size_name == "toy" else 10
        reference: list[float] = []
        benchmark.pedantic(step, setup=lambda: reference.append(timed(baseline)), rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        reference = reference[-rounds:]  # less the warm-up's
        share = ratio(benchmark.stats.stats.data, reference)
        benchmark.extra_info |= {"baseline_seconds": reference, "ratio": share._asdict(), **info}
        notes = "".join(f"  {name} {value:.3g}" for name, value in info.items())
        request.config.stash.setdefault(_ROWS, []).append(f"{request.node.name:60} {share}{notes}")

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of ratios."""
    if rows := config.stash.get(_ROWS, []):
        terminalreporter.section("time / baseline, round by round: median (quartiles)")
        for row in rows:
            terminalreporter.write_line(row)
