"""What each op costs at least: FLOPs of its matrix products, bytes that it reads and writes, memory that it holds.

N tokens, H hidden size, K bottleneck size, R LoRA rank, V vocabulary, s bytes of an element. A multiplication and an
addition are two FLOPs. Elementwise work is left out: beside products of width K or H it is small, and in `noise`, which
has no product, it is what bounds (docs/performance.md).

Bytes: every input is read once and every result written once; what a pass makes and uses up itself stays in cache. What
forward leaves for backward is written by one and read by the other.

Peak: bytes beyond the inputs at the highest point, results included, of the C++ backend and of eager PyTorch on a CPU;
left out are scratch of half a MiB a thread, and vectors [N].
"""

from collections.abc import Callable
from typing import NamedTuple

from ibkernels import absorbs

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
PASSES = (FORWARD, BACKWARD, BOTH)

_FLOAT32 = 4
_LOGITS_BYTES = 32 * 2**20  # of a block of rows in the CPU's backends
_LEAST_ROWS, _CHUNK_ROWS = 16, 1024  # of a block of logits; of the gradients that wait for the weight's


class Size(NamedTuple):
    """N, H, K, R and V."""

    tokens: int
    hidden: int
    bottleneck: int
    rank: int = 32
    vocabulary: int = 32000


