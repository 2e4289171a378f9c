"""What README and docs/lab.md say came out, against the committed results."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibft.errors import InputError
from ibft.lab.plan import full_plan
from ibft.lab.report_statistics import difference
from ibft.lab.tasks import generate_tasks

ROOT = Path(__file__).parents[3]
Solved = dict[tuple[str, str], list[np.ndarray]]


# In the order of the tables in docs/lab.md: the first run, the second, both together.
TOLD = {"first": ["lab"], "again": ["lab-again"], "both": ["lab", "lab-again"]}


@functools.cache
def results(folder: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results" / folder / "results.json").read_text())


def solved(told: str) -> Solved:
    """Which held-out tasks greedy decoding solves, of every seed, by regime and arm."""
    found: Solved = {}
    runs = [run for folder in TOLD[told] for run in results(folder)["runs"]]
    for run in sorted(runs, key=lambda run: run["seed"]):
        correct = np.array(run["held_out"]["correct_greedy"], dtype=float)
        found.setdefault((run["regime"], run["arm"]), []).append(correct)
    return found


def percent(of_seeds: list[np.ndarray]) -> float:
    return 100 * float(np.mean(of_seeds))


def points(one: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float, float]:
    """The difference with its interval."""
    found = difference(one, other)
    return 100 * found.value, 100 * found.low, 100 * found.high


@pytest.mark.parametrize("regime", ["strong", "mixed", "mild", "none"])
@pytest.mark.parametrize("told", TOLD)
def test_the_tables_of_docs_lab(told: str, regime: str) -> None:
    of_seeds = solved(told)
    lines = (ROOT / "docs/lab.md").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line == "| | strong | mixed | mild | none |"]
    start = dict(zip(TOLD, starts, strict=True))[told]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 9]]
    column = table[0].index(regime)
    cells = {row[0]: row[column] for row in table}
    sft, best, no_kl = (of_seeds[regime, arm] for arm in ("sft", "ib-3-1", "no-kl-3"))
    assert float(cells["SFT"].rstrip("%")) == pytest.approx(percent(sft), abs=0.051)
    expected = {
        "IB-FT published - SFT": points(of_seeds[regime, "ib-published"], sft),
        "IB-FT (3, 1) - SFT": points(best, sft),
        "(3, 1) without KL - SFT": points(no_kl, sft),
        "(3, 1) with - without KL": points(best, no_kl),
    }
    if (regime, "sft-reference") in of_seeds:
        reference = of_seeds[regime, "sft-reference"]
        assert float(cells["SFT from the reference base"].rstrip("%")) == pytest.approx(percent(reference), abs=0.051)
        expected["barrier"] = points(sft, reference)
    for name, numbers in expected.items():
        quoted = [float(word) for word in cells[name].replace("(", "").replace(")", "").replace(" to ", " ").split()]
        assert quoted == pytest.approx(numbers, abs=0.051), name


def comparisons(of_seeds: Solved) -> dict[str, set[str]]:
    """What with KL is against without, where both have been run: "above" and "below", by regime and setting."""
    found: dict[str, set[str]] = {"above": set(), "below": set(), "noise": set()}
    for regime, arm in of_seeds:
        alpha_beta = re.fullmatch(r"ib-([\d.]+)-([\d.]+)", arm)
        product = "0.002" if arm == "ib-published" else ""
        if alpha_beta:
            product = f"{float(alpha_beta[1]) * float(alpha_beta[2]):g}"
        if (regime, f"no-kl-{product}") in of_seeds:
            pair = difference(of_seeds[regime, arm], of_seeds[regime, f"no-kl-{product}"])
            found[pair.verdict].add(f"{regime} {arm}")
    return found


def test_what_kl_adds() -> None:
    """As docs/lab.md tells it of either run and of both."""
    first, again, both = (comparisons(solved(told)) for told in TOLD)
    assert [sum(map(len, found.values())) for found in (first, again, both)] == [20] * 3
    assert first["above"] == {"strong ib-10-1", "mixed ib-3-1", "mild ib-published"}
    assert first["below"] == {"none ib-1-0.1", "none ib-1-1"}
    assert again["above"] == {"strong ib-0.1-1", "strong ib-1-0.1"} and not again["below"]
    assert both["above"] == {f"strong ib-{x}" for x in ("1-0.1", "1-1", "3-1", "10-1")} | {"mixed ib-3-1"}
    assert both["below"] == {"none ib-1-0.1"}


@pytest.mark.parametrize(
    ("regime", "one", "other", "quoted"),
    [
        ("strong", "ib-3-1-target", "ib-3-1", "costs (3, 1) 21.6 points (12.1 to 31.0)"),
        ("strong", "ib-narrow-target", "ib-narrow", "11.1 (1.6 to 20.7)"),
        ("strong", "ib-3-1-warmup", "ib-3-1", "Warm-up costs 3.4 (1.0 to 5.9)"),
        ("strong", "ib-narrow-warmup", "ib-narrow", "and 7.2 (1.7 to 12.6)"),
        ("strong", "ib-3-1-layer-1", "ib-3-1", "Layer 1 costs 4.9 (0.4 to 9.3)"),
    ],
)
def test_what_options_and_layers_change(regime: str, one: str, other: str, quoted: str) -> None:
    assert quoted in " ".join((ROOT / "docs/lab.md").read_text().split())
    of_seeds = solved("both")
    numbers = [float(number) for number in re.findall(r"\d+\.\d", quoted)]
    value, low, high = points(of_seeds[regime, one], of_seeds[regime, other])
    assert numbers == pytest.approx([value, low, high] if value > 0 else [-value, -high, -low], abs=0.051)


def test_what_the_readme_says() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    of_seeds = solved("both")
    sft, reference, head = (of_seeds["strong", arm] for arm in ("sft", "sft-reference", "no-kl-3"))
    assert f"solves {percent(sft):.1f}% of held-out tasks" in text
    assert f"knows other programs by heart {percent(reference):.1f}%" in text
    gain, low, high = points(of_seeds["strong", "ib-3-1"], sft)
    barrier = percent(reference) - percent(sft)
    assert f"wins {gain:.0f} of these {barrier:.0f} points back (95% interval {low:.0f} to {high:.0f})" in text
    without, least, most = points(head, sft)
    assert f"brings {without:.0f} of the {gain:.0f} ({least:.0f} to {most:.0f})" in text
    added, least, most = points(of_seeds["strong", "ib-3-1"], head)
    assert f"compressing the other {added:.0f} ({least:.0f} to {most:.0f})" in text
    gain, low, high = points(of_seeds["strong", "ib-published"], sft)
    assert f"with the published weights {gain:.0f} ({low:.0f} to {high:.0f})" in text


def test_how_much_of_the_language_the_bases_read() -> None:
    """By making every program that there is."""
    text = " ".join((ROOT / "docs/lab.md").read_text().split())
    said = re.search(r"the bases read ([\d,]+) of its ([\d,]+) programs in some form, and about seven in ten", text)
    assert said
    read, there = (int(number.replace(",", "")) for number in said.groups())
    plan = full_plan((0,))
    assert len({task.program for task in generate_tasks(there, seed=0, max_steps=plan.max_steps)}) == there
    with pytest.raises(InputError, match=f"between 1 and {there}, not"):
        generate_tasks(there + 1, seed=0, max_steps=plan.max_steps)
    assert read == plan.first_reading + plan.documented + plan.other_programs
    tasks = results("lab")["tasks"]
    assert np.mean(tasks["held_out_behave_as_read"]) / tasks["held_out"] == pytest.approx(0.7, abs=0.05)
