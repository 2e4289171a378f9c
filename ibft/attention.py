"""Which attention the decoder runs, and why. Packed documents must never see each other.

An attention by documents (`document_attention`) is told their lengths, once per batch, and needs no mask. SDPA and
eager on whole rows need one of [B, 1, T, T], which transformers makes where position_ids restart, no attention mask is
given and no cache is used; `collate` and `CausalLM.decode` see to all three.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ibft.document_attention import BY_DOCUMENT, FLASH, KERNELS, VARLEN, registered
from ibft.errors import InputError

if TYPE_CHECKING:
    from ibft.data import Lengths

_INSTALL = {
    "flash_attention_3": "build it from the hopper folder of the flash-attention repository",
    "flash_attention_2": 'pip install "ibft[flash]"',
}
_NO_SOFTCAP = "no softcap on attention scores, which the model has"
_NO_DROPOUT = "no dropout on attention scores, which the model's configuration asks for"
_CUDA_CAPABILITY = 8  # of the oldest GPU that flash kernels run on, Ampere


class Attention(NamedTuple):
    """The name that transformers takes as attn_implementation, and the reason printed beside it."""

    implementation: str
    reason: str

    @property
    def lengths(self) -> "Lengths | None":
        """Where it looks for the lengths of documents, as `collate` takes it; None: a mask keeps them apart."""
        if self.implementation == BY_DOCUMENT:
            return "host"
        return "device" if self.implementation in KERNELS.values() else None

    @property
    def label(self) -> str:
        """The name as --attn_implementation takes it."""
        names = {implementation: name for name, implementation in KERNELS.items()} | {BY_DOCUMENT: "varlen"}
        return names.get(self.implementation, self.implementation)


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

    "varlen" is torch's kernel where that serves, and document by document elsewhere. base_config: the base model's;
    compiled: whether torch.compile will run over the layers. Raises InputError, saying what would work, for a request
    that the device, the dtype, the model or the installation cannot serve.
    """
    apart = "one padded document per row" if packing == "none" else "documents of a packed row kept apart by a mask"
    kernel_obstacle = _kernel_obstacle(base_config.get_text_config(), device, dtype)
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype, base_config, compiled):
            other = select_attention(
                "auto", packing=packing, device=device, dtype=dtype, base_config=base_config, compiled=compiled
            )
            raise InputError(f"--attn_implementation {requested}: {obstacle}; {other.label} would work here.")
        if requested == "varlen" and kernel_obstacle is not None:
            return Attention(BY_DOCUMENT, f"asked for; {_one_by_one(kernel_obstacle, device)}")
        if requested in KERNELS:
            return Attention(registered(requested), "asked for")
        return Attention(requested, f"asked for; {apart}")
    obstacles = {}
    for name in (*FLASH, "varlen", "sdpa", "eager"):
        obstacle = _obstacle(name, device, dtype, base_config, compiled)
        if name == "flash_attention_3" and obstacle is None and torch.cuda.get_device_capability(device)[0] != 9:
            obstacle = "made for Hopper GPUs"
        if obstacle is None:
            break
        obstacles[name] = obstacle
    if name in FLASH:
        return Attention(registered(name), "installed, and made for this GPU")
    if name == "varlen":
        flash_obstacle = obstacles["flash_attention_2"]
        faster = "" if device.type == "cpu" else f"; flash_attention_2: {flash_obstacle}"
        if kernel_obstacle is None:
            return Attention(VARLEN, f"of torch {torch.__version__}{faster}")
        how = "document by document" if kernel_obstacle == flash_obstacle else _one_by_one(kernel_obstacle, device)
        return Attention(BY_DOCUMENT, how + faster)
    return Attention(name, f"{apart}; varlen: {obstacles['varlen']}")


def _one_by_one(kernel_obstacle: str, device: torch.device) -> str:
    return "document by document" + ("" if device.type == "cpu" else f"; torch's kernel: {kernel_obstacle}")


