"""Importing ibkernels: nothing but torch, no accelerator woken, and quick."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ibkernels

PROGRAM = """
import sys, time

class Unimportable:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "transformers", "peft", "ibft"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Unimportable())
started = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - started
before = set(sys.modules)
started = time.perf_counter()
import ibkernels
seconds = time.perf_counter() - started
new = sorted(set(sys.modules) - before)

z, kl = ibkernels.VariationalBottleneck(8, 4)(torch.randn(3, 8))
loss = ibkernels.bottleneck_cross_entropy(z, torch.randn(8, 4), None, torch.randn(9, 8), torch.arange(3))
loss.backward()

import json
print(json.dumps({
    "new": new,
    "seconds": seconds,
    "torch_seconds": torch_seconds,
    "cuda": torch.cuda.is_initialized(),
    "loaded": sorted(sys.modules),
    "public": {name: callable(getattr(ibkernels, name)) for name in ibkernels.__all__ if name != "__version__"},
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    """What a fresh process, in which triton and ibft cannot be imported, says of `import ibkernels` and a step."""
    folder = Path(ibkernels.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_it_works_without_triton_and_wakes_no_accelerator(imported):
    assert not imported["cuda"]


def test_it_brings_only_itself_and_leaves_the_backends_for_their_first_call(imported):
    assert {name.partition(".")[0] for name in imported["new"]} == {"ibkernels"}
    assert not [name for name in imported["new"] if name.startswith(("ibkernels.reference", "ibkernels.native"))]


def test_it_never_imports_what_depends_on_it(imported):
    packages = {name.partition(".")[0] for name in imported["loaded"]}
    assert not packages & {"triton", "transformers", "peft", "ibft"}


def test_it_takes_little_beyond_torch(imported):
    assert imported["seconds"] < max(0.25, 0.25 * imported["torch_seconds"])


def test_the_public_names_are_there(imported):
    assert all(imported["public"].values())
    assert sorted(imported["public"]) == list(imported["public"])
