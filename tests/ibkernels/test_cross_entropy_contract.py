"""What the cross-entropy ops allocate, when the head is absorbed, and what they refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ibkernels
from ibkernels import reference

pytestmark = pytest.mark.ops("linear_cross_entropy", "bottleneck_cross_entropy")
each_head = pytest.mark.parametrize("head", ["linear", "absorbed", "unabsorbed"])
N, V, H, K = 600, 4001, 48, 16


def allocations(run: Callable[[], object]) -> list[int]:
    """The bytes of every allocation on the CPU, a release being negative, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def peak(sizes: list[int]) -> int:
    held = highest = 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    return highest


def make_inputs(head: str, dtype: torch.dtype, trained: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(name: str, *size: int) -> Tensor:
        tensor = torch.randn(size, generator=generator).to(dtype) / 4
        return tensor.requires_grad_(name not in ("head_weight", "head_bias") or name in trained)

    if head == "linear":
        inputs = {"input": normal("input", N, H)}
    else:
        inputs = {"z": normal("z", N, K), "up_weight": normal("up_weight", H, K), "up_bias": normal("up_bias", H)}
    return {**inputs, "head_weight": normal("head_weight", V, H), "head_bias": normal("head_bias", V)}


def loss_of(head: str, inputs: dict[str, Tensor], labels: Tensor, **options) -> Tensor:
    bias = inputs["head_bias"]
    if head == "linear":
        return ibkernels.linear_cross_entropy(inputs["input"], inputs["head_weight"], labels, bias=bias, **options)
    up = inputs["up_weight"], inputs["up_bias"]
    return ibkernels.bottleneck_cross_entropy(
        inputs["z"], *up, inputs["head_weight"], labels, bias=bias, absorb=head == "absorbed", **options
    )


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.cross_entropy, "_LOGITS_BYTES", 1)  # 16 rows
    monkeypatch.setattr(reference.cross_entropy, "_HEAD_BYTES", 512 * H * 4)


@pytest.mark.large
@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_neither_logits_nor_a_frozen_heads_gradient_is_allocated(target, head, reduction, labels):
    """Nothing of [N, V], and no second head: not of its gradient, and of a low-precision head no float32 copy."""
    inputs = make_inputs(head, target.dtype)
    wide = max(4, target.dtype.itemsize)
    options = {"reduction": reduction, "backend": target.backend, **({} if head == "linear" else {"softcap": 5.0})}

    def step() -> None:
        loss_of(head, inputs, labels, **options).sum().backward()

    sizes = allocations(step)
    assert max(sizes) < V * H * wide, f"{max(sizes)} bytes at once; the head in float32 is {V * H * wide}"
    assert peak(sizes) < N * V * wide / 4
    assert inputs["head_weight"].grad is None


@pytest.mark.parametrize("hidden_size", [16, 2048])
def test_a_low_precision_head_is_converted_by_blocks_of_a_fixed_size(monkeypatch, hidden_size):
    monkeypatch.setattr(reference.cross_entropy, "_HEAD_BYTES", 2**16)
    head = torch.randn(1001, hidden_size, dtype=torch.bfloat16)
    blocks = list(reference.cross_entropy._blocks(head, torch.float32))
    assert all(rows.nbytes <= 2**16 for _, rows in blocks)
    assert torch.equal(torch.cat([rows for _, rows in blocks]), head.float())
    assert all(torch.equal(head[block].float(), rows) for block, rows in blocks)


@pytest.mark.large
@each_head
def test_a_trained_heads_gradient_is_allocated_once_in_forward(target, head, labels):
    """So the two tests around this one measure what they mean to."""
    inputs = make_inputs(head, target.dtype, trained=("head_weight",))
    sizes = allocations(lambda: loss_of(head, inputs, labels, backend=target.backend))
    gradient = V * H * max(4, target.dtype.itemsize)
    assert sum(size >= gradient for size in sizes) == 1


