"""Which attention the decoder runs, and why. Packed documents must never see each other.

A flash attention is told the cumulative lengths of the documents, once per batch, and needs no mask. SDPA and eager
need one of [B, 1, T, T], which transformers makes where position_ids restart, no attention mask is given and no cache
is used; `collate` and `CausalLM.decode` see to all three.

Every flash attention is registered with transformers under a name of ours. For its own names transformers looks at
position_ids in each forward pass, which stops the host; any name with "flash" in it is its own; and what it calls runs
on a GPU alone, while a model that will be sharded is loaded, and tried, on the CPU.
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
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ibft.errors import InputError

VARLEN = "ibft_varlen"
# What takes the lengths of documents -> as transformers knows it.
REGISTERED = {"flash_attention_3": "ibft_fa3", "flash_attention_2": "ibft_fa2", "varlen": VARLEN}
FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}  # and the module of each
_INSTALL = {
    "flash_attention_3": "build it from the hopper folder of the flash-attention repository",
    "flash_attention_2": 'pip install "ibft[flash]"',
}
_KERNEL_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on
_NO_SOFTCAP = "it has no softcap on attention scores, which the model has"
_CUDA_CAPABILITY = 8  # of the oldest GPU that flash kernels run on, Ampere


class Attention(NamedTuple):
    """The name that transformers takes as attn_implementation, and the reason printed beside it."""

    implementation: str
    reason: str

    @property
    def takes_lengths(self) -> bool:
        """Whether batches carry the cumulative lengths of their documents, `collate(..., lengths=True)`."""
        return self.implementation in REGISTERED.values()

    @property
    def label(self) -> str:
        """The name as --attn_implementation takes it."""
        names = {registered: name for name, registered in REGISTERED.items()}
        return names.get(self.implementation, self.implementation)

    def leave(self, model: PreTrainedModel) -> None:
        """Makes a trained model fit for anything: what is registered here is for batches of a loader alone."""
        if self.takes_lengths:
            model.set_attn_implementation(_sdpa_or_eager(type(model), model.config))


def select_attention(
    requested: str,
    *,
    packing: str,
    device: torch.device,
    dtype: torch.dtype,
    base_config: PreTrainedConfig,
    compiled: bool = False,
) -> Attention:
    """What was requested, or for "auto" the first that works: flash-attn 3, flash-attn 2, varlen, SDPA, eager.

    base_config: the base model's; compiled: whether torch.compile will run over the layers. Raises InputError, saying
    what would work, for a request that the device, the dtype, the model or the installation cannot serve.
    """
    padded = "one padded document per row"
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype, base_config):
            other = select_attention(
                "auto", packing=packing, device=device, dtype=dtype, base_config=base_config, compiled=compiled
            )
            raise InputError(f"--attn_implementation {requested}: {obstacle}; {other.label} would work here.")
        if requested in REGISTERED:
            return Attention(_registered(requested), "asked for")
        masked = padded if packing == "none" else "documents of a packed row kept apart by a mask"
        return Attention(requested, f"asked for; {masked}")
    obstacles = {}
    for name in (*FLASH, "varlen", "sdpa", "eager"):
        obstacle = _obstacle(name, device, dtype, base_config)
        if name == "flash_attention_3" and obstacle is None and torch.cuda.get_device_capability(device)[0] != 9:
            obstacle = "made for Hopper GPUs"
        if name == "varlen" and device.type == "cpu" and compiled:
            obstacle = "a loop over documents, which --compile cannot take in"
        if obstacle is None:
            break
        obstacles[name] = obstacle
    if name in FLASH:
        return Attention(_registered(name), "installed, and made for this GPU")
    if name == "varlen":
        how = "document by document" if device.type == "cpu" else f"of torch {torch.__version__}"
        why = "" if device.type == "cpu" else f"; flash_attention_2: {obstacles['flash_attention_2']}"
        return Attention(VARLEN, how + why)
    kept = padded if packing == "none" else "documents of a packed row kept apart by its mask"
    return Attention(name, f"{kept}; varlen: {obstacles['varlen']}")


def plain_attention(base_config: PreTrainedConfig) -> str:
    """What takes any batch, padded on the left or with a cache: "sdpa", or "eager" for a model that it is wrong for."""
    return _sdpa_or_eager(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None), base_config)


def _sdpa_or_eager(model: Any, config: PreTrainedConfig) -> str:
    return "sdpa" if _sdpa_obstacle(model, config.get_text_config()) is None else "eager"


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, base_config: PreTrainedConfig) -> str | None:
    """Why an implementation cannot serve; None where it can. In the order in which a user would want to know."""
    config = base_config.get_text_config()
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None)  # None: `load_base_model` says what is wrong
    if name == "eager":
        return None
    if name == "sdpa":
        return _sdpa_obstacle(model, config)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] < _CUDA_CAPABILITY:
            return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16, and the model is {str(dtype).removeprefix('torch.')}"
    elif name in FLASH or device.type != "cpu":
        return f"it needs a CUDA GPU, and this run is on the {device.type}"
    if not (getattr(model, "_supports_flash_attn", False) and getattr(model, "_supports_attention_backend", False)):
        return f"{getattr(model, '__name__', 'the model')} does not run with it"
    if config.attention_dropout if hasattr(config, "attention_dropout") else getattr(config, "attn_pdrop", 0):
        return "it has no attention dropout, which the model's configuration asks for"
    if name in FLASH:
        accepted = getattr(model, "_compatible_flash_implementations", None)
        if accepted is not None and name not in accepted:  # transformers would download what is
            return f"{model.__name__} does not run with it"
        if _head_dim(config) > 256:
            return f"it has no kernel for heads of {_head_dim(config)} dimensions, 256 at most"
        return _missing(name, softcap=bool(getattr(config, "attn_logit_softcapping", None)))
    return _varlen_obstacle(model, config, device)


def _missing(name: str, softcap: bool) -> str | None:
    """Why flash-attn cannot be used. transformers must find it, or it would download a kernel from the Hub."""
    found = is_flash_attn_3_available() if name == "flash_attention_3" else is_flash_attn_2_available()
    if not found:
        return f"flash-attn {name[-1]} is not installed ({_INSTALL[name]})"
    try:
        module = importlib.import_module(FLASH[name])
    except (ImportError, OSError) as error:  # built for another torch
        return f"flash-attn {name[-1]} is installed, but cannot be imported ({' '.join(str(error).split())[:200]})"
    if softcap and "softcap" not in inspect.signature(module.flash_attn_varlen_func).parameters:
        return f"this flash-attn {name[-1]} has no softcap on attention scores, which the model has"
    return None


def _sdpa_obstacle(model: Any, config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):  # transformers 5.17 would run it, without its softcap
        return _NO_SOFTCAP
    return None if getattr(model, "_supports_sdpa", True) else f"{model.__name__} does not run with it"


def _varlen_obstacle(model: Any, config: Any, device: torch.device) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return _NO_SOFTCAP
    if not getattr(model, "_supports_sdpa", False):  # attention sinks and the like
        return f"{model.__name__} computes its attention in a way of its own"
    if device.type == "cpu":
        return None
    if torch.version.hip is not None:
        return "not tried on ROCm"
    parameters = inspect.signature(varlen_attn).parameters
    if missing := [option for option in ("scale", "window_size") if option not in parameters]:
        return f"torch {torch.__version__}'s varlen_attn has no {missing[0]}; 2.11 has"
    if getattr(config, "v_head_dim", None):
        return "it needs keys and values of the same width"
    if (width := _head_dim(config)) > 256 or width % 8:
        return f"its kernel takes heads of a multiple of 8 dimensions up to 256, not {width}"
    return None


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---------------------------------------------------------------------------------------------------------------------
# Attention by documents, as transformers calls it


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
    softcap: float | None = None,
    kernel: Callable[..., Tensor] | None = None,
    by_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each document of the flattened rows; [B, T, Hq, D], as transformers wants it back.

    cu_seq_lens_q: int32 [documents + 1], where they begin and end in B*T positions; max_length_q: the longest. Without
    them every row is one document, so padding on the right is harmless, and packed documents are an InputError.
    sliding_window counts the token itself. kernel: what runs on a GPU, by default torch's. by_kernel: as there, for
    tensors without data.

    There is no entry in AttentionMaskInterface: for an attention that it does not list, transformers makes no mask, nor
    stops the host to look at position_ids. Raises InputError for a cache (as generation has), dropout, sinks or, with
    torch's kernel, a softcap, none of which a model that `select_attention` gives this to has.
    """
    rows, num_heads, length, _ = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unable = {
        "a cache of keys": key.shape[2] != length,
        "a window of attention in both directions": not causal and sliding_window is not None,
        "an attention mask": attention_mask is not None,
        "attention dropout": dropout != 0,
        "softcap": softcap is not None and kernel is None,
        **{name: kwargs.get(name) is not None for name in ("s_aux", "position_bias")},
    }
    if wrong := [name for name, given in unable.items() if given]:
        raise InputError(f"attention by documents does not know {wrong[0]}; load the model with sdpa or eager.")
    if cu_seq_lens_q is None or max_length_q is None:
        positions = kwargs.get("position_ids")
        if positions is not None and (positions.diff() < 0).any():  # not in training, which gives the lengths
            raise InputError(
                "attention by documents needs the lengths of packed documents, as collate(..., lengths=True) gives; "
                "for batches without them load the model with sdpa or eager."
            )
        cu_seq_lens_q = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    states = (query.to(value.dtype), key.to(value.dtype), value)  # layer norms of them leave autocast in float32
    q, k, v = (tensor.transpose(1, 2).reshape(rows * length, *tensor.shape[1::2]) for tensor in states)
    attend = _by_document if query.device.type == "cpu" and not by_kernel else kernel or _by_kernel
    output = attend(q, k, v, cu_seq_lens_q, max_length_q, scaling, causal, window, softcap)
    return output.view(rows, length, num_heads, -1), None


