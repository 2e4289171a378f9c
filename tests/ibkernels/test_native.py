"""What is the C++ backend's own: results that do not depend on threads, every instruction set, and its memory."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ibkernels
from benchmarks.measure import can_measure_memory
from ibkernels import backends, native

pytestmark = pytest.mark.skipif(
    not backends.native_library().loaded, reason=f"no native library: {backends.native_library().reason}"
)
ROOT = Path(__file__).parents[2]
RNG = torch.tensor([3, 4])
DTYPES = [torch.float32, torch.bfloat16]


def bottleneck(
    encoder: str,
    num_tokens: int,
    dtype: torch.dtype,
    backend: str = "cpp",
    sizes: tuple[int, int, int] = (40, 24, 6),
    values: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients at those H, K, R, of numbers that `values` can hold."""
    hidden_size, width, rank = sizes
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return tensor.to(values or dtype).to(dtype).requires_grad_()

    hidden, bias = parameter(num_tokens, hidden_size), parameter(2 * width)
    weights = {"a": parameter(rank, hidden_size), "b": parameter(2 * width, rank)}
    if encoder == "linear":
        weights = {"weight": parameter(2 * width, hidden_size)}
    weight: Any = next(iter(weights.values())) if encoder == "linear" else tuple(weights.values())
    z, kl = ibkernels.variational_bottleneck(hidden, weight, bias, RNG, backend=backend)
    inputs = {"hidden": hidden, "bias": bias, **weights}
    gradients = torch.autograd.grad([z, kl], list(inputs.values()), [z.detach(), kl.detach()])
    return {"z": z.detach(), "kl": kl.detach(), **dict(zip(inputs, gradients, strict=True))}


def cross_entropy(
    num_tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    backend: str = "cpp",
    width: int = 40,
    values: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Loss, statistics and gradients at that width, with every option on, of numbers that `values` can hold."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    input, weight, bias = (each.to(values or dtype).to(dtype).requires_grad_() for each in (input, weight, bias))
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator)
    labels[::5] = -100
    result = ibkernels.linear_cross_entropy(
        input, weight, labels, bias=bias, label_smoothing=0.1, z_loss=1e-3, softcap=4.0, logit_scale=0.9,
        return_stats=True, backend=backend,
    )  # fmt: skip
    loss, stats = result
    inputs = {"input": input, "weight": weight, "bias": bias}
    gradients = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
    return {"loss": loss.detach(), "lse": stats.lse, "entropy": stats.entropy_sum, **gradients}


@pytest.fixture
def several_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 37, 2500])  # one task; several; more than one chunk of rows in backward
@pytest.mark.parametrize("encoder", ["linear", "lora"])
def test_the_bottleneck_is_the_same_for_any_number_of_threads(encoder, num_tokens, dtype, several_threads):
    several_threads(1)
    expected = bottleneck(encoder, num_tokens, dtype)
    for threads in (2, 3, 5):
        several_threads(threads)
        actual = bottleneck(encoder, num_tokens, dtype)
        assert all(torch.equal(actual[name], expected[name]) for name in expected), threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(1, 1), (37, 1700), (300, 1700)])
def test_cross_entropy_is_the_same_for_any_number_of_threads(
    num_tokens, vocabulary, dtype, several_threads, monkeypatch
):
    monkeypatch.setattr(native, "_LOGITS_BYTES", 128 * 1700 * 4)  # the largest case takes three blocks of rows
    several_threads(1)
    expected = cross_entropy(num_tokens, vocabulary, dtype)
    for threads in (2, 3, 5):
        several_threads(threads)
        actual = cross_entropy(num_tokens, vocabulary, dtype)
        assert all(torch.equal(actual[name], expected[name]) for name in expected), threads


def test_the_threads_of_torchs_own_products_stay_as_they_were(several_threads):
    several_threads(3)
    before = torch.__config__.parallel_info()  # with the number that MKL has for this thread
    bottleneck("linear", 37, torch.float32)
    assert torch.__config__.parallel_info() == before


def test_blocks_of_logits_keep_to_their_budget(monkeypatch):
    """However small the budget, results are those of one block, to rounding."""
    whole = cross_entropy(100, 600, torch.float32)
    monkeypatch.setattr(native, "_LOGITS_BYTES", 1)  # 16 rows
    for name, tensor in cross_entropy(100, 600, torch.float32).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6)


