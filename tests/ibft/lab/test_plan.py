"""The plans of `ibft lab`: tasks, bases and arms differ in what they are compared in, and in nothing else."""

import pytest

from ibft.lab.jobs import Tasks
from ibft.lab.plan import CHOSEN_NAME, full_plan, quick_plan
from ibft.lab.sampling import behaviour


def test_tasks_of_a_seed_are_apart() -> None:
    for plan in (quick_plan(1), full_plan((1,))):
        tasks = Tasks.of(plan, 1)
        parts = (tasks.training, tasks.decoys, tasks.held_out, tasks.others)
        for attribute in ("name", "program"):
            found = [getattr(task, attribute) for part in parts for task in part]
            assert len(set(found)) == len(found)
        assert len(tasks.held_out) == plan.held_out
        repeated = {behaviour(task) for task in (*tasks.training, *tasks.decoys)}
        assert repeated.isdisjoint(map(behaviour, tasks.held_out))
        assert len(tasks.others) == plan.first_reading + plan.other_programs + plan.documented


def test_each_product_of_weights_has_one_ablation_and_the_published_settings_are_those_of_the_preset() -> None:
    from ibft.arguments import PUBLISHED

    arms = {arm.name: arm for arm in full_plan((0,)).arms}
    ablations = [arm for arm in arms.values() if arm.group == "ablation"]
    for ablation in ablations:
        assert ablation.settings["kl_weight"] == 0 and ablation.of
        for name in ablation.of:
            product = arms[name].settings["alpha"] * arms[name].settings["beta"]
            assert ablation.settings["alpha"] * ablation.settings["beta"] == pytest.approx(product)
    products = [ablation.settings["alpha"] * ablation.settings["beta"] for ablation in ablations]
    assert len(set(products)) == len(products)
    covered = {name for ablation in ablations for name in ablation.of}
    assert covered == {arm.name for arm in arms.values() if arm.group in ("published", "grid")} - {"ib-0.1-0.01"}
    assert arms["ib-published"].settings == {name: PUBLISHED[name] for name in ("alpha", "beta")}
    assert full_plan((0,)).bottleneck_dim == PUBLISHED["bottleneck_dim"]


def test_no_two_pieces_are_the_same_training() -> None:
    for plan in (quick_plan(0), full_plan((0,))):
        pieces = [
            (regime.base, arm.rows, arm.again, tuple(sorted(arm.train_settings.items())))
            for regime in plan.regimes
            for arm in plan.arms
            if plan.includes(regime, arm)
        ]
        assert len(set(pieces)) == len(pieces)
        for regime in plan.regimes:
            if regime.memorised:  # what the barrier is measured against is run once, and is there for each
                names = {arm.name for arm in plan.arms if plan.source(regime, arm)}
                assert {"sft", "sft-reference", CHOSEN_NAME, f"{CHOSEN_NAME}-reference"} <= names


def test_bases_differ_in_what_they_repeat_and_in_nothing_else() -> None:
    for plan in (quick_plan(0), full_plan((0,))):
        regimes = {regime.name: regime for regime in plan.regimes}
        for regime in plan.regimes:
            assert (regime.memorised + regime.decoys) * regime.repeats <= plan.second_reading
            if regime.reference:
                reference = regimes[regime.reference]
                assert reference.memorised == 0
                assert (reference.decoys, reference.repeats) == (regime.memorised + regime.decoys, regime.repeats)
