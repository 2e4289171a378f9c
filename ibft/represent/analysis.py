"""The same rows under a base model and its adapters: hidden states, their distances, and what each bottleneck keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ibft.architecture import CausalLM, default_target_layer
from ibft.data import EncodedDataset
from ibft.errors import InputError
from ibft.export import TRAINING_DTYPES, Source, read_source
from ibft.loading import (
    cast_weights,
    check_positions,
    check_vocabulary,
    compute_in_base_dtype,
    fingerprint,
    load_base_config,
    load_base_model,
)
from ibft.model import HEAD_NAME, IBModel
from ibft.objective import CONFIG_NAME, IBConfig
from ibft.represent.distances import between, ratio
from ibft.represent.groups import Groups
from ibft.represent.states import Span, bottleneck_statistics, hidden_means

BASE = "base"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder under the name that it has in the report; `ib` where a bottleneck lies beside it."""

    name: str
    source: Source
    ib: IBConfig | None

    @classmethod
    def read(cls, text: str) -> Adapter:
        """From `name=path`, or a path alone, whose last part is the name. InputError for what is no adapter."""
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_dir():  # a folder may be called lr=1e-4
            name, path = Path(text).name, text
        if not name or name == BASE:
            raise InputError(f"--adapters {text!r}: the name before = must be neither empty nor {BASE!r}.")
        source = read_source(Path(path).expanduser())
        has_bottleneck = (source.folder / CONFIG_NAME).is_file() and (source.folder / HEAD_NAME).is_file()
        return cls(name, source, IBConfig.load(source.folder / CONFIG_NAME) if has_bottleneck else None)


