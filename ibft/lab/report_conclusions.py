"""The report's sentences: each follows by a stated rule from the numbers, and turns when they turn.

A is "above" or "below" B where the 95% interval of their difference excludes 0, and "cannot be told from" it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ibft.lab.report_data import SFT, SFT_FILTERED, SFT_HALF, SFT_REFERENCE, SFT_UNMEMORISED, Arm, Lab
from ibft.lab.report_findings import COLLAPSED, Bottleneck, Findings, Noise, Terms, compare, counterpart
from ibft.lab.report_statistics import Estimate


def percent(value: float) -> str:
    """A share, as "23.5%"."""
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points, as "+2.5"."""
    return _signed(round(100 * value, 1))


def number(value: float | None) -> str:
    """A quantity without a scale of its own, as nats: three significant digits, two below 1."""
    if value is None or not math.isfinite(value):
        return "–"
    return (f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}").replace(
        "-", "−"
    )


def _signed(rounded: float) -> str:
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"  # no negative zero


def comparison(a: str, b: str, found: Estimate, *, interval: str = "95% interval") -> str:
    """Whether a is above b, below it, or cannot be told from it, with the numbers that say so; no full stop."""
    n = len(found.per_seed)
    if n == 1:
        more = "more" if found.value >= 0 else "fewer"
        low, high = (found.low, found.high) if found.value >= 0 else (-found.high, -found.low)
        return (
            f"{a} solves {100 * abs(found.value):.1f} points {more} of these tasks than {b} ({interval} over tasks "
            f"{points(low)} to {points(high)})"
        )
    ahead, behind = sum(x > 0 for x in found.per_seed), sum(x < 0 for x in found.per_seed)
    if found.verdict == "noise":
        seeds = f"; ahead in {ahead} and behind in {behind} of {n} seeds" if n > 1 else ""
        between = f"{interval} {points(found.low)} to {points(found.high)}"
        return f"{a} cannot be told from {b}: {points(found.value)} points ({between}{seeds})"
    if found.verdict == "above":
        low, high, seeds = found.low, found.high, f"; ahead in {ahead} of {n} seeds"
    else:
        low, high, seeds = -found.high, -found.low, f"; behind in {behind} of {n} seeds"
    between = f"{interval} {100 * low:.1f} to {100 * high:.1f}{seeds if n > 1 else ''}"
    return f"{a} is {found.verdict} {b} by {100 * abs(found.value):.1f} points ({between})"


def in_short(lab: Lab, all_found: Sequence[Findings]) -> list[str]:
    """What the whole of the lab says, one sentence for each of its questions."""
    published = [arm for arm in lab.arms.values() if arm.group == "published"]
    sentences = [
        _barriers(all_found),
        *(_across(arm.title, "SFT", _of_arm(all_found, arm.name)) for arm in published),
        _chosen(lab, all_found),
        _best_overall(all_found),
        *_terms_overall(lab, all_found),
        *(_collapse_overall(arm, all_found) for arm in published),
        _remedies_overall(lab, all_found),
        *(
            _across(lab.arms[name].title, "SFT", _of_arm(all_found, name))
            for name in (SFT_FILTERED, SFT_UNMEMORISED, SFT_HALF)
            if name in lab.arms
        ),
    ]
    return [sentence for sentence in sentences if sentence]


def of_regime(lab: Lab, found: Findings) -> dict[str, list[str]]:
    """What one regime says, by section of the report."""
    sections = {
        "barrier": [_barrier(found), _gains(lab, found), _noise(found.noise)],
        "arms": [*_published(lab, found), _best(found), *_references(lab, found)],
        "terms": [*map(_terms, found.terms), _terms_counted(found.terms)],
        "grid": [_settings(lab, found)],
        "collapse": [*_collapse(lab, found), *_remedies(lab, found)],
    }
    kept = {section: [sentence for sentence in own if sentence] for section, own in sections.items()}
    return {section: own for section, own in kept.items() if own}


def warning(all_found: Sequence[Findings]) -> str | None:
    """For results of a single seed, what their intervals leave out."""
    if any(len(found.per_seed) > 1 for each in all_found for found in each.held_out.values()):
        return None
    return (
        "Everything here is of one seed. Its intervals say only how much the finite number of held-out tasks leaves "
        "open; another seed, with other tasks, another base and another order, can differ by more than they say."
    )


# The whole lab.


def _of_arm(all_found: Sequence[Findings], arm: str) -> dict[str, Estimate]:
    """An arm's differences to SFT, by regime."""
    return {each.regime.name: each.against_sft[arm] for each in all_found if arm in each.against_sft}


