"""Which attention the decoder runs, and why. Packed documents must never see each other.

transformers isolates the documents of a packed row on SDPA and eager when position_ids restart, no attention mask is
given and no cache is used; `collate` and `CausalLM.decode` see to all three.
"""

import importlib.util
from typing import NamedTuple

from ibft.errors import InputError


class Attention(NamedTuple):
    """The name that transformers takes as attn_implementation, and the reason printed beside it."""

    implementation: str
    reason: str


def select_attention(requested: str, packing: str, device_type: str) -> Attention:
    """Checks the choice against what is installed. Raises InputError saying what would work."""
    if requested == "flash_attention_2":
        if device_type != "cuda":
            raise InputError(f"flash_attention_2 needs a GPU, and this run is on the {device_type}; use sdpa.")
        if importlib.util.find_spec("flash_attn") is None:
            raise InputError('flash_attention_2 needs the package flash-attn: pip install "ibft[flash]", or use sdpa.')
        return Attention(requested, "asked for; one padded document per row")
    reason = "one padded document per row" if packing == "none" else "documents of a packed row kept apart by its mask"
    return Attention(requested, reason)
