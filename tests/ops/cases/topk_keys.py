"""Op `topk_keys`."""

import importlib
from collections.abc import Iterator

import torch
from ops.cases import SAME, Bad, Case, Pair, Sample, device, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops import topk_keys

op = importlib.import_module("sapt_fast.ops.topk_keys")


def plain_topk(metric):
    def run(query, keys):
        s = query @ keys.t()
        if metric == "l2":
            s = 2 * s - query.square().sum(1)[:, None] - keys.square().sum(1)
        if metric == "cosine":
            s = s / query.norm(dim=1)[:, None] / keys.norm(dim=1)[None]
        return s.sort(dim=1, descending=True).values[:, :2]

    return run


FORMULAS = {
    **{
        f"topk_keys_{metric}": Case(
            lambda q, k, metric=metric, **b: topk_keys(q, k, 2, metric=metric, **b)[0],
            plain_topk(metric),
            (draw(3, 4), draw(5, 4)),
        )
        for metric in ("dot", "cosine", "l2")
    },
}


def _sample(metric, k, m, n, d):
    def run(query, keys, backend):
        return topk_keys(query, keys, k, metric=metric, backend=backend)

    return Sample(run, floats(query=(m, d), keys=(n, d)))


SAMPLES = {
    **{metric: _sample(metric, 5, 3, 35, 19) for metric in op.METRICS},
    "keys in parts": _sample("cosine", 3, 1, 150, 8),
    "all keys": _sample("l2", 9, 2, 9, 16),
}
EMPTY = {"no queries": _sample("dot", 2, 0, 5, 4)}


def _pair(x, other, backend):
    return topk_keys(draw(3, 8).to(x), draw(4, 8).to(other), 2, backend=backend)[0]


PAIRS = Pair(_pair, SAME, "keys")


def _bad(error, message, **changes):
    given = {"query": torch.zeros(2, 4), "keys": torch.zeros(5, 4), "k": 2, **changes}
    return Bad(lambda: topk_keys(**given), error, message)


BAD = {
    "query": _bad(ValueError, r"query: got shape \(4,\)", query=torch.zeros(4)),
    "width": _bad(ValueError, "query: got", query=torch.zeros(2, 0), keys=torch.zeros(5, 0)),
    "keys": _bad(ValueError, r"keys: .*expected \[N, 4\]", keys=torch.zeros(5, 3)),
    "dtype": _bad(TypeError, "query: got dtype", query=torch.zeros(2, 4).long()),
    "two dtypes": _bad(TypeError, "keys: got dtype", keys=torch.zeros(5, 4).half()),
    "device": _bad(ValueError, "keys: got device", keys=torch.zeros(5, 4, device="meta")),
    "k": _bad(ValueError, "k: got 6, expected 1 to 5", k=6),
    "no k": _bad(ValueError, "k: got 0", k=0),
    "k type": _bad(TypeError, "k: got 1.5", k=1.5),
    "metric": _bad(ValueError, "metric: got 'manhattan'", metric="manhattan"),
    "backend": _bad(ValueError, "rocket", backend="rocket"),
    "no such kernel": _bad(dispatch.BackendError, "cuda", backend="cuda"),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    query, keys = (t.to(device(backend)) for t in floats(query=(3, 19), keys=(35, 19)).values())
    leaves = (t.clone().requires_grad_() for t in (query, keys))
    yield op._forward_op, (*leaves, 3, "cosine", backend)
    scores, index = op._forward_op(query, keys, 3, "cosine", backend)
    saved = torch.ones_like(scores), query, keys, scores, index
    yield op._backward_op, (*saved, "cosine", True, True)
    yield op._backward_op, (*saved, "cosine", False, True)