def _across(a: str, b: str, found: Mapping[str, Estimate], *, how: str = "") -> str:
    """On which side of b each regime has a; the numbers in full where only one regime has it."""
    if not found:
        return ""
    if len(found) == 1:
        ((name, only),) = found.items()
        return f"In “{name}”, {comparison(a, b, only)}."
    sides = []
    if any(len(each.per_seed) == 1 for each in found.values()):
        regimes = [f"{points(each.value)} points in “{name}”" for name, each in found.items()]
        return f"{_sentence(a)[:-1]} against {b}, on these tasks: {_listed(regimes)}{how}."
    for verdict, words in (
        ("above", f"is above {b}"),
        ("below", f"is below {b}"),
        ("noise", f"cannot be told from {b}"),
    ):
        regimes = [f"“{name}” ({points(each.value)})" for name, each in found.items() if each.verdict == verdict]
        if regimes:
            sides.append(f"{words} in {_listed(regimes)}")
    return f"{_sentence(a)[:-1]} {_listed(sides, ', and ')}{how}."


def _barriers(all_found: Sequence[Findings]) -> str:
    measured = [(found.regime.name, found.held_out, found.barrier) for found in all_found if found.barrier]
    if not measured:
        return ""

    def shares(verdict: str) -> list[str]:
        return [
            f"“{name}” ({percent(held_out[SFT].value)} against {percent(held_out[SFT_REFERENCE].value)})"
            for name, held_out, barrier in measured
            if barrier.verdict == verdict
        ]

    if all(len(barrier.per_seed) == 1 for _, _, barrier in measured):
        against = [f"in {each}" for each in shares("noise")]
        return (
            "SFT from the base that has memorised against SFT from the reference base, held-out tasks solved: "
            f"{_listed(against)}."
        )
    barriers, starts, noise = shares("below"), shares("above"), shares("noise")
    if not barriers:
        sentence = "There is no memorisation barrier that could be told from noise"
    else:
        which = f" of the {len(measured)} regimes with a base that has memorised" if len(measured) > 1 else ""
        count = f"{len(barriers)}{which}" if which else _listed(barriers)
        sentence = (
            f"There is a memorisation barrier in {count}: from the base that has memorised, SFT solves fewer held-out "
            f"tasks than from the reference base{': ' + _listed(barriers) if which else ''}"
        )
    if noise:
        sentence += f"; the two bases cannot be told apart in {_listed(noise)}"
    if starts:
        sentence += f"; having memorised helps in {_listed(starts)}"
    return sentence + "."


def _chosen(lab: Lab, all_found: Sequence[Findings]) -> str:
    if lab.chosen not in lab.arms:
        return ""
    trials = (lab.raw.get("chosen") or {}).get("seeds") or ()
    where = f" on {_listed(['seed ' + str(seed) for seed in trials])}" if trials else ""
    name = f"{lab.arms[lab.chosen].title}, chosen beforehand in trials{where},"
    return _across(name, "SFT", _of_arm(all_found, lab.chosen))


def _best_overall(all_found: Sequence[Findings]) -> str:
    found = {f"{each.regime.name}": each for each in all_found if each.best and each.best_corrected}
    if len(found) == 1:
        return _best(*found.values())
    if all(each.choices == 1 for each in found.values()):
        titles = {each.best.title for each in found.values() if each.best}
        corrected = ""
    else:
        titles = {"the best (alpha, beta) of each regime's grid"}
        chosen = ", ".join(f"{each.best.setting} in “{name}”" for name, each in found.items() if each.best)
        corrected = f" (intervals corrected for choosing; chosen: {chosen})"
    differences = {name: each.best_corrected for name, each in found.items() if each.best_corrected}
    return _across(" or ".join(sorted(titles)), "SFT", differences, how=corrected)


def _terms_overall(lab: Lab, all_found: Sequence[Findings]) -> list[str]:
    """Of the setting that was chosen beforehand, or else of the published one."""
    names = [lab.chosen, *(arm.name for arm in lab.arms.values() if arm.group == "published")]
    for name in names:
        terms = {each.regime.name: one for each in all_found for one in each.terms if one.arm.name == name}
        if terms:
            title = lab.arms[name].title
            return [
                _across(f"an extra prediction head without KL, of the weight that {title} gives it,", "SFT",
                        {regime: each.predicting for regime, each in terms.items()}),
                _across(f"{title}, which has the KL term besides,", "that head alone",
                        {regime: each.compressing for regime, each in terms.items()}),
            ]  # fmt: skip
    return []


def _collapse_overall(arm: Arm, all_found: Sequence[Findings]) -> str:
    found = [each.bottlenecks[arm.name] for each in all_found if arm.name in each.bottlenecks]
    if not found:
        return ""
    collapsed, runs = sum(each.collapsed for each in found), sum(each.seeds for each in found)
    kls = [kl for each in found for kl in each.kl.per_seed]
    ends = _between(kls)
    how = f"collapses in {collapsed}" if collapsed else "does not collapse in any"
    return (
        f"With {arm.title} the posterior {how} of {_counted(runs, 'run')}: KL ends at {ends} nats per token (below "
        f"{COLLAPSED:g} counts as "
        "collapsed)."
    )


