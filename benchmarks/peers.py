"""Other libraries' cross-entropies of (input [N, D], weight [V, D], labels [N]), and why some are not here."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_heads(chunks: Sequence[int]) -> tuple[dict[str, Head], dict[str, str]]:
    """`F.linear_cross_entropy` with its own choice of a chunk and with each of these; the best is its tuned time."""
    linear_cross_entropy: Any = getattr(F, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        return {}, {"F.linear_cross_entropy": f"torch {torch.__version__} has none (2.13 has)"}
    found: dict[str, Head] = {}
    for chunk in (None, *chunks):
        method = "auto" if chunk is None else None
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=method)
        found[f"F.linear_cross_entropy chunk={chunk or 'auto'}"] = partial(linear_cross_entropy, options=options)
    return found, {}


def gpu_heads() -> tuple[dict[str, Head], dict[str, str]]:
    """Liger's and cut-cross-entropy's, whose kernels run on GPUs only."""
    found: dict[str, Head] = {}
    left_out = {}
    try:
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, weight, labels: liger(weight, x, labels)
    except ImportError as error:
        left_out["Liger"] = f"not importable: {error}"
    try:
        found["cut-cross-entropy"] = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        left_out["cut-cross-entropy"] = f"not importable: {error}"
    return found, left_out
