"""What a GPU asks of a launch and Triton's interpreter does not: strides, grids, devices, precision, sizes that fit."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ibkernels

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu runs the kernels there", allow_module_level=True)

from ibkernels.gpu import (
    bottleneck_linear,
    bottleneck_lora,
    bottleneck_lora_bwd,
    configs,
    heads,
    launch,
    wide_cross_entropy,
)

N, H, K, R, V = 21, 37, 19, 5, 45
CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950")
RNG = torch.tensor([3, 4])


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def bottleneck(
    backend: str,
    encoder: str,
    rank: int = R,
    dtype: torch.dtype = torch.float32,
    rng: Tensor = RNG,
    spread: bool = False,
    width: int = K,
) -> dict[str, Tensor]:
    """Outputs and gradients; `spread`: the bias is every other element of another tensor."""
    bias = normal(4 * width, dtype=dtype)[::2]
    hidden, weight = normal(N, H, dtype=dtype), normal(2 * width, H, dtype=dtype) / H**0.5
    lora = normal(rank, H, dtype=dtype) / H**0.5, normal(2 * width, rank, dtype=dtype) / rank**0.5
    matrices = [weight] if encoder == "linear" else list(lora)
    leaves = [hidden, *matrices, bias if spread else bias.clone()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    encoder_weight: Any = leaves[1] if encoder == "linear" else (leaves[1], leaves[2])
    z, kl = ibkernels.variational_bottleneck(hidden, encoder_weight, leaves[-1], rng, backend=backend)
    gradients = torch.autograd.grad([(z.double() * 0.5).sum() + kl.double().sum()], leaves)
    return {"z": z, "kl": kl, **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in theirs.items():
        scale = expected.double().abs().max()
        assert (ours[name].double() - expected.double()).abs().max() <= tolerance * scale, name


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["linear", "lora"])
@pytest.mark.parametrize("what", ["bias", "rng"])
def test_elements_may_lie_apart(what: str, encoder: str) -> None:
    rng = torch.tensor([[3, 9], [4, 9]])[:, 0] if what == "rng" else RNG
    ours = bottleneck("triton", encoder, rng=rng, spread=what == "bias")
    assert_close(ours, bottleneck("reference", encoder), 1e-5)
    noise = [ibkernels.noise(state, torch.arange(N), K, backend="triton") for state in (rng, RNG)]
    assert torch.equal(*noise)


@pytest.mark.parametrize("absorb", [True, False])
def test_gradients_have_the_strides_that_the_compiler_was_told(absorb: bool) -> None:
    """Of every input, a trainable head included; inductor asserts them."""
    shapes = (N, K), (H, K), (H,), (V, H), (V,)
    tensors = [normal(*shape).requires_grad_() for shape in shapes]
    sample = (
        *tensors,
        torch.arange(N) * 7 % V,
        None,
        -100,
        0.0,
        0.0,
        None,
        1.0,
        absorb,
        False,
        [True] * 5,
        False,
        "triton",
    )
    torch.library.opcheck(torch.ops.ibkernels.bottleneck_cross_entropy.default, sample)


# ---- grids -----------------------------------------------------------------------------------------------------------


class Recorder:
    """In the place of a kernel: keeps the grids it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *arguments, **settings: None


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Of every kernel of the bottleneck, in the configurations of an H100."""
    recorder = Recorder()
    for module in (bottleneck_linear, bottleneck_lora, bottleneck_lora_bwd):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, recorder)
    monkeypatch.setattr(configs, "chip", lambda device: "sm_90")
    return recorder


@pytest.mark.parametrize("encoder", ["linear", "lora"])
def test_grids_end_below_what_a_gpu_takes(encoder: str, recorder: Recorder) -> None:
    """2^31 - 1 programs, and 65535 in the second dimension."""
    tokens = 5_000_000
    hidden = torch.zeros(1, 4, dtype=torch.float16).expand(tokens, 4).requires_grad_()
    weight: Any = torch.zeros(2, 4) if encoder == "linear" else (torch.zeros(1, 4), torch.zeros(2, 1))
    z, _ = ibkernels.variational_bottleneck(hidden, weight, None, RNG, backend="triton")
    torch.autograd.grad(z, hidden, torch.zeros_like(z))
    assert len(recorder.grids) == (2 if encoder == "linear" else 3) and recorder.grids[0][0] >= tokens // 128
    for grid in recorder.grids:
        assert grid[0] < 2**31 and all(size <= 65535 for size in grid[1:]), grid


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_wide_tiles_are_finished_piece_by_piece(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter's own tiles there is one piece."""
    monkeypatch.setitem(configs._INTERPRETED, "BK", columns)
    ours, theirs = (bottleneck(backend, "linear", width=150) for backend in ("triton", "reference"))
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "kernel"),
    [
        (16384, 256, torch.bfloat16, ""),  # 256 tiles of 128 by 128 in two waves, or 512 in four
        (12288, 256, torch.bfloat16, "_half"),  # 192 in two, or 384 in three
        (8192, 256, torch.bfloat16, ""),  # 128 in one, or 256 in two
        (4096, 256, torch.bfloat16, "_half"),  # 64 or 128 in one
        (4096, 64, torch.bfloat16, ""),  # small tiles as it is
        (4096, 256, torch.float32, ""),
        (0, 256, torch.bfloat16, ""),
    ],
)
def test_tiles_are_of_the_size_that_keeps_an_h100_busy(
    rows: int, width: int, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "processors", lambda device: 132)
    monkeypatch.setattr(configs, "chip", lambda device: "sm_90")
    assert bottleneck_linear._tiles(torch.empty(rows, 1, dtype=dtype), width) == f"bottleneck_linear_fwd{kernel}"


