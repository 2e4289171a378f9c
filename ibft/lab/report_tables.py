"""The report's tables, as text cells: the page, the summary and the terminal show them each in its own way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ibft.evaluate.metrics import KS, metric_name
from ibft.lab import report_statistics as statistics
from ibft.lab.figure_style import model_title
from ibft.lab.report_data import SFT, Lab
from ibft.lab.report_findings import CHANGES, Crossed, Findings, shown_arms, shown_rows
from ibft.lab.report_statistics import Estimate
from ibft.lab.report_words import listed, number, percent, points

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
        _crossed(lab, all_found),
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
    caption = f"Held-out tasks solved greedily, % (95% interval). {legend}.{_shared(lab)}"
    return Table("arms", caption, ["arm", *(found.regime.name for found in all_found)], rows)


def _shared(lab: Lab) -> str:
    """Which regimes list the same runs, which are therefore no independent evidence."""
    sharing: dict[str, dict[str, None]] = {}  # by where the runs are: who lists them, in order
    for (regime, _), runs in lab.runs.items():
        for source in {run.shared for run in runs.values() if run.shared}:
            sharing.setdefault(source, {})[regime] = None
    names = {regime.name for regime in lab.regimes}
    places = [[*regimes, *([source] if source in names else [])] for source, regimes in sharing.items()]
    return "".join(
        f" From the reference base, {listed(each)} list the same runs: differences to them are not independent."
        for each in places
        if len(each) > 1
    )


def _crossed(lab: Lab, all_found: Sequence[Findings]) -> Table:
    shown = {arm.name for found in all_found for arm in shown_arms(lab, found) if arm.name in found.crossed}
    rows = [
        [arm.title, *(_obeyed(found.crossed.get(arm.name)) for found in all_found)]
        for arm in lab.arms.values()
        if arm.name in shown
    ]
    caption = (
        "One training task's description above the name of another: % of the prompts whose greedy program is the "
        "described one / the named one, means over seeds. Names are such as the base has memorised, where it has; "
        "every model has seen all of them in fine-tuning, but for arms that leave rows out."
    )
    return Table("crossed", caption, ["arm", *(found.regime.name for found in all_found)], rows)


def _obeyed(found: Crossed | None) -> str:
    return f"{100 * found.description.value:.1f} / {100 * found.name.value:.1f}" if found else NONE


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
    def cell(rows: Sequence[Mapping[str, Any]], name: str, show: Callable[[float], str]) -> str:
        values = [row[name] for row in rows if row.get(name) is not None]
        return show(sum(values) / len(values)) if values else NONE

    rows = []
    for regime in lab.regimes:
        for kind, title in (("memorised", "has memorised"), ("reference", "reference")):
            found = [row for row in lab.rows("bases", regime) if row["kind"] == kind]
            if found:
                shares = ("recall", "decoy_recall", "held_out_recall")
                losses = ("name_loss", "decoy_name_loss", "held_out_name_loss")
                rows.append([
                    regime.name,
                    title,
                    *(cell(found, name, percent) for name in shares),
                    *(cell(found, name, number) for name in losses),
                    *(cell(found, name, percent) for name in ("training_greedy", "held_out_greedy")),
                    str(len(found)),
                ])  # fmt: skip
    caption = (
        "The bases before fine-tuning, means over seeds. Recall: share of programs that greedy decoding writes from "
        "the name alone; held-out programs give what guessing gives. Loss: cross-entropy of the programs given their "
        "names, nats per token. Training: of the training set, what the base has memorised, where it has (of 75, where "
        "75 are memorised); decoys: the other programs that it has read as often. Followed: tasks solved from "
        "description and name, as fine-tuning asks."
    )
    columns = [
        "regime", "base", "recall: training", "decoys", "held-out", "loss: training", "decoys", "held-out",
        "followed: training", "held-out", "seeds",
    ]  # fmt: skip
    return Table("barrier", caption, columns, rows)


def _terms(all_found: Sequence[Findings]) -> Table:
    rows = [
        [
            f"{found.regime.name}: {terms.arm.title}",
            *map(_difference, (terms.gain, terms.predicting, terms.compressing)),
        ]
        for found in all_found
        for terms in found.terms
    ]
    caption = (
        "The gain over SFT and its two parts, in points on held-out tasks (95% interval, paired by seed; * excludes "
        "0). Gain = predicting + compressing; settings of the same alpha beta share the run without KL."
    )
    columns = ["regime: arm", "IB-FT − SFT", "predicting: no KL − SFT", "compressing: IB-FT − no KL"]
    return Table("terms", caption, columns, rows)


def _bottlenecks(lab: Lab, all_found: Sequence[Findings]) -> Table:
    rows = []
    for found in all_found:
        for arm in [*shown_arms(lab, found, references=False), *lab.arms_in(found.regime, *CHANGES)]:
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
            if row["model"] in lab.arms and lab.arms[row["model"]].group in ("ablation", "narrow"):
                continue
            score = "by name alone" if row.get("named") else "as rows"
            key = (row["model"], row["a"].replace("_", "-"), row["b"].replace("_", "-"), str(score))
            grouped.setdefault(key, []).append((row["auc"], row["ks"]))
        for (model, a, b, score), values in grouped.items():
            auc, ks = (statistics.over_seeds(column, least=0, most=1) for column in zip(*values, strict=True))
            which = f"{found.regime.name}: {model_title(lab, model)}"
            rows.append([which, f"{a} against {b}", score, _plain(auc, 3), _plain(ks, 3), str(len(values))])
    caption = (
        "How well a score tells one kind of rows from another: AUC above 0.5 means that the first scores higher, as "
        "memorised rows do. Training: the rows that the base has memorised, where it has; fresh: the other training "
        "rows. Means over seeds (95% interval, Student's t); all other arms are in results.json."
    )
    return Table("densities", caption, ["regime: model", "rows", "scored", "AUC", "KS", "seeds"], rows)


def _representation(lab: Lab, found_all: Sequence[Findings]) -> Table:
    rows = []
    for found in found_all:
        grouped: dict[str, list[Mapping[str, Any]]] = {}
        for row in shown_rows(lab, "representation", found):
            grouped.setdefault(row["model"], []).append(row)
        for model, entries in grouped.items():
            separation, l2, angle = (
                statistics.over_seeds([value(entry) for entry in entries], least=0)
                for value in (
                    lambda entry: entry["separation"]["value"], lambda entry: entry["l2"],
                    lambda entry: entry["angle_degrees"],
                )
            )  # fmt: skip
            by_chance = sum(entry["p_l2"] > 0.05 for entry in entries)
            rows.append(
                [
                    f"{found.regime.name}: {model_title(lab, model)}",
                    _plain(separation, 3),
                    f"{by_chance} of {len(entries)}",
                    _plain(l2, 2),
                    _plain(angle, 1),
                ]
            )
    caption = (
        "The mean hidden states of the quarter of the training rows whose programs the base scores highest, and of the "
        "quarter that it scores lowest. Separation: L2 distance by the spread within the groups, which scaling the "
        "hidden states does not change, as it changes L2. As by chance: seeds in which more than 5% of random groups "
        "of the same rows lie as far apart. Means over seeds (95% interval, Student's t); all other arms are in "
        "results.json."
    )
    columns = ["regime: model", "separation", "as by chance", "L2", "angle, degrees"]
    return Table("representation", caption, columns, rows)


def _everything(lab: Lab, found: Findings) -> Table:
    """All arms of a regime: greedy on training and held-out tasks, Pass@1 and what the largest k gives."""
    fewest = min(run.samples for name in found.held_out for run in lab.of(found.regime, name).values())
    k = max((k for k in KS if k <= fewest), default=0)
    names = list(dict.fromkeys(metric_name(k, m) for k, m in ((1, 1), (k, 1), (k, (k + 1) // 2), (k, k)) if k))
    columns = ["arm", "training", "held-out", "against SFT", "against no KL", *(name.capitalize() for name in names)]
    columns += ["KL", "CE_ib", "rows", "memorised", "epochs", "seeds"]
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
                *(
                    _whole([getattr(run, field) for run in runs.values()])
                    for field in ("rows", "memorised_rows", "epochs")
                ),
                str(len(runs)),
            ]
        )
    caption = (
        f"{found.regime.title}. Training and held-out: % solved greedily; differences in points; Pass@k^(m) in %, of "
        "the sampled programs; KL and CE_ib at the end, in nats per token; means over seeds, 95% intervals. Rows that "
        "it was trained on, how many of them the base has memorised, and epochs."
    )
    return Table("everything", caption, columns, rows)


def _whole(values: Sequence[int | None]) -> str:
    """ "75", or "30–41" where seeds differ."""
    known = [value for value in values if value is not None]
    return "–".join(str(value) for value in sorted({min(known), max(known)})) if known else NONE


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
    columns = ["regime: arm", "seed", "training", "held-out", "wrong", "invalid", "processor s", "file"]
    return Table("everything", caption, columns, rows)
