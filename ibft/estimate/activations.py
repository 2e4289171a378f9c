"""What forward keeps for backward, by running two layers on tensors that have shapes and no memory."""

import copy
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedModel

from ibft.architecture import CausalLM
from ibft.data import document_lengths
from ibft.document_attention import varlen_attention
from ibft.estimate.cost import ModelCost
from ibft.loading import autocast, compute_in_base_dtype

OUTLINE = "ibft_outline"  # the attention of the model to run: flash attention, whatever the device
_TOKENS = 4096  # what is kept grows with the tokens, but for copies of small weights


class Activations(NamedTuple):
    """Bytes per token that autograd saves."""

    layer: float  # in each of the decoder's layers
    around: float  # before the first and after the last

    def with_scores(self, cost: ModelCost, length: int, dtype_bytes: int) -> "Activations":
        """Where attention is eager, with its scores: for each head, all pairs of positions in a row of `length` tokens.

        The softmax is in float32, is cast before it meets the values, and a softcap keeps its tanh.
        """
        pair = 4 + dtype_bytes * ((dtype_bytes < 4) + cost.attention_softcap)
        return self._replace(layer=self.layer + cost.attention_heads * length * pair)


def _outlined(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """What flash attention keeps is the same whatever a model does to its scores."""
    for name in ("dropout", "softcap", "s_aux"):
        options.pop(name, None)
    return varlen_attention(module, query, key, value, mask, by_kernel=True, **options)


AttentionInterface.register(OUTLINE, _outlined)


def measure_activations(base: PreTrainedModel, adapter: LoraConfig) -> Activations:
    """Of a base model on the meta device whose attention is OUTLINE; the model is of no further use.

    The decoder runs as in training, under autocast, and every tensor that autograd saves is counted once. Dropout's
    masks are those of a CPU, in the activations' dtype; a GPU's take a byte an element.
    """
    parts = CausalLM.of(base)
    layers, owner, name = _found(parts)
    setattr(owner, name, layers[:2])
    adapter = copy.copy(adapter)
    adapter.init_lora_weights = True  # others may compute with the base model's weights, and here are none
    compute_in_base_dtype(get_peft_model(base, adapter).train())
    with FakeTensorMode():
        two = _saved_by_forward(parts)
        setattr(owner, name, layers[:1])
        one = _saved_by_forward(parts)
    return Activations(layer=(two - one) / _TOKENS, around=(2 * one - two) / _TOKENS)


def _found(parts: CausalLM) -> tuple[nn.ModuleList, nn.Module, str]:
    layers = parts.layers
    for owner in parts.decoder.modules():
        for name, child in owner.named_children():
            if child is layers:
                return layers, owner, name
    raise AssertionError("CausalLM.layers is a module of the decoder")


def _saved_by_forward(parts: CausalLM) -> int:
    """Bytes, of storages that are no parameter's."""
    for module in parts.decoder.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = _faked(tensor)  # type: ignore[assignment]
    own = {parameter.untyped_storage()._cdata for parameter in parts.decoder.parameters()}
    sizes: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage  # kept alive, so that no other takes its place
        return tensor

    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)
    lengths = {k: v for k, v in document_lengths([_TOKENS], "device").items() if not isinstance(v, Tensor)}
    bounds = torch.zeros(2, dtype=torch.int32)
    dtype = next(parts.decoder.parameters()).dtype
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(tokens.device, dtype):
        parts.decode(input_ids=tokens, position_ids=tokens, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, **lengths)
    return sum(storage.nbytes() for storage in sizes.values())


def _faked(tensor: Tensor) -> Tensor:
    """Under a FakeTensorMode: a tensor like it, on the CPU as far as dispatch can tell."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
