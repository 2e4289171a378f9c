"""What transformers.Trainer and trl.SFTTrainer need for an objective whose weights vary: `ObjectiveCallback`."""

from typing import Any

from transformers import TrainerCallback


class ObjectiveCallback(TrainerCallback):
    """Calls `IBModel.step_objective` after each optimizer step: `Trainer(..., callbacks=[ObjectiveCallback()])`.

    For alpha_warmup_steps and ib_rate_target. Resuming needs no more: IBModel saves and loads how far they have got.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Trainer's, after each optimizer step."""
        model.step_objective()
