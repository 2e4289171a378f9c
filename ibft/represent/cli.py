"""`ibft represent`: how far apart a model and its adapters keep the most and the least memorised rows."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ibft.config import DataFlags, Measure
from ibft.errors import InputError, Interrupted
from ibft.figure import check_figure
from ibft.flags import (
    AT_LEAST_1,
    NOT_EMPTY,
    NOT_NEGATIVE,
    REQUIRED,
    check_fields,
    flag,
    parse_flags,
)
from ibft.represent.plot import FIGURE_NAME, draw

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ibft.data import EncodedDataset
    from ibft.data.memorized import ScoreTable

RESULT_NAME = "representation.json"
_MODEL, _GROUPS, _OUTPUT = "models", "groups", "output"


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The models that are compared."""

    base_model: str = flag(_MODEL, REQUIRED, "Hub name or folder of the causal language model", NOT_EMPTY, path=True)
    adapters: list[str] = flag(  # noqa: RUF009
        _MODEL, [], "runs of ibft train on it, as name=path: their folders, or checkpoints in them", verbatim=True
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag(_MODEL, "auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    use_cpu: bool = flag(_MODEL, False, "leave a GPU alone")
    layer: int | None = flag(
        _MODEL, None, "from 1; if not given, the bottleneck's, and without one 20/32 up", AT_LEAST_1
    )


@dataclass(frozen=True, kw_only=True)
class RepresentConfig(DataFlags, ModelFlags):
    """The flags of `ibft represent`."""

    scores: str = flag(
        _GROUPS, REQUIRED, "file that `ibft memorization score` wrote for the dataset", NOT_EMPTY, path=True
    )
    measure: Measure = flag(  # noqa: RUF009
        _GROUPS, "min_k", "the score that counts; the higher, the more memorised"
    )
    share: str = flag(_GROUPS, "10%", "of the rows in each of the two groups, as 10% or 0.1", NOT_EMPTY)
    span: Literal["response", "full"] = flag(
        _GROUPS, "response", "positions in the mean of a row: those that predict what is learnt, or all"
    )
    seed: int = flag(_GROUPS, 0, "of the random groups", NOT_NEGATIVE)

    output_dir: str = flag(_OUTPUT, REQUIRED, f"folder for {RESULT_NAME} and {FIGURE_NAME}", NOT_EMPTY, path=True)
    overwrite: bool = flag(_OUTPUT, False, "replace what an earlier command left there")
    plot: bool = flag(_OUTPUT, True, "draw the figure")
    batch_tokens: int = flag(_OUTPUT, 8192, "positions in a batch, padding included", AT_LEAST_1)
    debug: bool = flag(_OUTPUT, False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.share_of_rows

    @property
    def share_of_rows(self) -> float:
        """The share as a number in (0, 0.5]."""
        text = self.share.strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share <= 0.5:
            raise InputError(f"--share takes a share of the rows above 0 and at most 50%, as 10% or 0.1, not {text!r}.")
        return share


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """The flags of `ibft represent plot`."""

    plot: str = flag("output", REQUIRED, "file to draw: .png, .svg or .pdf", NOT_EMPTY, path=True)
    debug: bool = flag("output", False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: Sequence[str]) -> None:
    """Parses the command line and compares, or draws what an earlier command found."""
    if argv[:1] == ["plot"]:
        _plot(argv[1:])
        return
    config = parse_flags(
        RepresentConfig,
        argv,
        "ibft represent",
        "Hidden states of the most and the least memorised rows under a base model and its adapters: how far apart the "
        "two groups lie, and what a bottleneck keeps of them.",
        example="\n\nexample:\n  ibft represent --base_model path/to/model --adapters sft=path/to/sft ib=path/to/ib "
        "\\\n    --dataset path/to/data.jsonl --scores path/to/scores.parquet --output_dir path/to/representation\n\n"
        "ibft represent plot DIR --plot FILE draws the figure of an output_dir anew.",
    )
    try:
        represent(config)
    except KeyboardInterrupt as interrupt:
        raise Interrupted("interrupted; the same command starts over.", signal.SIGINT) from interrupt


def represent(config: RepresentConfig) -> dict[str, Any]:
    """Compares, writes the result and its figure, prints a table, and returns the result.

    InputError for whatever cannot be used, most of it before a model is loaded.
    """
    from ibft.run_folder import leave_no_empty_folder, prepare_output, write_json  # imports torch and transformers

    folder = Path(config.output_dir)
    if (folder / RESULT_NAME).exists() and not config.overwrite:
        raise InputError(f"output_dir {folder} holds a {RESULT_NAME}; choose another folder, or pass --overwrite.")
    if config.plot:
        check_figure(folder / FIGURE_NAME, "--plot", "--no_plot does without")
    with leave_no_empty_folder(folder):
        prepare_output(folder, overwrite=True, resume=False)
        result = _compare(config)
        write_json(folder / RESULT_NAME, result)
    if config.plot:
        draw(result, folder / FIGURE_NAME)
    print("\n".join(table(result)))
    print(f"\nresult in {folder / RESULT_NAME}" + (f", figure in {folder / FIGURE_NAME}" if config.plot else ""))
    return result


def _compare(config: RepresentConfig) -> dict[str, Any]:
    import numpy as np
    import torch

    from ibft.data.memorized import ScoreTable
    from ibft.loading import load_tokenizer, quiet_libraries, resolve_dtype
    from ibft.represent.analysis import Analysis, choose_layer, read_adapters
    from ibft.represent.groups import choose_groups

    quiet_libraries(progress_bars=sys.stderr.isatty())
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    adapters = read_adapters(config.adapters)
    layer = choose_layer(config.base_model, adapters, config.layer)
    table = ScoreTable(Path(config.scores))
    tokenizer = load_tokenizer(config.base_model)
    data, rows, scores = _scored_rows(config, tokenizer, table)
    groups = choose_groups(scores, config.share_of_rows, config.scores)
    dtype = resolve_dtype(config.dtype, device)
    analysis = Analysis(
        base_model=config.base_model,
        adapters=adapters,
        data=data,
        rows=rows,
        groups=groups,
        layer=layer,
        span=config.span,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        dtype=dtype,
        device=device,
    )
    most, least = (data.example_ids[[rows[row][0] for row in group]].tolist() for group in groups[:2])
    try:
        models = analysis.run(tokenizer)
    except torch.OutOfMemoryError as error:  # where a batch is too large, it says so itself
        raise InputError(
            f"The device has too little memory for {config.base_model!r} in {str(dtype).removeprefix('torch.')}; "
            "--dtype bfloat16 needs half of what float32 needs, and --use_cpu takes the host's memory."
        ) from error
    result = {
        "config": dataclasses.asdict(config),
        "adapters": {adapter.name: str(adapter.source.folder) for adapter in adapters},
        "layer": layer,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "scores": table.record,
        "scored_rows": int(np.isfinite(scores).sum()),
        "most": {"example_ids": most, "lowest_score": groups.lowest_of_most},
        "least": {"example_ids": least, "highest_score": groups.highest_of_least},
        "models": models,
    }
    return _without_nan(result)


def _scored_rows(
    config: RepresentConfig, tokenizer: PreTrainedTokenizerBase, table: ScoreTable
) -> tuple[EncodedDataset, list[np.ndarray], np.ndarray]:
    """The data, the documents of each of its different rows, and the rows' scores, [rows], NaN for one without."""
    import numpy as np

    from ibft.data.memorized import row_digests, scores_of_rows
    from ibft.data.mixture import Part, encode_parts, load_sources
    from ibft.represent.groups import distinct_rows

    settings = config.train_config(config.base_model)
    named = load_sources(settings)
    rows = [np.arange(source.table.num_rows) for _, source in named]
    scores = scores_of_rows(table, config.measure, named, rows)  # of all rows, one dataset after the other
    parts = [Part(name, source, each) for (name, source), each in zip(named, rows, strict=True)]
    data = encode_parts(settings, tokenizer, parts)
    first = np.cumsum([0, *map(len, rows)])
    row_of = first[data.sources] + data.source_rows  # [documents]
    documents = distinct_rows(row_of, [digest for _, source in named for digest in row_digests(source)])
    return data, documents, scores[[row_of[each[0]] for each in documents]]


def _without_nan(value: Any) -> Any:
    """The value as JSON can hold it: what is no finite number is null."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    groups = result["most"], result["least"]
    rows = [["model", "L2", "spread", "L2/spread (95%)", "by chance", "p", "to base (95%)", "angle", "by chance"]]
    for entry in result["models"]:
        found, compared = entry["hidden"], entry["separation_over_base"]
        low, high = (value / found["spread"] for value in found["chance_l2"])
        rows.append(
            [
                entry["name"],
                f"{found['l2']:.4g}",
                f"{found['spread']:.4g}",
                _interval(found["separation"]),
                f"{low:.2f}-{high:.2f}",
                f"{found['p_l2']:.3f}",
                "" if compared is None else _interval(compared),
                f"{_number(found['angle_degrees'], '.2f')}°",
                "-".join(_number(value, ".2f") for value in found["chance_angle_degrees"]) + "°",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"Layer {result['layer']}: the {len(groups[0]['example_ids']):,} most against the "
        f"{len(groups[1]['example_ids']):,} least memorised of {result['scored_rows']:,} scored rows "
        f"({result['config']['measure']} from {groups[0]['lowest_score']:.3g} up, and up to "
        f"{groups[1]['highest_score']:.3g}).",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
        "spread: of the rows around their group's mean. by chance: the middle 95% for random groups of these rows.",
        "to base: how many times the base model's L2/spread.",
    ]
    for entry in result["models"]:
        if (kept := entry["bottleneck"]) is None:
            continue
        low, high = (value / kept["mu"]["spread"] for value in kept["mu"]["chance_l2"])
        lines += [
            "",
            f"{entry['name']}: bottleneck at layer {kept['layer']}, {kept['active_dimensions']} of "
            f"{kept['dimensions']} dimensions active, KL {kept['kl_nats']:.4g} nats per token "
            f"(most memorised {kept['kl_nats_most']:.4g}, least {kept['kl_nats_least']:.4g});",
            f"  mu: L2/spread {_interval(kept['mu']['separation'])}, by chance {low:.2f}-{high:.2f}, "
            f"p {kept['mu']['p_l2']:.3f}.",
        ]
    return lines


def _interval(values: Sequence[float | None]) -> str:
    value, low, high = (_number(each, ".2f") for each in values)
    return f"{value} ({low} to {high})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plot(argv: Sequence[str]) -> None:
    named: list[str] = []
    description = "Draws the figure of a result of `ibft represent` anew."
    config = parse_flags(PlotConfig, argv, "ibft represent plot", description, words=("DIR", named))
    if len(named) != 1:
        raise InputError("`ibft represent plot` takes the output_dir of one `ibft represent`.")
    check_figure(Path(config.plot), "--plot")
    file = Path(named[0]).expanduser()
    file = file / RESULT_NAME if file.is_dir() else file
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        models = result["models"]
    except FileNotFoundError as error:
        raise InputError(f"There is no file {str(file)!r}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no result of `ibft represent`: {type(error).__name__}: {error}.") from error
    draw(result, Path(config.plot))
    print(f"figure of {len(models)} models in {config.plot}")
