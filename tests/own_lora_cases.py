"""Inputs of op own_lora and what it must give, in float64."""

import torch

from sapt_fast.ops.own_lora import Adapter

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-14}


def make(shape, ranks, dtype=torch.float32, lora_dtype=None, outputs=7):
    """(y, x, adapters); shape [B, ..., I]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, of):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    of = lora_dtype or dtype
    adapters = [
        Adapter(draw(r, shape[-1], of=of), draw(outputs, r, of=of), 0.5 + k)
        for k, r in enumerate(ranks)
    ]
    return draw(*shape[:-1], outputs, of=dtype), draw(*shape, of=dtype), adapters


def make_base(x, outputs=7, transposed=False):
    """(weight [O, I], bias [O]) of x's dtype."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs, x.shape[-1], generator=generator, dtype=torch.float64)
    weight = weight.t().contiguous().t() if transposed else weight
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    return weight.to(x.dtype), bias.to(x.dtype)


def expected_whole(x, weight, bias, adapters, owner):
    y = x.double() @ weight.double().t()
    return expected(y if bias is None else y + bias.double(), x, adapters, owner)


def expected(y, x, adapters, owner):
    y = y.double().clone()
    for row, k in enumerate(owner):
        if k >= 0:
            a, b, scaling = adapters[k]
            y[row] += scaling * (x[row].double() @ a.double().t()) @ b.double().t()
    return y


def assert_right(got, want, dtype):
    assert not got.isnan().any()
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm().clamp(min=1e-30)
