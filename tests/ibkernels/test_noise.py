"""The noise stream against a Philox of Python integers, the contract's vectors, and the normal distribution."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import ibkernels
from ibkernels import backends, reference

pytestmark = pytest.mark.ops("noise")
MASK = 0xFFFFFFFF
BOUND = math.sqrt(48 * math.log(2))  # of |eps|: the radius of the smallest uniform, 2^-24
SEED, OFFSET = 0x0123456789ABCDEF, 0x100000005
VECTORS = [  # (row, column, word, normal) of the stream (SEED, OFFSET)
    (0, 0, 0xB1B649F8, -0.8386606),
    (0, 1, 0x87D61E30, -0.1633222),
    (0, 8, 0xA14CCFAF, -0.9541123),
    (0, 9, 0x7B1065E7, 0.1161563),
    (0, 2, 0x887A8368, 1.0427895),
    (3, 17, 0x31A7005A, 2.0478523),
]


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def call_of(seed: int, offset: int, row: int, column: int) -> tuple[tuple[int, ...], int]:
    """The four words of the call that serves a column, and which of them is the column's."""
    group, lane = ((column >> 4) << 2) | ((column >> 1) & 3), (column & 1) | (((column >> 3) & 1) << 1)
    counter = (group, row & MASK, offset & MASK, (offset >> 32) ^ 0x49424654)
    return philox4x32_10(counter, (seed & MASK, seed >> 32)), lane


def scalar_normal(seed: int, offset: int, row: int, column: int) -> float:
    """Box-Muller in double precision."""
    words, lane = call_of(seed, offset, row, column)
    first = lane & 2
    radius_uniform, angle_uniform = (((word >> 8) | 1) * 2.0**-24 for word in words[first : first + 2])
    radius, angle = math.sqrt(-2 * math.log(radius_uniform)), 2 * math.pi * angle_uniform
    return radius * (math.sin(angle) if lane & 1 else math.cos(angle))


def bits(target, rng: Tensor, rows: Tensor, columns: int) -> Tensor:
    return backends.select("noise", "cpu", torch.float32, target.backend).backend.load().noise_bits(rng, rows, columns)


def draw(target, seed: int, offset: int, rows: Tensor, columns: int) -> Tensor:
    return ibkernels.noise(torch.tensor([seed, offset]), rows, columns, backend=target.backend)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_oracle_gives_the_words_of_random123(counter, key, words):
    assert philox4x32_10(counter, key) == words


@pytest.mark.parametrize(("row", "column", "word", "normal"), VECTORS)
def test_contract_vectors(target, row, column, word, normal):
    words, lane = call_of(SEED, OFFSET, row, column)
    assert words[lane] == word
    assert scalar_normal(SEED, OFFSET, row, column) == pytest.approx(normal, abs=1e-6)
    rows = torch.tensor([row])
    assert bits(target, torch.tensor([SEED, OFFSET]), rows, column + 1)[0, column] == word
    assert draw(target, SEED, OFFSET, rows, column + 1)[0, column].item() == pytest.approx(normal, abs=1e-6)


def test_words_equal_the_oracle_bit_for_bit(target):
    generator = random.Random(7)
    largest = 2**63 - 1
    corners = [(0, 0), (largest, largest), (2**32 - 1, 2**32 - 1), (2**32, 2**32), (2**31, 2**31), (1 << 62, 1 << 62)]
    states = corners + [(generator.getrandbits(63), generator.getrandbits(63)) for _ in range(12)]
    row_ids = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, largest, *(generator.getrandbits(63) for _ in range(6))]
    for seed, offset in states:
        words = bits(target, torch.tensor([seed, offset]), torch.tensor(row_ids), 530)
        assert words.shape == (len(row_ids), 530)
        for _ in range(40):
            n, column = generator.randrange(len(row_ids)), generator.randrange(530)
            expected, lane = call_of(seed, offset, row_ids[n], column)
            assert words[n, column].item() == expected[lane], (seed, offset, row_ids[n], column)


def test_row_ids_count_modulo_2_to_the_32(target):
    small = torch.tensor([0, 1, 7, 2**31, 2**32 - 1])
    for shift in (2**32, 3 * 2**32, -(2**32)):
        assert torch.equal(draw(target, 5, 6, small + shift, 20), draw(target, 5, 6, small, 20))


def test_normals_equal_box_muller_in_double(target):
    rows = torch.arange(150) * 31
    for seed, offset in ((SEED, OFFSET), (3, 2**40)):
        exact = [[scalar_normal(seed, offset, row, column) for column in range(40)] for row in rows.tolist()]
        got = draw(target, seed, offset, rows, 40)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.large
