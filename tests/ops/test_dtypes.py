"""Every combination of dtypes: those that a docstring allows are computed, the others named."""

import itertools

import pytest
import torch
from ops import cases
from ops.cases import ANY, SAME_OR_FLOAT32, draw

from sapt_fast import dispatch, ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = (None, *(b for b in dispatch.BACKENDS if b != "cuda"))
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@pytest.mark.parametrize(("x", "other"), itertools.product(DTYPES, DTYPES), ids=str)
@pytest.mark.parametrize("op", cases.modules())
def test_every_pair(op, x, other):
    call, rule, name, keeps_dtype = cases.modules()[op].PAIRS
    allowed = rule == ANY or other == x or (rule == SAME_OR_FLOAT32 and other == torch.float32)
    for backend in BACKENDS:
        if backend is not None and dispatch.unavailable(op, backend, "cpu", x) is not None:
            with pytest.raises(dispatch.BackendError):
                call(x, x, backend)
        elif not allowed:
            with pytest.raises(TypeError, match=f"{name}: got"):
                call(x, other, backend)
        else:
            with torch.no_grad():
                y = call(x, other, backend)
            wide = call(torch.float64, torch.float64, "reference")
            limit = max(EXACT[x], EXACT[other])
            torch.testing.assert_close(y.double(), wide.double(), rtol=limit, atol=limit)
            assert y.dtype == (x if keeps_dtype else y.dtype)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("sparse", [False, True])
def test_float64_rows_and_float32_experts(backend, sparse):
    x, a, b = draw(3, 8), draw(5, 2, 8).float(), draw(5, 2, 6).float()
    index, weights = torch.tensor([[0, 4], [2, -1], [3, 3]]), draw(3, 2)
    given = [t.requires_grad_() for t in (x, a, b, weights)]
    y = ops.mix_experts(x, a, b, index, weights, backend=backend, sparse_grad=sparse)
    y.square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in given]
    want = ops.mix_experts(*wide[:3], index, wide[3], backend="reference")
    want.square().sum().backward()
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, want)
    for t, exact in zip(given, wide, strict=True):
        grad = t.grad.to_dense() if t.grad.is_sparse else t.grad
        assert grad.dtype == t.dtype
        torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-6, atol=1e-6)
