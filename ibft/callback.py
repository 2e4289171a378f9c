"""What transformers.Trainer and trl.SFTTrainer need for an objective whose weights vary: `ObjectiveCallback`."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ibft.errors import InputError
from ibft.objective import STATE_NAME


class ObjectiveCallback(TrainerCallback):
    """Calls `IBModel.step_objective` after each optimizer step: `Trainer(..., callbacks=[ObjectiveCallback()])`.

    For alpha_warmup_steps and ib_rate_target, which go on where they were when a training is resumed.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Trainer's: reads how far they had got, where Trainer does not load the adapter itself (DeepSpeed, FSDP).

        Raises InputError when the checkpoint does not say.
        """
        objective = model.objective
        if objective is None or not objective.varies or state.global_step in (0, objective.steps):
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_NAME
        if not file.exists():
            raise InputError(
                f"the training goes on at step {state.global_step}, and {file} is not there, which says how far "
                "alpha_warmup_steps and ib_rate_target had got."
            )
        objective.load(file)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Trainer's, after each optimizer step."""
        model.step_objective()
