"""Attention within the documents of packed rows, as transformers calls it: by their lengths, without a mask.

By a kernel, torch's or flash-attn's, or one document after the other where none serves. Each is registered with
transformers under a name of ours. For its own names transformers looks at position_ids in every forward pass, which
stops the host; any name with "flash" in it is its own; and what it calls runs on a GPU alone, while a model that will
be sharded is loaded, and tried, on the CPU.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from ibft.errors import InputError

VARLEN, BY_DOCUMENT = "ibft_varlen", "ibft_by_document"  # as transformers knows them
KERNELS = {"flash_attention_3": "ibft_fa3", "flash_attention_2": "ibft_fa2", "varlen": VARLEN}  # likewise
FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}  # the module of each
_KERNEL_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on


class _Scores(NamedTuple):
    """What a model does to its attention scores."""

    scale: float | None  # None: 1 / sqrt(D)
    causal: bool
    window: int | None
    softcap: float | None
    dropout: float


def varlen_attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, T, D]
    key: Tensor,  # [B, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    document_lengths: tuple[int, ...] | None = None,
    softcap: float | None = None,
    kernel: Callable[..., Tensor] | None = None,
    by_kernel: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each document of the flattened rows; [B, T, Hq, D], as transformers wants it back.

    cu_seq_lens_q: int32 [documents + 1], where they begin and end in B*T positions, and max_length_q, the longest, for
    a kernel; document_lengths, as numbers, for a loop. Without them every row is one document, so padding on the right
    is harmless, and packed documents are an InputError. sliding_window counts the token itself. kernel: by default
    torch's. by_kernel: whether that runs, or a loop over the documents; None: the kernel on a GPU, the loop on a CPU.

    There is no entry in AttentionMaskInterface: for an attention that it does not list, transformers makes no mask, nor
    stops the host to look at position_ids. Raises InputError for a cache (as generation has), sinks or, with torch's
    kernel, dropout or a softcap, none of which a model that `select_attention` gives this to has.
    """
    rows, num_heads, length, _ = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    by_kernel = query.device.type != "cpu" if by_kernel is None else by_kernel
    unable = {
        "a cache of keys": key.shape[2] != length,
        "a window of attention in both directions": not causal and sliding_window is not None,
        "an attention mask": attention_mask is not None,
        "attention dropout": dropout != 0 and by_kernel and kernel is None,
        "softcap": softcap is not None and by_kernel and kernel is None,
        **{name: kwargs.get(name) is not None for name in ("s_aux", "position_bias")},
    }
    if wrong := [name for name, given in unable.items() if given]:
        raise InputError(f"attention by documents does not know {wrong[0]}; load the model with sdpa or eager.")
    states = (query.to(value.dtype), key.to(value.dtype), value)  # layer norms of them leave autocast in float32
    q, k, v = (tensor.transpose(1, 2).reshape(rows * length, *tensor.shape[1::2]) for tensor in states)
    scores = _Scores(scaling, causal, sliding_window, softcap, dropout)
    if not by_kernel:
        if document_lengths is None and cu_seq_lens_q is not None:
            document_lengths = tuple(cu_seq_lens_q.diff().tolist())
        if document_lengths is None:
            _check_unpacked(kwargs.get("position_ids"))
            document_lengths = (length,) * rows
        output = _by_document(q, k, v, document_lengths, scores)
    else:
        if cu_seq_lens_q is None or max_length_q is None:
            _check_unpacked(kwargs.get("position_ids"))
            cu_seq_lens_q = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
            max_length_q = length
        output = (kernel or _by_kernel)(q, k, v, cu_seq_lens_q, max_length_q, scores)
    return output.view(rows, length, num_heads, -1), None


AttentionInterface.register(VARLEN, varlen_attention)
AttentionInterface.register(BY_DOCUMENT, partial(varlen_attention, by_kernel=False))


def registered(name: str) -> str:
    """The name that transformers takes for one of KERNELS; flash-attn is imported here, where it is wanted."""
    if name in FLASH:
        kernel = partial(_by_flash_attn, importlib.import_module(FLASH[name]).flash_attn_varlen_func)
        AttentionInterface.register(KERNELS[name], partial(varlen_attention, kernel=kernel))
    return KERNELS[name]


def _check_unpacked(positions: Tensor | None) -> None:
    """Raises InputError for packed documents whose lengths nobody gave. Training gives them: nothing waits there."""
    if positions is not None and (positions.diff() < 0).any():
        raise InputError(
            "attention by documents needs the lengths of packed documents, as collate(..., lengths=) gives; for "
            "batches without them load the model with sdpa or eager."
        )


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scores: _Scores) -> Tensor:
    """torch's own flash attention, [B*T, heads, D] each; softcap and dropout are refused for it above."""
    options: dict[str, Any] = {"scale": scores.scale, "window_size": _span(scores)}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _KERNEL_TAKES_GROUPS:
            options["enable_gqa"] = True
        else:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    return cast(Tensor, output)  # without return_aux


def _by_flash_attn(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scores: _Scores,
) -> Tensor:
    """flash_attn_varlen_func of flash-attn 2 or 3, [B*T, heads, D] each."""
    options: dict[str, Any] = {}
    if scores.softcap is not None:
        options["softcap"] = scores.softcap
    if scores.dropout:
        options["dropout_p"] = scores.dropout
    width = value.shape[-1]
    if width < query.shape[-1]:  # in latent attention; the kernels want one width
        value = F.pad(value, (0, query.shape[-1] - width))
    output = function(
        query,
        key,
        value,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scores.scale,
        causal=scores.causal,
        window_size=_span(scores),
        **options,
    )
    return (output[0] if isinstance(output, tuple) else output)[..., :width]  # early versions of 3 give a tuple


def _span(scores: _Scores) -> tuple[int, int]:
    """How many tokens are seen before the query's own, and after it; -1: all."""
    return -1 if scores.window is None else scores.window - 1, 0 if scores.causal else -1


def _by_document(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scores: _Scores) -> Tensor:
    """SDPA on one document after the other: sum of L^2 instead of T^2, and no mask; [B*T, heads, D] each."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu":  # with groups a GPU may be left with a kernel that keeps all scores
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    outputs = []
    documents = (tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value))
    for size, q, k, v in zip(lengths, *documents, strict=True):  # [1, heads, L, D]
        if scores.softcap is not None:  # computed again in backward, so that only one document's scores are ever there
            output = checkpoint(
                _with_softcap, q, k, v, scores, use_reentrant=False, preserve_rng_state=scores.dropout > 0
            )
        else:
            mask = _seen(q, scores) if scores.window is not None and scores.window < size else None
            output = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=scores.dropout,
                is_causal=scores.causal and mask is None,
                scale=scores.scale,
                enable_gqa=groups > 1,
            )
        outputs.append(output)
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)  # [B*T, heads, D]


def _seen(query: Tensor, scores: _Scores) -> Tensor:
    """Which keys a query of [..., L, D] sees, itself and those before it within the window; bool [L, L]."""
    size = query.shape[-2]
    seen = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    return seen if scores.window is None else seen.triu(1 - scores.window)


def _with_softcap(query: Tensor, key: Tensor, value: Tensor, scores: _Scores) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v, which SDPA has not; [1, heads, L, D]."""
    assert scores.softcap is not None
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    logits = scores.softcap * torch.tanh(logits / scores.softcap)
    if scores.causal:
        logits = logits.masked_fill(~_seen(query, scores), -torch.inf)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
    return F.dropout(weights, scores.dropout) @ value
