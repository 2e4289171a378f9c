"""How a step is distributed: one process, DDP, FSDP2 or DeepSpeed, behind one seam (`base.Engine`)."""

from ibft.engines.base import Engine, num_elements
from ibft.engines.start import start_engine

__all__ = ["Engine", "num_elements", "start_engine"]