def test_a_large_vocabulary_and_a_common_offset_cost_no_digits():
    """Float32 sums over a whole vocabulary would: losses off by 1e-5 with flat logits, 1e-3 with logits about 1000."""
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(8, 4, generator=generator), 1e-3 * torch.randn(150_000, 4, generator=generator)
    labels = torch.randint(150_000, (8,), generator=generator)
    for offset in (0.0, 1000.1):
        options = {"bias": torch.full((150_000,), offset), "label_smoothing": 0.1, "reduction": "none"}
        loss = ibkernels.linear_cross_entropy(input, weight, labels, backend="cpp", **options)
        exact = torch.nn.functional.cross_entropy(input.double() @ weight.double().T, labels, label_smoothing=0.1,
                                                  reduction="none")  # fmt: skip
        # A logit of 1000.1 has itself only seven digits.
        torch.testing.assert_close(loss.double(), exact, rtol=2e-7, atol=0 if offset == 0 else 1000.1 * 2**-23)


def test_the_biases_gradient_sums_many_rows_exactly():
    input, weight = torch.zeros(60_000, 1), torch.zeros(3, 1)
    bias = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    ibkernels.linear_cross_entropy(input, weight, torch.zeros(60_000, dtype=torch.int64), bias=bias, reduction="sum",
                                   backend="cpp").backward()  # fmt: skip
    exact = 60_000 * (bias.detach().double().softmax(0) - torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(bias.grad.double(), exact, rtol=2e-7, atol=0)


def test_nan_reaches_the_gradients():
    """So that a check of the gradients' finiteness sees it."""
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    bias = torch.tensor([0.0, 0.0, float("nan"), 0.0], requires_grad=True)
    z, kl = ibkernels.variational_bottleneck(hidden, weight, bias, RNG, backend="cpp")
    (z.sum() + kl.sum()).backward()
    assert bias.grad.isnan().tolist() == [False, False, True, False]


def test_saved_tensors_may_come_back_with_other_strides():
    def run(unpack: Any) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(size, generator=generator).requires_grad_() for size in ((7, 6), (10, 6)))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            z, kl = ibkernels.variational_bottleneck(hidden, weight, None, RNG, backend="cpp")
            return torch.autograd.grad(z.sum() + kl.sum(), (hidden, weight))

    columns_first = run(lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
    assert all(map(torch.equal, columns_first, run(lambda tensor: tensor)))


@pytest.mark.parametrize("needs", [[True, False, False, True], [False, True, False, False], [True, True, False, True]])
def test_opcheck_of_backward_with_some_gradients(needs):
    z, kl, mu, raw = torch.ops.ibkernels.variational_bottleneck(
        torch.randn(5, 8), torch.randn(6, 8), None, torch.randn(6), RNG, None, -4.0, 4.0, True, True, "cpp"
    )
    arguments = (z, kl, torch.randn(5, 8), torch.randn(6, 8), None, torch.randn(6), RNG, None, mu, raw)
    op = torch.ops.ibkernels.variational_bottleneck_backward.default
    torch.library.opcheck(op, (*arguments, -4.0, 4.0, True, needs, "cpp"))


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def products():
    """Of bfloat16 factors as such."""
    if not native.has_bfloat16_products():
        pytest.skip("this machine has no bfloat16 instructions")


@pytest.fixture(params=["bfloat16", "float32"])
def factors(request):
    """Those of the products: bfloat16 as such where the machine has instructions for it, or widened to float32."""
    if request.param == "bfloat16":
        request.getfixturevalue("products")
    with torch.backends.mkldnn.flags(enabled=request.param == "bfloat16"):
        assert native.has_bfloat16_products() == (request.param == "bfloat16")
        yield request.param


def assert_close_to_float64(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """To a few roundings to bfloat16 of what enters a product or comes out of one."""
    assert actual.keys() == exact.keys()
    for name, tensor in actual.items():
        error = (tensor.double() - exact[name]).norm() / exact[name].norm()
        assert error < 2**-8, (name, error)


# Of hidden size, K and rank: within one piece of a product, with odd counts of all else; beyond one piece in every
# direction; and odd ones, whose products are float32's.
@pytest.mark.parametrize(("num_tokens", "sizes"), [(37, (40, 7, 6)), (1301, (1090, 71, 66)), (300, (41, 24, 5))])
@pytest.mark.parametrize("encoder", ["linear", "lora"])
def test_the_bottleneck_in_bfloat16_equals_float64(factors, encoder, num_tokens, sizes, several_threads):
    exact = bottleneck(encoder, num_tokens, torch.float64, "reference", sizes, torch.bfloat16)
    several_threads(1)
    single = bottleneck(encoder, num_tokens, torch.bfloat16, sizes=sizes)
    assert_close_to_float64(single, exact)
    several_threads(3)  # which pack a factor's panels of columns together
    actual = bottleneck(encoder, num_tokens, torch.bfloat16, sizes=sizes)
    assert all(torch.equal(actual[name], single[name]) for name in single)


@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "width"), [(37, 1, 40), (1301, 1701, 130), (50, 700, 41), (9, 600, 1090)]
)
def test_cross_entropy_in_bfloat16_equals_float64(factors, num_tokens, vocabulary, width, several_threads, monkeypatch):
    monkeypatch.setattr(native, "_LOGITS_BYTES", 700 * 1701 * 4)  # the second case takes blocks of 651 and 650 rows
    exact = cross_entropy(num_tokens, vocabulary, torch.float64, "reference", width, torch.bfloat16)
    several_threads(1)
    single = cross_entropy(num_tokens, vocabulary, torch.bfloat16, width=width)
    several_threads(3)
    actual = cross_entropy(num_tokens, vocabulary, torch.bfloat16, width=width)
    assert all(torch.equal(actual[name], single[name]) for name in single)
    if vocabulary == 1:
        actual, exact = ({name: each[name] for name in ("loss", "lse")} for each in (actual, exact))
    assert_close_to_float64(actual, exact)


