"""Op `mix_experts`."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from ops.cases import SAME_OR_FLOAT32, Bad, Case, Pair, Sample, device, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops import mix_experts

op = importlib.import_module("sapt_fast.ops.mix_experts")

WAYS = {"grouped": "triton"}
CHOSEN = torch.tensor([[0, 3], [2, -1], [1, 1]])


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's two ways: pair by pair, and sorted by expert."""
    kernels = pytest.importorskip("sapt_fast.triton_kernels.mix_experts")
    monkeypatch.setattr(kernels, "grouping_pays", lambda *_: way == "grouped")


def plain_experts(x, a, b, weights):
    rows = []
    for m in range(3):
        y = x.new_zeros(b.shape[2])
        for j in range(2):
            n = int(CHOSEN[m, j])
            if n >= 0:
                y = y + 0.7 * weights[m, j] * (x[m] @ a[n].t() @ b[n])
        rows.append(y)
    return torch.stack(rows)


FORMULAS = {
    "mix_experts": Case(
        lambda x, a, b, w, **k: mix_experts(x, a, b, CHOSEN, w, scaling=0.7, **k),
        plain_experts,
        (draw(3, 4), draw(4, 2, 4), draw(4, 2, 3), draw(3, 2)),
    ),
}


def _inputs(m=5, n=7, r=3, i=19, o=21, k=3):
    given = floats(x=(m, i), bank_a=(n, r, i), bank_b=(n, r, o), weights=(m, k))
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1 if n > 1 else 0, n, (m, k), generator=generator)
    return {**given, "index": index}


def _scaled(backend, **given):
    return mix_experts(**given, scaling=0.5, backend=backend)


SAMPLES = {
    "odd": Sample(_scaled, _inputs(), wide=("weights",)),
    "crowded": Sample(_scaled, _inputs(20, 2, 4, 16, 40, 1), wide=("weights",)),
}


def _without(rows=5, choices=3, ranks=3, experts=7):
    given = _inputs(rows, 7, ranks, 19, 21, choices)
    if not experts:
        given |= {n: given[n][:0] for n in ("bank_a", "bank_b")}
        given["index"] = torch.full_like(given["index"], -1)
    return Sample(mix_experts, given)


EMPTY = {
    "no rows": _without(rows=0),
    "no choices": _without(choices=0),
    "no ranks": _without(ranks=0),
    "no experts": _without(experts=0),
}


def _pair(x, other, backend):
    return mix_experts(
        *(draw(3, 8).to(x), draw(5, 2, 8).to(other), draw(5, 2, 6).to(other)),
        *(torch.tensor([[0, 4], [2, -1], [3, 3]]), draw(3, 2).to(other)),
        backend=backend,
    )


PAIRS = Pair(_pair, SAME_OR_FLOAT32, "bank_a", keeps_dtype=True)


def _bad(error, message, backend=None, **changes):
    given = {**_inputs(), **changes}
    return Bad(lambda: mix_experts(**given, backend=backend), error, message)


BAD = {
    "x": _bad(ValueError, r"x: got shape \(5,\)", x=torch.zeros(5)),
    "x dtype": _bad(TypeError, "x: got dtype", x=torch.zeros(5, 19).long()),
    "bank_a": _bad(ValueError, r"bank_a: .*\[N, r, 19\]", bank_a=torch.zeros(7, 3, 18)),
    "bank_b": _bad(ValueError, r"bank_b: .*\[7, 3, O\]", bank_b=torch.zeros(7, 4, 21)),
    "bank_a dtype": _bad(TypeError, "bank_a: got dtype", bank_a=torch.zeros(7, 3, 19).half()),
    "bank_b dtype": _bad(TypeError, "bank_b: got dtype", bank_b=torch.zeros(7, 3, 21).half()),
    "index": _bad(ValueError, r"index: .*\[5, k\]", index=torch.zeros(4, 3).long()),
    "index dtype": _bad(TypeError, "index: got dtype", index=torch.zeros(5, 3).int()),
    "too high": _bad(ValueError, "index: got values from 7 to 7", index=torch.full((5, 3), 7)),
    "too low": _bad(ValueError, "index: got values from -2", index=torch.full((5, 3), -2)),
    "weights": _bad(ValueError, "weights: got shape", weights=torch.zeros(5, 2)),
    "weights dtype": _bad(TypeError, "weights: got dtype", weights=torch.zeros(5, 3).long()),
    "device": _bad(ValueError, "weights: got device", weights=torch.zeros(5, 3, device="meta")),
    "backend": _bad(ValueError, "rocket", backend="rocket"),
    "no such kernel": _bad(dispatch.BackendError, "cuda", backend="cuda"),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    given = {n: t.to(device(backend)) for n, t in _inputs().items()}
    tensors = [given[n] for n in ("x", "bank_a", "bank_b", "index", "weights")]
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    yield op._forward_op, (*leaves, 0.5, False, True, backend)
    for banks in (True, False):
        y, h, order = op._forward_op(*tensors, 0.5, False, banks, backend)
        given = (torch.ones_like(y), *tensors, h, order, 0.5)
        yield op._backward_op, (*given, [banks, True, banks], backend)