def _remedies_overall(lab: Lab, all_found: Sequence[Findings]) -> str:
    """How the remedies fall, against the same setting without them."""
    verdicts = [
        against.verdict
        for found in all_found
        for arm in lab.arms_in(found.regime, "option", "layer")
        if (plain := counterpart(lab, found.regime, arm))
        and (against := compare(lab, found.regime, arm.name, plain.name))
    ]
    if not verdicts:
        return ""
    return (
        f"Other options, each against the same (alpha, beta) without it: "
        f"of {_counted(len(verdicts), 'comparison')}, "
        f"{verdicts.count('noise')} cannot be told from it, {verdicts.count('above')} are above and "
        f"{verdicts.count('below')} below{_by_chance(len(verdicts))}."
    )


# One regime.


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _listed(parts: Sequence[str], last: str = " and ") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _by_chance(comparisons: int) -> str:
    return f"; without any effect, about {0.05 * comparisons:.1f} would still be so" if comparisons > 1 else ""


def _barrier(found: Findings) -> str:
    if not found.barrier:
        return "" if found.regime.memorised else "Nothing is memorised here: this regime is the control."
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
            f"base: {_interval(gains)}."
        )
    side = {"above": "more", "below": "less", "noise": "as far as can be told no more"}[gains.verdict]
    return (
        f"From the base that has memorised, {title} gains {side} over SFT than from the reference base (difference of "
        f"the two gains {_interval(gains)})."
    )


def _noise(noise: Noise | None) -> str:
    if not noise:
        return ""
    return (
        f"Trained again on the same base with another training seed, {noise.arm.title} solves other shares of the same "
        f"held-out tasks, with a standard deviation of {100 * noise.deviation:.1f} points ({noise.trainings} trainings "
        f"on {_counted(noise.bases, 'base')}): two single trainings that differ in nothing else can lie "
        f"{196 * math.sqrt(2) * noise.deviation:.0f} points apart."
    )


def _published(lab: Lab, found: Findings) -> list[str]:
    return [
        _sentence(comparison(arm.title, "SFT", found.against_sft[arm.name]))
        for arm in lab.arms_in(found.regime, "published")
        if arm.name in found.against_sft
    ]


def _best(found: Findings) -> str:
    if not found.best or not found.best_corrected:
        return ""
    a, interval = found.best.title, "95% interval"
    if found.choices > 1:
        a = f"the best of the grid, {a},"
        interval = f"95% interval, corrected for choosing among {found.choices},"
    return _sentence(comparison(a, "SFT", found.best_corrected, interval=interval))


def _references(lab: Lab, found: Findings) -> list[str]:
    return [
        _sentence(comparison(lab.arms[name].title, "SFT", found.against_sft[name]))
        for name in (SFT_FILTERED, SFT_UNMEMORISED, SFT_HALF)
        if name in found.against_sft
    ]


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
        f"{len(below)} below it{_at(below)}{_by_chance(len(arms))}. The differences reach from {points(min(values))} "
        f"to {points(max(values))} points."
    )


def _at(settings: Sequence[str]) -> str:
    return f" (at {_listed(settings)})" if settings else ""


def _terms(terms: Terms) -> str:
    """Which term does the work at one setting: two comparisons with three outcomes each."""
    numbers = (
        f"without KL against SFT {_interval(terms.predicting)}; with KL against without {_interval(terms.compressing)}"
    )
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
        f"{verdicts.count('above')} and lowers it at {verdicts.count('below')}{_by_chance(len(terms))}."
    )


def _interval(found: Estimate) -> str:
    return f"{points(found.value)} points, 95% interval {points(found.low)} to {points(found.high)}"


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
        which = f", at {_listed(collapsed)}" if 0 < len(collapsed) < len(grid) else ""
        sentences.append(f"In {len(collapsed)} of the grid's {len(grid)} settings it collapses in every seed{which}.")
    return sentences


def _posterior(bottleneck: Bottleneck) -> str:
    how = {0: "does not collapse", bottleneck.seeds: "collapses"}.get(
        bottleneck.collapsed, f"collapses in {bottleneck.collapsed} of {bottleneck.seeds} seeds"
    )
    active = bottleneck.active_share
    dimensions = f", {active:.0%} of its dimensions active" if active is not None else ""
    return (
        f"the posterior {how}: KL ends at {_between(bottleneck.kl.per_seed)} nats per token{dimensions}, and the "
        f"bottleneck's own loss goes from {number(bottleneck.ce_ib_first)} to {number(bottleneck.ce_ib.value)} nats"
    )


def _between(values: Sequence[float]) -> str:
    """The lowest to the highest of the runs: a mean of collapsed and other ones would be neither's."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _remedies(lab: Lab, found: Findings) -> list[str]:
    sentences = []
    for arm in lab.arms_in(found.regime, "option", "layer"):
        plain = counterpart(lab, found.regime, arm)
        against = compare(lab, found.regime, arm.name, plain.name) if plain else found.against_sft.get(arm.name)
        if not against:
            continue
        text = comparison(arm.title, f"{plain.title} as it is" if plain else "SFT", against)
        bottleneck = found.bottlenecks.get(arm.name)
        kl = f"; KL ends at {number(bottleneck.kl.value)} nats per token" if bottleneck else ""
        sentences.append(_sentence(text + kl))
    return sentences
