"""Stand-ins for the kernels of attention, which a CPU has not: softmax by softmax, after their documentation."""

import math
from typing import Any

import torch
from torch import Tensor


def varlen_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn, softmax by softmax after its documentation: the CPU has no kernel."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.shape == cu_seq_k.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert window_size[1] in (0, -1) and enable_gqa == (query.shape[1] > key.shape[1])
    assert cu_seq_q.diff().max() == max_q == max_k
    return by_softmax(query, key, value, cu_seq_q.diff().tolist(), scale, window_size)


def by_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float = 0.0,
) -> Tensor:
    groups, (left, right) = query.shape[1] // key.shape[1], window_size
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        heads = []
        for head in range(query.shape[1]):
            scores = q[:, head] @ k[:, head // groups].T * (scale or 1 / math.sqrt(q.shape[-1]))
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
            seen = ((distance >= 0) | (right < 0)) & ((distance <= left) | (left < 0))
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, head // groups])
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)


def varlen_kernel_without_groups(*arguments: Any, scale: Any = None, window_size: Any = (-1, -1)) -> Tensor:
    """torch 2.11's: as many heads of keys as of queries."""
    assert arguments[0].shape == arguments[1].shape
    return varlen_kernel(*arguments, scale=scale, window_size=window_size)


def flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """flash_attn.flash_attn_varlen_func, after its documentation."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and type(max_seqlen_q) is type(max_seqlen_k) is int
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and cu_seqlens_q.diff().max() == max_seqlen_q
    span = (window_size[0], 0) if causal else window_size
    return by_softmax(q, k, v, cu_seqlens_q.diff().tolist(), softmax_scale, span, softcap)


def flash_attn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, None]:
    """flash_attn_interface.flash_attn_varlen_func; its early versions gave the log-sum-exp too."""
    output = flash_attn_2(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
    )
    return output, None


def on_a_gpu_alone(*arguments: Any, **options: Any) -> Tensor:
    """flash-attn for tensors of the CPU."""
    raise RuntimeError("FlashAttention only supports CUDA tensors")


KERNELS = {"kernel": varlen_kernel, "kernel of torch 2.11": varlen_kernel_without_groups}
PACKAGES = {"flash_attention_2": flash_attn_2, "flash_attention_3": flash_attn_3, "flash-attn on a CPU": on_a_gpu_alone}