def read_adapters(texts: Sequence[str]) -> list[Adapter]:
    """The adapters in their order, of different names. InputError as `Adapter.read`."""
    adapters = [Adapter.read(text) for text in texts]
    names = [adapter.name for adapter in adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--adapters names {twice[0]!r} twice; give each a name of its own, as name=path.")
    return adapters


def choose_layer(base_model: str, adapters: Sequence[Adapter], layer: int | None) -> int:
    """The layer to compare at: the one given, or the bottlenecks', or the published relative depth.

    InputError for one that the model does not have, or bottlenecks at several layers.
    """
    layers = {adapter.ib.target_layer: adapter.name for adapter in adapters if adapter.ib is not None}
    if layer is None and len(layers) > 1:
        found = ", ".join(f"{name} at layer {number}" for number, name in layers.items())
        raise InputError(f"the adapters have their bottlenecks at different layers ({found}); choose with --layer.")
    num_layers = load_base_config(base_model).get_text_config().num_hidden_layers
    chosen = layer or next(iter(layers), default_target_layer(num_layers))
    if chosen > num_layers:
        raise InputError(f"--layer must be in 1..{num_layers}, the layers of {base_model!r}, not {chosen}.")
    return chosen


@dataclass(frozen=True)
class Analysis:
    """What is compared, and how; `run` does it. rows: the documents of each row that `groups` chooses from."""

    base_model: str
    adapters: Sequence[Adapter]
    data: EncodedDataset
    rows: Sequence[np.ndarray]
    groups: Groups
    layer: int
    span: Span
    batch_tokens: int
    seed: int
    dtype: torch.dtype
    device: torch.device

    def run(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """An entry for the base model and for each adapter, ready for JSON, as docs/representation.md describes them.

        One model is in memory at a time. InputError for what does not load or fit together, before anything is
        computed where that can be seen.
        """
        entries: list[dict[str, Any]] = []
        points: list[tuple[np.ndarray, np.ndarray]] = []
        for name, model in self._models(tokenizer):
            most, least = self._split(self._means(model, self.layer))
            points.append((most, least))
            entries.append(
                {
                    "name": name,
                    "hidden": asdict(between(most, least, seed=self.seed)),
                    "separation_over_base": None if len(points) == 1 else ratio(most, least, *points[0]),
                    "bottleneck": self._bottleneck(model, np.concatenate([most, least])),
                }
            )
            del model  # before the next one is loaded
        for entry, projection in zip(entries, project(points), strict=True):
            entry["projection"] = projection
        return entries

    def _models(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Any]]:
        base = load_base_model(self.base_model, "auto", None, self.device)
        self._check(base, tokenizer)
        yield BASE, cast_weights(base, self.dtype)
        for adapter in self.adapters:
            del base  # an adapter may have changed more than can be taken back (modules_to_save, biases)
            base = cast_weights(load_base_model(self.base_model, "auto", None, self.device), self.dtype)
            try:
                model = IBModel.from_pretrained(base, adapter.source.folder)
            except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise InputError(
                    f"the adapter {adapter.name!r} ({adapter.source.folder}) does not fit {self.base_model!r}: {reason}"
                ) from error
            compute_in_base_dtype(model)
            yield adapter.name, model
            del model

    def _check(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        CausalLM.of(base).check_causal()
        check_vocabulary(self.base_model, base, tokenizer, [self.data])
        check_positions(self.base_model, base.config, int(self.data.lengths[np.concatenate(self._documents)].max()))
        # A run's record is of the dtype that training loaded the model in, which need not be that of the file.
        ours = {fingerprint(base), *(fingerprint(base, dtype) for dtype in TRAINING_DTYPES)}
        for adapter in self.adapters:
            record = adapter.source.record
            in_4bit = record.get("config", {}).get("load_in_4bit")  # a fingerprint of other weights
            if record.get("base") is not None and not in_4bit and record["base"] not in ours:
                raise InputError(
                    f"--base_model {self.base_model!r} is not the model that the adapter {adapter.name!r} "
                    f"({adapter.source.folder}) was trained on: its fingerprint differs from the one in ibft.json."
                )

    @property
    def _documents(self) -> list[np.ndarray]:
        """Those of each row of both groups, the most memorised first."""
        return [self.rows[row] for row in (*self.groups.most, *self.groups.least)]

    def _means(self, model: Any, layer: int) -> np.ndarray:
        """[rows, H] float32: the mean over a row's positions, whichever of its documents they are in."""
        documents = np.concatenate(self._documents)
        means = hidden_means(model, self.data, documents, layer=layer, span=self.span, batch_tokens=self.batch_tokens)
        positions = (self.data.label_tokens if self.span == "response" else self.data.lengths)[documents]
        ends = np.cumsum([len(each) for each in self._documents])[:-1]
        parts = zip(np.split(means, ends), np.split(positions, ends), strict=True)
        return np.stack([np.average(part, 0, weights=weights).astype(np.float32) for part, weights in parts])

    def _split(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rows[: len(self.groups.most)], rows[len(self.groups.most) :]

    def _bottleneck(self, model: Any, means: np.ndarray) -> dict[str, Any] | None:
        """What the model's bottleneck keeps of the rows; None where it has none."""
        if not isinstance(model, IBModel) or model.bottleneck is None or model.ib_config is None:
            return None
        layer = model.ib_config.target_layer
        if layer != self.layer:
            means = self._means(model, layer)
        with torch.no_grad():  # the encoder is affine: mu of a mean is the mean of mu
            mu = model.bottleneck.encode(torch.from_numpy(means).to(self.device))[0].cpu().numpy()  # [rows, K]
        most, least = (
            bottleneck_statistics(
                model,
                self.data,
                np.concatenate([self.rows[row] for row in group]),
                span=self.span,
                batch_tokens=self.batch_tokens,
            )
            for group in (self.groups.most, self.groups.least)
        )
        both = most.merged(least)
        return {
            "layer": layer,
            "dimensions": len(both.kl),
            "active_dimensions": int(both.active.sum()),
            "tokens": both.tokens,
            "kl_nats": both.kl.sum(),
            "kl_nats_most": most.kl.sum(),
            "kl_nats_least": least.kl.sum(),
            "kl_per_dimension": both.kl.tolist(),
            "mu_variance_per_dimension": both.mu_variance.tolist(),
            "mu": asdict(between(*self._split(mu), seed=self.seed)),
        }


def project(points: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """Two dimensions of each model's rows (most [n, H], least [m, H]), by one PCA for all models.

    Each model's rows are centred on the middle between its two group means, so that what a fine-tuning shifts as a
    whole does not take up an axis, and the axes are those of the largest variance of all models' rows together: every
    projection has the same axes and units. `explained` is the share of a model's own variance along each of them.
    """
    centred = [
        np.concatenate([most, least]).astype(np.float64) - (most.mean(0, np.float64) + least.mean(0, np.float64)) / 2
        for most, least in points
    ]
    axes = _principal_axes(np.concatenate(centred))
    projections = []
    for rows, (most, _) in zip(centred, points, strict=True):
        flat = rows @ axes.T  # [n + m, 2]
        explained = flat.var(0) / rows.var(0).sum()
        projections.append(
            {
                "explained": explained.tolist(),
                "most": flat[: len(most)].tolist(),
                "least": flat[len(most) :].tolist(),
            }
        )
    return projections


def _principal_axes(rows: np.ndarray) -> np.ndarray:
    """[2, H] (or [1, H] for a single column): the directions of the largest variance of centred rows [N, H]."""
    with torch.random.fork_rng(devices=[]):  # the algorithm starts from random vectors; so many rounds forget them
        torch.manual_seed(0)
        axes = torch.svd_lowrank(torch.from_numpy(rows), q=min(10, *rows.shape), niter=20)[2].T[:2].numpy()
    return axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]  # their sign is free
