"""What the kernels of both kinds of head share: the constants of a running softmax, and the soft cap."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1.0e38)  # of a running maximum: -inf less itself would be no number


@triton.jit
def softcapped(x, softcap):
    """softcap * tanh(x / softcap), and its slope."""
    tanh = 1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634 / softcap)) + 1.0)
    return softcap * tanh, 1.0 - tanh * tanh
