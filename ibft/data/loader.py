"""The batches of a plan as tensors on the device."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibft.data.encoded import EncodedDataset
from ibft.data.packing import BatchPlan, Lengths, collate


def load_batches(
    data: EncodedDataset,
    plan: BatchPlan,
    steps: Iterable[int],
    *,
    rank: int,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths | None = None,
) -> Iterator[dict[str, Any]]:
    """Every micro-batch of a rank in those steps of the plan, in order: what `collate` makes, on `device`."""
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad  # padding is never attended to or learnt: any id will do
    for step in steps:
        for bins in plan.micro_batches(step, rank):
            documents = [[data.document(int(index)) for index in row] for row in bins]
            batch = collate(
                documents, pad_token_id=pad, max_length=plan.max_length, packing=plan.packing, lengths=lengths
            )
            yield {name: _moved(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
