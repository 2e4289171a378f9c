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
    down, column, across, wide = (
        torch.randn(size, generator=generator) * scale for size in ((50, 7), (50, 1), (24, 1), (9, 24))
    )
    column *= 1e-4  # each column has a scale of its own
    # Twice the mantissa: 8 bits in bfloat16, 11 in float16; one rounding of the factor alone would err by 2^-9, 2^-12.
    error = {torch.bfloat16: 2**-15, torch.float16: 2**-20, torch.float32: 2**-20}[dtype]
    both = heads._times(head.T, down, column)
    for ours, exact in (
        (both[:, :7], head.double().T @ down.double()),
        (both[:, 7:], head.double().T @ column.double()),
        (heads._times(head, across), head.double() @ across.double()),
        (heads._times_transposed(wide, head), wide.double() @ head.double().T),
    ):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        assert (ours - exact).abs().max() <= error * exact.abs().max()


def test_a_factor_of_zeros_gives_zeros() -> None:
    from ibkernels.gpu import heads

    head = torch.randn(50, 24).half()
    assert (heads._times(head.T, torch.zeros(50, 7)) == 0).all()
    assert (heads._times_transposed(torch.zeros(5, 24), head) == 0).all()


def test_the_head_is_read_once_for_a_factor_and_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    from ibkernels.gpu import heads

    products = []
    monkeypatch.setattr(heads, "mm_float32", lambda a, b: products.append((a.shape, b.shape)) or a.float() @ b.float())
    heads._times(torch.randn(50, 24).half().T, torch.randn(50, 7), torch.randn(50, 1))
    assert products == [((24, 50), (50, 16))]  # 8 columns, high and low
