"""`ibft memorization filter`: a dataset without the rows that a model knows best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ibft.data.memorized import Drop, ScoreTable, scores_of_rows
from ibft.data.sources import choice, load_source
from ibft.errors import InputError
from ibft.memorization.config import FilterFlags, check_output
from ibft.memorization.original import write_rows

SHOWN = 10  # dropped rows that are named to people


def filter_rows(config: FilterFlags) -> dict[str, Any]:
    """Writes the rows that are left, and says what was dropped: JSON-able. InputError for what cannot be used."""
    output = Path(config.output)
    check_output(output, [config.dataset], [config.scores])
    if output.exists() and not config.overwrite:
        raise InputError(f"--output {str(output)!r} exists; choose another, or pass --overwrite.")
    drop = Drop.read(config.drop_top, "--drop_top")
    table = ScoreTable(Path(config.scores))
    source = load_source(
        config.dataset, choice(config.prompt_column, config.response_column), split=config.dataset_split
    )
    rows = np.arange(source.table.num_rows)
    scores = scores_of_rows(table, config.measure, [(config.dataset, source)], [rows])
    dropped = drop.choose(scores, f"--drop_top {config.drop_top}")
    keep = np.ones(len(rows), bool)
    keep[dropped] = False
    write_rows(config.dataset, config.dataset_split, keep, output)
    left = scores[keep & np.isfinite(scores)]
    return {
        "output": str(output),
        "measure": config.measure,
        "model": table.record.get("model"),
        "adapter": table.record.get("adapter"),
        "rows": len(rows),
        "kept": int(keep.sum()),
        "dropped": len(dropped),
        "without_score": int(np.isnan(scores).sum()),
        "lowest_dropped": float(scores[dropped].min()),
        "highest_kept": float(left.max()) if len(left) else None,
        "dropped_rows": [{"row": int(row), "score": float(scores[row])} for row in dropped],
    }


def describe(result: dict[str, Any]) -> str:
    """The result for people: how many, where the border lies, and which rows are known best."""
    measure, highest = result["measure"], result["highest_kept"]
    by = f", by {result['model']!r}" if result["model"] else ""
    by += f" with {result['adapter']!r}" if result["adapter"] else ""
    first = result["dropped_rows"][:SHOWN]
    lines = [
        f"{result['rows']:,} rows: {result['dropped']:,} dropped, whose {measure}{by} is "
        f"{result['lowest_dropped']:.4g} or more; {result['kept']:,} written to {result['output']}"
        + (f", whose highest is {highest:.4g}" if highest is not None else ""),
        "known best (row, counted from 0: score): "
        + ", ".join(f"{each['row']}: {each['score']:.4g}" for each in first)
        + ", ..." * (result["dropped"] > len(first)),
    ]
    if result["without_score"]:
        lines.append(f"{result['without_score']:,} rows have no score, because they are empty or too long, and stay")
    return "\n".join(lines)
