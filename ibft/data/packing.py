"""Which documents share a row, which rows share a batch, and the tensors of a batch.

Everything is a pure function of the lengths, the seed and the step, so a run's place in its data is one integer.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from ibft.data.encoded import Document
from ibft.errors import InputError

IGNORE = -100
Packing = Literal["best-fit", "none"]
Lengths = Literal["device", "host"]  # where attention by documents looks for the documents' lengths


class BatchPlan:
    """The order of a whole run. A *bin* holds the indices of the documents that share one row of a batch.

    lengths: [documents] integers in 1..max_length. "best-fit" packs the whole dataset anew every epoch; "none" gives
    every document a bin of its own. Bins depend on (lengths, max_length, packing, seed, epoch) alone; world_size,
    accumulation and rows_per_batch only decide how consecutive bins are dealt out: optimizer step s of an epoch takes
    bins s*G .. (s+1)*G - 1, G = rows_per_step or else world_size * accumulation * rows_per_batch. InputError for
    lengths out of range.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        max_length: int,
        packing: Packing = "best-fit",
        rows_per_batch: int,
        accumulation: int,
        world_size: int,
        seed: int,
        rows_per_step: int | None = None,
    ) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        if self.lengths.ndim != 1 or not len(self.lengths):
            raise InputError(f"lengths must list at least one document, not an array of shape {self.lengths.shape}.")
        unfit = np.flatnonzero((self.lengths < 1) | (self.lengths > max_length))
        if len(unfit):
            raise InputError(
                f"Document {unfit[0]} has {self.lengths[unfit[0]]} tokens; accepted are 1 to max_length {max_length}."
            )
        self.max_length, self.packing, self.seed = max_length, packing, seed
        self.rows_per_batch, self.world_size = rows_per_batch, world_size
        self.rows_per_step = rows_per_step or world_size * accumulation * rows_per_batch
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])

    def bins(self, epoch: int) -> list[np.ndarray]:
        """Document indices (int64) of every bin, in the order of the epoch; each document occurs exactly once."""
        cached_epoch, bins = self._cached
        if cached_epoch != epoch:
            bins = self._pack(epoch)
            self._cached = (epoch, bins)
        return bins

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps, the ragged last one included: the same for every epoch, as best-fit sees only lengths."""
        return -(-len(self.bins(epoch)) // self.rows_per_step)

    def total_steps(self, num_epochs: float) -> int:
        """Steps of a run, at least 1; part of an epoch is rounded up to whole steps (less rounding error)."""
        return max(1, math.ceil(num_epochs * self._steps_per_epoch - 1e-6))

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of optimizer step `step` of the run, counted from 0."""
        return divmod(step, self._steps_per_epoch)

    def micro_batches(self, step: int, rank: int) -> list[list[np.ndarray]]:
        """The micro-batches of a step for a rank: each a list of at most `rows_per_batch` bins, possibly empty.

        Every rank gets the same number of them, as few as hold the step's bins. Ranks hold consecutive bins, so that
        all ranks' micro-batches in a row are the step's bins in order. A ragged last step is spread evenly, first over
        the ranks, then over their micro-batches.
        """
        bins = self._step_bins(step)
        mine = _share(bins, rank, self.world_size)
        most = -(-len(bins) // self.world_size)
        count = -(-most // self.rows_per_batch)
        return [_share(mine, index, count) for index in range(count)]

    def documents(self, step: int) -> np.ndarray:
        """The indices of a step's documents, of all ranks and micro-batches: what its token counts are taken over."""
        return np.concatenate(self._step_bins(step))

    def positions(self, step: int) -> int:
        """Positions in a step's batches on all ranks, padding included: rows are as long as their batch's longest."""
        total = 0
        for rank in range(self.world_size):
            for bins in self.micro_batches(step, rank):
                total += len(bins) * max(int(self.lengths[row].sum()) for row in bins) if bins else 1
        return total

    def efficiency(self, epoch: int) -> float:
        """Share of real tokens among the positions of the epoch's bins, were every row `max_length` long."""
        return float(self.lengths.sum()) / (len(self.bins(epoch)) * self.max_length)

    @cached_property
    def _steps_per_epoch(self) -> int:
        return self.steps_in_epoch(0)

    def _step_bins(self, step: int) -> list[np.ndarray]:
        epoch, step_in_epoch = self.locate(step)
        first = step_in_epoch * self.rows_per_step
        return self.bins(epoch)[first : first + self.rows_per_step]

    def _pack(self, epoch: int) -> list[np.ndarray]:
        stream = np.random.PCG64([self.seed, epoch])
        order = permutation(stream, len(self.lengths))  # breaks the ties of equal lengths
        if self.packing == "none":
            return list(order[:, None])
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        bin_of, num_bins = _best_fit(self.lengths[order].tolist(), self.max_length)
        place = permutation(stream, num_bins)[bin_of]
        boundaries = np.bincount(place, minlength=num_bins).cumsum()[:-1]
        return np.split(order[np.argsort(place, kind="stable")], boundaries)


def collate(
    bins: list[list[Document]],
    *,
    pad_token_id: int,
    max_length: int,
    packing: Packing,
    lengths: Lengths | None = None,
) -> dict[str, Any]:
    """One row for every bin, its documents one after the other, padded on the right to the longest row.

    All [B, T] and int64 unless said otherwise:
      input_ids       tokens
      labels          -100 on prompts, on padding and on the first token of every document, so that the model's shift by
                      one can never cross documents
      position_ids    from 0 in every document; the padding of a row counts from 0 as a document of its own
      token_mask      bool, True on real tokens
      noise_rows      (example_id * max_length + position) mod 2**32, 0 on padding: the row ids of the noise stream
      label_indices   [M], ascending: the flat positions b*T + t whose next token is a label
      attention_mask  only with packing "none"; without one, transformers isolates packed documents by position_ids
    and with `lengths`, in place of attention_mask, `document_lengths` of the flattened rows.

    No bins give the dummy batch, which holds no real token: one padding token, which attends to itself.
    """
    longest = max((sum(len(document.tokens) for document in documents) for documents in bins), default=1)
    if longest > max_length:
        raise ValueError(f"a row of {longest} tokens is longer than max_length {max_length}")
    if packing == "none" and any(len(documents) > 1 for documents in bins):
        raise ValueError("packing 'none' takes one document a row")
    shape = (max(len(bins), 1), longest)
    input_ids = np.full(shape, pad_token_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    positions = np.arange(longest)
    position_ids = np.zeros(shape, np.int64)
    token_mask = np.zeros(shape, bool)
    noise_rows = np.zeros(shape, np.int64)
    sizes: list[int] = []  # of the documents, a row's padding being one
    for row, documents in enumerate(bins):
        start = 0
        for tokens, is_label, example_id in documents:
            end = start + len(tokens)
            input_ids[row, start:end] = tokens
            labels[row, start + 1 : end] = np.where(is_label[1:], tokens[1:], IGNORE)
            position_ids[row, start:end] = positions[: len(tokens)]
            noise_rows[row, start:end] = (example_id * max_length + positions[: len(tokens)]) % 2**32
            start = end
        position_ids[row, start:] = positions[: longest - start]
        token_mask[row, :start] = True
        sizes += [len(document.tokens) for document in documents]
        sizes += [longest - start] if start < longest else []
    next_is_label = np.zeros(shape, bool)
    next_is_label[:, :-1] = labels[:, 1:] != IGNORE
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "token_mask": token_mask,
        "noise_rows": noise_rows,
        "label_indices": np.flatnonzero(next_is_label),
    }
    if packing == "none" and lengths is None:
        batch["attention_mask"] = token_mask.astype(np.int64) if bins else np.ones(shape, np.int64)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return tensors if lengths is None else tensors | document_lengths(sizes or [1], lengths)


def document_lengths(sizes: Sequence[int], lengths: Lengths) -> dict[str, Any]:
    """What attentions by documents are called with, of the documents in a flattened batch [B*T].

    "device", for kernels, as transformers calls them: cu_seq_lens_q and cu_seq_lens_k, int32 [documents + 1], where
    each begins and the last one ends; max_length_q and max_length_k, the longest, a number, so that no layer has to ask
    the device for it. "host", for a loop over the documents: document_lengths, their lengths as numbers, since DDP and
    FSDP2 move tensors to the device.
    """
    if lengths == "host":
        return {"document_lengths": tuple(sizes)}
    bounds = torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32))
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(sizes), "max_length_k": max(sizes)}


