"""A run chooses activation checkpointing for itself."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from outlines import cost_of, lora, published

import ibft.estimate.checkpointing
from ibft.attention import Attention
from ibft.config import TrainConfig
from ibft.document_attention import VARLEN
from ibft.engines import Engine
from ibft.estimate.checkpointing import Checkpointing, choose_checkpointing
from ibft.estimate.cost import ModelCost
from ibft.estimate.step import Setting, memory


def test_a_run_chooses_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published("deepseek-coder-1.3b").save_pretrained(tmp_path)
    cost = cost_of(published("deepseek-coder-1.3b"), target_modules=["q_proj"])

    def choose(
        gib: float, cost: ModelCost | None = cost, engine: Engine | None = None, eager: bool = False, **changes: Any
    ) -> Checkpointing:
        monkeypatch.setattr(ibft.estimate.checkpointing, "_memory_gib", lambda device: gib)
        config = TrainConfig(base_model=str(tmp_path), dataset=["rows.jsonl"], max_length=2048, **changes)
        return choose_checkpointing(
            config,
            cost,
            lora(),
            num_parameters=1_346_471_936,
            dtype=torch.bfloat16,
            engine=engine or Engine(torch.device("cuda")),
            attention=Attention("eager" if eager else VARLEN, ""),
        )

    assert choose(1000) == (False, "there is room")
    on = choose(12, tokens_per_batch=8192)
    assert on.on and re.fullmatch(r"a step without it would take about \d+ GiB of 12", on.reason)
    assert not choose(60, tokens_per_batch=8192).on
    assert choose(12, tokens_per_batch=8192, gradient_checkpointing=False) == (False, "asked for")
    assert choose(1000, gradient_checkpointing=True) == (True, "asked for")
    assert choose(1000, cost=None).on
    # Eager attention keeps the scores, 16 heads x 2048^2 for each row and layer, in float32 and in bfloat16.
    assert choose(60, tokens_per_batch=8192, eager=True).on and not choose(200, tokens_per_batch=8192, eager=True).on
    # What an engine shards is its own.
    several = Engine(torch.device("cuda"))
    several.kind, several.world_size = "zero2", 16
    seen: list[Setting] = []
    monkeypatch.setattr(
        ibft.estimate.checkpointing, "memory", lambda c, a, setting: seen.append(setting) or memory(c, a, setting)
    )
    choose(12, tokens_per_batch=8192, engine=several)
    assert [(setting.engine, setting.gpus) for setting in seen] == [("zero2", 16)]
