"""The report's sentences turn with the data."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from lab_results import ARMS, FEW, GRID, TASKS, arm, found, results, run
from scipy import stats

from ibft.lab.plan import full_plan


def test_published_turns(tmp_path: Path) -> None:
    for published, expected in (
        (0.45, "IB-FT ib-published is above SFT by 25.0 points"),
        (0.05, "IB-FT ib-published is below SFT by 15.0 points"),
        (0.20, "IB-FT ib-published cannot be told from SFT: 0.0 points"),
    ):
        overall, sections, _ = found(tmp_path, results({"sft": 0.2, "ib-published": published}))
        assert any(sentence.startswith(expected) for sentence in sections["arms"]), sections["arms"]
        assert any(expected in sentence for sentence in overall)


def test_swapping_two_arms_swaps_the_sentence(tmp_path: Path) -> None:
    shares = {"sft": 0.2, "ib-published": 0.5}
    _, there, _ = found(tmp_path, results(shares))
    _, back, _ = found(tmp_path, results({"sft": 0.5, "ib-published": 0.2}))
    interval = re.search(r"by 30.0 points \(95% interval ([\d.]+) to ([\d.]+); ahead in 3 of 3", there["arms"][0])
    turned = re.search(r"by 30.0 points \(95% interval ([\d.]+) to ([\d.]+); behind in 3 of 3", back["arms"][0])
    assert interval and turned and interval.groups() == turned.groups()


def test_regimes_are_told_apart(tmp_path: Path) -> None:
    values = results(regimes=("one", "two", "three"), shares={"sft": 0.3})
    for row in values["runs"]:
        if row["arm"] == "ib-published" and row["regime"] != "two":
            changed = run("ib-published", row["regime"], row["seed"], 0.6 if row["regime"] == "one" else 0.1, 0.01)
            row["held_out"] = changed["held_out"]
    overall, _, _ = found(tmp_path, values)
    expected = (
        "IB-FT ib-published is above SFT in “one” (+30.0), is below SFT in “three” (−20.0), and cannot be told from "
        "SFT in “two” (0.0)."
    )
    assert expected in overall


@pytest.mark.parametrize(
    ("fresh", "heading", "short"),
    [
        (0.6, "There is a memorisation barrier:", "There is a memorisation barrier in “mixed” (20.0% against 60.0%)"),
        (0.2, "No memorisation barrier can be told", "There is no memorisation barrier that could be told from noise"),
        (0.05, "There is no memorisation barrier, rather a head", "having memorised helps in “mixed”"),
    ],
)
def test_barrier_turns(tmp_path: Path, fresh: float, heading: str, short: str) -> None:
    # With seeds 0, 1, 2 a run solves so many tasks more: the shares of the sentences are those of seed 1.
    shares = {"sft": 0.19, "sft-reference": fresh - 0.01}
    overall, sections, _ = found(tmp_path, results(shares))
    assert sections["barrier"][0].startswith(heading)
    assert short in overall[0]


def test_gains_from_both_bases_are_compared(tmp_path: Path) -> None:
    arms = [*ARMS, arm("ib-1-1-reference", "reference", base="reference")]
    chosen = {"arm": "ib-1-1", "seeds": [7]}
    for reference, expected, gain in (
        (0.4, "gains more over SFT", "+20.0"),
        (0.8, "gains less over SFT", "−20.0"),
        (0.6, "cannot be told from noise (difference", "0.0"),
    ):
        shares = {"sft": 0.2, "sft-reference": 0.4, "ib-1-1": 0.4, "ib-1-1-reference": reference}
        overall, sections, each = found(tmp_path, {**results(shares, arms=arms), "chosen": chosen})
        assert each.gains and each.gains.value == pytest.approx(0.2 - (reference - 0.4))
        assert any(expected in sentence for sentence in sections["arms"])
        assert any("chosen beforehand in trials on seed 7, is above SFT by 20.0" in sentence for sentence in overall)
        assert any(f"from the reference base, in points with 95% intervals: {gain} in" in each for each in overall)


@pytest.mark.parametrize(
    ("without", "with_kl", "expected"),
    [
        (0.2, 0.2, "neither term's effect can be told from noise"),
        (0.4, 0.4, "the extra prediction head raises held-out success; an effect of the KL term cannot be"),
        (0.4, 0.6, "the extra prediction head raises held-out success, and the KL term adds to it"),
        (0.6, 0.4, "the extra prediction head raises held-out success, and the KL term takes away from it"),
        (0.2, 0.4, "the extra prediction head cannot be told from noise, the KL term raises held-out success"),
        (0.2, 0.05, "the extra prediction head cannot be told from noise, the KL term lowers held-out success"),
        (0.05, 0.2, "the extra prediction head lowers held-out success, the KL term raises held-out success"),
        (0.1, 0.0, "the extra prediction head lowers held-out success, the KL term lowers held-out success"),
        (0.05, 0.05, "the extra prediction head lowers held-out success, an effect of the KL term cannot be"),
    ],
)
def test_which_term_does_the_work(tmp_path: Path, without: float, with_kl: float, expected: str) -> None:
    shares = {"sft": 0.2, **dict.fromkeys(GRID, with_kl), **{f"{name}-no-kl": without for name in GRID}}
    _, sections, each = found(tmp_path, results(shares))
    said = [sentence for sentence in sections["terms"] if expected in sentence]
    assert [sentence.split(":")[0] for sentence in said][-4:] == [
        "At (0.1, 0.1)", "At (0.1, 1)", "At (1, 0.1)", "At (1, 1)"
    ]  # fmt: skip
    for terms in each.terms:
        assert terms.gain.value == pytest.approx(terms.predicting.value + terms.compressing.value)


def test_choosing_the_best_of_a_grid_costs_certainty(tmp_path: Path) -> None:
    values = results({"sft": 0.2, **dict.fromkeys(GRID, 0.2)})
    for row in values["runs"]:  # +10, +13 and +16 points in three seeds: +-7.5 at 95%, +-15 at 98.75%
        if row["arm"] == "ib-1-0.1":
            changed = run(row["arm"], "mixed", row["seed"], 0.30 + 0.03 * row["seed"], 0.01)
            row["held_out"] = changed["held_out"]
    _, sections, four = found(tmp_path, values)
    assert four.best and four.best.name == "ib-1-0.1" and four.choices == 4 and four.best_corrected
    assert four.against_sft["ib-1-0.1"].verdict == "above" and four.best_corrected.verdict == "noise"
    assert "The best of the grid, IB-FT ib-1-0.1, cannot be told from SFT: +13.0 points" in " ".join(sections["arms"])
    differences = [four.against_sft["ib-1-0.1"].per_seed[seed] for seed in range(3)]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / 4)
    assert (four.best_corrected.low, four.best_corrected.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("kl", "regime", "short"),
    [
        (0.01, "the posterior collapses: KL ends at 0.01 nats per token, 25% of its", "collapses in 3 of 3 runs"),
        (2.5, "the posterior does not collapse: KL ends at 2.5 nats per token", "the posterior does not collapse"),
    ],
)
def test_collapse_turns(tmp_path: Path, kl: float, regime: str, short: str) -> None:
    overall, sections, _ = found(tmp_path, results(kl=kl))
    assert regime in sections["collapse"][0]
    assert any(short in sentence for sentence in overall)


def test_collapse_of_some_seeds(tmp_path: Path) -> None:
    values = results()
    for row in values["runs"]:
        if row["arm"] == "ib-published" and row["seed"] == 2:
            for record in row["curve"][:-1]:
                record["kl_nats"] = 3.0  # only the last tenth of the records counts
        if row["arm"] == "ib-published" and row["seed"] == 1:
            row["curve"][-1]["kl_nats"] = 3.0
    overall, sections, each = found(tmp_path, values)
    assert "the posterior collapses in 2 of 3 seeds" in sections["collapse"][0]
    assert each.bottlenecks["ib-published"].kl.per_seed == pytest.approx((0.01, 3.0, 0.01))
    assert any("collapses in 2 of 3 runs" in sentence for sentence in overall)


def test_remedies_are_held_against_the_same_setting(tmp_path: Path) -> None:
    for group, name, what in (("option", "free-bits", "Options, each"), ("layer", "layer-1", "Other layers, each")):
        for remedy, expected in ((0.5, "is above"), (0.1, "is below"), (0.3, "cannot be told from")):
            overall, sections, _ = found(tmp_path, results({"ib-published": 0.3, name: remedy, "sft": 0.9}))
            (sentence,) = (each for each in sections[f"{group}s"] if name in each)
            assert f"{name}, {expected} IB-FT ib-published as it is" in sentence
            assert ("by 20.0 points" in sentence) == (remedy != 0.3)
            counted = f"IB-FT {name}" if remedy != 0.3 else "1 cannot be told from it."
            (count,) = (each for each in overall if each.startswith(what))
            assert counted in count and expected.removeprefix("is ").removesuffix(" from") in count
        one, _, _ = found(tmp_path, results({"ib-published": 0.3, name: 0.5}, seeds=(0,)))
        assert not any(each.startswith(what) for each in one), "nothing is counted of one seed"


def test_options_say_whether_there_is_a_collapse_and_what_they_do_to_kl(tmp_path: Path) -> None:
    for kl, with_option, before, after in (
        (0.01, 8.0, "the options the posterior collapses in 3 of 3 runs: KL ends at 0.01", "instead of 0.01, looser"),
        (12.0, 8.0, "Nothing collapses here without the options", "at 8 nats per token instead of 12, tighter"),
        (12.0, 12.5, "have no collapse to prevent: KL ends at 12 with", "12.5 nats per token instead of 12, about"),
    ):
        values = results(kl=kl)
        for row in values["runs"]:
            if row["arm"] == "free-bits":
                for record in row["curve"]:
                    record["kl_nats"] = with_option
        _, sections, _ = found(tmp_path, values)
        assert before in sections["options"][0] and after in sections["options"][1]
        assert not any("free-bits" in each for each in sections["collapse"])


def test_noise_between_trainings_against_a_hand_computation(tmp_path: Path) -> None:
    again = [arm(f"sft-again-{n}", "repeat", of=["sft"]) for n in (1, 2)]
    values = results(arms=[*FEW, *again], seeds=(0, 1))
    counts = {("sft", 0): 40, ("sft-again-1", 0): 44, ("sft-again-2", 0): 48, ("sft", 1): 60, ("sft-again-1", 1): 50}
    for row in values["runs"]:
        if (row["arm"], row["seed"]) in counts:
            row["held_out"]["correct_greedy"] = [n < counts[row["arm"], row["seed"]] for n in range(TASKS)]
    values["runs"] = [row for row in values["runs"] if (row["arm"], row["seed"]) != ("sft-again-2", 1)]
    _, sections, each = found(tmp_path, values)
    # Within the first base the squares are 16 + 0 + 16 of 2 degrees of freedom, in the second 25 + 25 of 1; in points.
    assert [(noise.arm.name, noise.trainings, noise.bases) for noise in each.noises] == [("sft", 5, 2)]
    assert 100 * each.noises[0].deviation == pytest.approx(math.sqrt((32 + 50) / 3))
    (sentence,) = (each for each in sections["barrier"] if "another training seed" in each)
    assert "a standard deviation of 5.2 points (5 trainings on 2 bases)" in sentence
    assert "can lie 14 points apart" in sentence  # 1.96 * sqrt(2) * 5.23


def test_what_decides_where_name_and_description_disagree(tmp_path: Path) -> None:
    for description, name, expected in (
        (30, 2, "The description decides and not the name: "),
        (2, 30, "The name decides and not the description: "),
        (20, 20, "Neither the name nor the description decides alone: "),
    ):
        values = results()
        for row in values["runs"]:
            row["crossed"] = ["description"] * description + ["name"] * name + ["neither"] * (40 - description - name)
        overall, sections, each = found(tmp_path, values)
        (sentence,) = sections["crossed"]
        shares = f"{100 * description / 40:.1f}% and {100 * name / 40:.1f}%"
        assert sentence.startswith(expected) and f"SFT {shares}" in sentence
        assert any(f"“mixed” ({shares})" in sentence and expected.lower() in sentence for sentence in overall)
        wilson = stats.binomtest(3 * name, 120).proportion_ci(method="wilson")
        assert each.crossed["sft"].name.high == pytest.approx(wilson.high)
    _, sections, _ = found(tmp_path, results(seeds=(0,)))
    assert sections["crossed"][0].startswith("Under the name of")  # no verdict on one seed


def test_crossed_prompts_count_where_the_name_is_memorised(tmp_path: Path) -> None:
    values = results()
    values["regimes"][0]["memorised"] = 2
    for row in values["runs"]:  # the names are those of the tasks 1, 2, 3 and 0, of which 0 and 1 are memorised
        row["crossed"] = ["name", "neither", "neither", "description"]
    _, _, each = found(tmp_path, values)
    assert (each.crossed["sft"].name.value, each.crossed["sft"].description.value) == (0.5, 0.5)
    values["regimes"][0]["memorised"] = 0
    _, _, each = found(tmp_path, values)
    assert (each.crossed["sft"].name.value, each.crossed["sft"].description.value) == (0.25, 0.25)


def test_every_group_of_the_plan_has_its_place(tmp_path: Path) -> None:
    planned = {arm.group for arm in full_plan((10,)).arms}
    assert planned == {each["group"] for each in ARMS} | {"repeat"}


def test_settings_are_counted(tmp_path: Path) -> None:
    _, sections, _ = found(tmp_path, results({"sft": 0.3, "ib-0.1-1": 0.6, "ib-1-1": 0.1, "ib-1-0.1": 0.05}))
    assert sections["grid"] == [
        "Of the grid's 4 settings, each judged on its own, 1 is above SFT (at (0.1, 1)) and 2 below it (at (1, 0.1) "
        "and (1, 1)); by chance alone, about 0.2 would differ. The differences reach from −25.0 to +30.0 "
        "points."
    ]


def test_groups_of_rows_that_lie_as_by_chance_are_counted(tmp_path: Path) -> None:
    values = results()
    for row in values["representation"]:
        row["p_l2"] = (0.2, 0.01, 0.06)[row["seed"]]
    _, sections, _ = found(tmp_path, values)
    assert sections["representation"] == [
        "The two groups lie no farther apart than random groups may: SFT 2 of 3 seeds."
    ]


def test_a_run_that_is_still_missing_pairs_the_others(tmp_path: Path) -> None:
    values = results({"sft": 0.2, "ib-published": 0.5})
    values["runs"] = [row for row in values["runs"] if (row["arm"], row["seed"]) != ("sft", 1)]
    _, _, each = found(tmp_path, values)
    assert len(each.against_sft["ib-published"].per_seed) == 2
    assert len(each.held_out["ib-published"].per_seed) == 3
