"""The report's sentences on each regime: each follows by a stated rule from the numbers, and turns when they turn.

A is "above" or "below" B where the 95% interval of their difference excludes 0, and "cannot be told from" it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ibft.lab.figure_style import model_title
from ibft.lab.report_data import SFT, SFT_REFERENCE, SFT_UNMEMORISED, Lab
from ibft.lab.report_findings import (
    Bottleneck,
    Crossed,
    Findings,
    Noise,
    Terms,
    counterpart,
    fewer_rows,
    filter_is_exact,
    unchanged,
)
from ibft.lab.report_words import (
    as_sentence,
    by_chance,
    comparison,
    counted,
    listed,
    number,
    percent,
    points,
    span,
    with_interval,
)

_TIGHTER, _LOOSER = 0.9, 1.1  # of the KL without an option, from where on it is said to change it


def of_regime(lab: Lab, found: Findings) -> dict[str, list[str]]:
    """What one regime says, by section of the report."""
    sections = {
        "barrier": [_barrier(found), *map(_noise, found.noises)],
        "crossed": [_crossed(lab, found)],
        "arms": [*_main_arms(lab, found), _best(found), _gains(lab, found), *_fewer_rows(lab, found)],
        "terms": [*map(_terms, _told(lab, found.terms)), _terms_counted(found.terms)],
        "grid": [_settings(lab, found)],
        "collapse": _collapse(lab, found),
        "options": [_as_they_are(lab, found), *_changes(lab, found, "option")],
        "layers": _changes(lab, found, "layer"),
        "representation": [_representation(lab, found)],
    }
    kept = {section: [sentence for sentence in own if sentence] for section, own in sections.items()}
    return {section: own for section, own in kept.items() if own}


def _barrier(found: Findings) -> str:
    if not found.barrier:
        return (
            ""
            if found.regime.memorised
            else "Nothing of the training set is memorised here: this regime is the control."
        )
    heading = {
        "below": "There is a memorisation barrier",
        "noise": "No memorisation barrier can be told from noise",
        "above": "There is no memorisation barrier, rather a head start",
    }[found.barrier.verdict]
    sft, fresh = percent(found.held_out[SFT].value), percent(found.held_out[SFT_REFERENCE].value)
    if len(found.barrier.per_seed) == 1:
        heading = "One training from each base"
    judged = comparison("the first", "the second", found.barrier)
    return (
        f"{heading}: from the base that has memorised, SFT solves {percent(found.training[SFT].value)} of its training "
        f"tasks and {sft} of the held-out ones, from the reference base {fresh} of the held-out ones; of these two "
        f"shares, {judged}."
    )


def _gains(lab: Lab, found: Findings) -> str:
    if not found.gains:
        return ""
    title, gains = lab.arms[lab.chosen].title, found.gains
    if len(gains.per_seed) == 1:
        return (
            f"What {title} gains over SFT from the base that has memorised, minus what it gains from the reference "
            f"base: {with_interval(gains)}."
        )
    side = "less" if gains.verdict == "below" else "more"
    what = f"{title} gains {side} over SFT from the base that has memorised than from the reference base"
    if gains.verdict == "noise":
        what = f"That {what} cannot be told from noise"
    return f"{what} (difference of the two gains {with_interval(gains)})."


def _noise(noise: Noise) -> str:
    return (
        f"Trained again on the same base with another training seed, {noise.arm.title} solves other shares of the same "
        f"held-out tasks, with a standard deviation of {100 * noise.deviation:.1f} points ({noise.trainings} trainings "
        f"on {counted(noise.bases, 'base')}): two single trainings that differ in nothing else can lie "
        f"{196 * math.sqrt(2) * noise.deviation:.0f} points apart."
    )


def _crossed(lab: Lab, found: Findings) -> str:
    """What decides after fine-tuning where name and description disagree."""
    names = {SFT: "SFT", SFT_REFERENCE: "SFT from the reference base"}
    if lab.chosen in lab.arms:
        names[lab.chosen] = lab.arms[lab.chosen].title
    shares = {title: found.crossed[name] for name, title in names.items() if name in found.crossed}
    if SFT not in found.crossed:
        return ""
    which = "another one that the base has memorised" if found.regime.memorised else "another one"
    numbers = [
        f"{title} {percent(obeyed.description.value)} and {percent(obeyed.name.value)}"
        for title, obeyed in shares.items()
    ]
    return as_sentence(
        f"{decides(found.crossed[SFT])}under the name of {which}, the program that is described and the one that is "
        f"named come in these shares of the prompts: {'; '.join(numbers)}"
    )


def decides(crossed: Crossed) -> str:
    """Of several seeds, which of the two it is, to begin a sentence with; an empty text of one."""
    if len(crossed.name.per_seed) == 1:
        return ""
    if crossed.name.high < crossed.description.low:
        return "the description decides and not the name: "
    if crossed.description.high < crossed.name.low:
        return "the name decides and not the description: "
    return "neither the name nor the description decides alone: "


def _main_arms(lab: Lab, found: Findings) -> list[str]:
    """The published settings and the one chosen beforehand."""
    arms = lab.arms_in(found.regime, "published", "narrow")
    titles = {arm.name: arm.title for arm in arms}
    if lab.chosen in lab.arms:
        titles[lab.chosen] = f"{lab.arms[lab.chosen].title}, chosen beforehand,"
    return [
        as_sentence(comparison(title, "SFT", found.against_sft[name]))
        for name, title in titles.items()
        if name in found.against_sft
    ]


def _best(found: Findings) -> str:
    return best_of_grid(found) if found.best_corrected and found.choices > 1 else ""


def best_of_grid(found: Findings) -> str:
    """The best of a regime's grid against SFT, corrected for the choice."""
    assert found.best and found.best_corrected
    a = f"the best of the grid, {found.best.title},"
    how = f"95% interval, corrected for choosing among {found.choices},"
    return as_sentence(comparison(a, "SFT", found.best_corrected, interval=how))


