"""Op `own_lora`, which takes no gradient: see tests/ops/test_own_lora.py for its bad input."""

from collections.abc import Iterator

import torch
from ops.cases import SAME_OR_FLOAT32, Bad, Pair, Sample, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops.own_lora import Adapter, own_lora

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-14}
FORMULAS = {}
COMPILES = False  # its CPU kernel is no registered op


def _run(x, weight, bias, a, b, backend, owner=(1, -1, 0)):
    adapters = [Adapter(*factors, 0.5) for factors in zip(a, b, strict=True)]
    return own_lora(x, weight, bias, adapters, owner[: len(x)], backend=backend)


def _inputs(*lead):
    return floats(x=(*lead, 19), weight=(17, 19), bias=(17,), a=(2, 5, 19), b=(2, 17, 5))


_NONE = ("x", "weight", "bias", "a", "b")
SAMPLES = {
    "a row each": Sample(_run, _inputs(3, 1), frozen=_NONE),
    "many rows": Sample(_run, _inputs(3, 40), frozen=_NONE),
}
EMPTY = {
    "no samples": Sample(_run, _inputs(0, 4), frozen=_NONE),
    "no tokens": Sample(_run, _inputs(3, 0), frozen=_NONE),
}


def _pair(x, other, backend):
    adapters = [Adapter(draw(2, 8).to(other), draw(6, 2).to(other), 0.5)]
    return own_lora(draw(2, 3, 8).to(x), draw(6, 8).to(x), None, adapters, [0, -1], backend=backend)


PAIRS = Pair(_pair, SAME_OR_FLOAT32, "adapters", keeps_dtype=True)


def _bad(error, message, backend=None, **changes):
    given = {**_inputs(3, 4), **changes}
    return Bad(lambda: _run(**given, backend=backend), error, message)


BAD = {
    "weight": _bad(ValueError, r"weight: got shape \(19,\)", weight=torch.zeros(19)),
    "dtype": _bad(TypeError, "weight: got dtype", weight=torch.zeros(17, 19).half()),
    "gradient": _bad(ValueError, "require gradients", x=torch.zeros(3, 4, 19, requires_grad=True)),
    "backend": _bad(ValueError, "rocket", backend="rocket"),
    "no such kernel": _bad(dispatch.BackendError, "triton", backend="triton"),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    return iter(())


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