AttentionInterface.register(VARLEN, varlen_attention)


def _registered(name: str) -> str:
    """The name that transformers takes for one of REGISTERED; flash-attn is imported here, where it is wanted."""
    if name in FLASH:
        kernel = partial(_by_flash_attn, importlib.import_module(FLASH[name]).flash_attn_varlen_func)
        AttentionInterface.register(REGISTERED[name], partial(varlen_attention, kernel=kernel))
    return REGISTERED[name]


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """torch's own flash attention, [B*T, heads, D] each; without a softcap, which `varlen_attention` refuses for it."""
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _KERNEL_TAKES_GROUPS:
            options["enable_gqa"] = True
        else:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    span = _span(causal, window)
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=span, **options)
    return cast(Tensor, output)  # without return_aux


def _by_flash_attn(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """flash_attn_varlen_func of flash-attn 2 or 3, [B*T, heads, D] each."""
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
        softmax_scale=scale,
        causal=causal,
        window_size=_span(causal, window),
        **({} if softcap is None else {"softcap": softcap}),
    )
    return (output[0] if isinstance(output, tuple) else output)[..., :width]  # early versions of 3 give a tuple


def _span(causal: bool, window: int | None) -> tuple[int, int]:
    """How many tokens are seen before the query's own, and after it; -1: all."""
    return -1 if window is None else window - 1, 0 if causal else -1


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """SDPA on one document after the other: sum of L^2 instead of T^2, and no mask. For the CPU, where no one waits."""
    lengths = bounds.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    documents = (tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value))
    for size, q, k, v in zip(lengths, *documents, strict=True):  # [1, heads, L, D]
        mask = None
        if window is not None and window < size:
            mask = torch.ones(size, size, dtype=torch.bool).tril().triu(1 - window)
        if softcap is not None:
            outputs.append(_with_softcap(q, k, v, mask, causal, scale, softcap))
            continue
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)  # [B*T, heads, D]


def _with_softcap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v, which SDPA has not; [1, heads, L, D]."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value