def absorbed(
    num_tokens: int, vocabulary: int, dtype: torch.dtype, backend: str = "cpp", hidden_size: int = 72
) -> dict[str, Tensor]:
    """Loss and gradients of the absorbed head at that H and K=14, of numbers that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return tensor.bfloat16().to(dtype).requires_grad_()

    z, labels = parameter(num_tokens, 14), torch.randint(vocabulary, (num_tokens,), generator=generator)
    parameters = {"up": parameter(hidden_size, 14), "up_bias": parameter(hidden_size)}
    parameters |= {"head": parameter(vocabulary, hidden_size), "head_bias": parameter(vocabulary)}
    up, up_bias, head, head_bias = parameters.values()
    loss = ibkernels.bottleneck_cross_entropy(
        z, up, up_bias, head, labels, bias=head_bias, logit_scale=0.9, absorb=True, backend=backend
    )
    inputs = {"z": z, **parameters}
    return {"loss": loss.detach(), **dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))}


@pytest.mark.parametrize("vocabulary", [301, 4500])  # less and more than the words that are taken apart at a time
def test_the_absorbed_head_in_bfloat16_equals_float64(factors, vocabulary, several_threads):
    exact = absorbed(90, vocabulary, torch.float64, "reference")
    several_threads(1)
    single = absorbed(90, vocabulary, torch.bfloat16)
    assert_close_to_float64(single, exact)
    several_threads(3)
    actual = absorbed(90, vocabulary, torch.bfloat16)
    assert factors == "float32" or all(torch.equal(actual[name], single[name]) for name in single)


def test_what_multiplies_the_head_is_not_rounded_to_bfloat16(products):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(4301, 130, generator=generator).bfloat16()
    right, left = torch.randn(130, 67, generator=generator), torch.randn(4301, 67, generator=generator)
    ops = torch.ops.ibkernels_cpu
    # Twice the mantissa of 8 bits; one rounding of the factor alone would err by 2^-9.
    for actual, exact in (
        (ops.head_times(head, right), head.double() @ right.double()),
        (ops.transposed_times(left, head), left.double().T @ head.double()),
    ):
        assert (actual.double() - exact).norm() < 2**-15 * exact.norm()


@pytest.mark.parametrize(
    ("call", "even", "odd"),
    [
        (bottleneck, {"encoder": "linear", "sizes": (40, 24, 6)}, {"encoder": "linear", "sizes": (41, 24, 6)}),
        (bottleneck, {"encoder": "lora", "sizes": (40, 24, 6)}, {"encoder": "lora", "sizes": (40, 24, 5)}),
        (cross_entropy, {"vocabulary": 300, "width": 40}, {"vocabulary": 300, "width": 41}),
    ],
    ids=["hidden_size", "rank", "width"],
)
def test_rows_that_do_not_end_with_a_pair_are_widened(call, even, odd, products):
    """And multiplied as float32: to the bit what comes out where no bfloat16 factors are multiplied."""
    for sizes, same in ((even, False), (odd, True)):
        found = call(num_tokens=50, dtype=torch.bfloat16, **sizes)
        with torch.backends.mkldnn.flags(enabled=False):
            widened = call(num_tokens=50, dtype=torch.bfloat16, **sizes)
        assert all(torch.equal(found[name], widened[name]) for name in found) == same


@pytest.mark.parametrize(("hidden_size", "times"), [(72, 2), (73, 0)])
def test_a_head_whose_rows_do_not_end_with_a_pair_is_widened(hidden_size, times, products, monkeypatch):
    calls, real = [], native._head_times
    monkeypatch.setattr(native, "_head_times", lambda *factors: calls.append(factors) or real(*factors))
    actual = absorbed(90, 301, torch.bfloat16, hidden_size=hidden_size)
    assert_close_to_float64(actual, absorbed(90, 301, torch.float64, "reference", hidden_size))
    assert len(calls) == times


# ---- instruction sets ------------------------------------------------------------------------------------------------

# Prints the instruction set, then the largest error of any output or gradient against the reference in float64.
COMPARE = """
import torch
from test_native import bottleneck, cross_entropy
errors = []
for call, arguments in ((bottleneck, ("linear", 70)), (bottleneck, ("lora", 70)), (cross_entropy, (50, 700))):
    exact = call(*arguments, torch.float64, backend="reference")
    actual = call(*arguments, torch.float32)
    errors += [((actual[n] - exact[n]).norm() / exact[n].norm().clamp(min=1e-9)).item() for n in exact]
