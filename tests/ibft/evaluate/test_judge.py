"""What a verdict depends on: the digest of the rules follows the text of every module that has a say."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import ibft.evaluate
from ibft.evaluate import judge

PACKAGE = Path(ibft.evaluate.__file__).parent
READING = {"problems", "jsonl"}  # make the problem, which is in the key itself


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, from which the digest is made."""
    folder = shutil.copytree(PACKAGE, tmp_path / "evaluate", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(judge.resources, "files", lambda name: folder)
    judge.rules.cache_clear()
    yield folder
    judge.rules.cache_clear()


def imported(module: str) -> set[str]:
    """The modules of the package that a module needs, itself and those that they need included."""
    found = {module}
    waiting = [module]
    while waiting:
        tree = ast.parse((PACKAGE / f"{waiting.pop()}.py").read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("ibft.evaluate"):
                continue
            parts = (node.module or "").split(".")
            for name in parts[2:] or [alias.name for alias in node.names]:
                if name not in found:
                    found.add(name)
                    waiting.append(name)
    return found


# The scripts that run inside are read as text, so no import names the last tier's.
DECIDING = sorted((imported("judge") | {"supervisor"}) - READING)


def test_what_decides_is_known() -> None:
    assert {"python_child", "verilog_verdict", "assembly", "walls", "sandbox"} < set(DECIDING)
    assert not {"extraction", "samples", "execute", "report"} & set(DECIDING)


@pytest.mark.parametrize("module", DECIDING)
def test_the_digest_of_the_rules_follows_each_module(module: str, copy: Path) -> None:
    before = judge.rules()
    judge.rules.cache_clear()
    assert judge.rules() == before
    (copy / f"{module}.py").write_text((copy / f"{module}.py").read_text() + "# another rule\n")
    judge.rules.cache_clear()
    assert judge.rules() != before


def test_other_modules_make_nothing_stale(copy: Path) -> None:
    before = judge.rules()
    for module in ("report", "extraction", "cli"):
        (copy / f"{module}.py").write_text("")
    judge.rules.cache_clear()
    assert judge.rules() == before
