"""What the report's figures share: colours, axes, marks, and the way from a figure to SVG text."""

from __future__ import annotations

import io
import re
import textwrap
from typing import Any

from ibft.lab.report_data import SFT, SFT_FILTERED, SFT_HALF, SFT_REFERENCE, SFT_UNMEMORISED, Arm, Lab
from ibft.lab.report_findings import CHANGES
from ibft.lab.report_statistics import Estimate

WIDTH = 3.5  # inches, of a panel
# Okabe and Ito's colours, which the colour-blind tell apart; every series has a shape or a dash of its own as well.
BLACK, ORANGE, GREEN, BLUE, RED, PURPLE = "#333333", "#c98500", "#009e73", "#0072b2", "#d55e00", "#b5558a"
GREY = "#767676"
MODELS = {"base-memorised": "base that has memorised", "base-reference": "reference base"}
_STYLES = {  # by name of an arm, else by group: colour, marker, dash
    SFT: (BLACK, "s", "-"),
    SFT_REFERENCE: (GREEN, "^", (0, (5, 1.5))),
    SFT_FILTERED: (ORANGE, "v", (0, (3, 1.5))),
    SFT_UNMEMORISED: (PURPLE, "P", (0, (1, 1.2))),
    "reference": (GREY, "X", (0, (1, 1))),
    SFT_HALF: (GREY, "p", (0, (2, 2))),
    "published": (RED, "D", "-"),
    "narrow": (PURPLE, "d", "-"),
    "grid": (BLUE, "o", "-"),
}
_CHANGES = (  # which never meet the references in a panel with a legend
    (GREEN, "h", (0, (6, 1.5))), (PURPLE, "h", (0, (4, 1, 1, 1))), (ORANGE, "h", (0, (1.5, 1))),
    (BLACK, "h", (0, (3, 1, 1, 1, 1, 1))),
)  # fmt: skip
_WITHOUT_KL = (0, (2.5, 1.2))
_HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.3}
LOOK: Any = {  # matplotlib's settings, with which all panels are drawn

    "svg.hashsalt": "ibft.lab", "svg.fonttype": "none", "text.parse_math": False, "font.family": "DejaVu Sans",
    "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
    "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False, "legend.fontsize": 8,
    "axes.grid": False, "grid.color": "#dddddd", "grid.linewidth": 0.6, "lines.linewidth": 1.6,
}  # fmt: skip


def new_axes(height: float, rows: int = 1) -> tuple[Any, Any]:
    """A panel's figure and its axes [rows], below one another. `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, sharex=True, squeeze=False)[:, 0]


def style(lab: Lab, arm: Arm) -> tuple[str, str, Any]:
    """Colour, marker and dash; an ablation has those of its arm, dashed (and hollow where it has a marker)."""
    if arm.group == "ablation":
        whole = lab.arms.get(arm.of[0]) if arm.of else None
        colour, marker, _ = _STYLES.get(whole.group if whole else "grid", _STYLES["grid"])
        return colour, marker, _WITHOUT_KL
    if arm.group in CHANGES:
        changes = [other.name for other in lab.arms.values() if other.group in CHANGES]
        return _CHANGES[changes.index(arm.name) % len(_CHANGES)]
    return _STYLES.get(arm.name) or _STYLES.get(arm.group, _STYLES["reference"])


def point(axes: Any, row: float, estimate: Estimate, lab: Lab, arm: Arm) -> None:
    """A share in percent with its interval, in an arm's style."""
    colour, marker, _ = style(lab, arm)
    whisker(axes, row, estimate, colour)
    face = "white" if arm.group == "ablation" else colour
    axes.plot(100 * estimate.value, row, marker, color=face, markeredgecolor=colour, markersize=5.5)


def whisker(axes: Any, row: float, estimate: Estimate, colour: str) -> None:
    """An interval of shares, in percent."""
    axes.plot([100 * estimate.low, 100 * estimate.high], [row, row], color=colour, linewidth=1.3, zorder=2)


def row_label(axes: Any, x: float, row: float, text: str) -> None:
    """A row's name above what it shows, so that a narrow panel keeps its width for the numbers."""
    axes.text(x, row - 0.2, text, va="bottom", fontsize=8, color=BLACK, bbox=_HALO)


def row_axes(axes: Any, rows: int, label: str) -> None:
    """Axes whose rows go downwards and bear their own labels."""
    axes.set_ylim(rows - 0.45, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel(label)


def legend_below(figure: Any, axes: Any, columns: int = 1) -> None:
    """A legend under the axes, with one entry for each label, however often it was drawn."""
    unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower left", ncols=columns, handlelength=2.6, labelspacing=0.25,
        borderaxespad=0.1,
    )  # fmt: skip


def to_svg(figure: Any, title: str) -> str:
    """The figure as SVG without what would make two of the same differ, or reach outside of the page."""
    figure.suptitle(textwrap.fill(title, 46), x=0.01, ha="left", fontsize=9, fontweight="bold")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = (
        svg[svg.index("<svg") :]
        .replace("xlink:href", "href")
        .replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    )
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A hundredth of a point is finer than any screen or printer.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), svg)


def model_title(lab: Lab, model: str) -> str:
    """What a reader calls a model of the memorisation part: a base, or an arm's title."""
    return MODELS.get(model) or (lab.arms[model].title if model in lab.arms else model)


def slug(text: str) -> str:
    """Fit for a file's name and an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
