"""What is kept of every optimizer step: scalars on the device until logged, then the lines of metrics.jsonl."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ibft.output import IBOutput

if TYPE_CHECKING:
    from ibft.run import Run

SUMMARY = ("step", "loss", "ce", "kl_nats", "ce_ib", "active_share", "eval_loss")  # of the last step: the run's result


class StepRecord(NamedTuple):
    """One optimizer step, before its numbers have reached the host."""

    step: int  # steps done, from 1
    documents: np.ndarray
    num_tokens: int
    num_labels: int
    positions: int  # `BatchPlan.positions`; on the main process, which alone writes of it
    learning_rate: Any
    scalars: Tensor  # loss, ce, kl, ce_ib, gradient norm; on the device
    weights: dict[str, float | Tensor]  # those of the objective that vary, as they were in this step


def stack_terms(output: IBOutput) -> Tensor:
    """loss, ce, kl, ce_ib, detached; zero for what plain fine-tuning does not have."""
    loss = cast(Tensor, output.loss).detach().float()
    values = (output.ce, output.kl, output.ce_ib)
    return torch.stack([loss, *(torch.zeros_like(loss) if value is None else value.float() for value in values)])


def to_host(
    run: "Run", window: list[StepRecord], share: Tensor | None, speeds: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The records of metrics.jsonl: one transfer for the whole window. `share` belongs to its last step."""
    values = torch.stack([torch.cat([record.scalars, *_on_device(record.weights)]) for record in window]).tolist()
    ib = run.model.ib_config
    records = []
    for record, speed, (loss, ce, kl, ce_ib, grad_norm, *adapted) in zip(window, speeds, values, strict=True):
        records.append(
            {
                "step": record.step,
                "epoch": run.plan.locate(record.step - 1)[0],
                "loss": loss,
                "ce": ce,
                "kl": kl if ib else None,
                "kl_nats": kl * ib.nats_scale if ib else None,
                "ce_ib": ce_ib if ib else None,
                "active_share": None,
                "eval_loss": None,
                "grad_norm": grad_norm,
                "learning_rate": record.learning_rate,
                "tokens": record.num_tokens,
                "label_tokens": record.num_labels,
                **{name: adapted.pop(0) if isinstance(w, Tensor) else w for name, w in record.weights.items()},
                **speed,
            }
        )
    if share is not None and not math.isnan(value := share.item()):
        records[-1]["active_share"] = value
    return records


def _on_device(weights: dict[str, float | Tensor]) -> list[Tensor]:
    return [weight.reshape(1) for weight in weights.values() if isinstance(weight, Tensor)]


_CHECKED = ("loss", "ce", "kl", "ce_ib", "grad_norm")


def is_finite(values: dict[str, Any]) -> bool:
    """Whether every number of a record is one."""
    return all(values[name] is None or math.isfinite(values[name]) for name in _CHECKED)


def what_diverged(run: "Run", values: dict[str, Any], record: StepRecord) -> str:
    """The sentence of TrainingDiverged: the step, its numbers, and the rows of its batch."""
    found = ", ".join(f"{name} {values[name]}" for name in _CHECKED)
    return (
        f"step {record.step} is not finite ({found}); its batch holds {run.data.places(record.documents)}. "
        "No weight was changed by this step or after it. A lower --learning_rate or --max_grad_norm, or "
        "--dtype float32, may help."
    )
