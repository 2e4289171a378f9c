"""What the tests of `ibft estimate` share."""

import pytest
from outlines import cost_of, lora, outline, published

from ibft import IBConfig
from ibft.estimate.activations import Activations, measure_activations
from ibft.estimate.cost import ModelCost


@pytest.fixture(scope="session")
def seven_billion() -> tuple[ModelCost, Activations]:
    config = published("deepseek-coder-6.7b")
    return cost_of(config, IBConfig(target_layer=20)), measure_activations(outline(config), lora(lora_dropout=0.05))
