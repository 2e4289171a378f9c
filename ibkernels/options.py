"""How logits become a loss: the options that every cross-entropy op shares."""

from typing import NamedTuple

from torch import Tensor


class LogitOptions(NamedTuple):
    """logits = softcap(logit_scale * (x W^T) + bias), softcap(x) = c tanh(x / c).

    loss = (1 - label_smoothing) * nll + label_smoothing * mean over V of nll + z_loss * lse^2.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def check(self) -> None:
        """Raises TypeError for a tensor, ValueError for a value outside its range."""
        for name, value in zip(self._fields, self, strict=True):
            if isinstance(value, Tensor):  # an op takes it for a number, and a learned one would get no gradient
                raise TypeError(f"{name} is a tensor; it must be a number, which takes no gradient: {name}.item().")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1).")
        if not self.z_loss >= 0.0:
            raise ValueError(f"z_loss is {self.z_loss}; it must not be negative.")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap is {self.softcap}; it must be positive, or None for no soft cap.")
