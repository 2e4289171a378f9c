"""Attention within the documents of a packed row, by torch's kernel and document by document, as eager alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_problems import DEVICE, DRY

pytest.importorskip("transformers")

from transformers import Gemma2Config, LlamaConfig, MistralConfig, Starcoder2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ibft.architecture import CausalLM
from ibft.document_attention import BY_DOCUMENT, VARLEN

SIZES = (9, 1, 33, 20) if DRY else (700, 1, 333, 1024, 77)
SHAPE = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 2048,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "a window": MistralConfig(**SHAPE, head_dim=64, sliding_window=16),
    "a softcap": Gemma2Config(**SHAPE, head_dim=64, sliding_window=16, attn_logit_softcapping=5.0),
    "dropout": Starcoder2Config(**SHAPE, attention_dropout=0.1, bos_token_id=0, eos_token_id=0),
}
CASES = [(kind, BY_DOCUMENT, precision) for kind in CONFIGS for precision in ("bf16", "fp32")]
CASES += [(kind, VARLEN, "bf16") for kind in ("llama", "a window")]
ERROR = {"bf16": 2e-2, "fp32": 1e-5}  # ||x - x32|| / ||x32|| over two layers


def decode(model: Any, ids: Tensor, sizes: tuple[int, ...], **lengths: Any) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H] of documents in one row, and the gradient of the embeddings' weight."""
    positions = torch.cat([torch.arange(size, device=DEVICE) for size in sizes])
    model.zero_grad()
    hidden = CausalLM.of(model).decode(input_ids=ids[None], position_ids=positions[None], **lengths)[0]
    (hidden.float() * torch.arange(hidden.shape[1], device=DEVICE).cos()).sum().backward()  # a norm keeps the squares
    return hidden.detach().float(), model.get_input_embeddings().weight.grad.float()


@pytest.mark.parametrize(("kind", "implementation", "precision"), CASES)
def test_packed_documents_are_as_alone(kind: str, implementation: str, precision: str, dtype: torch.dtype) -> None:
    if DRY and implementation == VARLEN:
        pytest.skip("torch's kernel runs on a GPU alone")
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager").eval()
        ids = torch.randint(300, (sum(SIZES),))
        alone = [decode(model, part, (len(part),)) for part in ids.split(SIZES)]
        hidden, gradient = torch.cat([each[0] for each in alone]), sum(each[1] for each in alone)
        model.to(dtype).set_attn_implementation(implementation)
        lengths: dict[str, Any] = {"document_lengths": SIZES}
        if implementation == VARLEN:
            bounds = torch.tensor((0, *SIZES)).cumsum(0, dtype=torch.int32)
            lengths = {
                "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(SIZES), "max_length_k": max(SIZES)
            }  # fmt: skip
        packed = decode(model, ids, SIZES, **lengths)
    for actual, expected in zip(packed, (hidden, gradient), strict=True):
        assert (actual - expected).norm() <= ERROR[precision] * expected.norm()


@pytest.mark.skipif(DRY, reason="on a CPU nothing waits")
@pytest.mark.parametrize("implementation", [VARLEN, BY_DOCUMENT])
def test_no_layer_waits_for_the_device(implementation: str) -> None:
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation=implementation).bfloat16()
        ids = torch.randint(300, (1, sum(SIZES)))
        positions = torch.cat([torch.arange(size) for size in SIZES])[None]
        bounds = torch.tensor((0, *SIZES)).cumsum(0, dtype=torch.int32)
    lengths: dict[str, Any] = {"document_lengths": SIZES}
    if implementation == VARLEN:
        lengths = {"cu_seq_lens_q": bounds, "max_length_q": max(SIZES)}
    decoder = CausalLM.of(model)
    decoder.decode(input_ids=ids, position_ids=positions, **lengths)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.decode(input_ids=ids, position_ids=positions, **lengths).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
