"""What `variational_bottleneck` and `encode` refuse: a sentence that names the argument, before any work is done."""

import pytest
import torch
from torch import Tensor

import ibkernels

H, K, R = 24, 10, 3
RNG = torch.tensor([1, 2])
FLOATS = torch.zeros(4, H)
GOOD = {"hidden": FLOATS, "weight": torch.zeros(2 * K, H), "bias": torch.zeros(2 * K), "rng": RNG}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(4, H, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"hidden": torch.zeros(())}, TypeError, r"hidden is .* of shape \(\)"),
        ({"hidden": torch.zeros(4, H + 1)}, ValueError, r"weight has shape \(20, 24\)"),
        ({"hidden": torch.zeros(4, H, device="meta")}, ValueError, "weight is on cpu but hidden on meta"),
        ({"weight": torch.zeros(2 * K, H, 1)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(2 * K + 1, H), "bias": None}, ValueError, "21 outputs; it must be an even number"),
        ({"weight": torch.zeros(())}, ValueError, "weight has shape"),
        ({"weight": (torch.zeros(R, H), torch.zeros(()))}, ValueError, "lora_b has shape"),
        ({"weight": [torch.zeros(R, H)]}, (TypeError, ValueError), "weight is"),
        ({"weight": torch.zeros(0, H)}, ValueError, "weight has shape .* gather it first"),
        ({"weight": torch.zeros(2 * K, H, dtype=torch.int8)}, TypeError, "weight is torch.int8"),
        ({"weight": torch.zeros(2 * K, H).to(torch.float8_e4m3fn)}, TypeError, "weight is torch.float8_e4m3fn"),
        ({"weight": (torch.zeros(R, H + 1), torch.zeros(2 * K, R))}, ValueError, "lora_a has shape"),
        ({"weight": (torch.zeros(R, H), torch.zeros(2 * K, R + 1))}, ValueError, "lora_b has shape"),
        ({"weight": (torch.zeros(R, H), torch.zeros(2 * K - 1, R))}, ValueError, "19 outputs"),
        ({"bias": torch.zeros(K)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(2 * K, device="meta")}, ValueError, "bias is on meta"),
        ({"rng": torch.zeros(2)}, ValueError, "rng is torch.float32"),
        ({"rng": RNG[:1]}, ValueError, "rng is torch.int64 of shape"),
        ({"rows": torch.arange(3)}, ValueError, r"rows is torch.int64 of shape \(3,\)"),
        ({"rows": torch.arange(4)[None]}, ValueError, "rows is"),
        ({"rows": torch.arange(4, dtype=torch.int32)}, ValueError, "rows is torch.int32"),
        ({"rows": torch.arange(4, device="meta")}, ValueError, "rows is on meta but hidden on cpu"),
        ({"logvar_range": (4.0, -4.0)}, ValueError, "logvar_range is"),
        ({"logvar_range": (float("nan"), 4.0)}, ValueError, "logvar_range is"),
        ({"kl_reduction": "max"}, ValueError, "kl_reduction is 'max'"),
        ({"backend": "cuda"}, ValueError, "names the backend 'cuda'; there are:"),
        ({"hidden": FLOATS.to(torch.float8_e4m3fn)}, ValueError, "float8_e4m3fn"),
    ],
)
def test_errors_name_the_argument(changed, error, message):
    with pytest.raises(error, match=message):
        ibkernels.variational_bottleneck(**{**GOOD, **changed})
    if not changed.keys() & {"rng", "rows", "kl_reduction"}:
        with pytest.raises(error, match=message):
            ibkernels.encode(**{name: value for name, value in {**GOOD, **changed}.items() if name != "rng"})


def test_a_sharded_parameter_is_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self) -> Tensor:
            raise NotImplementedError

    weight = GOOD["weight"].as_subclass(Sharded)
    with pytest.raises(TypeError, match=r"weight is a DTensor.*full_tensor"):
        ibkernels.variational_bottleneck(FLOATS, weight)
