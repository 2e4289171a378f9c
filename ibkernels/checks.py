"""What every op asks of its arguments, and the dtype it computes in. Messages name the argument and its value."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype an op computes in: that of the tensor, or of autocast where it is on."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or tensor.is_meta:  # that device has no autocast, and asking for it raises
        return tensor.dtype
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raises unless the tensor is plain and of that shape (None: any size), which `meaning` spells, e.g. "[2K, H]"."""
    require_plain(name, tensor)
    fits = tensor.dim() == len(shape)
    if not fits or any(size is not None and size != own for own, size in zip(tensor.shape, shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; here it must be {meaning} = ({sizes}).")


def require_device(device: torch.device, owner: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless the tensors that there are lie on `device`, that of the argument `owner`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but {owner} on {device}.")


def require_plain(name: str, tensor: Tensor) -> None:
    """Raises for what would give a wrong number rather than an error: sharded and quantised parameters."""
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, a shard of the parameter; pass {name}.full_tensor(), or gather it first."
        )
    if tensor.dim() > 0 and tensor.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: it is empty, as a sharded parameter is; gather it first."
        )
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:  # float8: its scale is kept apart
        raise TypeError(f"{name} is {tensor.dtype}; floating point of 16 bits or more is needed (dequantise it first).")


def require_floating_rows(name: str, tensor: Tensor) -> None:
    """Raises unless the tensor is floating point with at least one dimension; no rows at all are fine."""
    if not tensor.is_floating_point() or tensor.dim() < 1:
        raise TypeError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a floating-point [..., D] is needed."
        )
