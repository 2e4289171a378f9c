"""Products of a half-precision head with float32 factors, on which the up-projection's gradients rest."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])  # beyond float16's range at both ends
def test_a_float32_factor_keeps_its_digits(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from ibkernels.gpu import heads

    monkeypatch.setattr(heads, "_BLOCK_WORDS", 16)  # three blocks and a ragged one
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 24, generator=generator).to(dtype)
    down, across = (torch.randn(size, generator=generator) * scale for size in ((50, 7), (24, 5)))
    # Twice the mantissa: 8 bits in bfloat16, 11 in float16; one rounding of the factor alone would err by 2^-9, 2^-12.
    error = {torch.bfloat16: 2**-15, torch.float16: 2**-20, torch.float32: 2**-20}[dtype]
    for ours, exact in (
        (heads._transposed_times(head, down), head.double().T @ down.double()),
        (heads._times(head, across), head.double() @ across.double()),
    ):
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= error * exact.abs().max()


def test_a_factor_of_zeros_gives_zeros() -> None:
    from ibkernels.gpu import heads

    head = torch.randn(50, 24).half()
    assert (heads._transposed_times(head, torch.zeros(50, 7)) == 0).all()
    assert (heads._times(head, torch.zeros(24, 5)) == 0).all()
