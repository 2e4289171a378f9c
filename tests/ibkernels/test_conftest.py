"""The fixture that poisons memory does so: else the suite could not see an element that nobody wrote."""

import torch


def test_empty_memory_is_poisoned():
    for tensor in (torch.empty(1000), torch.zeros(3).new_empty(50, 20), torch.empty_like(torch.zeros(3, 300))):
        assert tensor.isnan().all()
    assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
