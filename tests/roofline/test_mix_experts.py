"""The bytes of `cases.mix_experts` are those that the kernels move, tensor by tensor."""

from importlib import import_module

import pytest
import torch
from cases.mix_experts import Experts, experts_backward, experts_forward
from kernel_traffic import check, check_rereads

from sapt_fast.ops.mix_experts import pair_groups, pair_order

experts_kernels = import_module("sapt_fast.triton_kernels.mix_experts")


@pytest.mark.parametrize("crowded", [False, True], ids=["scattered", "crowded"])
def test_mix_experts(crowded, monkeypatch):
    monkeypatch.setattr(experts_kernels, "grouping_pays", lambda *_: crowded)
    m, k, n, i, o, rank = 10, 3, 12, 33, 41, 5
    x, dy = torch.randn(m, i).half(), torch.randn(m, o).half()
    bank_a, bank_b = torch.randn(n, rank, i).half(), torch.randn(n, rank, o).half()
    index, weights = torch.randint(0, n, (m, k)), torch.rand(m, k)
    c = Experts(m, k, n, i, o, rank, chosen=index.unique().numel(), tile=16)
    inputs = {"bank_a": bank_a, "bank_b": bank_b, "index": index, "weights": weights}

    def forward():
        y, h = experts_kernels.mix_experts_fwd(x, bank_a, bank_b, index, weights, 2.0)
        return {"y": y, "h": h}

    passes = experts_forward(c, crowded)
    check_rereads(check(forward, {"x": x, **inputs}, passes, {}), passes)

    h = forward()["h"]
    groups = pair_groups(index, weights, n, pair_order(index, weights, n), True)

    def backward():
        grads = experts_kernels.mix_experts_bwd(
            dy, x, bank_a, bank_b, index, weights, h, 2.0, groups, True, True
        )
        return dict(zip(("dx", "d_weights", "d_a", "d_b"), grads, strict=True))

    passes = experts_backward(c, crowded)
    inputs |= {"x": x, "dy": dy, "h": h}
    check_rereads(check(backward, inputs, passes, {}), passes)
