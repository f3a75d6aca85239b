"""Every combination of dtypes: those that a docstring allows are computed, the others named."""

import itertools

import pytest
import torch
from torch import Tensor

from sapt_fast import dispatch, ops
from sapt_fast.ops.own_lora import Adapter, own_lora

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = (None, "reference", "cpu", "triton")
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
PAIRS = list(itertools.product(DTYPES, DTYPES))


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _mixed_lora(x, other, backend):
    return ops.mixed_lora_linear(
        *(_normal(2, 3, 8).to(x), _normal(6, 8).to(x), None, _normal(4, 8).to(other)),
        *(_normal(4, 6).to(other), _normal(2, 2).abs().to(other)),
        ranks=2,
        backend=backend,
    )


def _mix_experts(x, other, backend):
    return ops.mix_experts(
        *(_normal(3, 8).to(x), _normal(5, 2, 8).to(other), _normal(5, 2, 6).to(other)),
        *(torch.tensor([[0, 4], [2, -1], [3, 3]]), _normal(3, 2).to(other)),
        backend=backend,
    )


def _mix_prompts(x, other, backend):
    prompts, mixture = _normal(3, 2, 8).to(other), _normal(2, 3).to(other)
    return ops.mix_prompts(prompts, mixture, _normal(2, 4, 8).to(x), backend=backend)


def _own_lora(x, other, backend):
    adapters = [Adapter(_normal(2, 8).to(other), _normal(6, 2).to(other), 0.5)]
    return own_lora(
        _normal(2, 3, 8).to(x), _normal(6, 8).to(x), None, adapters, [0, -1], backend=backend
    )


def _nearest_key(x, other, backend):
    query, keys, radius = _normal(3, 8).to(x), _normal(4, 8).to(x), torch.full((4,), 9.0)
    return ops.nearest_key(query, keys, radius.to(other), backend=backend)[1]


def _topk_keys(x, other, backend):
    return ops.topk_keys(_normal(3, 8).to(x), _normal(4, 8).to(other), 2, backend=backend)[0]


def _pool_tokens(x, other, backend):
    ids, mask = torch.tensor([[1, 2, 0]]), torch.ones(1, 3).to(other)
    return ops.pool_tokens(ids, _normal(4, 8).to(x), mask=mask, pooling="mean", backend=backend)


def _route(x, other, backend):
    return ops.route(_normal(2, 3, 8).to(x), _normal(4, 8).to(other), None, backend=backend)


SAME_OR_FLOAT32 = "same or float32"
OPS = {
    "mixed_lora": (_mixed_lora, SAME_OR_FLOAT32, "lora_a"),
    "mix_experts": (_mix_experts, SAME_OR_FLOAT32, "bank_a"),
    "mix_prompts": (_mix_prompts, SAME_OR_FLOAT32, "prompts"),
    "own_lora": (_own_lora, SAME_OR_FLOAT32, "adapters"),
    "nearest_key": (_nearest_key, "any", ""),
    "topk_keys": (_topk_keys, "same", "keys"),
    "pool_tokens": (_pool_tokens, "any", ""),
    "route": (_route, "any", ""),
}


@pytest.mark.parametrize(("x", "other"), PAIRS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_pair(op, x, other):
    call, rule, name = OPS[op]
    allowed = rule == "any" or other == x or (rule == SAME_OR_FLOAT32 and other == torch.float32)
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
            assert y.dtype == (x if op in ("mixed_lora", "own_lora", "pool_tokens") else y.dtype)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("sparse", [False, True])
def test_float64_rows_and_float32_experts(backend, sparse):
    x, a, b = _normal(3, 8), _normal(5, 2, 8).float(), _normal(5, 2, 6).float()
    index, weights = torch.tensor([[0, 4], [2, -1], [3, 3]]), _normal(3, 2)
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
