"""The bytes of `cases.route` are those that the kernels move, tensor by tensor."""

import pytest
import torch
from cases.route import Head, head_forward
from kernel_traffic import check, check_rereads

from sapt_fast.ops import QueryProjection
from sapt_fast.triton_kernels.route import route_fwd


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("keys", [1, 15, 70])
def test_router_head(keys, top_k):
    b, d, hidden = 3, 37, 19
    c = Head(b, d, hidden, keys, tile=16)
    shapes = {"pooled": (b, d), "keys": (keys, d), "down": (hidden, d), "up": (d, hidden),
              "norm_weight": (d,), "norm_bias": (d,)}  # fmt: skip
    inputs = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    pooled, key_rows, *projection = inputs.values()

    def forward():
        projected = QueryProjection(*projection)
        return {"weights": route_fwd(pooled, key_rows, projected, 6.0, top_k, 0.01)}

    passes = head_forward(c, ranked=top_k is not None and top_k < keys)
    check_rereads(check(forward, inputs, passes, {}), passes)
