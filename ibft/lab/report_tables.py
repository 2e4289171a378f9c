"""The report's tables, as text cells: the page, the summary and the terminal show them each in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ibft.evaluate.metrics import KS, metric_name
from ibft.lab import report_statistics as statistics
from ibft.lab.figures import model_title
from ibft.lab.report_conclusions import number, percent, points
from ibft.lab.report_data import SFT, Lab
from ibft.lab.report_findings import Findings, shown_arms, shown_rows
from ibft.lab.report_statistics import Estimate

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row."""

    section: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(lab: Lab, all_found: Sequence[Findings]) -> list[Table]:
    """All tables that have rows."""
    every = [
        _bases(lab),
        held_out(lab, all_found),
        _terms(all_found),
        _bottlenecks(lab, all_found),
        _separations(lab, all_found),
        _representation(lab, all_found),
        *(_everything(lab, found) for found in all_found),
        _runs(lab),
    ]
    return [table for table in every if table.rows]


def held_out(lab: Lab, all_found: Sequence[Findings]) -> Table:
    """The main table: an arm a row, a regime a column."""
    rows = [
        [arm.title, *(_share(found.held_out.get(arm.name)) for found in all_found)]
        for arm in lab.arms.values()
        if any(arm.name in found.held_out for found in all_found)
    ]
    legend = "; ".join(f"{found.regime.name}: {found.regime.title}" for found in all_found)
    caption = f"Held-out tasks solved greedily, % (95% interval). {legend}."
    return Table("arms", caption, ["arm", *(found.regime.name for found in all_found)], rows)


def _share(found: Estimate | None) -> str:
    """ "23.5 (18.0–29.1)", in percent."""
    return NONE if found is None else f"{100 * found.value:.1f} ({100 * found.low:.1f}–{100 * found.high:.1f})"


def _difference(found: Estimate | None) -> str:
    """ "+2.5 (−1.0 to +6.0)" in points, with a star where the interval excludes 0."""
    if found is None:
        return NONE
    star = "" if found.verdict == "noise" else " *"
    return f"{points(found.value)} ({points(found.low)} to {points(found.high)}){star}"


def _plain(found: Estimate, digits: int) -> str:
    """A quantity over seeds, with its interval where there is one."""
    interval = "" if math.isnan(found.low) else f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{found.value:.{digits}f}{interval}".replace("-", "−")


def _bases(lab: Lab) -> Table:
    rows = []
    for regime in lab.regimes:
        for kind, title in (("memorised", "has memorised"), ("fresh", "has not")):
            found = [row for row in lab.rows("bases", regime) if row["kind"] == kind]
            if found:
                recall = statistics.over_seeds([row["recall"] for row in found])
                loss = statistics.over_seeds([row["name_loss"] for row in found])
                seeds = str(len(found))
                rows.append([regime.title, title, percent(recall.value), number(loss.value), seeds])
    caption = (
        "The bases before fine-tuning. Recall: share of the training programs that greedy decoding writes from the "
        "name alone. Loss: cross-entropy of those programs given their names, nats per token. Means over seeds."
    )
    return Table("barrier", caption, ["regime", "base", "recall", "loss given the name", "seeds"], rows)


def _terms(all_found: Sequence[Findings]) -> Table:
    rows = [
        [
            found.regime.title,
            *map(_difference, (found.terms.gain, found.terms.predicting, found.terms.compressing)),
            str(found.terms.settings),
        ]
        for found in all_found
        if found.terms
    ]
    caption = (
        "The gain over SFT averaged over the grid's settings, and its two parts, in points on held-out tasks (95% "
        "interval, paired by seed; * excludes 0). Gain = predicting + compressing."
    )
    columns = ["regime", "IB-FT − SFT", "predicting: no KL − SFT", "compressing: IB-FT − no KL", "settings"]
    return Table("terms", caption, columns, rows)


def _bottlenecks(lab: Lab, all_found: Sequence[Findings]) -> Table:
    rows = []
    for found in all_found:
        for arm in [*shown_arms(lab, found, references=False), *lab.arms_in(found.regime, "remedy")]:
            bottleneck = found.bottlenecks.get(arm.name)
            if bottleneck is None:
                continue
            active = bottleneck.active_share
            rows.append(
                [
                    f"{found.regime.name}: {arm.title}",
                    number(bottleneck.kl.value),
                    number(bottleneck.ce_ib_first),
                    number(bottleneck.ce_ib.value),
                    NONE if active is None else f"{active:.0%}",
                    f"{bottleneck.collapsed} of {bottleneck.seeds}",
                ]
            )
    caption = (
        "What the bottleneck came to: means over seeds, of the last tenth of each run's records. KL and CE_ib in nats "
        "per token; without the KL term, KL is measured and costs nothing. All other arms: see “Every number”."
    )
    columns = ["regime: arm", "KL, end", "CE_ib, start", "CE_ib, end", "active", "collapsed"]
    return Table("collapse", caption, columns, rows)


