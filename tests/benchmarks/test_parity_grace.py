"""parity_grace finds that numbers differ."""

import parity_grace
import torch


def test_deviations():
    recorded = torch.tensor([1.0, -4.0])
    assert parity_grace._deviation(torch.tensor([1.0, -3.0]), recorded) == 0.25
    assert parity_grace._deviation(torch.ones(3), recorded) == float("inf")
    for wrong in (float("nan"), float("inf")):
        found = parity_grace._deviation(torch.tensor([wrong, -4.0]), recorded)
        assert max(0.0, found) == float("inf")
