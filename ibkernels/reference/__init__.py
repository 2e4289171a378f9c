"""The specification: each op as plain PyTorch, float64-capable; oracle of the tests and fallback of every device."""

from ibkernels.reference.bottleneck import bottleneck_backward, bottleneck_forward, encode_backward, encode_forward
from ibkernels.reference.cross_entropy import bottleneck_cross_entropy, linear_cross_entropy
from ibkernels.reference.noise import noise, noise_bits

__all__ = [
    "bottleneck_backward",
    "bottleneck_cross_entropy",
    "bottleneck_forward",
    "encode_backward",
    "encode_forward",
    "linear_cross_entropy",
    "noise",
    "noise_bits",
]
