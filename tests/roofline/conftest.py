"""Kernels whose loads and stores are counted run in Triton's interpreter, on one multiprocessor."""

import pytest
import torch

from sapt_fast.triton_kernels.blocks import common


@pytest.fixture(autouse=True)
def _one_multiprocessor(monkeypatch):
    """Nothing is split into parts, which the formulas leave out unless they name them."""
    if not common.INTERPRETED:
        pytest.skip("accesses are seen in Triton's interpreter only")
    torch.manual_seed(0)
    traits = common.DeviceTraits(capability=0, num_sms=1)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)


@pytest.fixture
def four_multiprocessors(_one_multiprocessor, monkeypatch):
    """Work is split into up to four parts."""
    traits = common.DeviceTraits(capability=0, num_sms=4)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)
