"""How well a model knows each document: Min-K% Prob and Min-K%++, from the log-probabilities of its tokens.

Min-K% Prob (Shi et al., arXiv 2310.16789) is the mean log-probability of the k% least probable tokens. Min-K%++ (Zhang
et al., arXiv 2404.02936) first standardises each token's log-probability by the mean and standard deviation that
log-probabilities have under the model's own prediction at that place. Both are higher for what is memorised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ibft.architecture import CausalLM, evaluating
from ibft.data import EncodedDataset
from ibft.errors import InputError
from ibft.loading import autocast

Span = Literal["response", "full"]
BATCH_TOKENS = 8192
LOGITS_BLOCK = 2**24  # logits in memory at a time, in float32: 64 MiB, and up to three temporaries of that size
_LOWEST = -1e4  # beside the largest logit; what lies below has a probability of exactly 0 in float32


class Scores(NamedTuple):
    """Scores of documents, [documents] each, float64 means of float32 values; a higher one means more memorised.

    min_k: Min-K% Prob, nats. min_k_plus_plus: Min-K%++, standard deviations. mean_log_prob: over all scored tokens,
    nats. tokens: how many those are, int64.
    """

    min_k: np.ndarray
    min_k_plus_plus: np.ndarray
    mean_log_prob: np.ndarray
    tokens: np.ndarray

    def put(self, documents: np.ndarray, scores: Scores) -> None:
        """Takes over the scores of these documents (indices)."""
        for column, values in zip(self, scores, strict=True):
            column[documents] = values


def empty_scores(documents: int) -> Scores:
    """Zeros, to `put` scores into."""
    return Scores(np.zeros(documents), np.zeros(documents), np.zeros(documents), np.zeros(documents, np.int64))


def score_documents(
    model: nn.Module,
    data: EncodedDataset,
    *,
    k: float = 0.2,
    span: Span = "response",
    batch_tokens: int = BATCH_TOKENS,
) -> Scores:
    """Scores of all documents, in their order, by any causal language model, with an adapter or without.

    k: share of the tokens that the means are of, in (0, 1], rounded down to whole tokens and at least one. span:
    "response" scores what is learnt (the response and its EOS, or the assistant's turns), "full" every token but the
    first, which nothing predicts. batch_tokens: padded tokens of a forward pass; it changes only the last bits, and
    equal documents have equal scores always. Memory for logits is that of LOGITS_BLOCK, never [tokens, V] of a batch,
    unless the model's logits are no function of its head alone (see `CausalLM`): then a batch is made that small.
    InputError for a bad argument, an adapter that learns a prompt, or log-probabilities that are not finite.
    """
    scores = empty_scores(len(data))
    for documents, found in score_batches(model, data, np.arange(len(data)), k=k, span=span, batch_tokens=batch_tokens):
        scores.put(documents, found)
    return scores


def score_batches(
    model: nn.Module,
    data: EncodedDataset,
    documents: np.ndarray,
    *,
    k: float = 0.2,
    span: Span = "response",
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[np.ndarray, Scores]]:
    """As `score_documents`, for the documents of these indices, batch by batch: indices, and their scores.

    The longest come first, so that too little memory shows at once.
    """
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 < k <= 1:
        raise InputError(f"k must be a share of the tokens, above 0 and at most 1, not {k!r}; Min-20% Prob is k=0.2.")
    if span not in ("response", "full"):
        raise InputError(f"span must be 'response' or 'full', not {span!r}.")
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise InputError(f"batch_tokens must be a positive integer, not {batch_tokens!r}.")
    predictor = _Predictor(model)
    groups = _equal_documents(data, documents, span)
    for batch in _batches([data.lengths[group[0]] for group in groups], predictor.at_most(batch_tokens)):
        found = [_Wanted(data, groups[index][0], span) for index in batch]
        with evaluating(model):
            log_probs, standardised = predictor.read(found)
        rows = [
            (_lowest(log_prob, k), _lowest(standard, k), log_prob.mean(dtype=np.float64), len(log_prob))
            for log_prob, standard in zip(log_probs, standardised, strict=True)
        ]
        members = [groups[index] for index in batch]
        repeated = [row for row, group in zip(rows, members, strict=True) for _ in group]
        min_k, plus_plus, mean, tokens = map(np.array, zip(*repeated, strict=True))
        yield np.concatenate(members), Scores(min_k, plus_plus, mean, tokens)


class _Wanted:
    """The tokens of a document, [length] int64, and the positions of those that are scored, [n] int64, from 1."""

    def __init__(self, data: EncodedDataset, index: int, span: Span) -> None:
        document = data.document(index)
        self.tokens = document.tokens
        self.positions = np.flatnonzero(document.is_label) if span == "response" else np.arange(1, len(self.tokens))


class _Predictor:
    """A model's log-probabilities of given tokens, from the hidden states under its head where that is possible."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise InputError("an adapter that learns a prompt puts tokens of its own before a document; use LoRA.")
        self._model, self._parts = model, _parts(model, base)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._vocabulary = int(base.config.get_text_config().vocab_size)

    def at_most(self, batch_tokens: int) -> int:
        """Tokens of a batch: fewer where the model makes the logits of all of them at once."""
        return batch_tokens if self._parts is not None else min(batch_tokens, max(1, LOGITS_BLOCK // self._vocabulary))

    @torch.no_grad()
    def read(self, batch: Sequence[_Wanted]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probabilities and standardised ones of the wanted tokens of each document, [n] float32."""
        width = max(len(each.tokens) for each in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)  # [B, T]
        for row, each in enumerate(batch):
            ids[row, : len(each.tokens)] = torch.from_numpy(each.tokens)
        before = np.concatenate([row * width + each.positions - 1 for row, each in enumerate(batch)])
        places = torch.from_numpy(before).to(self._device)  # [N] flat, of what predicts each wanted token
        targets = torch.from_numpy(np.concatenate([each.tokens[each.positions] for each in batch])).to(self._device)
        with autocast(self._device, self._dtype):
            # No attention mask: padding on the right is seen by no token that is scored, and without a mask one
            # document alone and many take the same path through the attention.
            states = self._states(ids.to(self._device))  # [B, T, H], or [B, T, V]
            states = states.reshape(-1, states.shape[-1]).index_select(0, places)
            block = max(1, LOGITS_BLOCK // self._vocabulary)
            found = [
                _log_probs(self._logits(states[at : at + block]), targets[at : at + block])
                for at in range(0, len(places), block)
            ]
        log_probs, standardised = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
        if not (np.isfinite(log_probs).all() and np.isfinite(standardised).all()):
            raise InputError("the model's log-probabilities are not finite; try float32, or look at how it was made.")
        ends = np.cumsum([len(each.positions) for each in batch])[:-1]
        return np.split(log_probs, ends), np.split(standardised, ends)

    def _states(self, ids: Tensor) -> Tensor:
        if self._parts is None:
            return self._model(input_ids=ids, use_cache=False).logits
        return self._parts.decode(input_ids=ids)

    def _logits(self, states: Tensor) -> Tensor:
        """[n, H] or [n, V] -> logits [n, V] float32."""
        return states.float() if self._parts is None else self._parts.logits(states)


def _parts(model: Any, base: Any) -> CausalLM | None:
    """The model's parts, if its logits follow from them."""
    try:
        parts = CausalLM.of(base)
        parts.check_logits(model)
    except InputError:
        return None
    return parts


def _log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V] float32, overwritten; targets [n] -> log p(target), (log p(target) - mean) / deviation; [n] each.

    Mean and deviation are those of log p under p. The log-partition cancels in the difference, so it is taken between
    logits relative to the largest one: where the model is nearly sure, log p and its mean are both nearly 0, and their
    difference would be rounding error.
    """
    relative = logits.sub_(logits.amax(-1, keepdim=True)).clamp_(min=_LOWEST)
    target = relative.gather(-1, targets[:, None])[:, 0]
    probabilities = relative.exp()
    total = probabilities.sum(-1)
    log_prob = target - total.log()
    probabilities.div_(total[:, None])
    mean = (probabilities * relative).sum(-1)
    variance = relative.sub_(mean[:, None]).square_().mul_(probabilities).sum(-1)
    # 0 only where a single token has all the probability that float32 can tell, or all have the same: target - mean is
    # 0 for it then. Another target than that single token scores below anything else, down to -1e21 and further.
    return log_prob, (target - mean) / variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()


def _lowest(values: np.ndarray, k: float) -> float:
    """The mean of the share k of the lowest values: rounded down to whole ones (0.29 of 100 are 29), at least one."""
    count = max(1, int(k * len(values) + 1e-9))
    return float(np.partition(values, count - 1)[:count].mean(dtype=np.float64))


def _equal_documents(data: EncodedDataset, documents: np.ndarray, span: Span) -> list[np.ndarray]:
    """The documents in groups that are equal in tokens and in what is scored, which are scored once; longest first."""
    groups: dict[bytes, list[int]] = {}
    for index in documents[np.argsort(-data.lengths[documents], kind="stable")].tolist():
        wanted = _Wanted(data, index, span)
        parts = (hashlib.sha256(part.tobytes()).digest() for part in (wanted.tokens, wanted.positions))
        groups.setdefault(b"".join(parts), []).append(index)
    return [np.array(group) for group in groups.values()]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[range]:
    """Consecutive documents (descending lengths) whose padded size is at most batch_tokens; one at least."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, batch_tokens // int(lengths[start])))
        yield range(start, stop)
        start = stop