def _separations(lab: Lab, all_found: Sequence[Findings]) -> Table:
    rows = []
    for found in all_found:
        grouped: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
        for row in shown_rows(lab, "separations", found):
            score = {"min_k": "Min-K%", "min_k_plus_plus": "Min-K%++"}.get(row.get("score", "min_k"), row.get("score"))
            key = (row["model"], row["a"].replace("_", "-"), row["b"].replace("_", "-"), str(score))
            grouped.setdefault(key, []).append((row["auc"], row["ks"]))
        for (model, a, b, score), values in grouped.items():
            auc, ks = (statistics.over_seeds(column) for column in zip(*values, strict=True))
            which = f"{found.regime.name}: {model_title(lab, model)}"
            rows.append([which, f"{a} against {b}", score, _plain(auc, 3), _plain(ks, 3), str(len(values))])
    caption = (
        "How well a score tells one kind of rows from another: AUC above 0.5 means that the first scores higher, as "
        "memorised rows do. Training: the rows that the base has memorised, where it has; fresh: the other training "
        "rows. Means over seeds (95% interval, Student's t); all other arms are in results.json."
    )
    return Table("densities", caption, ["regime: model", "rows", "score", "AUC", "KS", "seeds"], rows)


def _representation(lab: Lab, all_found: Sequence[Findings]) -> Table:
    rows = []
    for found in all_found:
        grouped: dict[str, list[tuple[float, float]]] = {}
        for row in shown_rows(lab, "representation", found):
            grouped.setdefault(row["model"], []).append((row["l2"], row["angle_degrees"]))
        for model, values in grouped.items():
            l2, angle = (statistics.over_seeds(column) for column in zip(*values, strict=True))
            rows.append(
                [f"{found.regime.name}: {model_title(lab, model)}", _plain(l2, 2), _plain(angle, 1), str(len(values))]
            )
    caption = (
        "Distance and angle between the mean hidden states of the most and of the least memorised training rows. Means "
        "over seeds (95% interval, Student's t); all other arms are in results.json."
    )
    return Table("representation", caption, ["regime: model", "L2", "angle, degrees", "seeds"], rows)


def _everything(lab: Lab, found: Findings) -> Table:
    """All arms of a regime: greedy on training and held-out tasks, Pass@1 and what the largest k gives."""
    fewest = min(run.samples for name in found.held_out for run in lab.of(found.regime, name).values())
    k = max((k for k in KS if k <= fewest), default=0)
    names = list(dict.fromkeys(metric_name(k, m) for k, m in ((1, 1), (k, 1), (k, (k + 1) // 2), (k, k)) if k))
    columns = ["arm", "training", "held-out", "against SFT", "against no KL", *(name.capitalize() for name in names)]
    columns += ["KL", "CE_ib", "seeds"]
    rows = []
    for name, share in found.held_out.items():
        runs = lab.of(found.regime, name)
        metrics = [_metric(lab, found, name, metric) for metric in names]
        rows.append(
            [
                lab.arms[name].title,
                percent(found.training[name].value),
                _share(share),
                NONE if name == SFT else _difference(found.against_sft.get(name)),
                _difference(found.against_ablation.get(name)),
                *metrics,
                number(bottleneck.kl.value) if (bottleneck := found.bottlenecks.get(name)) else NONE,
                number(bottleneck.ce_ib.value) if bottleneck else NONE,
                str(len(runs)),
            ]
        )
    caption = (
        f"{found.regime.title}. Training and held-out: % solved greedily; differences in points; Pass@k^(m) in %, of "
        "the sampled programs; KL and CE_ib at the end, in nats per token; means over seeds, 95% intervals."
    )
    return Table("everything", caption, columns, rows)


def _metric(lab: Lab, found: Findings, arm: str, metric: str) -> str:
    rows = [
        row["held_out"].get("metrics", {}).get(metric)
        for row in lab.raw["runs"]
        if (row["regime"], row["arm"]) == (found.regime.name, arm)
    ]
    values = [row for row in rows if row is not None]
    return f"{100 * sum(values) / len(values):.1f}" if values else NONE


def _runs(lab: Lab) -> Table:
    """Every run with its file, so that each number can be traced."""
    rows = [
        [
            f"{regime}: {lab.arms[arm].title}",
            str(run.seed),
            percent(run.training),
            percent(float(run.solved.mean())),
            *(NONE if run.kinds.get(kind) is None else f"{run.kinds[kind]:.0%}" for kind in ("wrong", "invalid")),
            f"{run.seconds:.0f}",
            run.file or NONE,
        ]
        for (regime, arm), runs in lab.runs.items()
        for run in runs.values()
    ]
    caption = (
        "Every run. Training and held-out: % solved greedily; wrong and invalid: of the greedy held-out programs, "
        "those that run but do something else, and those that are no program of the language; file: beside "
        "results.json."
    )
    columns = ["regime: arm", "seed", "training", "held-out", "wrong", "invalid", "seconds", "file"]
    return Table("everything", caption, columns, rows)