def plain_attention(base_config: PreTrainedConfig) -> str:
    """What takes any batch, padded on the left or with a cache: "sdpa", or "eager" for a model that it is wrong for."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None)
    return "sdpa" if _sdpa_obstacle(model, base_config.get_text_config()) is None else "eager"


def _obstacle(
    name: str, device: torch.device, dtype: torch.dtype, base_config: PreTrainedConfig, compiled: bool
) -> str | None:
    """Why an implementation cannot serve; None where it can. In the order in which a user would want to know."""
    config = base_config.get_text_config()
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None)  # None: `load_base_model` says what is wrong
    if name == "eager":
        return None
    if name == "sdpa":
        return _sdpa_obstacle(model, config)
    if name in FLASH and (obstacle := _gpu_obstacle(device, dtype)):
        return obstacle
    if not (getattr(model, "_supports_flash_attn", False) and getattr(model, "_supports_attention_backend", False)):
        return f"{getattr(model, '__name__', 'the model')} does not run with it"
    if name in FLASH:
        accepted = getattr(model, "_compatible_flash_implementations", None)
        if accepted is not None and name not in accepted:  # transformers would download what is
            return f"{model.__name__} does not run with it"
        if _head_dim(config) > 256:
            return f"it has no kernel for heads of {_head_dim(config)} dimensions, 256 at most"
        return _missing(name, config)
    if not (getattr(model, "_supports_sdpa", False) or _softcap(config)):  # attention sinks and the like
        return f"{model.__name__} computes its attention in a way of its own"
    if compiled and (obstacle := _kernel_obstacle(config, device, dtype)):
        also = "" if device.type == "cpu" else f"; torch's kernel: {obstacle}"
        return f"a loop over documents, which --compile cannot take in{also}"
    return None


def _gpu_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this run is on the {device.type}"
    if torch.cuda.get_device_capability(device)[0] < _CUDA_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16, and the model is {str(dtype).removeprefix('torch.')}"
    return None


def _missing(name: str, config: Any) -> str | None:
    """Why flash-attn cannot be used. transformers must find it, or it would download a kernel from the Hub."""
    found = is_flash_attn_3_available() if name == "flash_attention_3" else is_flash_attn_2_available()
    if not found:
        return f"flash-attn {name[-1]} is not installed ({_INSTALL[name]})"
    try:
        module = importlib.import_module(FLASH[name])
    except (ImportError, OSError) as error:  # built for another torch
        return f"flash-attn {name[-1]} is installed, but cannot be imported ({' '.join(str(error).split())[:200]})"
    parameters = inspect.signature(module.flash_attn_varlen_func).parameters
    if _softcap(config) and "softcap" not in parameters:
        return f"this flash-attn {name[-1]} has {_NO_SOFTCAP}"
    if _dropout(config) and "dropout_p" not in parameters:
        return f"this flash-attn {name[-1]} has {_NO_DROPOUT}"
    return None


def _sdpa_obstacle(model: Any, config: Any) -> str | None:
    if _softcap(config):  # transformers 5.17 would run it, without its softcap
        return f"it has {_NO_SOFTCAP}"
    return None if getattr(model, "_supports_sdpa", True) else f"{model.__name__} does not run with it"


def _kernel_obstacle(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's own kernel cannot serve where a loop over documents can."""
    if obstacle := _gpu_obstacle(device, dtype):
        return obstacle
    if _softcap(config):
        return f"it has {_NO_SOFTCAP}"
    if _dropout(config):
        return f"it has {_NO_DROPOUT}"
    if torch.version.hip is not None:
        return "not tried on ROCm"
    if getattr(config, "v_head_dim", None):
        return "it needs keys and values of the same width"
    if (width := _head_dim(config)) > 256 or width % 8:
        return f"its kernel takes heads of a multiple of 8 dimensions up to 256, not {width}"
    return None


def _softcap(config: Any) -> bool:
    return bool(getattr(config, "attn_logit_softcapping", None))


def _dropout(config: Any) -> bool:
    return bool(config.attention_dropout if hasattr(config, "attention_dropout") else getattr(config, "attn_pdrop", 0))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
