"""The report's curves over training steps: losses, KL, CE_ib and the share of active dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ibft.lab.figure_style import BLACK, GREEN, GREY, MODELS, legend_below, new_axes, style
from ibft.lab.report_data import Arm, Lab, Run
from ibft.lab.report_findings import COLLAPSED, Findings, shown_arms

_FIELDS = {
    "kl_nats": "KL, nats per token",
    "ce_ib": "CE_ib, nats per token",
    "active_share": "active dimensions, share",
    "ce": "fine-tuning loss (CE), nats per token",
}


def bottlenecks(lab: Lab, found: Findings) -> Any:
    """KL, CE_ib and the share of active dimensions over time, below one another."""
    arms = shown_arms(lab, found, references=False)
    fields = [field for field in ("kl_nats", "ce_ib", "active_share") if _series(lab, found, arms, field)]
    if not fields:
        return None
    figure, rows = new_axes(0.6 + 1.75 * len(fields) + 0.165 * len(arms), rows=len(fields))
    for axes, field in zip(rows, fields, strict=True):
        _over_time(axes, lab, found, arms, field)
    rows[-1].set_xlabel("fine-tuning step")
    legend_below(figure, rows[0])
    return figure


def options(lab: Lab, found: Findings, plain: Arm) -> Any:
    """KL over time of an arm, and of the options that change it."""
    arms = [plain, *(arm for arm in lab.arms_in(found.regime, "option") if plain.name in arm.of)]
    return _alone(lab, found, arms, "kl_nats", 2.3)


def losses(lab: Lab, found: Findings) -> Any:
    """The fine-tuning's loss over time."""
    return _alone(lab, found, shown_arms(lab, found), "ce", 2.6)


def base_curves(lab: Lab, found: Findings) -> Any:
    """The loss in pretraining of the regime's two bases, a line for each seed."""
    figure, (axes,) = new_axes(2.9)
    for kind, colour, dash in (("memorised", BLACK, "-"), ("reference", GREEN, (0, (5, 1.5)))):
        for row in lab.rows("bases", found.regime):
            if row["kind"] == kind and row.get("curve"):
                steps, losses = zip(*((record["step"], record["loss"]) for record in row["curve"]), strict=True)
                label = MODELS[f"base-{kind}"]
                axes.plot(steps, losses, color=colour, linestyle=dash, linewidth=1.1, label=label)
    if not axes.lines:
        return None
    axes.grid(axis="y")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pretraining step")
    axes.set_title("pretraining loss, nats per token", fontsize=8, fontweight="normal")
    legend_below(figure, axes)
    return figure


def _alone(lab: Lab, found: Findings, arms: list[Arm], field: str, height: float) -> Any:
    """One field over time, of that height without its legend; None where no run has it."""
    if not _series(lab, found, arms, field):
        return None
    figure, (axes,) = new_axes(height + 0.165 * len(arms))
    _over_time(axes, lab, found, arms, field)
    axes.set_xlabel("fine-tuning step")
    legend_below(figure, axes)
    return figure


def _over_time(axes: Any, lab: Lab, found: Findings, arms: Sequence[Arm], field: str) -> None:
    """A field of the training records: the mean over seeds, and the band between the lowest and the highest."""
    for arm, (steps, values) in _series(lab, found, arms, field):
        colour, _, dash = style(lab, arm)
        axes.plot(steps, values.mean(axis=0), color=colour, linestyle=dash, label=arm.title)
        if len(values) > 1:
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    if field in ("kl_nats", "ce"):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
    if field == "kl_nats":
        axes.axhline(COLLAPSED, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
        at_right = axes.get_yaxis_transform()
        axes.text(
            1, COLLAPSED, "collapsed below", va="bottom", ha="right", fontsize=7.5, color=GREY, transform=at_right
        )
    if field == "active_share":
        axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y")
    axes.set_title(_FIELDS[field], fontsize=8, fontweight="normal")


def _series(
    lab: Lab, found: Findings, arms: Sequence[Arm], field: str
) -> list[tuple[Arm, tuple[np.ndarray, np.ndarray]]]:
    """Of each arm that has them: (steps [n], values [seeds, n])."""
    return [(arm, curve) for arm in arms if (curve := _curve(lab.of(found.regime, arm.name), field)) is not None]


def _curve(runs: Mapping[int, Run], field: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps [n], values [seeds, n]) of the steps that all seeds have a number at; None without any."""
    found = [{row["step"]: row[field] for row in run.curve if row.get(field) is not None} for run in runs.values()]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    if not steps:
        return None
    return np.array(steps), np.array([[of_seed[step] for step in steps] for of_seed in found], dtype=float)