def test_column_tiles_of_a_block_of_rows_are_neighbours_in_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tile's program computes, by number: with K of two tiles, programs 0 and 1 write the first rows."""
    kernel, order = bottleneck_linear.bottleneck_linear_fwd_kernel, []

    class Partly:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def start(*arguments: Any, **settings: Any) -> None:
                order.append(grid)
                kernel[(2,)](*arguments, **settings)

            return start

    monkeypatch.setattr(bottleneck_linear, "bottleneck_linear_fwd_kernel", Partly())
    z, _ = ibkernels.variational_bottleneck(normal(40, H), normal(2 * K, H), backend="triton")
    assert order == [(6,)]  # 3 blocks of 16 rows, 2 of 16 columns
    assert z[:16].isfinite().all() and z[16:].isnan().all()  # torch.empty is NaN in these tests


# ---- devices and precisions ------------------------------------------------------------------------------------------


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(index: torch.device) -> Iterator[None]:
        entered.append(index)
        yield
        entered.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(configs, "chip", lambda device: "sm_90")
    there: Any = SimpleNamespace(device=torch.device("cuda:1"), element_size=lambda: 2)
    ran = launch.configured("softmax_grad", there, 1000, lambda config: (config, list(entered)))
    assert ran == (configs.lookup("softmax_grad", 2, 1000, "sm_90"), [torch.device("cuda:1")])
    assert len(entered) == 2


SWITCHES: dict[str, Callable[[], None]] = {
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
}


@pytest.fixture
def exact_afterwards() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("exact_afterwards")
@pytest.mark.parametrize("switch", SWITCHES)
def test_tf32_follows_each_of_torchs_switches(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.float16)
    assert launch.dot_precision(single) == "ieee"
    SWITCHES[switch]()
    assert launch.dot_precision(single) == "tf32" and launch.dot_precision(half) == "ieee"
    found = {}
    for chip in CHIPS:
        monkeypatch.setattr(configs, "chip", lambda device, chip=chip: chip)
        found[chip] = launch.dot_precision(single)
    assert {chip for chip, precision in found.items() if precision == "ieee"} == {"gfx90a", "gfx950"}


