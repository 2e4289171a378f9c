"""The Triton backend: each op under the name that every backend has."""

from ibkernels.gpu.bottleneck import bottleneck_backward, bottleneck_forward, encode_backward, encode_forward
from ibkernels.gpu.heads import bottleneck_cross_entropy, linear_cross_entropy
from ibkernels.gpu.philox import noise, noise_bits

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
