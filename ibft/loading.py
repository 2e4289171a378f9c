"""The base model and its tokenizer, from a folder or the Hub, with errors that say what was looked for."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import logging

from ibft.attention import plain_attention
from ibft.errors import InputError

if TYPE_CHECKING:
    from ibft.data import EncodedDataset


def quiet_libraries(progress_bars: bool) -> None:
    """Hides what a user of ibft can do nothing about: deprecations between libraries, and bars in a log file."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    if not progress_bars:
        logging.disable_progress_bar()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises InputError when there is none."""
    _check_folder(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of as many kinds as files can be wrong
        raise InputError(f"no tokenizer can be loaded from base_model {name!r}: {_reason(error)}") from error


def load_base_config(name: str) -> PreTrainedConfig:
    """The base model's configuration, the only file that is read. Raises InputError when there is none."""
    _check_folder(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # as above
        raise InputError(f"base_model {name!r} cannot be loaded as a causal LM: {_reason(error)}") from error


def load_base_model(
    name: str,
    dtype: torch.dtype | str,
    attn_implementation: str | None,
    device: torch.device,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`; dtype "auto": that of its file.

    attn_implementation: None for what takes any batch, `plain_attention`.
    load_in_4bit: the weights of its linear layers but the head in NF4 with double quantisation (QLoRA), computing in
    `dtype`. Raises InputError when it cannot be loaded.
    """
    _check_folder(name)
    options = {}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        if attn_implementation is None:
            attn_implementation = plain_attention(AutoConfig.from_pretrained(name, trust_remote_code=False))
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,  # else it would ask, and on every process
            # Straight to the GPU: no copy of the whole model in the host's memory, once per process.
            device_map={"": device} if device.type == "cuda" or load_in_4bit else None,
            **options,
        )
    except Exception as error:  # as above, and of the network
        raise InputError(f"base_model {name!r} cannot be loaded as a causal LM: {_reason(error)}") from error
    return model if load_in_4bit else model.to(device)  # bitsandbytes has placed it


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in `dtype`, as if they had been loaded in it; changes it in place.

    `model.to(dtype)` would also round the frequencies of rotary embeddings, which are computed in float32 whatever the
    weights are: in bfloat16 far positions would stand anywhere.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    return model


def load_base_outline(name: str, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """The base model without its weights, on the meta device: every module and shape, in no memory to speak of.

    Only its configuration is read. Raises InputError when there is none of a causal language model.
    """
    config = load_base_config(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    except Exception as error:  # as above
        raise InputError(f"base_model {name!r} cannot be loaded as a causal LM: {_reason(error)}") from error
    return model.eval()


_LIGER, _BITSANDBYTES = Version("0.6"), Version("0.46.1")  # the latter: what transformers asks for


def check_optional_packages(*, liger: bool, load_in_4bit: bool, base_config: PreTrainedConfig) -> None:
    """Raises InputError where an option needs a package that is missing or too old, or another kind of model."""
    if load_in_4bit:
        _check_package("--load_in_4bit", "bitsandbytes", _BITSANDBYTES, "quantized")
        if getattr(base_config, "quantization_config", None) is not None:
            raise InputError("--load_in_4bit: the base model is quantized already; leave the option out.")
    if liger:
        _check_package("--liger", "liger-kernel", _LIGER, "liger")
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if base_config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise InputError(f"--liger: Liger has no kernels for models of the type {base_config.model_type!r}.")


def _check_package(option: str, name: str, least: Version, extra: str) -> None:
    try:
        found = Version(version(name))
    except PackageNotFoundError:
        raise InputError(f'{option} needs {name}, which is not installed: pip install "ibft[{extra}]".') from None
    if found < least:
        raise InputError(f"{option} needs {name} {least} or newer, and {found} is installed.")


def use_liger_layers(model: PreTrainedModel) -> None:
    """Liger's Triton kernels for the model's norms, rotary embeddings and MLPs; the loss stays ibkernels'."""
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def compute_in_base_dtype(model: nn.Module) -> None:
    """Stops PEFT from casting a bf16 layer's input to the adapter's float32: `autocast` casts the small weights."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """For forward passes: float32 adapters and bottleneck compute in bfloat16 where the base model is bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def check_vocabulary(
    name: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: "Sequence[EncodedDataset]"
) -> None:
    """Raises InputError for data with an id that has no embedding: an index error, on a GPU one that names nothing."""
    size = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= size:  # else only the tokens that occur matter
        return
    largest = max(data.largest_token for data in parts)
    if largest >= size:
        raise InputError(
            f"the data holds token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but base_model {name!r} "
            f"has embeddings for {size} tokens and its tokenizer {len(tokenizer)}; use the tokenizer that it was made "
            "with, or resize its embeddings and save it."
        )


def check_positions(name: str, config: PreTrainedConfig, longest: int) -> None:
    """Raises InputError for rows of up to `longest` tokens where the model has fewer positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"a row has {longest:,} tokens, and model {name!r} has {positions:,} positions; --max_length can be "
            f"{positions:,} at most."
        )


def check_table_of_positions(name: str, base: PreTrainedModel, longest: int) -> None:
    """`check_positions` for a model that looks positions up in a table, as GPT-2 does: an index error there.

    One that computes them (RoPE) can be trained on longer rows than it was made for.
    """
    embeddings = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    looked_up = len(embeddings) > 1 or any(key.endswith("embed_positions") for key, _ in base.named_buffers())
    if looked_up and getattr(base.config.get_text_config(), "rope_parameters", None) is None:
        check_positions(name, base.config, longest)


def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """sha256 (hex) that tells base models apart: their configuration, and the first weights of every parameter.

    `dtype`: the fingerprint that the model would have, had it been loaded in that dtype.
    """
    left_out = ("_name_or_path", "transformers_version")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in left_out}
    if dtype is not None:
        settings["dtype"] = str(dtype).removeprefix("torch.")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:256].to(dtype or parameter.dtype)
        digest.update(f"{name} {tuple(parameter.shape)} {first.dtype}".encode() + first.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def resolve_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The base model's dtype: "auto" is bfloat16 on a GPU that has it, else float32."""
    if requested != "auto":
        return getattr(torch, requested)
    return (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )


def _check_folder(name: str) -> None:
    """A path that does not exist would otherwise be looked up on the Hub, and fail with a puzzling sentence."""
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")
    if Path(name).is_file():
        raise InputError(f"base_model {name!r} is a file; name the folder that holds the model, or one on the Hub.")
    if looks_local and not Path(name).expanduser().is_dir():
        raise InputError(f"base_model {name!r} is not a folder; name one that holds a model, or a model on the Hub.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        hint = " (it holds an adapter: name the base model)" if (Path(name) / "adapter_config.json").is_file() else ""
        raise InputError(f"base_model {name!r} is a folder without config.json, so not a model{hint}.")


def _reason(error: Exception) -> str:
    """What the libraries say, in a line; in our words where theirs name an argument that no user of ours can give."""
    text = " ".join(str(error).split()).partition(" Model type should be one of")[0] or type(error).__name__
    if "trust_remote_code" in text:
        return "it needs code of its own, and ibft runs no code that comes with a model."
    if "ignore_mismatched_sizes" in text:
        return "its weights are not of the shapes that its config.json asks for."
    if "instantiate the backend tokenizer" in text:
        return "it has no tokenizer.json, nor other files that can be made one."
    if isinstance(error, SafetensorError):
        return f"one of its .safetensors files is damaged ({text})."
    if isinstance(error, json.JSONDecodeError):
        return f"one of its .json files is damaged ({text})."
    if isinstance(error, (AttributeError, KeyError, TypeError)):
        return f"its files do not hold what transformers looks for there ({type(error).__name__}: {text[:200]})."
    return text if len(text) <= 300 else f"{text[:300]}..."
