"""The loss on held-out rows: plain cross-entropy per label token, over all of them and all ranks."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ibft.data import BatchPlan, EncodedDataset, load_batches
from ibft.loading import autocast

if TYPE_CHECKING:
    from ibft.run import Run


class Validation:
    """The held-out documents, packed as the training's are. Draws no random number: a run goes on as without it."""

    def __init__(self, run: "Run", data: EncodedDataset) -> None:
        config, engine = run.config, run.engine
        self.data, self._tokenizer, self._engine, self._every = data, run.tokenizer, engine, config.eval_steps
        self._lengths, self._dtype = run.attention.takes_lengths, run.dtype
        self._plan = BatchPlan(
            data.lengths,
            max_length=config.max_length,
            packing=config.packing,
            rows_per_batch=config.rows_per_batch,
            accumulation=1,
            world_size=engine.world_size,
            seed=0,
        )

    def is_due(self, done: int, steps_in_epoch: int, total_steps: int) -> bool:
        """Whether to evaluate after `done` optimizer steps: each eval_steps, or each epoch; always at the end."""
        return done % (self._every or steps_in_epoch) == 0 or done == total_steps

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """The mean cross-entropy of the label tokens; on all ranks together, with the same result on each."""
        num_labels = int(self.data.label_tokens.sum())
        total = torch.zeros((), device=self._engine.device)
        training = model.training
        model.eval()
        for batch in load_batches(
            self.data,
            self._plan,
            range(self._plan.steps_in_epoch(0)),
            rank=self._engine.rank,
            device=self._engine.device,
            tokenizer=self._tokenizer,
            lengths=self._lengths,
        ):
            with autocast(self._engine.device, self._dtype):
                total += model(**batch, num_items_in_batch=num_labels, return_stats=False).loss
        model.train(training)
        return float(self._engine.sum(total).item())
