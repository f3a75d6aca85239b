"""Op `nearest_key`."""

import importlib
from collections.abc import Iterator

import torch
from ops.cases import ANY, Bad, Case, Pair, Sample, device, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops import nearest_key

op = importlib.import_module("sapt_fast.ops.nearest_key")

FORMULAS = {
    "nearest_key": Case(
        lambda q, k, **b: nearest_key(q, k, torch.ones(5), **b)[1],
        lambda q, k: (q[:, None] - k[None]).square().sum(-1).sqrt().amin(1),
        (draw(3, 4), draw(5, 4)),
    ),
}


def _inputs(m, n, d):
    given = floats(query=(m, d), keys=(n, d))
    return {**given, "radius": 2 * d**0.5 * torch.linspace(0, 1, n)}


def _sample(*sizes):
    return Sample(nearest_key, _inputs(*sizes), wide=("radius",), frozen=("radius",))


SAMPLES = {"odd": _sample(3, 50, 19), "keys in parts": _sample(5, 300, 8)}
EMPTY = {"no queries": _sample(0, 5, 4)}


def _pair(x, other, backend):
    query, keys, radius = draw(3, 8).to(x), draw(4, 8).to(x), torch.full((4,), 9.0)
    return nearest_key(query, keys, radius.to(other), backend=backend)[1]


PAIRS = Pair(_pair, ANY, "")


def _bad(error, message, **changes):
    given = {"query": torch.zeros(2, 4), "keys": torch.zeros(5, 4), "radius": torch.zeros(5)}
    return Bad(lambda: nearest_key(**{**given, **changes}), error, message)


BAD = {
    "query": _bad(ValueError, r"query: got shape \(4,\)", query=torch.zeros(4)),
    "keys": _bad(ValueError, r"keys: .*expected \[N, 4\]", keys=torch.zeros(5, 3)),
    "keys dtype": _bad(TypeError, "keys: got dtype", keys=torch.zeros(5, 4).half()),
    "radius": _bad(ValueError, r"radius: .*expected \[5\]", radius=torch.zeros(4)),
    "radius dtype": _bad(TypeError, "radius: got dtype", radius=torch.zeros(5).long()),
    "device": _bad(ValueError, "radius: got device", radius=torch.zeros(5, device="meta")),
    "backend": _bad(ValueError, "rocket", backend="rocket"),
    "no such kernel": _bad(dispatch.BackendError, "cuda", backend="cuda"),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    query, keys, radius = (t.to(device(backend)) for t in _inputs(3, 50, 19).values())
    yield op._forward_op, (query.requires_grad_(), keys.requires_grad_(), radius, backend)