low = bottleneck("linear", 70, torch.bfloat16)["hidden"].double()
exact = bottleneck("linear", 70, torch.float64, backend="reference")["hidden"]
assert (low - exact).norm() < 2**-8 * exact.norm()
ops = torch.ops.ibkernels_cpu
assert ops.instruction_set() == "avx512" or not ops.bfloat16_products()
print(ops.instruction_set(), max(errors))
"""


@pytest.mark.parametrize(("capability", "isa"), [("default", "baseline"), ("avx2", "avx2"), (None, None)])
def test_every_instruction_set_agrees_with_the_reference(capability, isa):
    """ATEN_CPU_CAPABILITY is torch's own switch, and ours."""
    best = torch.ops.ibkernels_cpu.instruction_set()
    if capability == "avx2" and best == "baseline":
        pytest.skip("this machine has no AVX2")
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment |= {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-c", COMPARE]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    name, error = result.stdout.split()
    assert name == (best if isa is None else isa)
    assert float(error) < 2e-6


# ---- memory ----------------------------------------------------------------------------------------------------------

# Prints the MiB that one forward and backward pass of the absorbed head takes beyond what is there before and after.
PEAK = """
import torch, ibkernels
from benchmarks.measure import peak_of
torch.set_num_threads(2)
z = torch.randn(1024, 256, requires_grad=True)
weight = torch.randn(32000, 256, requires_grad=True)
labels = torch.randint(32000, (1024,))
def step():
    ibkernels.linear_cross_entropy(z, weight, labels, backend="cpp").backward()
def release():
    z.grad = weight.grad = None
result = peak_of(lambda: (release(), step()), release, repeats=2)
print(result["peak"] - result["rest"])
"""


@pytest.mark.skipif(not can_measure_memory(), reason="no high-water mark of memory here")
def test_peak_memory_of_the_absorbed_head_at_full_size():
    """Its gradient is 31 MiB and the whole logits would be 125. The budget is 80 MiB."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", PEAK]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 80


# ---- vector code -----------------------------------------------------------------------------------------------------

KERNELS = ROOT / "ibkernels" / "csrc" / "kernels.cpp"


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs GCC for x86")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_what_should_be_vector_code_is(isa: str, tmp_path: Path) -> None:
    """GCC says nothing of a `#pragma omp simd` that it cannot follow, and the loop takes several times as long."""
    text = (ROOT / "CMakeLists.txt").read_text()
    common, own = re.search(r"set\(vector_flags (.*)\)", text), re.search(rf"add_kernels\({isa} \w+ ?(.*)\)", text)
    assert common and own
    flags = [*common[1].split(), *own[1].split(), "-fopenmp-simd", "-fopt-info-vec-optimized", "-std=c++20"]
    names = [f"-DIBKERNELS_ISA={isa}", "-DIBKERNELS_KERNELS=table"]
    command = ["g++", *flags, *names, "-c", str(KERNELS), "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    vectorised = {int(line) for line in re.findall(r"kernels\.cpp:(\d+):.*loop vectorized", result.stderr)}
    assert vectorised, result.stderr
    lines = KERNELS.read_text().splitlines()
    for number, line in enumerate(lines):
        if "#pragma omp simd" in line:
            loop = lines[number + 1]
            brace = loop[: len(loop) - len(loop.lstrip())] + "}"
            end = number + 1 if loop.endswith(";") else lines.index(brace, number)
            assert vectorised & set(range(number + 1, end + 2)), f"line {number + 2} is scalar code: {loop}"
    # Philox's loops are reported at the lines of what is inlined into them; its products would be `imul`.
    code = subprocess.run(["objdump", "-d", str(tmp_path / "kernels.o")], capture_output=True, text=True, check=True)
    assert not re.findall(r"\bimul\b.*", code.stdout)
