"""The ops' suite: what errs is not timed, what cannot run is listed, and each case is whole. No test asserts a time."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import ops
from benchmarks.cost import BACKWARD, BOTH, FORWARD, PASSES
from benchmarks.measure import can_measure_memory
from benchmarks.op_cases import EAGER, OPS, OURS, Call, Inputs, Op
from benchmarks.ops import COPY, EFFORTS, PRODUCTS, measure_op

TOY = EFFORTS["toy"]


def measured(op: Op, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, dict[str, Any]]:
    return measure_op(op, op.sizes["toy"], dtype, TOY, **options)


def scaled(call: Call, factor: float) -> Call:
    """Its outputs, and with them its gradients, too large."""

    def wrong(inputs: Inputs, rng: torch.Tensor | None) -> Inputs:
        return tuple(factor * output for output in call(inputs, rng))

    return wrong


@pytest.mark.parametrize("op", ["bottleneck, LoRA", "bottleneck CE"])
def test_a_case_is_whole(op: str) -> None:
    cases = measured(OPS[op], only=(EAGER, OURS))
    assert list(cases) == [f"{op}, float32: {passes}" for passes in PASSES]
    for case in cases.values():
        assert list(case["seconds"]) == [EAGER, OURS, PRODUCTS, COPY]
        probed = case["probes"]["seconds"]
        assert all(len(samples) == 2 and min(samples) > 0 for samples in (*case["seconds"].values(), *probed.values()))
        assert case["relative_error"].keys() == {EAGER, OURS} and max(case["relative_error"].values()) < 1e-5
        assert case["cost"]["flops"] > 0 and case["cost"]["bytes"] > 0
        measures = can_measure_memory() and case["passes"] != BACKWARD
        assert case["peak_bytes"].keys() == ({EAGER, OURS} if measures else set())


def test_what_errs_is_listed_and_not_timed() -> None:
    op = OPS["encode, linear"]
    wrong = replace(op, peers={"fast": scaled(op.eager, 1.001)}, ours=lambda backend: scaled(op.ours(backend), 1.001))
    for case in measured(wrong, only=(EAGER, OURS, "fast")).values():
        assert list(case["seconds"]) == [EAGER, PRODUCTS, COPY]
        # Upstream gradients are outputs, and as much too large.
        assert case["left_out"] == dict.fromkeys((OURS, "fast"), "differs from float64 by 0.002 (accepted: 1e-04)")


def test_what_raises_is_listed_with_its_reason() -> None:
    def broken(inputs: Inputs, rng: torch.Tensor | None) -> Inputs:
        raise RuntimeError("no kernel\nfor this")

    op = replace(OPS["linear CE"], peers={"broken": broken})
    for case in measured(op, only=(EAGER, OURS, "broken"), passes=(FORWARD, BOTH)).values():
        assert case["left_out"] == {"broken": "RuntimeError: no kernel for this"} and "broken" not in case["seconds"]


def test_a_backward_pass_that_cannot_be_repeated_is_listed() -> None:
    op = OPS["linear CE"]
    torch_head = next((name for name in op.peers if name.endswith("chunk=64")), None)
    if torch_head is None:
        pytest.skip("this torch has no F.linear_cross_entropy")
    cases = measured(op, only=(EAGER, OURS, torch_head)).values()
    assert ["called twice" in case["left_out"].get(torch_head, "") for case in cases] == [False, True, False]
    assert [torch_head in case["seconds"] for case in cases] == [True, False, True]


def test_a_wrong_gradient_is_found_though_the_loss_is_right() -> None:
    op = OPS["linear CE"]

    def detached(inputs: Inputs, rng: torch.Tensor | None) -> Inputs:
        input, weight, labels = inputs
        return op.eager((input * 2 - input.detach(), weight, labels), rng)

    case = measured(replace(op, peers={"double": detached}), only=(EAGER, OURS, "double"), passes=(FORWARD,))
    (record,) = case.values()
    assert "differs from float64 by 1 " in record["left_out"]["double"]


def test_every_peer_is_there_or_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear CE", "bottleneck CE"):
        found, missing = OPS[name].variants(torch.float32, generate_code=False)
        assert {EAGER, OURS, "torch.compile"} <= found.keys()
        assert {"Liger", "cut-cross-entropy"} <= missing.keys() and "needs a GPU" in missing["Liger"]
        torch_heads = [other for other in found if other.startswith("F.linear_cross_entropy")]
        assert torch_heads or "F.linear_cross_entropy" in missing
        for backend in ("triton", "cpp", "reference"):
            assert f"{OURS} {backend}" in found or f"{OURS} {backend}" in missing or backend in ("cpp", "reference")
        assert "ibkernels triton" in missing
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, missing = OPS["linear CE"].variants(torch.float32, generate_code=False)
    assert "interpreter" in missing["ibkernels triton"] or "not installed" in missing["ibkernels triton"]


def test_compiled_variants_agree_with_float64() -> None:
    op = OPS["bottleneck CE"]
    compiled = [name for name in op.variants(torch.float32, generate_code=False)[0] if name.startswith("torch.compile")]
    (case,) = measured(op, only=(EAGER, OURS, *compiled), passes=(BOTH,)).values()
    assert len(compiled) == 2 and not case["left_out"] and set(compiled) <= case["relative_error"].keys()


def test_noise_is_compared_with_its_reference_and_randn_with_nothing() -> None:
    (case,) = measured(OPS["noise"], only=(EAGER, OURS)).values()
    assert case["relative_error"].keys() == {OURS} and {EAGER, OURS} <= case["seconds"].keys()


@pytest.mark.skipif(not can_measure_memory(), reason="needs /proc/self/clear_refs")
def test_peaks_are_those_of_live_tensors() -> None:
    """16 MiB, of which a copy is made; a step that makes nothing has none."""
    ones = torch.ones(4 * 2**20)
    peaks = ops._peaks({"copy": lambda: (ones + 1).sum(), "nothing": lambda: None})
    assert peaks["copy"] == pytest.approx(16 * 2**20, rel=0.1) and peaks["nothing"] < 2**20
