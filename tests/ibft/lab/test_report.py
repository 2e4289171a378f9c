"""The lab's report: numbers are those of results.json, intervals those of others, sentences turn with the data."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ibft.cli import main
from ibft.errors import InputError
from ibft.evaluate.metrics import Count, pass_at_k_m
from ibft.lab import report_statistics as statistics
from ibft.lab.plan import full_plan
from ibft.lab.report import write_report
from ibft.lab.report_conclusions import of_regime
from ibft.lab.report_data import load
from ibft.lab.report_findings import Findings, find
from ibft.lab.report_short import in_short

TASKS, SAMPLES = 100, 5


def arm(name: str, group: str, alpha: float | None = None, beta: float | None = None, **more: Any) -> dict[str, Any]:
    title = f"IB-FT {name}" if alpha is not None else name.upper()
    return {
        "name": name, "title": title, "group": group, "base": "memorised", "alpha": alpha, "beta": beta,
        "settings": {}, **more,
    }  # fmt: skip


ARMS = [
    arm("sft", "reference"),
    arm("sft-reference", "reference", base="reference"),
    arm("sft-filtered", "reference"),
    arm("ib-published", "published", 0.2, 0.01),
    arm("ib-published-no-kl", "ablation", 0.2, 0.01, of=["ib-published"]),
    *(arm(f"ib-{a:g}-{b:g}", "grid", a, b) for a in (0.1, 1.0) for b in (0.1, 1.0)),
    *(arm(f"ib-{a:g}-{b:g}-no-kl", "ablation", a, b, of=[f"ib-{a:g}-{b:g}"]) for a in (0.1, 1.0) for b in (0.1, 1.0)),
    arm("ib-narrow", "narrow", 0.2, 0.01),  # the same weights, but not what the option changes
    arm("free-bits", "option", 0.2, 0.01, of=["ib-published"]),
    arm("layer-1", "layer", 0.2, 0.01, of=["ib-published"]),
]
FEW = [each for each in ARMS if each["name"] in ("sft", "sft-reference", "ib-published", "ib-published-no-kl")]
GRID = [each["name"] for each in ARMS if each["group"] == "grid"]


def run(name: str, regime: str, seed: int, share: float, kl: float | None) -> dict[str, Any]:
    """A run whose first tasks are solved: `share` of them, and one more with every seed."""
    solved = [task < round(share * TASKS) + seed for task in range(TASKS)]
    correct = [4 if each else task % 2 for task, each in enumerate(solved)]
    values = {
        f"pass@{k}" + (f"^({m})" if m > 1 else ""): float(
            np.mean([float(pass_at_k_m(SAMPLES, c, k, m)) for c in correct])
        )
        for k in (1, 5)
        for m in range(1, k + 1)
    }
    bottleneck = {"kl_nats": None, "ce_ib": None, "active_share": None}
    curve: list[dict[str, Any]] = [{"step": step, "ce": 1 / step, **bottleneck} for step in range(10, 110, 10)]
    if kl is not None:
        for record in curve:
            record.update(kl_nats=kl, ce_ib=3.0 + 1 / record["step"], active_share=0.25)
    return {
        "arm": name, "seed": seed, "regime": regime, "processor_seconds": 30.0,
        "file": f"runs/{regime}/{name}-{seed}.json",
        "curve": curve, "training": {"greedy": 0.96}, "trained_rows": 100, "trained_memorised_rows": 50, "epochs": 20,
        "crossed": ["description", "name", "neither", "description"],
        "held_out": {
            "greedy": float(np.mean(solved)), "correct_greedy": solved, "samples": SAMPLES, "correct": correct,
            "metrics": values,
        },
        "kinds": {"correct": 0.5, "wrong": 0.25, "invalid": 0.25},
    }  # fmt: skip


def results(
    shares: Mapping[str, float] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    regimes: Sequence[str] = ("mixed",),
    kl: float = 0.01,
    arms: Sequence[dict[str, Any]] = tuple(ARMS),
) -> dict[str, Any]:
    """A results.json; `shares` of held-out tasks solved, by arm (0.3 for the others)."""
    shares = shares or {}
    rng = np.random.default_rng(0)
    pairs = [(regime, seed) for regime in regimes for seed in seeds]
    return {
        "mode": "full", "command": "ibft lab --full", "versions": {"ibft": "0.1.0"}, "device": "CPU, 2 cores",
        "processor_seconds": 3600.0, "config": {"parameters": 800_000, "samples": SAMPLES, "temperature": 0.8},
        "seeds": list(seeds),
        "tasks": {
            "training": 300, "memorised": 150, "held_out": TASKS,
            "example": {"name": "t1", "description": "add 2", "program": "def solve(xs):\n    return xs\n"},
        },
        "regimes": [{"name": regime, "title": f"Regime {regime}", "memorised": 150} for regime in regimes],
        "pieces": {"planned": 7, "done": 7},
        "arms": list(arms),
        "bases": [
            {
                "regime": regime, "seed": seed, "kind": kind, "recall": recall, "name_loss": 0.03,
                "held_out_name_loss": 1.2,
                "training_greedy": 0.04, "held_out_greedy": 0.0,
                "curve": [{"step": step, "loss": 1 / step} for step in range(10, 60, 10)], "file": "bases/x.json",
            }
            for regime, seed in pairs
            for kind, recall in (("memorised", 0.97), ("reference", 0.0))
        ],
        "runs": [
            run(each["name"], regime, seed, shares.get(each["name"], 0.3), None if each["alpha"] is None else kl)
            for regime, seed in pairs
            for each in arms
        ],
        "memorization": [
            {
                "regime": regime, "seed": seed, "model": model, "rows": rows,
                "min_k": rng.normal(-1 if rows == "training" else -2, 0.3, 40).tolist(),
            }
            for regime, seed in pairs
            for model in ("base-memorised", "sft")
            for rows in ("training", "held-out")
        ],
        "separations": [
            {
                "regime": regime, "seed": seed, "model": "base-memorised", "a": "training", "b": "held-out",
                "auc": 0.9 + 0.01 * seed, "ks": 0.8, "score": "min_k",
            }
            for regime, seed in pairs
        ],
        "representation": [
            {
                "regime": regime, "seed": seed, "model": "sft", "l2": 2.5, "angle_degrees": 30.0, "spread": 5.0,
                "separation": {"value": 0.5, "low": 0.25, "high": 0.75}, "chance_l2": [1.0, 3.0], "p_l2": 0.2,
            }
            for regime, seed in pairs
        ],
    }  # fmt: skip


def written(folder: Path, values: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(values))
    return folder


def found(folder: Path, values: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]], Findings]:
    """The sentences in short, those of the first regime by section, and its findings."""
    lab = load(written(folder, values))
    all_found = [find(lab, regime) for regime in lab.regimes]
    return in_short(lab, all_found), of_regime(lab, all_found[0]), all_found[0]


class Page(HTMLParser):
    """What a browser makes of a page: its tags closed in order, its ids, its text, its tables."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "srcset", "data", "action"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three seeds and two regimes."""
    folder = tmp_path_factory.mktemp("lab")
    shares = {"sft": 0.2, "sft-reference": 0.6, "ib-0.1-1": 0.4, "ib-1-1": 0.1}
    written(folder, results(shares, regimes=("mixed", "strong")))
    write_report(folder)
    return folder


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<script|<iframe|<link|\bdata:", text)
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    page = Page(text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    figures = sorted((folder / "figures").glob("*.svg"))
    assert page.tags.count("svg") == len(figures) > 10
    drawn = (
        "barrier",
        "arms",
        "terms",
        "grid",
        "collapse",
        "options",
        "layers",
        "densities",
        "representation",
        "curves",
    )
    for section in (*drawn, "pass"):
        assert section in page.ids and any(figure.name.startswith(section) for figure in figures), section


def test_every_figure_is_a_file_of_its_own(folder: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    for figure in (folder / "figures").glob("*.svg"):
        text = figure.read_text()
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "Regime mixed" in text or "Regime strong" in text  # text stays text: selectable, and read aloud
        assert not re.search(r"<image|<script|metadata", text)


def test_numbers_are_those_of_the_results(folder: Path) -> None:
    values = json.loads((folder / "results.json").read_text())
    page = Page((folder / "report.html").read_text())
    cells = {row[0]: row for row in page.rows if len(row) == 3}  # the main table: an arm, two regimes
    summary = (folder / "summary.md").read_text()
    for each in values["arms"]:
        for column, regime in enumerate(("mixed", "strong"), 1):
            runs = [row for row in values["runs"] if (row["arm"], row["regime"]) == (each["name"], regime)]
            mean = np.mean([np.mean(row["held_out"]["correct_greedy"]) for row in runs])
            assert cells[each["title"]][column].startswith(f"{100 * mean:.1f} (")
        assert f"| {' | '.join(cells[each['title']])} |" in summary
    text = "".join(page.text)
    for row in values["runs"]:
        assert row["file"] in text
    metric = np.mean([row["held_out"]["metrics"]["pass@5^(3)"] for row in values["runs"] if row["arm"] == "sft"])
    everything = [row for row in page.rows if row[0] == "SFT" and row[1] == "96.0%"]  # of each regime
    assert len(everything) == 2 and all(f"{100 * metric:.1f}" in row for row in everything)
    assert "0.910 (0.885 to 0.935)" in text  # the AUCs 0.90, 0.91, 0.92: 0.91 +- 4.303 * 0.01 / sqrt(3)


def solved(*counts: int, tasks: int = TASKS) -> list[np.ndarray]:
    """For each seed, the first so many tasks solved."""
    return [np.array([task < count for task in range(tasks)], dtype=float) for count in counts]


def test_shares_of_one_seed_have_wilsons_interval() -> None:
    for count in (0, 1, 37, TASKS):
        estimate = statistics.share(solved(count))
        expected = stats.binomtest(count, TASKS).proportion_ci(method="wilson")
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_seeds_that_differ_have_students_interval() -> None:
    counts = [10, 40, 25, 70]
    estimate = statistics.share(solved(*counts))
    shares = np.array(counts) / TASKS
    expected = stats.t.interval(0.95, 3, loc=shares.mean(), scale=stats.sem(shares))
    assert estimate.value == pytest.approx(shares.mean())
    assert (estimate.low, estimate.high) == pytest.approx((max(0, expected[0]), min(1, expected[1])))
    paired = statistics.difference(solved(*counts), solved(30, 30, 30, 30))
    shares = (np.array(counts) - 30) / TASKS
    expected = stats.ttest_1samp(shares, 0).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    assert paired.per_seed == pytest.approx(tuple(shares))
    corrected = statistics.difference(solved(*counts), solved(30, 30, 30, 30), comparisons=9)
    expected = stats.ttest_1samp(shares, 0).confidence_interval(1 - 0.05 / 9)
    assert (corrected.low, corrected.high) == pytest.approx((expected.low, expected.high))


def test_seeds_that_agree_are_not_taken_for_certain() -> None:
    alike = statistics.share(solved(20, 20, 20))
    expected = stats.binomtest(60, 300).proportion_ci(method="wilson")
    assert (alike.low, alike.high) == pytest.approx((expected.low, expected.high))
    assert statistics.difference(solved(21, 21, 21), solved(20, 20, 20)).verdict == "noise"
    assert statistics.difference(solved(30, 30, 30), solved(20, 20, 20)).verdict == "above"


def test_pairs_of_one_seed_have_agresti_and_mins_interval() -> None:
    a, b = solved(30)[0], np.roll(solved(20)[0], 15)
    n12, n21 = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n = TASKS + 2  # Agresti & Min 2005, section 3: a half added to each cell, then Wald's interval
    plus, minus = (n12 + 0.5) / n, (n21 + 0.5) / n
    half = stats.norm.ppf(0.975) * math.sqrt((plus + minus - (plus - minus) ** 2) / n)
    estimate = statistics.difference([a], [b])
    assert n12 > 0 < n21 and estimate.value == pytest.approx((n12 - n21) / TASKS)
    assert (estimate.low, estimate.high) == pytest.approx((plus - minus - half, plus - minus + half))


def test_coverage_of_paired_intervals() -> None:
    """Of 400 experiments without any difference, and of 400 with one, about 95% of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    for gain, seeds in ((0.0, 3), (0.2, 3), (0.0, 1), (0.2, 1)):
        inside = 0
        for _ in range(400):
            a, b = (
                [(rng.random(60) < np.clip(0.4 + extra + rng.normal(0, 0.05 if seeds > 1 else 0), 0, 1)).astype(float)
                 for _ in range(seeds)]
                for extra in (gain, 0.0)
            )  # fmt: skip
            estimate = statistics.difference(a, b)
            inside += estimate.low <= gain <= estimate.high
        assert 0.93 <= inside / 400 <= 1.0, (gain, seeds)


def test_pass_curve_against_an_independent_bootstrap() -> None:
    counts = np.random.default_rng(0).integers(0, 6, size=150)
    curve = statistics.pass_curve([[Count(5, int(c)) for c in counts]], 5)
    values = np.array([[float(pass_at_k_m(5, int(c), 5, m)) for c in counts] for m in range(1, 6)])
    drawn = np.random.default_rng(1).integers(len(counts), size=(4000, len(counts)))
    for m, estimate in enumerate(curve):
        low, high = np.quantile(values[m][drawn].mean(axis=1), [0.025, 0.975])
        assert estimate.value == pytest.approx(values[m].mean())
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.015)


def test_other_tasks_cannot_be_paired() -> None:
    with pytest.raises(InputError, match="must share their held-out tasks, and have 3 and 4"):
        statistics.difference([np.zeros(3)], [np.zeros(4)])


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


def test_arms_that_leave_rows_out_say_how_many(tmp_path: Path) -> None:
    values = results()
    for row in values["runs"]:
        if row["arm"] == "sft-filtered":
            row.update(trained_rows=75, trained_memorised_rows=3 * row["seed"], epochs=60)
    _, sections, _ = found(tmp_path, values)
    assert any("FILTERED (75 rows, 0 to 6 of them memorised, 60 epochs)" in each for each in sections["arms"])
    write_report(tmp_path)
    rows = Page((tmp_path / "report.html").read_text()).rows
    (row,) = (row for row in rows if row[0] == "SFT-FILTERED" and len(row) > 10)
    assert row[-4:] == ["75", "0–6", "60", "3"]


def test_shared_runs_are_said_to_be_shared(tmp_path: Path) -> None:
    values = results(regimes=("one", "two", "none"), seeds=(0, 1), arms=FEW)
    for row in values["runs"]:
        if row["arm"] == "sft-reference" and row["regime"] != "none":
            row["shared"] = "none"
    write_report(written(tmp_path, values))
    text = "".join(Page((tmp_path / "report.html").read_text()).text)
    assert "From the reference base, one, two and none list the same runs" in text
    for row in values["runs"]:
        row.pop("shared", None)
    write_report(written(tmp_path, values))
    assert "list the same runs" not in (tmp_path / "report.html").read_text()


def test_every_group_of_the_plan_has_its_place(tmp_path: Path) -> None:
    planned = {arm.group for arm in full_plan((10,)).arms}
    assert planned == {each["group"] for each in ARMS} | {"repeat"}


def test_intervals_stay_within_what_a_quantity_can_be() -> None:
    wide = statistics.over_seeds([0.99, 0.6, 0.98])
    free = stats.t.interval(0.95, 2, loc=np.mean([0.99, 0.6, 0.98]), scale=stats.sem([0.99, 0.6, 0.98]))
    assert (wide.low, wide.high) == pytest.approx(free) and wide.high > 1
    clamped = statistics.over_seeds([0.99, 0.6, 0.98], least=0, most=1)
    assert (clamped.low, clamped.high) == (pytest.approx(free[0]), 1)
    assert statistics.over_seeds([0.01, 0.4], least=0, most=1).low == 0
    assert math.isnan(statistics.over_seeds([0.5], least=0, most=1).low)


def test_separations_on_the_page_stay_within_their_range(tmp_path: Path) -> None:
    values = results()
    for row in values["separations"]:
        row["auc"], row["ks"] = [(1.0, 1.0), (0.6, 0.2), (1.0, 1.0)][row["seed"]]
    write_report(written(tmp_path, values))
    (row,) = (row for row in Page((tmp_path / "report.html").read_text()).rows if len(row) == 6 and row[-1] == "3")
    assert re.fullmatch(r"0\.867 \(0\.\d+ to 1\.000\)", row[3]) and row[4] == "0.733 (0.000 to 1.000)"


def test_settings_are_counted(tmp_path: Path) -> None:
    _, sections, _ = found(tmp_path, results({"sft": 0.3, "ib-0.1-1": 0.6, "ib-1-1": 0.1, "ib-1-0.1": 0.05}))
    assert sections["grid"] == [
        "Of the grid's 4 settings, each judged on its own, 1 is above SFT (at (0.1, 1)) and 2 below it (at (1, 0.1) "
        "and (1, 1)); by chance alone, about 0.2 would differ. The differences reach from −25.0 to +30.0 "
        "points."
    ]


def test_one_seed_is_warned_of_and_has_intervals_over_tasks(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", results({"sft": 0.2, "ib-published": 0.5}, seeds=(0,), arms=FEW))
    printed = write_report(folder)
    text = "".join(Page((folder / "report.html").read_text()).text)
    for shown in (printed.replace("\n  ", " "), text, (folder / "summary.md").read_text()):
        assert "Everything here is of one seed" in shown
    expected = stats.binomtest(20, TASKS).proportion_ci(method="wilson")
    assert f"20.0 ({100 * expected.low:.1f}–{100 * expected.high:.1f})" in text
    assert "of 1 seeds" not in text and "nan" not in text
    three = written(tmp_path / "three", results(arms=FEW))
    assert "one seed" not in write_report(three)


def test_groups_of_rows_that_lie_as_by_chance_are_counted(tmp_path: Path) -> None:
    values = results()
    for row in values["representation"]:
        row["p_l2"] = (0.2, 0.01, 0.06)[row["seed"]]
    _, sections, _ = found(tmp_path, values)
    assert sections["representation"] == [
        "The two groups lie no farther apart than random groups may: SFT 2 of 3 seeds."
    ]


def test_seeds_of_the_trials_are_warned_of(tmp_path: Path) -> None:
    chosen = {"chosen": {"arm": "ib-published", "seeds": [0, 1, 2]}}
    for seeds, expected in (
        ((1, 2, 3), "chosen in trials on seeds 0, 1 and 2, and seeds 1 and 2 are some of those"),
        ((2, 3), "chosen in trials on seeds 0, 1 and 2, and seed 2 is one of those"),
        ((3, 4), None),
    ):
        folder = written(tmp_path, {**results(arms=FEW, seeds=seeds), **chosen})
        printed = " ".join(write_report(folder).split())
        text = "".join(Page((folder / "report.html").read_text()).text)
        for shown in (printed, text, (folder / "summary.md").read_text()):
            assert (expected or "flatters") in shown if expected else "flatters" not in shown


def test_a_part_of_the_experiment_is_said_to_be_one(tmp_path: Path) -> None:
    printed = write_report(written(tmp_path, {**results(arms=FEW), "pieces": {"planned": 284, "done": 95}}))
    for shown in (
        " ".join(printed.split()),
        (tmp_path / "report.html").read_text(),
        (tmp_path / "summary.md").read_text(),
    ):
        assert "95 of the 284 pieces" in shown


def without(values: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in parts}


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    full = results(seeds=(0,), arms=[*FEW, *(each for each in ARMS if each["name"] == "ib-0.1-1")])
    optional = ("memorization", "separations", "representation", "bases", "config", "tasks", "versions", "device")
    bare = copy.deepcopy(without(full, *optional, "processor_seconds", "command", "mode", "seeds"))
    for row in bare["runs"]:
        for part in ("curve", "kinds", "processor_seconds", "file"):
            del row[part]
        row["held_out"] = {"correct_greedy": row["held_out"]["correct_greedy"]}
    only_sft = {**bare, "runs": [row for row in bare["runs"] if row["arm"] == "sft"]}
    no_sft = {**full, "runs": [row for row in full["runs"] if row["arm"] == "ib-published"]}
    no_grid = {**full, "runs": [row for row in full["runs"] if row["arm"] not in GRID]}
    nulls = copy.deepcopy(full)
    for row in nulls["runs"]:
        for record in row["curve"]:
            record["active_share"] = None
    for name, values in {"bare": bare, "sft": only_sft, "no sft": no_sft, "no grid": no_grid, "nulls": nulls}.items():
        folder = written(tmp_path / name, values)
        assert "arm" in write_report(folder)
        text = (folder / "report.html").read_text()
        Page(text)
        assert "None" not in text and "nan" not in text, name


def test_a_run_that_is_still_missing_pairs_the_others(tmp_path: Path) -> None:
    values = results({"sft": 0.2, "ib-published": 0.5})
    values["runs"] = [row for row in values["runs"] if (row["arm"], row["seed"]) != ("sft", 1)]
    _, _, each = found(tmp_path, values)
    assert len(each.against_sft["ib-published"].per_seed) == 2
    assert len(each.held_out["ib-published"].per_seed) == 3


def test_text_of_the_results_is_only_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"q\" $\\alpha$"
    values = results(seeds=(0, 1), arms=copy.deepcopy(FEW))
    values["regimes"][0]["title"] = values["arms"][2]["title"] = values["command"] = values["device"] = evil
    values["tasks"]["example"] = {"name": evil, "description": evil, "program": evil}
    for row in values["runs"]:
        row["file"] = evil
    folder = written(tmp_path, values)
    write_report(folder)
    page = Page((folder / "report.html").read_text())
    assert "script" not in page.tags
    assert "".join(page.text).count(evil) > 10


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    folder = written(tmp_path, results(seeds=(0, 1)))
    (folder / "figures").mkdir()
    (folder / "figures" / "of-other-results.svg").write_text("<svg/>")
    (folder / "runs.txt").write_text("kept")
    write_report(folder)
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not (folder / "figures" / "of-other-results.svg").exists() and (folder / "runs.txt").exists()
    write_report(folder)
    assert first == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_wrong_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no results\.json; name the --output_dir of `ibft lab`"):
        write_report(tmp_path / "nothing")
    good = results(seeds=(0,))
    unknown, twice = copy.deepcopy(good), copy.deepcopy(good)
    unknown["runs"][0]["arm"] = "sftt"
    twice["runs"].append(twice["runs"][0])
    for values, message in (
        ([], "is not what `ibft lab` writes"),
        (without(good, "arms"), "is not what `ibft lab` writes \\(KeyError: 'arms'\\)"),
        (unknown, "a run of regime 'mixed' and arm 'sftt', which the file does not name"),
        (twice, "two runs of regime 'mixed', arm 'sft' and seed 0"),
        ({**good, "runs": []}, "holds no run, so there is nothing to report"),
    ):
        folder = written(tmp_path / "wrong", values)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            write_report(folder)
        assert [path.name for path in folder.iterdir()] == ["results.json"]
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json cannot be read"):
        write_report(folder)


@pytest.mark.parametrize("library", ["matplotlib", "scipy"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    found_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found_spec(name))
    folder = written(tmp_path, results(seeds=(0,)))
    with pytest.raises(InputError, match=f'the report needs {library}, .*pip install "ibft\\[plot\\]"'):
        write_report(folder)
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "lab", results(seeds=(0,), arms=FEW))
    assert main(["lab", "report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "IB-FT ib-published" in printed and "Everything here is of one seed" in printed
    assert (folder / "report.html").exists()
    assert main(["lab", "report", str(tmp_path / "other")]) == 2
    assert "holds no results.json" in capsys.readouterr().err
