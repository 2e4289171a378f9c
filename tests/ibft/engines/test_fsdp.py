"""FSDP2's engine, in one process: what it hands out to be saved is of the shards, whatever ran before."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from oracle import random_batch, tiny_model, wrap

from ibft import IBConfig
from ibft.engines import Engine
from ibft.engines.fsdp import FullyShardedDataParallel


def saved(engine: Engine, order: list[str], *, forward: bool) -> dict[str, Any]:
    """What the engine's methods give, asked in this order, after a step and perhaps a forward without backward."""
    model = wrap(tiny_model("llama", torch.float32), IBConfig(target_layer=2, bottleneck_dim=8))
    engine.shard(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    batch = random_batch()
    torch.manual_seed(0)  # of the noise
    with engine.micro_batch(True):
        engine.backward(model(**batch).loss)
    engine.step(optimizer, 1.0, torch.zeros(()))
    if forward:
        with torch.no_grad():
            model.eval()(**batch)
    ask = {"weights": (model,), "optimizer_state": (model, optimizer)}
    return {method: getattr(engine, method)(*ask[method]) for method in order}


@pytest.mark.parametrize("order", [["weights", "optimizer_state"], ["optimizer_state", "weights"]], ids="-".join)
def test_what_is_saved_after_a_forward_alone_is_of_the_shards(order: list[str]) -> None:
    """The outermost group, with the bottleneck, is still gathered then; either method may be asked first."""
    expected = saved(Engine(torch.device("cpu")), order, forward=False)
    engine = FullyShardedDataParallel(torch.device("cpu"), timedelta(minutes=1))
    try:
        actual = saved(engine, order, forward=True)
    finally:
        engine.close()
    for state in expected.values():
        assert any(name.startswith("bottleneck.") for name in state)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
