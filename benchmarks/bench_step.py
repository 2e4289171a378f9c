"""One training step of every variant, each round paired with an eager SFT step; peak memory in extra_info."""

from collections.abc import Callable

import pytest

from benchmarks.measure import can_measure_memory
from benchmarks.step import BASELINE, SIZES, Step, build, cells, check, label, peak_memory

pytestmark = pytest.mark.timeout(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each variant and K of the size."""
    variants = cells(SIZES[metafunc.config.getoption("--size")])
    metafunc.parametrize("cell", variants, ids=[label(*cell) for cell in variants])


@pytest.fixture(scope="module")
def baseline(size_name: str) -> Step:
    size = SIZES[size_name]
    return build(BASELINE, size, size.bottleneck_dims[0])


@pytest.mark.benchmark(group="step")
def test_step(cell: tuple[str, int], size_name: str, baseline: Step, paired: Callable[..., None]) -> None:
    variant, bottleneck_dim = cell
    step = build(variant, SIZES[size_name], bottleneck_dim)
    info = {}
    if variant.startswith("ibft"):
        eager = build(variant.replace("ibft", "eager"), SIZES[size_name], bottleneck_dim)
        info["relative_error"] = check(step, eager)
        del eager
    if can_measure_memory() and size_name != "toy":  # beside the interpreter a toy model is nothing
        memory = peak_memory(variant, size_name, bottleneck_dim)
        info |= {"peak_above_rest_mib": memory["peak"] - memory["rest"], "peak_mib": memory["peak"]}
    paired(step, baseline, **info)