def _fewer_rows(lab: Lab, found: Findings) -> list[str]:
    sentences = []
    for arm, control, against in fewer_rows(lab, found.regime):
        if arm.name == SFT_UNMEMORISED and filter_is_exact(lab, found.regime):
            sentences.append(f"{arm.title} is the same: the scores find exactly the rows that are memorised.")
        else:
            title = f"{arm.title}{_trained_on(lab, found, arm.name)}"
            sentences.append(as_sentence(comparison(title, control.title, against)))
    return sentences


def _trained_on(lab: Lab, found: Findings, arm: str) -> str:
    """ " (75 rows, 30 to 41 of them memorised, 60 epochs)"."""
    runs = list(lab.of(found.regime, arm).values())
    memorised = [run.memorised_rows for run in runs if run.memorised_rows is not None]
    if not memorised or runs[0].rows is None or runs[0].epochs is None:
        return ""
    low, high = min(memorised), max(memorised)
    how_many = f"{low}" if low == high else f"{low} to {high}"
    return f" ({runs[0].rows} rows, {how_many} of them memorised, {counted(runs[0].epochs, 'epoch')})"


def _settings(lab: Lab, found: Findings) -> str:
    """How the grid's settings fall, and how many would by chance."""
    arms = [arm for arm in lab.arms_in(found.regime, "grid") if arm.name in found.against_sft]
    if len(arms) < 2 or len(found.against_sft[arms[0].name].per_seed) == 1:
        return ""
    verdicts = {arm.setting: found.against_sft[arm.name].verdict for arm in arms}
    above, below = ([setting for setting, each in verdicts.items() if each == side] for side in ("above", "below"))
    values = [found.against_sft[arm.name].value for arm in arms]
    verb = "is" if len(above) == 1 else "are"
    return (
        f"Of the grid's {len(arms)} settings, each judged on its own, {len(above)} {verb} above SFT{_at(above)} and "
        f"{len(below)} below it{_at(below)}{by_chance(len(arms))}. The differences reach from {points(min(values))} "
        f"to {points(max(values))} points."
    )


def _at(settings: Sequence[str]) -> str:
    return f" (at {listed(settings)})" if settings else ""


def _told(lab: Lab, terms: Sequence[Terms]) -> Sequence[Terms]:
    """Those of the published settings and of the one chosen beforehand, where there is one; the table has all."""
    if lab.chosen not in lab.arms:
        return terms
    return [each for each in terms if each.arm.group == "published" or each.arm.name == lab.chosen]


def _terms(terms: Terms) -> str:
    """Which term does the work at one setting: two comparisons with three outcomes each."""
    without, with_kl = map(with_interval, (terms.predicting, terms.compressing))
    numbers = f"without KL against SFT {without}; with KL against without {with_kl}"
    if len(terms.gain.per_seed) == 1:
        return f"At {terms.arm.setting}: {numbers}."
    predicting = {
        "above": "the extra prediction head raises held-out success",
        "below": "the extra prediction head lowers held-out success",
        "noise": "an effect of the extra prediction head cannot be told from noise",
    }[terms.predicting.verdict]
    compressing = {
        "above": "the KL term raises held-out success",
        "below": "the KL term lowers held-out success",
        "noise": "an effect of the KL term cannot be told from noise",
    }[terms.compressing.verdict]
    joined = f"{predicting}, {compressing}"
    match terms.predicting.verdict, terms.compressing.verdict:
        case "noise", "noise":
            joined = "neither term's effect can be told from noise"
        case "above", "above":
            joined = f"{predicting}, and the KL term adds to it"
        case "above", "below":
            joined = f"{predicting}, and the KL term takes away from it"
        case "above", "noise":
            joined = f"{predicting}; {compressing}"
    return f"At {terms.arm.setting}: {joined} ({numbers})."


