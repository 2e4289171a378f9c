"""From a configuration to what a run trains and validates on: datasets mixed by weight, rows held out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from ibft.data.chat import ChatTemplate, HistoryRewritten, TemplateRefusal, learnt_turns, one_for_each_turn
from ibft.data.columns import quoted
from ibft.data.encode import encode
from ibft.data.encoded import EncodedDataset, Origin
from ibft.data.memorized import leave_out_memorized
from ibft.data.packing import permutation
from ibft.data.readers import Source
from ibft.data.sources import SPLIT_WORDS, as_dataset, choice, load_source, splits_of
from ibft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ibft.config import TrainConfig

# Streams of random choices beside the plan's [seed, epoch], which no epoch comes near.
_HOLD_OUT, _PARTIAL_PASS = 2**32, 2**32 + 1
MOST_EXAMPLES = 2**31  # more are a slip of the keyboard, and would end in a lack of memory


class Part(NamedTuple):
    """A dataset's share of something: its name, its rows, and which of them, [n] int64, with repeats."""

    name: str
    source: Source
    rows: np.ndarray
    weight: float = 1.0


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedDataset, EncodedDataset | None]:
    """What a run trains on, and what it validates on, if the configuration asks for that.

    Within an epoch, a dataset of weight w is passed floor(w) times whole, and a share of its rows, drawn by the seed,
    makes up the rest; each occurrence is an example of its own. The id of an example is its position in the mixture:
    the datasets in the order in which they are named, each pass in the order of its rows. A row that is held out for
    validation is in no pass, nor is one that --drop_memorized leaves out. InputError for what cannot be used.
    """
    named = load_sources(config)
    validation = _validation_parts(config, named)
    if validation is None and config.validation_column is not None:
        train, validation, left_out = _by_column(config.validation_column, named)
    elif validation is None and config.validation_split is not None:
        train, validation, left_out = *_held_out(config, named), 0
    else:
        train, left_out = [np.arange(source.table.num_rows) for _, source in named], 0
    memorized, memorized_by = 0, ""
    if config.memorization_scores is not None and config.drop_memorized is not None:
        before = sum(map(len, train))
        train, memorized_by = leave_out_memorized(
            config.memorization_scores, config.drop_memorized, config.memorization_measure, named, train
        )
        memorized = before - sum(map(len, train))
    parts = _passes(config, named, train)
    _check_alike([*parts, *(validation or [])])
    data = encode_parts(config, tokenizer, parts, left_out=left_out, memorized=memorized, memorized_by=memorized_by)
    if validation is None:
        return data, None
    try:
        return data, encode_parts(config, tokenizer, validation)
    except InputError as error:
        raise InputError(f"The data to validate on: {error}") from error


def load_sources(config: TrainConfig) -> list[tuple[str, Source]]:
    """The datasets that the configuration names, each with all rows of its split. InputError as for `load_data`."""
    _refuse_twice(config.dataset)
    return _load(config, config.dataset, config.dataset_split)


def _load(config: TrainConfig, names: Sequence[str], split: str) -> list[tuple[str, Source]]:
    choose = choice(
        config.prompt_column, config.response_column, config.format, config.separator, config.validation_column
    )
    named = [(name, load_source(name, choose, split=split)) for name in names]
    _check_alike([Part(name, source, np.arange(0)) for name, source in named])
    return named


def _refuse_twice(names: Sequence[str]) -> None:
    """The same rows under two names could be held out under one of them and trained on under the other."""
    seen: dict[str, str] = {}
    for name in names:
        place = _place(name)
        if place in seen:
            again = f"{name!r}" if seen[place] == name else f"{seen[place]!r} and {name!r}"
            raise InputError(f"--dataset names {again} twice; to pass over it several times, use --dataset_weights.")
        seen[place] = name


