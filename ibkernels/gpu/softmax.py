"""What the kernels of both kinds of head share: the constants of a running softmax, and the soft cap."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Of a float16 factor of a product, whose sum is divided by it: probabilities down to 2^-36 count, not 2^-24, and there
# is room for z-loss, which multiplies them.
RAISED: tl.constexpr = tl.constexpr(4096.0)
LOWEST: tl.constexpr = tl.constexpr(-1.0e38)  # of a running maximum: -inf less itself would be no number


@triton.jit
def softcapped(x, softcap):
    """softcap * tanh(x / softcap), and its slope."""
    tanh = 1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634 / softcap)) + 1.0)
    return softcap * tanh, 1.0 - tanh * tanh