class Cost(NamedTuple):
    """Of one call; `peaks` in bytes, by variant."""

    flops: float
    bytes: float
    peaks: dict[str, float]

    def roofline(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds that a machine of these rates needs at least, products and traffic overlapping."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def bound(self, flops_per_second: float, bytes_per_second: float) -> str:
        """Which of the two rates sets that time."""
        return "products" if self.flops / flops_per_second >= self.bytes / bytes_per_second else "bytes"


CostOf = Callable[[Size, str, int], Cost]  # of a size, one of PASSES, and the bytes of an element


def encode_linear(size: Size, passes: str, s: int) -> Cost:
    """Forward 4 N H K; backward twice that, for the gradients of hidden and weight. The results are float32."""
    n, h, k = size.tokens, size.hidden, size.bottleneck
    product, weight = 4.0 * n * h * k, 2.0 * k * h
    forward = s * (n * h + weight) + _FLOAT32 * 2 * n * k
    backward = s * (2 * n * h + 2 * weight) + _FLOAT32 * 2 * n * k
    return _of(passes, (product, forward), (2 * product, backward), {})


def bottleneck_linear(size: Size, passes: str, s: int) -> Cost:
    """Forward 4 N H K; backward 8 N H K. Training writes and reads mu and the raw logvar, N K (s + 4) bytes."""
    n, h, k = size.tokens, size.hidden, size.bottleneck
    product, weight = 4.0 * n * h * k, 2.0 * k * h
    forward = s * (n * h + weight + n * k) + _FLOAT32 * n
    saved = 0 if passes == FORWARD else n * k * (s + _FLOAT32)
    backward = s * (2 * n * h + 2 * weight + n * k) + _FLOAT32 * n + saved
    results = n * k * s
    gradients = n * h * s + weight * (_FLOAT32 if s == _FLOAT32 else _FLOAT32 + s)
    scratch = min(n, _CHUNK_ROWS) * _FLOAT32 * (2 * k + (0 if s == _FLOAT32 else h))
    rounded = 0 if s == _FLOAT32 else weight * _FLOAT32  # the weight, widened
    peaks = {FORWARD: results + rounded, BOTH: results + saved + gradients + scratch + rounded}
    return _of(passes, (product, forward + saved), (2 * product, backward), {"ibkernels": peaks})


def bottleneck_lora(size: Size, passes: str, s: int) -> Cost:
    """Forward 2 N R (H + 2 K); backward twice that, and 4 N R K for mu and logvar again. Training saves t [N, R]."""
    n, h, k, r = size.tokens, size.hidden, size.bottleneck, size.rank
    product, weight = 2.0 * n * r * (h + 2 * k), r * (h + 2.0 * k)
    forward = s * (n * h + weight + n * k) + _FLOAT32 * n
    saved = 0 if passes == FORWARD else n * r * s
    backward = s * (2 * n * h + 2 * weight + n * k) + _FLOAT32 * n + saved
    results = n * k * s
    gradients = n * h * s + weight * (_FLOAT32 if s == _FLOAT32 else _FLOAT32 + s)
    wide = 0 if s == _FLOAT32 else h + r
    scratch = min(n, _CHUNK_ROWS) * _FLOAT32 * (2 * k + r + wide)
    peaks = {FORWARD: results, BOTH: results + saved + gradients + scratch}
    return _of(
        passes, (product, forward + saved), (2 * product + 4.0 * n * r * k, backward), {"ibkernels": peaks}
    )  # fmt: skip


def linear_cross_entropy(size: Size, passes: str, s: int) -> Cost:
    """The model's head, frozen: forward 2 N H V, as much for the gradient of the input. No logits in memory."""
    return _head(size.tokens, size.hidden, size.vocabulary, passes, s, trained=False)


def absorbed_cross_entropy(size: Size, passes: str, s: int) -> Cost:
    """A head of width K whose gradient is wanted: forward 2 N K V, backward 4 N K V."""
    return _head(size.tokens, size.bottleneck, size.vocabulary, passes, s, trained=True)


def bottleneck_cross_entropy(size: Size, passes: str, s: int) -> Cost:
    """As `ibkernels.absorbs` chooses: absorbed, or at full width."""
    n, h, k, v = size.tokens, size.hidden, size.bottleneck, size.vocabulary
    read = s * (n * k + h * k + v * h) + 8.0 * n
    gradients = s * (n * k + h * k)
    eager = _eager_logits(n, v, s)
    if not absorbs(n, h, k):
        forward, backward = 2.0 * n * h * (k + v), 2.0 * n * h * v + 4.0 * n * h * k
        hidden = _FLOAT32 * n * h * (1 if s == _FLOAT32 else 1.5)
        ours = {FORWARD: _block(n, v) + hidden, BOTH: _block(n, v) + 2 * hidden}
        # Backward reads the frozen head again.
        return _of(passes, (forward, read), (backward, read + gradients), {"ibkernels": ours, "eager": eager})
    once = 2.0 * v * h * k  # W_head W_up, and W_head^T dM
    forward, backward = once + 2.0 * n * k * v, once + 4.0 * n * k * v
    matrix = s * v * k
    saved = {FORWARD: matrix * 2, BOTH: matrix * 2 + 2.0 * _FLOAT32 * v * k}  # M written and read, dM likewise
    ours = {FORWARD: _block(n, v) + matrix, BOTH: _block(n, v) + matrix + _FLOAT32 * v * k + gradients}
    return _of(
        passes, (forward, read + saved[FORWARD]), (backward, read + gradients + saved[BOTH] - saved[FORWARD]),
        {"ibkernels": ours, "eager": eager},
    )  # fmt: skip


def crossover(size: Size) -> float:
    """N from which the absorbed head has fewer FLOPs on a CPU, forward and backward; infinite where it never has.

    Per token 4 H V + 6 H K at full width and 6 K V absorbed, next to 4 V H K once. `ibkernels.absorbs` counts 8 K V, as
    kernels on a GPU need, which compute the logits again.
    """
    h, k, v = size.hidden, size.bottleneck, size.vocabulary
    saved = 4.0 * h * v + 6.0 * h * k - 6.0 * k * v
    return 4.0 * v * h * k / saved if saved > 0 else float("inf")


def noise(size: Size, passes: str, s: int) -> Cost:
    """N K normals, float32, and the row ids."""
    written = _FLOAT32 * size.tokens * size.bottleneck
    return Cost(0.0, written + 8.0 * size.tokens, {"ibkernels": written})


def _head(n: int, d: int, v: int, passes: str, s: int, trained: bool) -> Cost:
    product = 2.0 * n * d * v
    read = s * (n * d + v * d) + 8.0 * n
    gradients = s * n * d + (_FLOAT32 * v * d if trained else 0)
    # Gradients are made in forward and multiplied by the upstream one in backward: twice there for a moment.
    kept = s * n * d + (_FLOAT32 * v * d if trained else 0)
    rounded = s * v * d if trained and s != _FLOAT32 else 0
    ours = {
        FORWARD: _block(n, v),
        BOTH: max(_block(n, v) + _FLOAT32 * n * d + (_FLOAT32 * v * d if trained else 0), 2 * kept + rounded),
    }
    backward = product * (2 if trained else 1)
    peaks = {"ibkernels": ours, "eager": _eager_logits(n, v, s)}
    return _of(passes, (product, read), (backward, read + gradients), peaks)


def _eager_logits(n: int, v: int, s: int) -> dict[str, float]:
    """Logits, in half precision in float32 too, and their log-softmax; in backward that with the gradients of both."""
    rounded = 0 if s == _FLOAT32 else s
    return {FORWARD: (2.0 * _FLOAT32 + rounded) * n * v, BOTH: 3.0 * _FLOAT32 * n * v}


def _block(n: int, v: int) -> float:
    """Bytes of a block of logits: of equal blocks, as few as the budget allows."""
    most = max(_LEAST_ROWS, _LOGITS_BYTES // (_FLOAT32 * v))
    blocks = -(-n // most)
    return float(_FLOAT32 * v * -(-n // blocks))


def _of(
    passes: str,
    forward: tuple[float, float],
    backward: tuple[float, float],
    peaks: dict[str, dict[str, float]],
) -> Cost:
    """The parts of (FLOPs, bytes) that a pass has. Peaks are known for whole passes, not for a backward alone."""
    parts = {FORWARD: [forward], BACKWARD: [backward], BOTH: [forward, backward]}[passes]
    flops, traffic = (sum(part[index] for part in parts) for index in (0, 1))
    return Cost(flops, traffic, {variant: by[passes] for variant, by in peaks.items() if passes in by})
