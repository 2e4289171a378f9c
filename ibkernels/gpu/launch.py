"""What every launch decides alike: the precision of float32 products, and dtypes of sums."""

import torch
from torch import Tensor


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's input_precision: TF32 for float32 only where torch's own switch allows it; half types have no choice."""
    if dtype != torch.float32:
        return "tf32"  # ignored
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result, as the sums of low-precision products are; a library GEMM."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # the interpreter's; the CPU's GEMM has no such output
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
