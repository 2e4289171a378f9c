"""The figure of a result: both groups under each model, how far apart they lie, what the bottleneck keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ibft.figure import save_figure, start_pyplot

FIGURE_NAME = "representation.png"
_GROUPS = (("least", "C0", "o"), ("most", "C3", "^"))  # name, colour, marker
_CHANCE = "0.85"


def draw(result: dict[str, Any], file: Path) -> None:
    """Draws what `ibft represent` found: a projection for each model above, the measures of all of them below."""
    models = result["models"]
    bottlenecks = [entry for entry in models if entry["bottleneck"] is not None]
    columns = max(len(models), 2 + bool(bottlenecks))
    figure = start_pyplot().figure(figsize=(3.6 * columns, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    _projections(above, models, result["layer"])
    axes = below.subplots(1, 2 + bool(bottlenecks))
    _separations(axes[0], models)
    _angles(axes[1], models)
    if bottlenecks:
        _kl(axes[2], bottlenecks)
    save_figure(figure, file)


def _projections(figure: Any, models: Sequence[dict[str, Any]], layer: int) -> None:
    axes = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
    for ax, entry in zip(axes, models, strict=True):
        projection = entry["projection"]
        for name, color, marker in _GROUPS:
            x, y, *_ = [*zip(*projection[name], strict=True), [0.0] * len(projection[name])]  # of one axis, in a line
            ax.scatter(x, y, s=10, alpha=0.5, color=color, marker=marker, linewidth=0, label=f"{name} memorised")
            center = sum(x) / len(x), sum(y) / len(y)
            ax.scatter(*center, s=90, color=color, marker=marker, edgecolor="black", label=f"their mean ({name})")
        share = " + ".join(f"{value:.0%}" for value in projection["explained"])
        ax.set_title(f"{entry['name']}: {share} of its variance", fontsize=9)
        ax.set_aspect("equal", adjustable="box")
        ax.set_xlabel("axis 1")
    axes[0].set_ylabel("axis 2")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Mean hidden states of rows at layer {layer}, on the first two axes of all models together")


def _separations(ax: Any, models: Sequence[dict[str, Any]]) -> None:
    for place, entry in enumerate(models):
        found = entry["hidden"]
        value, low, high = found["separation"]
        bounds = None if low is None else [[value - low], [high - value]]  # very small groups may have none
        _chance(ax, place, [bound / found["spread"] for bound in found["chance_l2"]])
        ax.errorbar(place, value, bounds, fmt="o", color="black", capsize=3)
    _by_model(ax, models)
    ax.set(title="L2 between the group means", ylabel="in spreads of a group")
    ax.set_ylim(bottom=0)


def _angles(ax: Any, models: Sequence[dict[str, Any]]) -> None:
    for place, entry in enumerate(models):
        found = entry["hidden"]
        if found["angle_degrees"] is None:
            continue
        _chance(ax, place, found["chance_angle_degrees"])
        ax.plot(place, found["angle_degrees"], "o", color="black")
        ax.plot(place, found["within_angle_degrees"], "_", color="black", markersize=14, label="of a row to its mean")
    _by_model(ax, models)
    ax.set(title="Angle between the group means", ylabel="degrees")
    ax.set_ylim(bottom=0)


def _kl(ax: Any, models: Sequence[dict[str, Any]]) -> None:
    for entry in models:
        kept = entry["bottleneck"]
        values = sorted(kept["kl_per_dimension"], reverse=True)
        label = f"{entry['name']}: {kept['active_dimensions']} of {kept['dimensions']} active"
        ax.plot(range(1, len(values) + 1), values, marker=".", label=label)
    ax.set_yscale("log")
    ax.set(title="KL per dimension, sorted", xlabel="dimension", ylabel="nats per token")
    ax.legend(fontsize=8)


def _chance(ax: Any, place: int, bounds: Sequence[float]) -> None:
    """A grey bar where random groups of the same rows lie."""
    ax.bar(place, bounds[1] - bounds[0], bottom=bounds[0], width=0.5, color=_CHANCE, label="by chance (95%)")


def _by_model(ax: Any, models: Sequence[dict[str, Any]]) -> None:
    ax.set_xticks(range(len(models)), [entry["name"] for entry in models])
    ax.set_xlim(-0.6, len(models) - 0.4)
    named = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # once each, not for every model
    ax.legend(named.values(), named, fontsize=8)
    ax.grid(axis="y", alpha=0.3)
