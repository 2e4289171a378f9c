"""The sentences on the whole of the lab, and what its results leave open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ibft.lab.report_conclusions import best_of_grid, decides
from ibft.lab.report_data import SFT, SFT_REFERENCE, SFT_UNMEMORISED, Arm, Lab
from ibft.lab.report_findings import COLLAPSED, Findings, fewer_rows, filter_is_exact
from ibft.lab.report_statistics import Estimate
from ibft.lab.report_words import as_sentence, by_chance, comparison, counted, listed, percent, points, span


class Caveat(NamedTuple):
    """What the results leave open."""

    title: str
    text: str


def in_short(lab: Lab, all_found: Sequence[Findings]) -> list[str]:
    """What the whole of the lab says, one sentence for each of its questions."""
    published = [arm for arm in lab.arms.values() if arm.group == "published"]
    sentences = [
        _barriers(all_found),
        _crossed_overall(all_found),
        *(_across(arm.title, "SFT", _of_arm(all_found, arm.name)) for arm in published),
        _chosen(lab, all_found),
        _gains_overall(lab, all_found),
        _best_overall(lab, all_found),
        *_terms_overall(lab, all_found),
        *(_collapse_overall(arm, all_found) for arm in published),
        _changes_overall(lab, all_found, "option", "Options, each against the same setting without it"),
        _changes_overall(lab, all_found, "layer", "Other layers, each against the default one"),
        *_fewer_rows_overall(lab, all_found),
    ]
    return [sentence for sentence in sentences if sentence]


def caveats(lab: Lab, all_found: Sequence[Findings]) -> list[Caveat]:
    """That pieces are missing, that there is one seed, that seeds are those of the trials: where it is so."""
    found = []
    pieces = lab.raw.get("pieces") or {}
    if pieces.get("done") != pieces.get("planned"):
        found.append(
            Caveat(
                "Not all of it.",
                f"These results are of {pieces['done']} of the {pieces['planned']} pieces of the experiment. Arms and "
                "regimes may have different seeds, and some none.",
            )
        )
    if all(len(each.per_seed) == 1 for of in all_found for each in of.held_out.values()):
        found.append(
            Caveat(
                "One seed.",
                "Everything here is of one seed. Its intervals say only how much the finite number of held-out tasks "
                "leaves open; another seed, with other tasks, another base and another order, can differ by more than "
                "they say.",
            )
        )
    trials = _trials(lab)
    tried = sorted({seed for runs in lab.runs.values() for seed in runs} & {*trials})
    if tried:
        found.append(
            Caveat(
                "Seeds of the trials.",
                f"{lab.arms[lab.chosen].title} was chosen in trials on {_seeds(trials)}, and {_seeds(tried)} "
                f"{'is one' if len(tried) == 1 else 'are some'} of those: what it gains there flatters it.",
            )
        )
    return found


def _trials(lab: Lab) -> Sequence[int]:
    """The seeds on which the setting chosen beforehand was chosen; none where there is no such setting."""
    return (lab.raw.get("chosen") or {}).get("seeds") or () if lab.chosen in lab.arms else ()


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}"


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
        return f"{as_sentence(a)[:-1]} against {b}, on these tasks: {listed(regimes)}{how}."
    for verdict, words in (
        ("above", f"is above {b}"),
        ("below", f"is below {b}"),
        ("noise", f"cannot be told from {b}"),
    ):
        regimes = [f"“{name}” ({points(each.value)})" for name, each in found.items() if each.verdict == verdict]
        if regimes:
            sides.append(f"{words} in {listed(regimes)}")
    return f"{as_sentence(a)[:-1]} {listed(sides, ', and ')}{how}."


def _barriers(all_found: Sequence[Findings]) -> str:
    measured = [(found.regime.name, found.held_out, found.barrier) for found in all_found if found.barrier]
    if several := [each for each in measured if len(each[2].per_seed) > 1]:
        measured = several  # of a single seed nothing is said beside them
    if not measured:
        return ""

    def shares(verdict: str) -> list[str]:
        return [
            f"“{name}” ({percent(held_out[SFT].value)} against {percent(held_out[SFT_REFERENCE].value)})"
            for name, held_out, barrier in measured
            if barrier.verdict == verdict
        ]

    if not several:
        against = [f"in {each}" for each in shares("noise")]
        return (
            "SFT from the base that has memorised against SFT from the reference base, held-out tasks solved: "
            f"{listed(against)}."
        )
    barriers, starts, noise = shares("below"), shares("above"), shares("noise")
    if not barriers:
        sentence = "There is no memorisation barrier that could be told from noise"
    else:
        which = f" of the {len(measured)} regimes with a base that has memorised" if len(measured) > 1 else ""
        count = f"{len(barriers)}{which}" if which else listed(barriers)
        sentence = (
            f"There is a memorisation barrier in {count}: from the base that has memorised, SFT solves fewer held-out "
            f"tasks than from the reference base{': ' + listed(barriers) if which else ''}"
        )
    if noise:
        sentence += f"; the two bases cannot be told apart in {listed(noise)}"
    if starts:
        sentence += f"; having memorised helps in {listed(starts)}"
    return sentence + "."


def _crossed_overall(all_found: Sequence[Findings]) -> str:
    measured = {
        each.regime.name: obeyed for each in all_found if each.regime.memorised and (obeyed := each.crossed.get(SFT))
    }
    if not measured:
        return ""
    regimes = [
        f"“{name}” ({percent(obeyed.description.value)} and {percent(obeyed.name.value)})"
        for name, obeyed in measured.items()
    ]
    verdicts = {decides(obeyed) for obeyed in measured.values()}
    agreed = f"after fine-tuning {verdicts.pop()}" if len(verdicts) == 1 and any(verdicts) else ""
    return as_sentence(
        f"{agreed}with one task's description under the name of another that the base has memorised, SFT writes the "
        f"program that is described, or the one that is named, in these shares of the prompts: {listed(regimes)}"
    )


def _chosen(lab: Lab, all_found: Sequence[Findings]) -> str:
    if lab.chosen not in lab.arms:
        return ""
    where = f" on {_seeds(trials)}" if (trials := _trials(lab)) else ""
    name = f"{lab.arms[lab.chosen].title}, chosen beforehand in trials{where},"
    return _across(name, "SFT", _of_arm(all_found, lab.chosen))


def _gains_overall(lab: Lab, all_found: Sequence[Findings]) -> str:
    """Whether IB-FT helps against memorisation, or as much without it."""
    gains = {each.regime.name: each.gains for each in all_found if each.gains}
    if not gains:
        return ""
    differences = listed(
        [
            f"{points(each.value)} in “{name}” ({points(each.low)} to {points(each.high)})"
            for name, each in gains.items()
        ]
    )
    return (
        f"What {lab.arms[lab.chosen].title} gains over SFT from the base that has memorised, minus what it gains from "
        f"the reference base, in points with 95% intervals: {differences}."
    )


def _best_overall(lab: Lab, all_found: Sequence[Findings]) -> str:
    """Nothing where the grid is the setting chosen beforehand alone, of which all is said."""
    differences = {
        each.regime.name: each.best_corrected for each in all_found if each.best_corrected and each.choices > 1
    }
    chosen = [f"{each.best.setting} in “{each.regime.name}”" for each in all_found if each.best and each.choices > 1]
    if len(differences) == 1:
        return next(best_of_grid(each) for each in all_found if each.choices > 1)
    return _across("the best (alpha, beta) of each regime's grid", "SFT", differences,
                   how=f" (intervals corrected for choosing; chosen: {', '.join(chosen)})")  # fmt: skip


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
    how = f"collapses in {collapsed} of {counted(runs, 'run')}" if collapsed else "does not collapse"
    return (
        f"With {arm.title} the posterior {how}: KL ends at {span([kl for each in found for kl in each.kl.per_seed])} "
        f"nats per token (below {COLLAPSED:g} counts as collapsed)."
    )


def _fewer_rows_overall(lab: Lab, all_found: Sequence[Findings]) -> list[str]:
    differences: dict[tuple[str, str], dict[str, Estimate]] = {}
    for each in all_found:
        for arm, control, against in fewer_rows(lab, each.regime):
            if arm.name != SFT_UNMEMORISED or not filter_is_exact(lab, each.regime):
                differences.setdefault((arm.title, control.title), {})[each.regime.name] = against
    return [_across(arm, control, found) for (arm, control), found in differences.items()]


def _changes_overall(lab: Lab, all_found: Sequence[Findings], group: str, what: str) -> str:
    """How the changes of a group fall. Of a single seed nothing is counted."""
    verdicts = {
        f"{arm.title}{f' in “{each.regime.name}”' if len(all_found) > 1 else ''}": each.changes[arm.name].verdict
        for each in all_found
        for arm in lab.arms_in(each.regime, group)
        if arm.name in each.changes and len(each.changes[arm.name].per_seed) > 1
    }
    if not verdicts:
        return ""
    sides = [
        f"{len(names)} {words} ({'; '.join(names)})"
        for verdict, words in (("above", "above it"), ("below", "below it"))
        if (names := [name for name, found in verdicts.items() if found == verdict])
    ]
    noise = [f"{count} cannot be told from it"] if (count := list(verdicts.values()).count("noise")) else []
    return f"{what}: of {counted(len(verdicts), 'comparison')}, {listed([*noise, *sides])}{by_chance(len(verdicts))}."
