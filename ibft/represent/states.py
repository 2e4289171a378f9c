"""Hidden states at one layer: their mean over each document, and what a bottleneck's mu makes of them.

The forward pass ends at that layer, and one batch of its output is all that is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from ibft.architecture import CausalLM, evaluating
from ibft.data import EncodedDataset, collate
from ibft.errors import InputError
from ibft.loading import autocast
from ibft.model import IBModel
from ibft.objective import ACTIVE_VARIANCE

Span = Literal["response", "full"]
BATCH_TOKENS = 8192


def hidden_means(
    model: nn.Module,
    data: EncodedDataset,
    documents: Sequence[int] | np.ndarray,
    *,
    layer: int,
    span: Span = "response",
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """The mean hidden state of each document at `hidden_states[layer]`: [documents, H] float32.

    Args:
        model: a causal language model, with or without a PEFT adapter, or an `IBModel`; dropout is off while it runs.
        data: what `ibft.data.encode` or `load_data` gives.
        documents: indices into `data`, in the order of the result.
        layer: 1..num_layers; the top one is the hidden state after the final norm.
        span: "response": the positions whose next token is learnt, where the loss is taken; "full": every token.
        batch_tokens: positions in a batch, padding included; a longer document has a batch of its own.

    Padding on the right changes nothing but the rounding of sums. Raises InputError for a layer or span that there is
    not, a model that is no causal language model, hidden states that are not finite, and a device with too little
    memory.
    """
    means: np.ndarray | None = None
    for states in _span_states(model, data, documents, layer, span, batch_tokens):
        rows = torch.stack([tokens.float().mean(0) for tokens in states.hidden.split(states.counts)])  # [B, H]
        if means is None:
            means = np.empty((len(documents), rows.shape[1]), np.float32)
        means[states.places] = rows.cpu().numpy()
    if means is None:
        raise InputError("no document was named; hidden states need at least one.")
    if not np.isfinite(means).all():
        raise InputError(f"the hidden states at layer {layer} are not finite; try --dtype float32.")
    return means


@dataclass(frozen=True)
class BottleneckStatistics:
    """What the dimensions of a bottleneck carry, over a number of tokens. All arrays [K], float64.

    mu_mean, mu_variance: of each dimension's mean over the tokens (the variance unbiased); kl: its KL from the prior,
    in nats per token, of which the sum is what the bottleneck keeps of a token.
    """

    tokens: int
    mu_mean: np.ndarray
    mu_variance: np.ndarray
    kl: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """Which dimensions are active, [K] bool: those whose mu varies by more than 0.01, as in `active_share`."""
        return self.mu_variance > ACTIVE_VARIANCE

    def merged(self, other: BottleneckStatistics) -> BottleneckStatistics:
        """The statistics over the tokens of both (Chan, Golub, LeVeque 1979)."""
        tokens = self.tokens + other.tokens
        share = other.tokens / tokens
        difference = other.mu_mean - self.mu_mean
        squares = self._squares + other._squares + difference**2 * self.tokens * share
        return BottleneckStatistics(
            tokens=tokens,
            mu_mean=self.mu_mean + share * difference,
            mu_variance=squares / max(tokens - 1, 1),
            kl=self.kl + share * (other.kl - self.kl),
        )

    @property
    def _squares(self) -> np.ndarray:
        """The sums of squared deviations from the mean."""
        return self.mu_variance * (self.tokens - 1)


def bottleneck_statistics(
    model: IBModel,
    data: EncodedDataset,
    documents: Sequence[int] | np.ndarray,
    *,
    span: Span = "response",
    batch_tokens: int = BATCH_TOKENS,
) -> BottleneckStatistics:
    """mu's variance and the KL in nats of each dimension of the model's bottleneck, over the tokens of the documents.

    Arguments as for `hidden_means`; the layer is the bottleneck's own. Raises InputError as that does, for a model
    without a bottleneck, and for documents that have fewer than two tokens in the span.
    """
    if model.bottleneck is None or model.ib_config is None:
        raise InputError("the model has no bottleneck: its adapter was trained without one (SFT).")
    total: BottleneckStatistics | None = None
    for states in _span_states(model, data, documents, model.ib_config.target_layer, span, batch_tokens):
        with torch.no_grad():
            mu, logvar = model.bottleneck.encode(states.hidden)  # [N, K] each, float32
            kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
            rows = [value.cpu().double().numpy() for value in (mu.mean(0), mu.var(0, correction=0), kl.mean(0))]
        count = len(mu)
        batch = BottleneckStatistics(count, rows[0], rows[1] * count / max(count - 1, 1), rows[2])
        total = batch if total is None else total.merged(batch)
    if total is None or total.tokens < 2:
        raise InputError(f"a variance needs two tokens, and the documents have {0 if total is None else 1}.")
    if not (np.isfinite(total.mu_variance).all() and np.isfinite(total.kl).all()):
        raise InputError("the bottleneck's mu or KL is not finite; try --dtype float32.")
    return total


@dataclass(frozen=True)
class _SpanStates:
    """One batch: `hidden` [N, H] of the span's tokens, document by document, counts[i] of the one at places[i]."""

    places: np.ndarray
    hidden: Tensor
    counts: list[int]


