"""One training step of every variant, SFT and IB-FT, eager and ours, at a size for a minute or two."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.measure import can_measure_memory
from benchmarks.step import SIZES, cells, label, make_record

pytestmark = pytest.mark.timeout(0)
SIZE_OF = {"toy": "toy", "full": "small"}  # by --size; `python -m benchmarks.step` has the full one


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each variant and K of the size."""
    variants = cells(SIZES[SIZE_OF[metafunc.config.getoption("--size")]])
    metafunc.parametrize("name", [label(*cell) for cell in variants])


@pytest.fixture(scope="module")
def record(size_name: str, command: str, save: Callable[..., None]) -> dict[str, Any]:
    """All variants, interleaved."""
    toy = size_name == "toy"  # whose memory, beside the interpreter, is nothing
    name = SIZE_OF[size_name]
    made = make_record(command, name, 2 if toy else 10, can_measure_memory() and not toy)
    save(f"step-{name}", made)
    return made


def test_step(name: str, record: dict[str, Any], replay: Callable[..., None]) -> None:
    memory = record["memory_mib"].get(name, {})
    info = {"relative_error": record["relative_error"][name]} if name in record["relative_error"] else {}
    replay(record["seconds"][name], "step", **info, **memory)