@pytest.mark.usefixtures("exact_afterwards")
def test_an_op_runs_under_the_newer_switch() -> None:
    """Reading the older one then raises."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert_close(bottleneck("triton", "linear"), bottleneck("reference", "linear"), 1e-5)


# ---- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "like"), [("sm_86", "sm_89"), ("sm_121", "sm_89"), ("sm_103", "sm_100"), ("gfx90a", "gfx942"),
                       ("gfx1100", "gfx942"), ("sm_87", "sm_80"), ("sm_120", "sm_120")],
)  # fmt: skip
def test_a_chip_that_is_not_in_the_table_gets_one_that_is_like_it(chip: str, like: str) -> None:
    for kernel, by_size in configs._SHIPPED.items():
        for size in by_size:
            limit = configs.widest(kernel, size, like)
            assert configs.widest(kernel, size, chip) == limit
            for width in (16, 64, 256, 512):
                if width <= limit:
                    assert configs.lookup(kernel, size, width, chip) == configs.lookup(kernel, size, width, like)


@pytest.mark.parametrize(("rank", "dtype"), [(32, torch.float32), (33, torch.float32), (129, torch.float16)])
def test_a_rank_that_does_not_fit_on_chip_gives_the_same(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.zeros(1, 1, dtype=dtype)
    fused = bottleneck_lora.holds(hidden, rank)
    assert fused == (rank == 32)
    if not fused:
        monkeypatch.setattr(bottleneck_lora, "forward", None)  # would fail
        monkeypatch.setattr(bottleneck_lora_bwd, "backward", None)
    ours, exact = bottleneck("triton", "lora", rank, dtype), bottleneck("reference", "lora", rank, dtype)
    assert_close(ours, exact, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("needed", range(4), ids=["hidden", "lora_a", "lora_b", "bias"])
def test_of_a_high_rank_only_what_is_needed_is_computed(needed: int) -> None:
    leaves = [normal(N, H), normal(40, H) / H**0.5, normal(2 * K, 40) / 40**0.5, normal(2 * K)]
    leaves[needed].requires_grad_()
    gradients = []
    for backend in ("triton", "reference"):
        z, kl = ibkernels.variational_bottleneck(leaves[0], (leaves[1], leaves[2]), leaves[3], RNG, backend=backend)
        gradients.append({"": torch.autograd.grad(z.sum() + kl.sum(), leaves[needed])[0]})
    assert_close(*gradients, 1e-5)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 1e-4, "z_loss": 1e-4}], ids=["plain", "options"])
def test_confident_tokens_keep_their_gradient_where_sums_are_cut_off(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores cut off every sum's last bits, always towards zero; here more of them, for there are few blocks."""
    from triton.runtime.interpreter import InterpreterBuilder

    exactly = InterpreterBuilder.create_dot

    def cut_off(*arguments: Any) -> Any:
        product = exactly(*arguments)
        product.data = (product.data.view(np.uint32) & 0xFFFFFE00).view(np.float32)  # 14 bits of 23 stay
        return product

    weight, labels = normal(V, K), torch.arange(N) * 7 % V
    rows = weight[labels]
    x = rows * (11 / rows.square().sum(dim=1, keepdim=True))  # the label's logit is 11
    results = []
    for dtype, backend in ((torch.float16, "triton"), (torch.float64, "reference")):
        monkeypatch.setattr(InterpreterBuilder, "create_dot", cut_off if backend == "triton" else exactly)
        own = [tensor.half().to(dtype).requires_grad_() for tensor in (x, weight)]
        loss = ibkernels.linear_cross_entropy(*own, labels, reduction="sum", backend=backend, **options)
        results.append([tensor.double() for tensor in torch.autograd.grad(loss, own)])
    (grad, grad_weight), (exact, exact_weight) = results
    assert ((grad - exact).norm(dim=1) <= 2**-7 * exact.norm(dim=1)).all()
    assert (grad_weight - exact_weight).norm() <= 2**-7 * exact_weight.norm()


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float16, {"softcap": 3.0}), (torch.float32, {})], ids=["softcap", "float32"]
)
def test_what_would_cost_confident_tokens_their_gradient_takes_the_wide_path(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, labels = normal(N, K, dtype=dtype), normal(V, K, dtype=dtype), torch.arange(N) * 7 % V
    monkeypatch.setattr(heads, "narrow_cross_entropy", None)
    ibkernels.linear_cross_entropy(x, weight, labels, backend="triton", **options)
    with pytest.raises(TypeError):
        ibkernels.linear_cross_entropy(x.half(), weight, labels, backend="triton")


@pytest.mark.parametrize(
    ("processors", "row_blocks", "splits"),
    [
        (132, 128, 1),
        (132, 64, 2),
        (132, 1, 8),
        (132, 100, 5),
        (108, 128, 4),
        (148, 128, 8),
        (132, 1024, 1),
        (132, 0, 1),
    ],
)
def test_the_vocabulary_is_split_where_the_device_is_done_sooner(
    processors: int, row_blocks: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """108 processors run 128 programs in two waves, four times as many of a quarter of the work in 5 of a quarter."""
    monkeypatch.setattr(configs, "processors", lambda device: processors)
    assert configs.splits(torch.device("cuda"), row_blocks, 800) == splits
    assert configs.splits(torch.device("cuda"), row_blocks, 1) == 1


def test_a_block_of_logits_is_of_even_tiles_within_its_bytes() -> None:
    rows = {v: wide_cross_entropy.rows_per_block(v) for v in (32000, 32256, 102400, 128256, 152064, 256000)}
    assert rows == {32000: 2048, 32256: 2048, 102400: 512, 128256: 512, 152064: 512, 256000: 256}
    assert all(4 * v * n <= wide_cross_entropy.LOGITS_BYTES for v, n in rows.items())
