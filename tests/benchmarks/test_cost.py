"""The cost model against FLOPs that torch counts, and against closed forms."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import BACKWARD, BOTH, FORWARD, Cost, Size, crossover
from benchmarks.op_cases import OPS, Call
from benchmarks.ops import run_pass
from ibkernels import absorbs

SIZES = {
    "encode, linear": Size(24, 32, 8),
    "bottleneck, linear": Size(24, 32, 8),
    "linear CE": Size(24, 32, 8, vocabulary=80),
    "absorbed CE": Size(24, 32, 8, vocabulary=80),
    "bottleneck CE": Size(24, 32, 8, vocabulary=80),
}


def counted(call: Call, size: Size, op: str, passes: str) -> float:
    """The FLOPs of the matrix products of plain PyTorch, as torch counts them."""
    inputs = OPS[op].inputs(size)
    with FlopCounterMode(display=False) as counter:
        run_pass(call, inputs, passes)
    return counter.get_total_flops()


@pytest.mark.parametrize("passes", [FORWARD, BOTH])
@pytest.mark.parametrize("op", SIZES)
def test_flops_are_those_that_torch_counts(op: str, passes: str) -> None:
    size = SIZES[op]
    call = OPS[op].peers["eager, absorbed"] if op == "bottleneck CE" else OPS[op].eager
    flops = OPS[op].cost(size, passes, 4).flops
    extra = 0.0
    if op == "bottleneck CE":  # W_head b_up and its gradient, which are vectors
        assert absorbs(size.tokens, size.hidden, size.bottleneck)
        extra = 2.0 * size.vocabulary * size.hidden * (1 if passes == FORWARD else 2)
    assert counted(call, size, op, passes) == pytest.approx(flops, abs=extra)


def test_flops_of_the_lora_encoder_have_its_product_again() -> None:
    size = Size(24, 32, 8, rank=4)
    op = OPS["bottleneck, LoRA"]
    assert op.cost(size, FORWARD, 4).flops == counted(op.eager, size, op.name, FORWARD)
    again = 4 * size.tokens * size.rank * size.bottleneck
    assert op.cost(size, BOTH, 4).flops == counted(op.eager, size, op.name, BOTH) + again


def test_at_full_width_the_head_costs_what_torch_counts() -> None:
    size = Size(6, 32, 8, vocabulary=80)
    op = OPS["bottleneck CE"]
    assert not absorbs(size.tokens, size.hidden, size.bottleneck)
    assert op.cost(size, BOTH, 4).flops == counted(op.eager, size, op.name, BOTH)


@pytest.mark.parametrize("op", OPS)
def test_the_parts_add_up_and_grow_with_the_element(op: str) -> None:
    size = Size(24, 32, 8, 4, 80)
    forward, backward, both = (OPS[op].cost(size, passes, 4) for passes in (FORWARD, BACKWARD, BOTH))
    if OPS[op].trains:
        assert both.flops == forward.flops + backward.flops
        assert both.bytes >= forward.bytes + backward.bytes  # what forward saves is written only for a backward
        assert OPS[op].cost(size, BOTH, 2).bytes < both.bytes
    assert "ibkernels" in OPS[op].cost(size, BOTH, 4).peaks or op.startswith("encode")


def test_the_crossover_is_where_both_heads_have_the_same_flops() -> None:
    """Both written out, and of twice as many tokens the absorbed one is what the model counts."""
    op = OPS["bottleneck CE"]
    size = Size(0, 1024, 128, vocabulary=16000)
    tokens = crossover(size)
    full = 2.0 * tokens * 1024 * (128 + 16000) + 2.0 * tokens * 1024 * 16000 + 4.0 * tokens * 1024 * 128
    absorbed = 4.0 * 16000 * 1024 * 128 + 6.0 * tokens * 128 * 16000
    assert full == pytest.approx(absorbed)
    assert op.cost(size._replace(tokens=2 * round(tokens)), BOTH, 4).flops == pytest.approx(
        4.0 * 16000 * 1024 * 128 + 12.0 * round(tokens) * 128 * 16000
    )
    assert crossover(Size(0, 64, 64, vocabulary=1000)) == float("inf")


def test_the_limit_is_the_slower_of_products_and_bytes() -> None:
    cost = Cost(flops=6e9, bytes=1e9, peaks={})
    assert cost.roofline(2e9, 1e9) == 3 and cost.bound(2e9, 1e9) == "products"
    assert cost.roofline(2e9, 0.1e9) == 10 and cost.bound(2e9, 0.1e9) == "bytes"


def test_the_peak_of_eager_is_what_it_holds() -> None:
    """[N, V] float32: the logits and their log-softmax; in backward that and the gradients of both."""
    size = Size(256, 64, 8, vocabulary=1000)
    peaks = [OPS["linear CE"].cost(size, passes, 4).peaks["eager"] for passes in (FORWARD, BOTH)]
    assert peaks == [2 * 256 * 1000 * 4, 3 * 256 * 1000 * 4]
