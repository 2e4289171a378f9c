"""The loss on held-out rows: plain cross-entropy per label token, over all of them and all ranks."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ibft.data import BatchPlan, EncodedDataset, load_batches
from ibft.loading import autocast
from ibft.signals import StopSignals

if TYPE_CHECKING:
    from ibft.run import Run


class Validation:
    """The held-out documents, packed as the training's are. Draws no random number: a run goes on as without it."""

    def __init__(self, run: "Run", data: EncodedDataset) -> None:
        config = run.config
        self._run, self._data = run, data
        self._every = config.eval_steps or run.plan.steps_in_epoch(0)
        self._plan = BatchPlan(
            data.lengths,
            max_length=config.max_length,
            packing=config.packing,
            rows_per_batch=config.rows_per_batch,
            accumulation=1,
            world_size=run.engine.world_size,
            seed=0,
        )

    def is_due(self, done: int) -> bool:
        """Whether to evaluate after `done` optimizer steps: each eval_steps, or each epoch; always at the end."""
        return done % self._every == 0 or done == self._run.total_steps

    @torch.no_grad()
    def loss(self, model: nn.Module, signals: StopSignals) -> float | None:
        """The mean cross-entropy of the label tokens; on all ranks together, with the same result on each.

        None where one of them has been told to stop: whoever told it may not wait for the rest of the batches.
        """
        run, engine = self._run, self._run.engine
        num_labels = int(self._data.label_tokens.sum())
        total = torch.zeros((), device=engine.device)
        stopped = False
        training = model.training
        model.eval()
        for batch in load_batches(
            self._data,
            self._plan,
            range(self._plan.steps_in_epoch(0)),
            rank=engine.rank,
            device=engine.device,
            tokenizer=run.tokenizer,
            lengths=run.attention.lengths,
        ):
            if stopped := engine.highest(signals.received) > 0:
                break
            with autocast(engine.device, run.dtype):
                total += model(**batch, num_items_in_batch=num_labels, return_stats=False).loss
        model.train(training)
        return None if stopped else float(engine.sum(total).item())
