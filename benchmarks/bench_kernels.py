"""Every op of `ibkernels` beside its peers and its floors: forward, backward and both, float32 and bfloat16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cost import FORWARD, PASSES
from benchmarks.measure import environment
from benchmarks.op_cases import OPS, OURS
from benchmarks.ops import EFFORTS, TOLERANCE, case_name, measure_op

pytestmark = pytest.mark.timeout(0)

CELLS = [
    (op, dtype, passes)
    for op in OPS
    for dtype in (TOLERANCE if OPS[op].trains else (torch.float32,))
    for passes in (PASSES if OPS[op].trains else (FORWARD,))
]


@pytest.fixture(scope="module")
def measured(size_name: str, command: str, save: Callable[..., None]) -> Callable[[str, torch.dtype], dict[str, Any]]:
    """measured(op, dtype) gives the records of its passes; all variants of a pass are timed together, once."""
    record: dict[str, Any] = {"suite": "ops", "command": command, **environment(), "size": size_name, "cases": {}}
    done: dict[tuple[str, torch.dtype], dict[str, Any]] = {}

    def measure(name: str, dtype: torch.dtype) -> dict[str, Any]:
        if (name, dtype) not in done:
            op = OPS[name]
            done[name, dtype] = measure_op(op, op.sizes[size_name], dtype, EFFORTS[size_name])
            record["cases"] |= done[name, dtype]
            save("ops", record)
        return done[name, dtype]

    return measure


@pytest.mark.parametrize(
    ("op", "dtype", "passes"), CELLS, ids=[case_name(OPS[op], dtype, passes) for op, dtype, passes in CELLS]
)
def test_op(
    op: str, dtype: torch.dtype, passes: str, measured: Callable[..., dict[str, Any]], replay: Callable[..., None]
) -> None:
    case = measured(op, dtype)[case_name(OPS[op], dtype, passes)]
    assert OURS not in case["left_out"], f"{op}: {case['left_out'][OURS]}"
    info = {name: case[name] for name in ("relative_error", "peak_bytes", "left_out")}
    replay(case["seconds"][OURS], op, **info, peers={name: s for name, s in case["seconds"].items() if name != OURS})
