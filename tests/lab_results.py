"""Results of `ibft lab` made up for the tests of its report, and the page that a browser makes of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from ibft.evaluate.metrics import pass_at_k_m
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
