"""Fixtures that every test may use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in its interpreter. With one, tests/gpu runs them there,
# and the op suite leaves Triton out.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def test_data() -> Callable[[str], Path]:
    """`test_data("mbpp/mbpp.jsonl")`: a file of the real data in the folder that IBFT_TEST_DATA names.

    Skips the test where the data is absent, or fails it when IBFT_REQUIRE_TEST_DATA=1 says that it must be there.
    """
    folder = Path(os.environ.get("IBFT_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))

    def find(name: str) -> Path:
        path = folder / name
        if path.exists():
            return path
        reason = f"{name} is not in the folder that IBFT_TEST_DATA names"
        if os.environ.get("IBFT_REQUIRE_TEST_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    return find


@pytest.fixture
def published_config(test_data: Callable[[str], Path]) -> Callable[[str], Path]:
    """`published_config("training_args.json")`: a configuration file of the published project, unchanged.

    They lie beside the data, in seed_configs.
    """
    return lambda name: test_data(f"../seed_configs/{name}")
