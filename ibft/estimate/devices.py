"""GPUs by their data sheets: the dense bf16 peak, memory, and how fast bytes move in and between them.

And what the processor of this machine is called.
"""

import platform
from pathlib import Path
from typing import NamedTuple


class Device(NamedTuple):
    """One GPU. Peaks are the vendor's, without sparsity; links are one way, per GPU, as collectives see them."""

    name: str
    tflops: float  # bf16 matrix products, summed in float32
    memory_gib: float  # what torch reports as total: a little less than the name says
    bandwidth: float  # of memory, GB/s
    link: float  # to the other GPUs of a node, GB/s
    node: int = 8  # GPUs that the link joins
    patterns: tuple[str, ...] = ()  # in what the driver calls it, all of them


NETWORK = 50.0  # GB/s per GPU between nodes: one 400 Gbit/s adapter each, as such machines are commonly built

DEVICES = {
    "a10": Device("A10 24 GB", 125, 22.1, 600, 32, patterns=("A10", "!A100", "!A10G")),
    "l4": Device("L4 24 GB", 121, 22.0, 300, 32, patterns=("L4", "!L40")),
    "rtx-4090": Device("GeForce RTX 4090 24 GB", 165, 23.6, 1008, 32, patterns=("RTX 4090",)),
    "l40s": Device("L40S 48 GB", 362, 44.4, 864, 32, patterns=("L40S",)),
    "a100-40gb": Device("A100 SXM 40 GB", 312, 39.4, 1555, 300, patterns=("A100", "40GB")),
    "a100-80gb": Device("A100 SXM 80 GB", 312, 79.1, 2039, 300, patterns=("A100", "80GB")),
    "h100-pcie": Device("H100 PCIe 80 GB", 756, 79.1, 2000, 64, patterns=("H100", "PCIe")),
    "h100-80gb": Device("H100 SXM 80 GB", 989, 79.1, 3350, 450, patterns=("H100", "!PCIe", "!NVL")),
    "h200": Device("H200 SXM 141 GB", 989, 139.8, 4800, 450, patterns=("H200", "!NVL", "!GH200")),
    "b200": Device("B200 180 GB", 2250, 178.4, 7700, 900, patterns=("B200", "!GB200")),
    "mi300x": Device("MI300X 192 GB", 1307, 191.5, 5300, 448, patterns=("MI300X",)),
}


def find_device(driver_name: str) -> Device | None:
    """The GPU that the driver (torch.cuda.get_device_name) calls so; None for one that is not in the table."""
    for device in DEVICES.values():
        wanted = [pattern for pattern in device.patterns if not pattern.startswith("!")]
        unwanted = [pattern[1:] for pattern in device.patterns if pattern.startswith("!")]
        if all(part in driver_name for part in wanted) and not any(part in driver_name for part in unwanted):
            return device
    return None


def cpu_name() -> str:
    """What the system calls this machine's processor; the architecture where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
