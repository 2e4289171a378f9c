"""The report's figures, as SVG text: many small panels, which a phone shows below and a page beside one another."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibft.errors import InputError
from ibft.evaluate.metrics import Count
from ibft.lab import report_statistics as statistics
from ibft.lab.figure_curves import base_curves, bottlenecks, losses, options
from ibft.lab.figure_style import (
    BLUE,
    GREEN,
    GREY,
    LOOK,
    RED,
    legend_below,
    model_title,
    new_axes,
    point,
    row_axes,
    row_label,
    slug,
    style,
    to_svg,
    whisker,
)
from ibft.lab.report_data import SFT, SFT_REFERENCE, Lab
from ibft.lab.report_findings import Findings, shown_arms, shown_rows, unchanged
from ibft.lab.report_words import points
from ibft.memorization.plot import density

_ROWS = {  # kinds of rows: label, colour, dash
    "training": ("memorised training rows", RED, "-"),
    "fresh": ("other training rows", GREEN, (0, (4, 1.5))),
    "held-out": ("held-out rows", BLUE, (0, (1.5, 1))),
}


@dataclass(frozen=True)
class Panel:
    """A figure of the report. `name` is its file's without ending, `section` the part of the report it is shown in."""

    name: str
    section: str
    svg: str
    description: str  # for those who cannot see it