def _place(name: str) -> str:
    """What is the same for two names of one dataset: a path without links and detours, or a Hub name."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _check_alike(parts: Sequence[Part]) -> None:
    first = parts[0]
    for other in parts[1:]:
        one, two = first.source.layout, other.source.layout
        if one.pair_of_text != two.pair_of_text:
            text, chat = (first, other) if one.pair_of_text else (other, first)
            raise InputError(
                f"{text.name!r} holds text ({quoted(text.source.layout.columns)}) and {chat.name!r} conversations "
                f"({quoted(chat.source.layout.columns)}); a run needs one format. --format chat makes conversations of "
                "both."
            )
        if one.pair_of_text and one.separator != two.separator:
            raise InputError(
                f"{first.name!r} ({quoted(one.columns)}) joins prompt and response with {one.separator!r}, and "
                f"{other.name!r} ({quoted(two.columns)}) with {two.separator!r}; a run needs one format. --separator "
                "sets one for both, --format chat makes conversations of both."
            )


def _validation_parts(config: TrainConfig, named: Sequence[tuple[str, Source]]) -> list[Part] | None:
    """The parts that are not rows of what is trained on: a split of its own, or another dataset."""
    if config.validation_dataset is not None:
        name = config.validation_dataset
        split = _only_split(name)
        if split == config.dataset_split and _place(name) in {_place(other) for other, _ in named}:
            raise InputError(
                f"--validation_dataset {name} is trained on; name another, or hold rows out with --validation_split."
            )
        return [Part(name, source, np.arange(source.table.num_rows)) for name, source in _load(config, [name], split)]
    wanted = config.validation_rows
    if not isinstance(wanted, str):
        return None
    for name, _ in named:
        if (splits := splits_of(name)) is not None and wanted not in splits:
            raise InputError(
                f"{name!r} has no split {wanted!r}; --validation_split can be {quoted(splits)}, or a share (0.05) or a "
                "number (200) of the rows to hold out."
            )
    loaded = _load(config, [name for name, _ in named], wanted)
    return [Part(name, source, np.arange(source.table.num_rows)) for name, source in loaded]


def _only_split(name: str) -> str:
    """The split of a dataset that is only there to validate on: "validation", or the only one it has."""
    splits = splits_of(name)
    if splits is None or "validation" in splits or not splits:
        return "validation"
    if len(splits) > 1:
        raise InputError(f"--validation_dataset {name} has the splits {quoted(splits)}, of which none is 'validation'.")
    return splits[0]


def _held_out(config: TrainConfig, named: Sequence[tuple[str, Source]]) -> tuple[list[np.ndarray], list[Part]]:
    """Rows drawn by the seed from all datasets alike, and the rows of each that are left."""
    sizes = [source.table.num_rows for _, source in named]
    total, wanted = sum(sizes), config.validation_rows
    assert isinstance(wanted, (int, float))
    count = wanted if isinstance(wanted, int) else max(1, round(wanted * total))
    if count >= total:
        raise InputError(
            f"--validation_split {config.validation_split} holds out {count:,} rows, and the data has {total:,}; at "
            "least one must be left to train on."
        )
    chosen = np.zeros(total, bool)
    chosen[permutation(np.random.PCG64([config.seed, _HOLD_OUT]), total)[:count]] = True
    train, validation = [], []
    for (name, source), mask in zip(named, np.split(chosen, np.cumsum(sizes)[:-1]), strict=True):
        train.append(np.flatnonzero(~mask))
        validation.append(Part(name, source, np.flatnonzero(mask)))
    return train, [part for part in validation if len(part.rows)]


def _by_column(column: str, named: Sequence[tuple[str, Source]]) -> tuple[list[np.ndarray], list[Part], int]:
    """The rows that say "train" in each dataset, those that say "validation", and the number that say "test"."""
    train, validation, left_out = [], [], 0
    for name, source in named:
        words = source.table["split"].to_pylist()
        splits = np.array([SPLIT_WORDS.get(word.strip().lower(), "") for word in words])
        if (unknown := np.flatnonzero(splits == "")).size:
            raise InputError(
                f"{name}, row {unknown[0]} (counted from 0): column {column!r} holds {words[unknown[0]]!r}; accepted "
                f"are {', '.join(SPLIT_WORDS)}."
            )
        train.append(np.flatnonzero(splits == "train"))
        validation.append(Part(name, source, np.flatnonzero(splits == "validation")))
        left_out += int((splits == "test").sum())
    for what, count in (("train", sum(map(len, train))), ("validation", sum(len(part.rows) for part in validation))):
        if not count:
            raise InputError(f"--validation_column {column}: no row says {what!r}.")
    return train, [part for part in validation if len(part.rows)], left_out


def _passes(config: TrainConfig, named: Sequence[tuple[str, Source]], train: Sequence[np.ndarray]) -> list[Part]:
    """The rows of each dataset as an epoch passes over them."""
    parts = []
    for index, ((name, source), rows) in enumerate(zip(named, train, strict=True)):
        weight = config.dataset_weights[index] if config.dataset_weights else 1.0
        if weight * len(rows) > MOST_EXAMPLES:
            raise InputError(
                f"{name!r} of weight {weight:g} makes {weight * len(rows):.3g} examples of its {len(rows):,} rows; an "
                f"epoch holds at most {MOST_EXAMPLES:,}."
            )
        whole, share = int(weight), weight % 1
        count = round(share * len(rows))
        stream = np.random.PCG64([config.seed, _PARTIAL_PASS, index])
        partial = np.sort(permutation(stream, len(rows))[:count])
        passes = np.concatenate([np.tile(rows, whole), rows[partial]])
        if len(rows) and not len(passes):  # without rows, all are held out, and another dataset has some
            raise InputError(
                f"{name!r} of weight {weight:g} gives no row to train on: its {len(rows):,} rows times {weight:g}."
            )
        parts.append(Part(name, source, passes, weight))
    return parts


def encode_parts(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    *,
    left_out: int = 0,
    memorized: int = 0,
    memorized_by: str = "",
) -> EncodedDataset:
    """The parts as one dataset; a row that occurs several times is tokenised once."""
    tables, sources, source_rows, order, start = [], [], [], [], 0
    for index, part in enumerate(parts):
        rows, places = np.unique(part.rows, return_inverse=True)
        table = part.source.table
        if len(rows) < table.num_rows:
            table = table.take(pa.array(rows))
        if "split" in table.column_names:
            table = table.drop_columns(["split"])
        tables.append(table)
        sources.append(np.full(len(rows), index))
        source_rows.append(rows)
        order.append(places + start)
        start += len(rows)
    table, positions = pa.concat_tables(tables), np.concatenate(order)
    origin = Origin(
        names=tuple(part.name for part in parts),
        sources=np.concatenate(sources),
        source_rows=np.concatenate(source_rows),
        datasets=tuple((part.name, len(part.rows), part.weight) for part in parts),
        left_out=left_out,
        memorized=memorized,
        memorized_by=memorized_by,
    )
    layout = parts[0].source.layout
    if not layout.pair_of_text:
        template = ChatTemplate(tokenizer)
        if _rewrites(template):
            table, positions, origin = _one_for_each_answer(table, positions, origin, template)
    table = table.append_column("example_id", pa.array(np.arange(table.num_rows)))
    return encode(
        as_dataset(table),
        tokenizer,
        max_length=config.max_length,
        bos=config.bos,
        overlong=config.overlong,
        num_proc=config.num_proc,
        separator=layout.separator,
        order=positions,
        origin=origin,
    )


def _one_for_each_answer(
    table: pa.Table, order: np.ndarray, origin: Origin, template: ChatTemplate
) -> tuple[pa.Table, np.ndarray, Origin]:
    """The rows, where a conversation that the template would rewrite has become one for each answer.

    Some templates (Qwen3's) write an answer differently once the conversation goes on, without its reasoning. Then no
    single text holds every answer behind the prompt that inference would build for it, but one for each answer does.
    """
    texts: list[str] = []
    rows: list[int] = []
    counts = []
    for row, cell in enumerate(table["messages"].to_pylist()):
        messages = json.loads(cell)
        found = [messages]
        if len(learnt_turns(messages)) > 1:
            try:
                template.render(messages)
            except HistoryRewritten:
                found = one_for_each_turn(messages)
            except TemplateRefusal:
                pass  # `encode` says so, naming the row
        texts += [cell] if len(found) == 1 else map(json.dumps, found)
        rows += [row] * len(found)
        counts.append(len(found))
    sizes = np.array(counts)
    first = np.cumsum(sizes) - sizes
    in_order = [np.arange(first[row], first[row] + sizes[row]) for row in order]
    origin = origin._replace(
        sources=origin.sources[rows],
        source_rows=origin.source_rows[rows],
        split_conversations=int((sizes > 1).sum()),
    )
    return pa.table({"messages": pa.array(texts, pa.string())}), np.concatenate(in_order), origin


def _rewrites(template: ChatTemplate) -> bool:
    """Whether the template writes a turn differently once the conversation goes on.

    Some drop an answer's reasoning, some write the system message into the last question.
    """
    question, system = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
    answers: list[dict[str, Any]] = [
        {"content": "a"},
        {"content": "<think>\nr\n</think>\n\na"},
        {"content": "a", "reasoning_content": "r"},
        {"content": "a", "thinking": "r"},
    ]
    for start, answer in itertools.product(([], [system]), answers):
        try:
            template.render([*start, *[question, {"role": "assistant", **answer}] * 2])
        except HistoryRewritten:
            return True
        except TemplateRefusal:
            continue
    return False