def _span_states(
    model: nn.Module,
    data: EncodedDataset,
    documents: Sequence[int] | np.ndarray,
    layer: int,
    span: Span,
    batch_tokens: int,
) -> Iterator[_SpanStates]:
    if span not in ("response", "full"):
        raise InputError(f"span must be 'response' or 'full', not {span!r}.")
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise InputError(f"batch_tokens must be a positive integer, not {batch_tokens!r}.")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError("an adapter that learns a prompt puts tokens of its own before a document; use LoRA.")
    parts = CausalLM.of(model.get_base_model() if isinstance(model, PeftModel) else model)
    parts.check_layer(layer)
    chosen = np.asarray(documents, np.int64)
    lengths = data.lengths[chosen]
    longest_first = np.argsort(-lengths, kind="stable")  # little padding, and too little memory shows at once
    with tqdm(total=len(chosen), desc="Hidden states", unit="row", disable=not sys.stderr.isatty()) as bar:
        start = 0
        while start < len(chosen):
            longest = int(lengths[longest_first[start]])
            places = longest_first[start : start + max(1, batch_tokens // longest)]
            batch = collate(
                [[data.document(int(index))] for index in chosen[places]],
                pad_token_id=0,  # no real token sees it: any id will do
                max_length=longest,
                packing="none",
            )
            if span == "full":
                mask = batch["token_mask"]
            else:
                mask = torch.zeros_like(batch["token_mask"])
                mask.view(-1)[batch["label_indices"]] = True
            try:
                hidden = _layer_output(model, parts, layer, batch["input_ids"])  # [B, T, H]
                states = _SpanStates(places, hidden[mask.to(hidden.device)], mask.sum(1).tolist())
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"the device has too little memory for {len(places)} rows of {longest} tokens at once; use fewer "
                    f"--batch_tokens than {batch_tokens}."
                ) from error
            del hidden
            yield states
            bar.update(len(places))
            start += len(places)


class _LayerReached(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


@torch.no_grad()  # and not inference_mode, whose tensors could stay behind in a model's buffers
def _layer_output(model: nn.Module, parts: CausalLM, layer: int, input_ids: Tensor) -> Tensor:
    """hidden_states[layer] of input_ids [B, T], [B, T, H].

    Without an attention mask: no real token sees the padding on its right, and in a window of attention a mask could
    leave padding nothing to attend to at all, which is NaN, and spreads.
    """
    found: list[Tensor] = []

    def stop(module: nn.Module, inputs: Any, output: Any) -> NoReturn:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _LayerReached

    weight = parts.head.weight
    # The topmost hidden state is the decoder's own output, after the final norm: no layer gives it.
    handle = parts.layers[layer - 1].register_forward_hook(stop) if layer < parts.num_layers else None
    try:
        with evaluating(model), autocast(weight.device, weight.dtype):
            return parts.decode(input_ids=input_ids.to(weight.device))
    except _LayerReached:
        return found[0]
    finally:
        if handle is not None:
            handle.remove()