@pytest.mark.large
@each_head
def test_evaluation_allocates_no_gradients(target, head, labels):
    inputs = make_inputs(head, target.dtype, trained=("head_weight",))
    wide = max(4, target.dtype.itemsize)
    with torch.no_grad():
        sizes = allocations(lambda: loss_of(head, inputs, labels, backend=target.backend))
    assert max(sizes) < V * H * wide


@pytest.mark.large
@each_head
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_saved_for_backward(target, head, reduction, labels):
    """The docstrings: the gradients themselves with "mean" and "sum", nothing but the arguments with "none"."""
    inputs = make_inputs(head, target.dtype)
    own = {tensor.data_ptr() for tensor in (*inputs.values(), labels)}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.numel() > 1:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(head, inputs, labels, reduction=reduction, backend=target.backend)
    size, wide = target.dtype.itemsize, max(4, target.dtype.itemsize)
    gradients = N * H * size if head == "linear" else N * K * size + (H * K + H) * wide
    assert sum(saved.values()) == (gradients if reduction == "mean" else 0)


# ---- the choice to absorb --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden_size", "width"), [(4096, 256), (2048, 64), (512, 64), (48, 16), (100, 7), (9, 4)])
def test_absorbs_at_the_threshold_of_the_formula(hidden_size, width):
    threshold = hidden_size * width / (hidden_size - 2 * width)
    first = -int(-threshold // 1)  # rounded up
    assert ibkernels.absorbs(first, hidden_size, width)
    assert not ibkernels.absorbs(first - 1, hidden_size, width)


def test_the_published_size_absorbs_from_293_tokens():
    assert ibkernels.absorbs(293, 4096, 256) and not ibkernels.absorbs(292, 4096, 256)


@pytest.mark.parametrize(("hidden_size", "width"), [(16, 8), (16, 9), (17, 9), (16, 16), (16, 40)])
def test_a_bottleneck_of_half_the_hidden_size_never_absorbs(hidden_size, width):
    assert not any(ibkernels.absorbs(tokens, hidden_size, width) for tokens in (0, 1, 1000, 10**9))


@pytest.mark.parametrize("tokens", [47, 48])
def test_auto_takes_the_cheaper_path(target, tokens, labels, monkeypatch):
    """H K / (H - 2K) is 48 here."""
    paths = []
    op = torch.ops.ibkernels.bottleneck_cross_entropy

    def record(*arguments):
        paths.append(arguments[12])
        return op(*arguments)

    monkeypatch.setattr(torch.ops.ibkernels, "bottleneck_cross_entropy", record)
    inputs = make_inputs("absorbed", target.dtype)
    arguments = inputs["up_weight"], inputs["up_bias"], inputs["head_weight"], labels[:tokens]
    for absorb in ("auto", True, False):
        ibkernels.bottleneck_cross_entropy(inputs["z"][:tokens], *arguments, absorb=absorb, backend=target.backend)
    assert paths == [tokens == 48, True, False]


def test_a_count_in_host_memory_is_not_copied_to_the_device():
    """A copy makes the host wait. No device is needed to see it: the tensors are fake."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copies.append((args[0].device.type, (kwargs or {}).get("device")))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Copies():
        input, weight = torch.empty(4, 6, device="cuda", dtype=torch.float16), torch.empty(9, 6, device="cuda")
        labels = torch.empty(4, device="cuda", dtype=torch.int64)
        for count in (torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)):
            loss = ibkernels.linear_cross_entropy(input, weight, labels, num_items=count)
            assert loss.device.type == "cuda" and loss.dtype == torch.float32
    assert copies and all(device is None for _, device in copies)


# ---- errors ----------------------------------------------------------------------------------------------------------

LABELS = torch.arange(4)
LINEAR = {"input": torch.zeros(4, 6), "weight": torch.zeros(9, 6), "labels": LABELS}
BOTTLENECK = {
    "z": torch.zeros(4, 2),
    "up_weight": torch.zeros(6, 2),
    "up_bias": torch.zeros(6),
    "head_weight": torch.zeros(9, 6),
    "labels": LABELS,
}
SHARED_ERRORS = [
    ({"labels": LABELS[:3]}, ValueError, r"labels is torch.int64 of shape \(3,\)"),
    ({"labels": LABELS.int()}, ValueError, "labels is torch.int32"),
    ({"labels": LABELS[None]}, ValueError, "labels is"),
    ({"token_weight": torch.ones(3)}, ValueError, "token_weight has shape"),
    ({"reduction": "average"}, ValueError, "reduction is 'average'"),
    ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items replaces .* 'sum'"),
    ({"num_items": 3, "reduction": "none"}, ValueError, "num_items replaces .* 'none'"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1"),
    ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ({"num_items": torch.tensor([3])}, ValueError, "num_items has shape"),
    ({"logit_scale": torch.ones((), requires_grad=True)}, TypeError, "logit_scale is a tensor; .* no gradient"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta but"),
    ({"token_weight": torch.ones(4, device="meta")}, ValueError, "token_weight is on meta but"),
    ({"bias": torch.zeros(9, device="meta")}, ValueError, "bias is on meta but"),
    ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \(8,\)"),
    ({"bias": torch.zeros(9, dtype=torch.int64)}, TypeError, "bias is torch.int64"),
    ({"backend": "fast"}, ValueError, "names the backend 'fast'"),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        *SHARED_ERRORS,
        ({"input": torch.zeros(2, 2, 6)}, ValueError, r"input has shape \(2, 2, 6\).*flatten"),
        ({"input": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "input is torch.int64"),
        ({"input": torch.zeros(4, 5)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(())}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(9, 6, device="meta")}, ValueError, "weight is on meta but"),
        ({"weight": torch.zeros(0, 6)}, ValueError, "weight .*gather it first"),
        ({"weight": torch.zeros(9, 6, dtype=torch.uint8)}, TypeError, "weight is torch.uint8.*dequantise"),
        ({"weight": torch.zeros(9, 6).to(torch.float8_e5m2)}, TypeError, "weight is torch.float8_e5m2.*dequantise"),
    ],
)
def test_errors_of_the_linear_head_name_the_argument(changed, error, message):
    with pytest.raises(error, match=message):
        ibkernels.linear_cross_entropy(**{**LINEAR, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        *SHARED_ERRORS,
        ({"z": torch.zeros(2, 2, 2)}, ValueError, "z has shape"),
        ({"z": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "z is torch.int64"),
        ({"z": torch.zeros(4, 3)}, ValueError, "up_weight has shape"),
        ({"up_bias": torch.zeros(5)}, ValueError, "up_bias has shape"),
        ({"up_weight": torch.zeros(6, 2, device="meta")}, ValueError, "up_weight is on meta but"),
        ({"head_weight": torch.zeros(9, 6, device="meta")}, ValueError, "head_weight is on meta but"),
        ({"head_weight": torch.zeros(9, 5)}, ValueError, "head_weight has shape"),
        ({"head_weight": torch.zeros(0, 6)}, ValueError, "head_weight .*gather it first"),
        ({"absorb": "always"}, ValueError, "absorb is 'always'"),
    ],
)
def test_errors_of_the_bottleneck_head_name_the_argument(changed, error, message):
    with pytest.raises(error, match=message):
        ibkernels.bottleneck_cross_entropy(**{**BOTTLENECK, **changed})


@pytest.mark.parametrize("label", [9, -1])
def test_a_label_outside_the_vocabulary_is_an_error_or_no_number(target, label):
    """A GPU cannot raise without making the host wait."""

    def loss() -> Tensor:
        labels = torch.full((4,), label)
        return ibkernels.linear_cross_entropy(
            LINEAR["input"].to(target.dtype), LINEAR["weight"], labels, backend=target.backend
        )

    if target.backend == "triton":
        assert loss().isnan()
        return
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss()
