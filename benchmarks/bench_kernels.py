"""Every op of `ibkernels` beside its peers and its floors: forward, backward and both, float32 and bfloat16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cost import FORWARD, PASSES
from benchmarks.measure import BATCHES, environment
from benchmarks.op_cases import OPS, OURS
from benchmarks.ops import EFFORTS, TOLERANCE, Case, case_name, dtype_name, prepare

pytestmark = pytest.mark.timeout(0)

CELLS = [
    (op, dtype, passes)
    for op in OPS
    for dtype in (TOLERANCE if OPS[op].trains else (torch.float32,))
    for passes in (PASSES if OPS[op].trains else (FORWARD,))
]


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, size_name: str, command: str, save: Callable[..., None], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The records of all cells that were asked for, by name.

    All are visited `BATCHES` times, a few rounds each: what the machine does besides lasts longer than one visit, so
    only rounds that are minutes apart show how far a repeated run may be from this one.
    """
    record: dict[str, Any] = {"suite": "ops", "command": command, **environment(), "size": size_name}
    passes: dict[tuple[str, torch.dtype], list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == test_op.__name__:
            asked: Any = item.callspec.params
            passes.setdefault((asked["op"], asked["dtype"]), []).append(asked["passes"])
    cases: dict[str, Case] = {}
    for (name, dtype), wanted in passes.items():
        op = OPS[name]
        cases |= prepare(op, op.sizes[size_name], dtype, EFFORTS[size_name], passes=wanted)
        say(f"{name}, {dtype_name(dtype)}: checked against float64")
    record["cases"] = {name: case.record for name, case in cases.items()}
    for visit in range(BATCHES):
        for case in cases.values():
            case.visit(BATCHES)
        save("ops", record)
        say(f"timed, part {visit + 1} of {BATCHES}")
    return record["cases"]


@pytest.mark.parametrize(
    ("op", "dtype", "passes"), CELLS, ids=[case_name(OPS[op], dtype, passes) for op, dtype, passes in CELLS]
)
def test_op(
    op: str, dtype: torch.dtype, passes: str, measured: dict[str, dict[str, Any]], replay: Callable[..., None]
) -> None:
    case = measured[case_name(OPS[op], dtype, passes)]
    assert OURS not in case["left_out"], f"{op}: {case['left_out'][OURS]}"
    info = {name: case[name] for name in ("relative_error", "peak_bytes", "left_out")}
    replay(case["seconds"][OURS], op, **info, peers={name: s for name, s in case["seconds"].items() if name != OURS})