def test_float32_agrees_with_float64_to_the_contract(target):
    rng, rows = torch.tensor([SEED, OFFSET]), torch.arange(8000)
    double = reference.noise(rng, rows, 256, torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(draw(target, SEED, OFFSET, rows, 256).double(), double, rtol=0, atol=1e-6)


def test_noise_depends_on_nothing_but_row_and_column(target):
    """Not on the number of rows, their order, the number of columns, the rows' layout in memory, or the threads."""
    rows, order = torch.arange(1000) * 3, torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    whole = draw(target, SEED, OFFSET, rows, 272)
    assert whole.is_contiguous()
    assert torch.equal(draw(target, SEED, OFFSET, rows[order], 272), whole[order])
    assert torch.equal(draw(target, SEED, OFFSET, rows[::7], 272), whole[::7])
    assert torch.equal(draw(target, SEED, OFFSET, torch.arange(3000)[::3], 272), whole)
    for n, columns in itertools.product((1, 2, 7, 63), (1, 2, 7, 8, 9, 15, 16, 17, 33, 255)):
        assert torch.equal(draw(target, SEED, OFFSET, rows[:n], columns), whole[:n, :columns]), (n, columns)
    torch.set_num_threads(2)
    try:
        assert torch.equal(draw(target, SEED, OFFSET, rows, 272), whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("n", "columns"), [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_draw(target, n, columns):
    assert draw(target, 1, 2, torch.arange(n), columns).shape == (n, columns)


# ---- the distribution ------------------------------------------------------------------------------------------------
# 2^20 draws of a fixed stream: a sample mean has standard error 1/1024. Limits are 4.5 standard errors, which a sound
# stream exceeds once in 150 000.


@pytest.mark.large
def test_moments(target):
    sample = draw(target, 2024, 11, torch.arange(4096), 256).double()
    n = sample.numel()
    assert abs(sample.mean()) < 4.5 / math.sqrt(n)
    assert abs(sample.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(sample.pow(3).mean()) < 4.5 * math.sqrt(15 / n)
    assert abs(sample.pow(4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    assert sample.abs().max() <= BOUND + 1e-6
    for axis in (0, 1):  # no row and no column is off by itself
        means = sample.mean(dim=axis) * math.sqrt(sample.shape[axis])
        assert stats.kstest(means.numpy(), "norm").pvalue > 1e-3


@pytest.mark.large
@pytest.mark.parametrize("columns", [1, 2, 16, 100])
def test_kolmogorov_smirnov(target, columns):
    sample = draw(target, 99, 3, torch.arange(200_000 // columns), columns)
    assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.large
def test_no_correlation_across_rows_columns_steps_and_seeds(target):
    base = draw(target, 2024, 11, torch.arange(4096), 64)
    pairs = {
        "next row": (base[1:], base[:-1]),
        "next column": (base[:, 1:], base[:, :-1]),
        "eight columns on": (base[:, 8:], base[:, :-8]),
        "next step": (base, draw(target, 2024, 12, torch.arange(4096), 64)),
        "step 2^32 later": (base, draw(target, 2024, 11 + 2**32, torch.arange(4096), 64)),
        "next seed": (base, draw(target, 2025, 11, torch.arange(4096), 64)),
        "seed 2^32 further": (base, draw(target, 2024 + 2**32, 11, torch.arange(4096), 64)),
        "seed and offset exchanged": (base, draw(target, 11, 2024, torch.arange(4096), 64)),
        "rows far away": (base, draw(target, 2024, 11, torch.arange(4096) + 2**31, 64)),
    }
    for name, (a, b) in pairs.items():
        for transform in (lambda t: t, torch.abs):  # the second finds draws that share a radius
            x, y = transform(a).flatten().numpy(), transform(b).flatten().numpy()
            assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / math.sqrt(x.size), name
    cross = torch.corrcoef(base.T.double()).fill_diagonal_(0)  # of every pair of columns: 2016 of them
    assert cross.abs().max() < 5.5 / math.sqrt(base.shape[0])


def test_no_value_is_drawn_twice(target):
    words = bits(target, torch.tensor([1, 2]), torch.arange(64), 64).flatten()
    assert words.unique().numel() == words.numel()  # 4096 of 2^32: a repeat by chance in this stream is excluded
    assert words.min() >= 0 and words.max() <= MASK


# ---- rng_state and errors --------------------------------------------------------------------------------------------


def test_rng_state_follows_torchs_generator():
    torch.manual_seed(3)
    first, second = ibkernels.rng_state(), ibkernels.rng_state()
    assert first.dtype == torch.int64 and first.shape == (2,) and first.min() >= 0
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(ibkernels.rng_state(), first)
    with torch.random.fork_rng():
        drawn = ibkernels.rng_state("cpu", torch.Generator().manual_seed(4))
        torch.manual_seed(5)
        assert torch.equal(ibkernels.rng_state("cpu", torch.Generator().manual_seed(4)), drawn)
    states = torch.stack([ibkernels.rng_state() for _ in range(200)])
    assert (states >= 2**62).any() and (states < 2**62).any()  # all of [0, 2^63) is in use


@pytest.mark.parametrize(
    ("rng", "rows", "columns", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.arange(2), 4, "rng is torch.int64 of shape"),
        (torch.zeros(2, dtype=torch.int32), torch.arange(2), 4, "rng is torch.int32"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), torch.arange(2), 4, "rng is on meta but the data on cpu"),
        (torch.zeros(2, dtype=torch.int64), torch.arange(2)[None], 4, "rows is torch.int64 of shape"),
        (torch.zeros(2, dtype=torch.int64), torch.arange(2, dtype=torch.int32), 4, "rows is torch.int32"),
        (torch.zeros(2, dtype=torch.int64), torch.arange(2), -1, "columns is -1"),
    ],
)
def test_errors_name_the_argument(target, rng, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        ibkernels.noise(rng, rows, columns, backend=target.backend)
