"""Fused kernels for information-bottleneck fine-tuning: the bottleneck, and cross-entropy without logits."""

from ibkernels.bottleneck import encode, variational_bottleneck
from ibkernels.cross_entropy import CrossEntropyStats, absorbs, bottleneck_cross_entropy, linear_cross_entropy
from ibkernels.modules import BottleneckHead, VariationalBottleneck
from ibkernels.philox import noise, rng_state

__version__ = "0.1.0"
__all__ = [
    "BottleneckHead",
    "CrossEntropyStats",
    "VariationalBottleneck",
    "__version__",
    "absorbs",
    "bottleneck_cross_entropy",
    "encode",
    "linear_cross_entropy",
    "noise",
    "rng_state",
    "variational_bottleneck",
]
