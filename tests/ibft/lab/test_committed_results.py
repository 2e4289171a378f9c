"""What README and docs/lab.md say came out, against the committed results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibft.lab.report_statistics import difference

ROOT = Path(__file__).parents[3]
Solved = dict[tuple[str, str], list[np.ndarray]]


@pytest.fixture(scope="module")
def solved() -> Solved:
    """Which held-out tasks greedy decoding solves, of every seed, by regime and arm."""
    results: dict[str, Any] = json.loads((ROOT / "benchmarks/results/lab/results.json").read_text())
    found: Solved = {}
    for run in sorted(results["runs"], key=lambda run: run["seed"]):
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
def test_the_table_of_docs_lab(solved: Solved, regime: str) -> None:
    lines = (ROOT / "docs/lab.md").read_text().splitlines()
    start = lines.index("| | strong | mixed | mild | none |")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 9]]
    column = table[0].index(regime)
    cells = {row[0]: row[column] for row in table}
    sft, best, no_kl = (solved[regime, arm] for arm in ("sft", "ib-3-1", "no-kl-3"))
    assert float(cells["SFT"].rstrip("%")) == pytest.approx(percent(sft), abs=0.051)
    expected = {
        "IB-FT published - SFT": points(solved[regime, "ib-published"], sft),
        "IB-FT (3, 1) - SFT": points(best, sft),
        "(3, 1) without KL - SFT": points(no_kl, sft),
        "(3, 1) with - without KL": points(best, no_kl),
    }
    if (regime, "sft-reference") in solved:
        reference = solved[regime, "sft-reference"]
        assert float(cells["SFT from the reference base"].rstrip("%")) == pytest.approx(percent(reference), abs=0.051)
        expected["barrier"] = points(sft, reference)
    for name, numbers in expected.items():
        quoted = [float(word) for word in cells[name].replace("(", "").replace(")", "").replace(" to ", " ").split()]
        assert quoted == pytest.approx(numbers, abs=0.051), name


def test_what_the_readme_says(solved: Solved) -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    sft, reference = solved["strong", "sft"], solved["strong", "sft-reference"]
    assert f"solves {percent(sft):.1f}% of held-out tasks" in text
    assert f"knows other programs by heart {percent(reference):.1f}%" in text
    gain, low, high = points(solved["strong", "ib-3-1"], sft)
    barrier = percent(reference) - percent(sft)
    assert f"wins {gain:.0f} of these {barrier:.0f} points back (95% interval {low:.0f} to {high:.0f})" in text
    gain, low, high = points(solved["strong", "ib-published"], sft)
    assert f"with the published weights {gain:.0f} ({low:.0f} to {high:.0f})" in text