def _terms_counted(terms: Sequence[Terms]) -> str:
    if len(terms) < 2 or len(terms[0].gain.per_seed) == 1:
        return ""
    verdicts = [each.compressing.verdict for each in terms]
    return (
        f"Of {len(terms)} settings, each judged on its own, KL raises held-out success at "
        f"{verdicts.count('above')} and lowers it at {verdicts.count('below')}{by_chance(len(terms))}."
    )


def _collapse(lab: Lab, found: Findings) -> list[str]:
    sentences = []
    for arm in lab.arms_in(found.regime, "published"):
        if arm.name in found.bottlenecks:
            ablation = lab.ablation_of(arm)
            free = found.bottlenecks.get(ablation.name) if ablation else None
            without = f" (without the KL term to {number(free.ce_ib.value)})" if free else ""
            sentences.append(f"With {arm.title} {_posterior(found.bottlenecks[arm.name])}{without}.")
    grid = [arm for arm in lab.arms_in(found.regime, "grid") if arm.name in found.bottlenecks]
    collapsed = [
        arm.setting for arm in grid if found.bottlenecks[arm.name].collapsed == found.bottlenecks[arm.name].seeds
    ]
    if len(grid) > 1:
        which = f", at {listed(collapsed)}" if 0 < len(collapsed) < len(grid) else ""
        sentences.append(f"In {len(collapsed)} of the grid's {len(grid)} settings it collapses in every seed{which}.")
    return sentences


def _posterior(bottleneck: Bottleneck) -> str:
    how = {0: "does not collapse", bottleneck.seeds: "collapses"}.get(
        bottleneck.collapsed, f"collapses in {bottleneck.collapsed} of {bottleneck.seeds} seeds"
    )
    active = bottleneck.active_share
    dimensions = f", {active:.0%} of its dimensions active" if active is not None else ""
    return (
        f"the posterior {how}: KL ends at {span(bottleneck.kl.per_seed)} nats per token{dimensions}, and the "
        f"bottleneck's own loss goes from {number(bottleneck.ce_ib_first)} to {number(bottleneck.ce_ib.value)} nats"
    )


def _as_they_are(lab: Lab, found: Findings) -> str:
    """Whether there is a collapse at all for the options to prevent."""
    plain = unchanged(lab, found, "option")
    ends = [(arm, found.bottlenecks[arm.name]) for arm in plain if arm.name in found.bottlenecks]
    if not ends:
        return ""
    collapsed, runs = sum(end.collapsed for _, end in ends), sum(end.seeds for _, end in ends)
    what = (
        f"Without the options the posterior collapses in {collapsed} of {counted(runs, 'run')}"
        if collapsed
        else "Nothing collapses here without the options, so they have no collapse to prevent"
    )
    kls = listed([f"{span(end.kl.per_seed)} with {arm.title}" for arm, end in ends])
    return f"{what}: KL ends at {kls}, in nats per token."


def _changes(lab: Lab, found: Findings, group: str) -> list[str]:
    """What each option or layer does to success and to KL, against the same setting without it."""
    sentences = []
    for arm in lab.arms_in(found.regime, group):
        plain = counterpart(lab, found.regime, arm)
        if not plain or arm.name not in found.changes:
            continue
        ends = [found.bottlenecks[name].kl.value for name in (arm.name, plain.name) if name in found.bottlenecks]
        kl = ""
        if len(ends) == 2:
            how = (
                "tighter"
                if ends[0] < _TIGHTER * ends[1]
                else "looser"
                if ends[0] > _LOOSER * ends[1]
                else "about the same"
            )
            kl = f"; KL ends at {number(ends[0])} nats per token instead of {number(ends[1])}, {how}"
        sentences.append(
            as_sentence(comparison(f"{arm.title},", f"{plain.title} as it is", found.changes[arm.name]) + kl)
        )
    return sentences


def _representation(lab: Lab, found: Findings) -> str:
    """In how many seeds the two groups of rows lie no farther apart than chance would have it, by model."""
    counts = []
    for model in ("base-memorised", "base-reference", SFT, lab.chosen):
        rows = [row for row in lab.rows("representation", found.regime) if row["model"] == model]
        if rows:
            as_random = sum(row["p_l2"] > 0.05 for row in rows)
            counts.append(f"{model_title(lab, model)} {as_random} of {counted(len(rows), 'seed')}")
    return f"The two groups lie no farther apart than random groups may: {'; '.join(counts)}." if counts else ""
