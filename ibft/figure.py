"""What the figures of all commands share: whether one can be drawn, and how it is written. matplotlib is an extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ibft.errors import InputError


def check_figure(file: Path, flag: str, otherwise: str = "") -> None:
    """InputError where no figure can be drawn to `file`, which `flag` names; to be called before the computation.

    `otherwise`: what does without the figure, in words.
    """
    if importlib.util.find_spec("matplotlib") is None:
        advice = f" ({otherwise})" if otherwise else ""
        raise InputError(f'{flag} draws with matplotlib, which is not installed: pip install "ibft[plot]"{advice}.')
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{flag} takes a file that ends in .png, .svg or .pdf, not {str(file)!r}.")


def start_pyplot() -> Any:
    """matplotlib.pyplot, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, file: Path) -> None:
    """Writes and closes a figure of pyplot's."""
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