def _best_fit(lengths: list[int], capacity: int) -> tuple[np.ndarray, int]:
    """(bin of each length [n] int64, number of bins): each goes where it leaves the least room; descending lengths."""
    rooms: list[int] = []  # the distinct room left in bins that can still take something, ascending
    bins_with: dict[int, list[int]] = {}
    bin_of: list[int] = []
    num_bins = 0
    for length in lengths:
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bin_index, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[at]
            bin_index = bins_with[room].pop()
            if not bins_with[room]:
                del bins_with[room], rooms[at]
        bin_of.append(bin_index)
        room -= length
        if room >= lengths[-1]:
            if room not in bins_with:
                bisect.insort(rooms, room)
                bins_with[room] = []
            bins_with[room].append(bin_index)
    return np.array(bin_of), num_bins


def permutation(stream: np.random.PCG64, size: int) -> np.ndarray:
    """From the raw stream, which is the same in every numpy; Generator.permutation is not promised to be."""
    return np.argsort(stream.random_raw(size), kind="stable")


def _share(items: list[np.ndarray], index: int, shares: int) -> list[np.ndarray]:
    """Part `index` of `shares` consecutive parts, whose sizes differ by at most one, the larger ones first."""
    size, larger = divmod(len(items), shares)
    start = index * size + min(index, larger)
    return items[start : start + size + (index < larger)]