def check_plotting() -> None:
    """InputError where the report's libraries are missing, before anything is computed."""
    for library in ("matplotlib", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise InputError(f'the report needs {library}, which is not installed: pip install "ibft[plot]".')


def draw(lab: Lab, all_found: Sequence[Findings]) -> list[Panel]:
    """Every panel that the results allow; the same results give the same bytes. InputError as `check_plotting`."""
    check_plotting()
    import matplotlib

    panels: list[Panel] = []
    with matplotlib.rc_context(LOOK):
        for found in all_found:
            for section, title, paint in _painters(lab, found):
                figure = paint()
                if figure is not None:
                    name = f"{section}-{found.regime.name}"
                    text = f"{title}. Regime: {found.regime.title}."
                    panels.append(Panel(slug(name), section.split(".")[0], to_svg(figure, found.regime.title), text))
    return panels


def _painters(lab: Lab, found: Findings) -> Iterable[tuple[str, str, Callable[[], Any]]]:
    """(section, or section.part; description; what draws it) in the order of the page."""
    yield "barrier", "Tasks solved after SFT, by base", lambda: _barrier(lab, found)
    yield "arms", "Held-out tasks solved, by arm, with 95% intervals", lambda: _forest(lab, found)
    yield "terms", "Gain over SFT with and without the KL term", lambda: _terms(lab, found)
    yield "grid.with", "Gain over SFT by alpha and beta, with KL", lambda: _heat(lab, found, ablation=False)
    yield "grid.without", "Gain over SFT by alpha and beta, without KL", lambda: _heat(lab, found, ablation=True)
    yield "collapse", "KL, CE_ib and active dimensions over time", lambda: bottlenecks(lab, found)
    yield "options.success", "Difference to the same setting without an option", lambda: _changes(lab, found, "option")
    for plain in unchanged(lab, found, "option"):
        title = f"KL over time of {plain.title}, with and without options"
        yield f"options.{plain.name}", title, functools.partial(options, lab, found, plain)
    yield "layers", "Difference to the same setting at the default layer", lambda: _changes(lab, found, "layer")
    yield "densities", "Densities of Min-K% by model and rows", lambda: _densities(lab, found)
    yield "representation", "Separation of the rows scored highest and lowest", lambda: _representation(lab, found)
    yield "curves.base", "The base's loss in pretraining", lambda: base_curves(lab, found)
    yield "curves.arms", "Training loss of the arms", lambda: losses(lab, found)
    yield "pass", "Pass@k^(m) against m", lambda: _pass(lab, found)


def _barrier(lab: Lab, found: Findings) -> Any:
    arms = [arm for arm in lab.arms_in(found.regime, "reference") if arm.name in (SFT, SFT_REFERENCE)]
    if len(arms) < 2:
        return None
    figure, (axes,) = new_axes(1.9)
    names = {SFT: "SFT from the base that has memorised", SFT_REFERENCE: "SFT from the reference base"}
    for row, arm in enumerate(arms):
        colour, marker, _ = style(lab, arm)
        held_out, training = found.held_out[arm.name], found.training[arm.name]
        axes.plot([100 * held_out.value, 100 * training.value], [row, row], color="#cccccc", linewidth=2, zorder=1)
        whisker(axes, row, held_out, colour)
        axes.plot(100 * held_out.value, row, marker, color=colour, markersize=7)
        axes.plot(100 * training.value, row, marker, color="white", markeredgecolor=colour, markersize=7)
        row_label(axes, 0, row, names[arm.name])
        labels = [(held_out.value, f"held-out {100 * held_out.value:.0f}%")]
        labels.append((training.value, f"training {100 * training.value:.0f}%"))
        if abs(held_out.value - training.value) < 0.4:  # two labels would overlap
            labels = [(max(held_out.value, training.value), f"{labels[0][1]}, {labels[1][1]}")]
        for value, label in labels:
            axes.text(
                100 * value, row + 0.2, label, va="top", fontsize=8, color="#444444",
                ha="left" if value < 0.15 else "right" if value > 0.85 else "center",
            )  # fmt: skip
    row_axes(axes, len(arms), "tasks solved, %")
    axes.set_xlim(-2, 103)
    return figure


def _forest(lab: Lab, found: Findings) -> Any:
    """A row for every arm that is not an ablation; the ablation stands on its arm's row."""
    arms = lab.arms_in(found.regime, "reference", "published", "narrow", "grid")
    if not arms:
        return None
    figure, (axes,) = new_axes(0.75 + 0.36 * len(arms))
    if SFT in found.held_out:
        axes.axvline(100 * found.held_out[SFT].value, color="#999999", linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
    for row, arm in enumerate(arms):
        ablation = lab.ablation_of(arm)
        if ablation and ablation.name in found.held_out:
            point(axes, row + 0.14, found.held_out[ablation.name], lab, ablation)
            point(axes, row - 0.08, found.held_out[arm.name], lab, arm)
        else:
            point(axes, row, found.held_out[arm.name], lab, arm)
        row_label(axes, 0, row, arm.title)
    highest = max(100 * estimate.high for estimate in found.held_out.values())
    row_axes(axes, len(arms), "held-out tasks solved, %")
    right = max(10.0, highest)
    axes.set_xlim(-0.02 * right, 1.03 * right)
    return figure


def _terms(lab: Lab, found: Findings) -> Any:
    """Differences to SFT: with KL filled, without it hollow."""
    rows = [(each.arm.title, each.gain, each.predicting) for each in found.terms]
    if not rows:
        return None
    figure, (axes,) = new_axes(0.95 + 0.4 * len(rows))
    axes.axvline(0, color=GREY, linewidth=0.9)
    left = min(100 * min(row[1].low, row[2].low) for row in rows)
    for row, (label, with_kl, without) in enumerate(rows):
        for estimate, offset, fill in ((with_kl, -0.06, BLUE), (without, 0.16, "white")):
            whisker(axes, row + offset, estimate, BLUE)
            axes.plot(100 * estimate.value, row + offset, "o", color=fill, markeredgecolor=BLUE, markersize=5.5)
        row_label(axes, left, row, label)
    row_axes(axes, len(rows), "difference to SFT, points")
    for label, fill in (("IB-FT", BLUE), ("without KL", "white")):
        axes.plot([], [], "o", color=fill, markeredgecolor=BLUE, markersize=5.5, label=label)
    legend_below(figure, axes, columns=2)
    return figure


def _heat(lab: Lab, found: Findings, *, ablation: bool) -> Any:
    """Differences to SFT over (alpha, beta), with the KL at the end; a star where the interval excludes 0."""
    cells: dict[tuple[float, float], str] = {}
    for arm in lab.arms_in(found.regime, "grid", "published"):
        shown = lab.ablation_of(arm) if ablation else arm
        if shown and shown.name in found.against_sft and arm.alpha is not None and arm.beta is not None:
            cells.setdefault((arm.alpha, arm.beta), shown.name)
    alphas, betas = sorted({alpha for alpha, _ in cells}), sorted({beta for _, beta in cells})
    if len(cells) < 3 or len(alphas) < 2 or len(betas) < 2:
        return None
    every = [arm for arm in lab.arms_in(found.regime, "grid", "published", "ablation") if arm.name in found.against_sft]
    limit = max(5.0, *(100 * abs(found.against_sft[arm.name].value) for arm in every))
    values = np.full((len(betas), len(alphas)), np.nan)
    for (alpha, beta), name in cells.items():
        values[betas.index(beta), alphas.index(alpha)] = 100 * found.against_sft[name].value
    figure, (axes,) = new_axes(0.85 + 0.55 * len(betas))
    edges = [np.arange(len(each) + 1) - 0.5 for each in (alphas, betas)]
    mesh = axes.pcolormesh(*edges, values, cmap="PuOr_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=1.5)
    for (alpha, beta), name in cells.items():
        difference, bottleneck = found.against_sft[name], found.bottlenecks.get(name)
        x, y = alphas.index(alpha), betas.index(beta)
        red, green, blue, _ = mesh.to_rgba(values[y, x])
        colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
        star = "" if difference.verdict == "noise" else "*"
        axes.text(
            x, y + 0.04, points(difference.value) + star, ha="center", va="bottom",
            color=colour, fontsize=9, fontweight="bold" if star else "normal",
        )  # fmt: skip
        if bottleneck and not ablation:  # unpriced, it may be anything
            axes.text(x, y - 0.08, f"KL {bottleneck.kl.value:.2g}", ha="center", va="top", color=colour, fontsize=7)
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="alpha", ylabel="beta")
    axes.text(1, 1.03, "without KL" if ablation else "with KL", transform=axes.transAxes, ha="right", color="#444444")
    return figure


def _changes(lab: Lab, found: Findings, group: str) -> Any:
    """Differences of options or layers to the arm that each changes."""
    arms = [arm for arm in lab.arms_in(found.regime, group) if arm.name in found.changes]
    if not arms:
        return None
    figure, (axes,) = new_axes(0.75 + 0.36 * len(arms))
    axes.axvline(0, color=GREY, linewidth=0.9)
    left = min(0.0, *(100 * found.changes[arm.name].low for arm in arms))
    for row, arm in enumerate(arms):
        whisker(axes, row, found.changes[arm.name], BLUE)
        axes.plot(100 * found.changes[arm.name].value, row, "o", color=BLUE, markersize=5.5)
        row_label(axes, left, row, arm.title)
    row_axes(axes, len(arms), "difference to the same setting as it is, points")
    return figure


def _densities(lab: Lab, found: Findings) -> Any:
    """A ridge for each model: kernel densities of Min-K% of each kind of rows, the seeds together.

    Each curve has the same height: what is known by heart lies in a peak that would flatten all others.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for entry in shown_rows(lab, "memorization", found):
        kind = entry["rows"].replace("_", "-")
        scores.setdefault(entry["model"], {}).setdefault(kind, []).extend(entry["min_k"])
    kinds = [kind for kind in _ROWS if any(kind in of_model for of_model in scores.values())]
    every = [value for of_model in scores.values() for values in of_model.values() for value in values]
    if len(every) < 2 or not kinds:
        return None
    low = np.quantile(every, 0.002)
    at = np.linspace(low - 0.06 * abs(low), 0, 160)
    figure, (axes,) = new_axes(0.95 + 0.66 * len(scores) + 0.165 * len(kinds))
    for ridge, (model, of_model) in enumerate(scores.items()):
        for kind in (kind for kind in kinds if of_model.get(kind)):
            label, colour, dash = _ROWS[kind]
            if kind == "training" and not found.regime.memorised:
                label = "training rows"
            values = np.array(of_model[kind])
            within = np.union1d(at, np.quantile(values, np.linspace(0, 1, 101)).clip(at[0]))  # a peak may be narrow
            heights = density(values, within, upper=0.0)
            heights = ridge - 0.62 * heights / heights.max()
            axes.fill_between(within, ridge, heights, color=colour, alpha=0.22, linewidth=0)
            axes.plot(within, heights, color=colour, linewidth=1.3, linestyle=dash, label=label)
        row_label(axes, at[0], ridge - 0.5, model_title(lab, model))
    row_axes(axes, len(scores), "Min-K% Prob, nats per token: right is memorised")
    axes.set_ylim(len(scores) - 0.9, -0.95)
    axes.grid(False)
    legend_below(figure, axes)
    return figure


def _representation(lab: Lab, found: Findings) -> Any:
    """How far apart the rows scored highest and lowest lie, by their spread: each seed with its interval.

    Grey: what random groups of the same rows and sizes give.
    """
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for entry in shown_rows(lab, "representation", found):
        by_model.setdefault(entry["model"], []).append(entry)
    if not by_model:
        return None
    most = max(map(len, by_model.values()))
    figure, (axes,) = new_axes(0.75 + (0.3 + 0.09 * most) * len(by_model))
    for row, (model, entries) in enumerate(by_model.items()):
        for index, entry in enumerate(entries):
            at = row + 0.5 * (index - (len(entries) - 1) / 2) / most
            separation, (low, high) = entry["separation"], (each / entry["spread"] for each in entry["chance_l2"])
            axes.plot([low, high], [at, at], color="#cccccc", linewidth=4, solid_capstyle="butt", zorder=1)
            axes.plot([separation["low"], separation["high"]], [at, at], color=BLUE, linewidth=1.1, zorder=2)
            axes.plot(separation["value"], at, "o", color=BLUE, markersize=4)
        row_label(axes, 0, row - 0.1, model_title(lab, model))
    row_axes(axes, len(by_model), "L2 distance of the groups' means / spread within them")
    axes.set_xlim(left=0)
    return figure


def _pass(lab: Lab, found: Findings) -> Any:
    """Pass@k^(m) against m, for the largest of k = 10, 5 that all the arms have samples for."""
    arms = [
        arm for arm in shown_arms(lab, found) if all(run.correct for run in lab.of(found.regime, arm.name).values())
    ]
    fewest = min((run.samples for arm in arms for run in lab.of(found.regime, arm.name).values()), default=0)
    k = next((k for k in (10, 5) if k <= fewest), fewest)
    if k < 2:
        return None
    figure, (axes,) = new_axes(2.7 + 0.165 * len(arms))
    ms = np.arange(1, k + 1)
    for index, arm in enumerate(arms):
        counts = [[Count(run.samples, c) for c in run.correct] for run in lab.of(found.regime, arm.name).values()]
        curve = statistics.pass_curve(counts, k)
        colour, marker, dash = style(lab, arm)
        values = np.array([(each.value, each.low, each.high) for each in curve]) * 100
        at = ms + 0.06 * (index - len(arms) / 2)  # so that intervals do not hide one another
        axes.vlines(at, values[:, 1], values[:, 2], color=colour, linewidth=0.7, alpha=0.7)
        face = "white" if arm.group == "ablation" else colour
        axes.plot(
            at, values[:, 0], color=colour, linestyle=dash, marker=marker, markersize=4, markerfacecolor=face,
            linewidth=1.2, label=arm.title,
        )  # fmt: skip
    axes.set_xticks(ms)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set(xlabel=f"m: of {k} samples, at least m pass", ylabel=f"Pass@{k}^(m), %")
    legend_below(figure, axes)
    return figure
