"""`python -m benchmarks compare`: what is beyond noise is found, what is not is left alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.compare import Change, compare, differences

Record = dict[str, Any]


def record_of(ours: float, *, seed: int, machine: float = 1.0, peak: float = 40e6, tokens: int = 256) -> Record:
    """Of a machine on which eager PyTorch takes `machine` seconds and ours `ours` of them; rounds vary by 4% together,
    as others' work does, and by 1% each."""
    generator = np.random.default_rng(seed)
    load = np.exp(generator.normal(0, 0.04, 12))
    times = {"eager": machine, "ibkernels": machine * ours, "floor: products": machine * 0.5}
    seconds = {name: list(load * time * np.exp(generator.normal(0, 0.01, 12))) for name, time in times.items()}
    case = {"size": {"tokens": tokens}, "seconds": seconds, "peak_bytes": {"eager": 90e6, "ibkernels": peak}}
    return {
        "suite": "ops", "command": "make bench", "date": "today", "device": {"cpu": "a CPU", "threads": 2},
        "versions": {"torch": "2.13"}, "cases": {"linear CE, float32: forward": case},
    }  # fmt: skip


def of_ours(changes: list[Change], what: str = "time") -> Change:
    (found,) = [change for change in changes if change.variant == "ibkernels" and change.what == what]
    return found


def test_repeated_runs_are_the_same() -> None:
    for seed in range(30):
        changes = compare(record_of(0.7, seed=seed), record_of(0.7, seed=100 + seed))
        assert {change.verdict for change in changes} == {"same"}


def test_a_regression_beyond_noise_is_found_with_its_size() -> None:
    change = of_ours(compare(record_of(0.7, seed=1), record_of(0.7 * 1.2, seed=2)))
    assert change.verdict == "worse" and change.low < 1.2 < change.high and change.ratio == pytest.approx(1.2, rel=0.03)
    assert of_ours(compare(record_of(0.7, seed=1), record_of(0.7 / 1.2, seed=2))).verdict == "better"
    assert of_ours(compare(record_of(0.7, seed=1), record_of(0.7 * 1.02, seed=2))).verdict == "same"


@pytest.mark.parametrize("left_out", [False, True])
def test_a_slower_machine_is_no_regression(left_out: bool) -> None:
    """Nor where eager PyTorch was left out, as it is where it errs too much."""
    records = record_of(0.7, seed=1), record_of(0.7, seed=2, machine=3.0)
    for record in records if left_out else ():
        del record["cases"]["linear CE, float32: forward"]["seconds"]["eager"]
    assert of_ours(compare(*records)).verdict == "same"


def test_another_size_is_not_compared_and_said() -> None:
    old, new = record_of(0.7, seed=1), record_of(1.4, seed=2, tokens=512)
    assert compare(old, new) == []
    assert differences(old, new) == ["linear CE, float32: forward: another size, so not compared"]


def test_a_larger_peak_is_found() -> None:
    change = of_ours(compare(record_of(0.7, seed=1), record_of(0.7, seed=2, peak=50e6)), "peak")
    assert change.verdict == "worse" and change.ratio == pytest.approx(1.25)
    assert of_ours(compare(record_of(0.7, seed=1), record_of(0.7, seed=2, peak=41e6)), "peak").verdict == "same"


def test_changes_of_our_own_layouts_do_not_cancel_out() -> None:
    def padding(ours: float) -> Record:
        seconds = {"eager-ib, published": [2.0] * 5, "published": [ours] * 5, "packed, varlen": [ours / 4] * 5}
        return {"suite": "padding", "real_tokens": 10, "seconds": seconds}

    verdicts = {change.variant: change.verdict for change in compare(padding(1.0), padding(1.3))}
    assert verdicts == {"published": "worse", "packed, varlen": "worse"}


def test_of_a_scaling_record_every_point_is_compared() -> None:
    def scaling(ours: float) -> Record:
        points = [
            {"size": {"tokens": n}, "seconds": {"eager": [1.0] * 5, "ibkernels": [ours] * 5}, "peak_bytes": {}}
            for n in (8, 16)
        ]
        return {"suite": "scaling", "sweeps": {"linear CE over tokens": {"axis": "tokens", "points": points}}}

    changes = compare(scaling(0.5), scaling(1.0))
    assert [(change.group, change.verdict) for change in changes] == [
        ("linear CE over tokens=16", "worse"),
        ("linear CE over tokens=8", "worse"),
    ]


def test_the_command_fails_for_what_became_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("old.json", "new.json", "slow.json")]
    slow = record_of(0.9, seed=3) | {"versions": {"torch": "2.14"}}
    for path, record in zip(paths, (record_of(0.7, seed=1), record_of(0.7, seed=2), slow), strict=True):
        path.write_text(json.dumps(record))
    assert main(["compare", str(paths[0]), str(paths[1])]) == 0
    assert "4 of 4 the same within their intervals." in capsys.readouterr().out
    assert main(["compare", str(paths[0]), str(paths[2])]) == 1
    printed = capsys.readouterr().out
    assert "| ibkernels | time | 1.2" in printed and "worse |" in printed and "floor" not in printed
    assert "Different: torch: 2.13 and 2.14." in printed
    assert main(["compare", str(paths[0]), str(paths[1]), "--all"]) == 0
    assert "floor: products" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("{", "Expecting"), ("[]", "something else"), ("{}", "something else")],
)
def test_what_is_no_record_is_refused_with_a_sentence(
    content: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(record_of(0.7, seed=1)))
    if content is not None:
        bad.write_text(content)
    for arguments in (["compare", str(good), str(bad)], ["report", str(bad)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert f"{bad} is not a record of benchmarks" in error and reason in error


def test_records_of_two_suites_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(record_of(0.7, seed=1)))
    two.write_text(json.dumps({"suite": "step", "command": "c", "device": {}, "seconds": {"eager-sft": [1.0]}}))
    assert main(["compare", str(one), str(two)]) == 2
    assert f"{one} is of ops, {two} of step" in capsys.readouterr().err


def test_what_else_differs_is_said() -> None:
    old, new = record_of(0.7, seed=1), record_of(0.7, seed=1) | {"device": {"cpu": "another", "threads": 2}}
    assert differences(old, new) == ["cpu: a CPU and another"] and differences(old, old) == []
