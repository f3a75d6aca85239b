"""Op `route`."""

import importlib
from collections.abc import Iterator
from functools import partial

import torch
from ops.cases import ANY, D64, Bad, Case, Pair, Sample, device, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops import QueryProjection, TaskProjections, reflection_loss, route
from sapt_fast.ops.route import route_scores, sparsify

op = importlib.import_module("sapt_fast.ops.route")

POOL = (draw(2, 4), draw(3, 4), draw(2, 4, seed=3), draw(4, 2), draw(4), draw(4, seed=5))
TARGET = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=D64)


def plain_projection(e, keys, down, up, weight, bias):
    z = e @ down.t() @ up.t()
    active = z * torch.sigmoid(z)
    centred = active - active.mean(-1, keepdim=True)
    q = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    return q @ keys.t() / keys.shape[1] ** 0.5


def plain_kl(scores, target):
    logs = torch.log_softmax(scores, -1)
    return ((target * target.log()).sum() - (target * logs[:, :2]).sum()) / scores.shape[0]


def _projected(e, keys, *parts, backend=None, **kwargs):
    return route(e, keys, QueryProjection(*parts), backend=backend, **kwargs)


FORMULAS = {
    "route": Case(_projected, lambda *t: torch.softmax(plain_projection(*t), -1), POOL),
    "route_top_k": Case(
        lambda *t, **k: _projected(*t, top_k=2, **k),
        lambda *t: (
            (w := torch.softmax(plain_projection(*t), -1))
            * (kept := (w > w.amin(-1, keepdim=True)).to(w))
            / (w * kept).sum(-1, keepdim=True)
        ),
        POOL,
    ),
    "route_scores": Case(
        lambda *t, **k: route_scores(*t[:2], QueryProjection(*t[2:]), **k),
        plain_projection,
        POOL,
    ),
    "reflection_loss": Case(
        lambda s, t, backend=None: reflection_loss(s, t),
        plain_kl,
        (draw(2, 3), TARGET),
    ),
}


def _inputs(batch=3, width=33, count=7, hidden=5):
    return floats(
        pooled=(batch, width),
        keys=(count, width),
        down=(hidden, width),
        up=(width, hidden),
        norm_weight=(width,),
        norm_bias=(width,),
    )


def _weights(pooled, keys, *parts, backend=None, scores=False, **options):
    projection = QueryProjection(*parts) if parts else None
    function = route_scores if scores else route
    return function(pooled, keys, projection, backend=backend, **options)


def _call(**options):
    return lambda backend, **given: _weights(*given.values(), backend=backend, **options)


_WITHOUT_PROJECTION = {n: t for n, t in _inputs().items() if n in ("pooled", "keys")}
_LARGE = _inputs(4, 40, 70, 18)
SAMPLES = {
    "threshold": Sample(_call(top_k=3, threshold=0.1), _inputs()),
    "scores": Sample(_call(scores=True), _inputs()),
    "scores, large": Sample(_call(scores=True), _LARGE),
    "weights": Sample(_call(), _LARGE),
    "no projection": Sample(_call(), _WITHOUT_PROJECTION),
    "top k": Sample(_call(top_k=3), _LARGE),
}


def _tasks(pooled, keys, down, up, backend=None, **options):
    return route(pooled, keys, TaskProjections(down, up), backend=backend, **options)


SAMPLES |= {
    "cosine": Sample(
        _call(gate="sigmoid", similarity="cosine", top_k=3, renormalize=True), _inputs()
    ),
    "kept softmax": Sample(_call(top_k=3, renormalize=False), _WITHOUT_PROJECTION),
    "tasks": Sample(
        partial(_tasks, gate="abs_sigmoid", similarity="cosine", temperature=0.25),
        floats(pooled=(3, 33), keys=(4, 20), down=(4, 5, 33), up=(4, 20, 5)),
    ),
    "tokens": Sample(
        _call(pooling="none", gate="relu", similarity="cosine", top_k=2, renormalize=True),
        floats(pooled=(2, 35, 33), keys=(5, 33)),
    ),
}
EMPTY = {
    name: Sample(_call(**options), {**given, "pooled": given["pooled"][:0]})
    for name, options, given in (
        ("no scores", {"scores": True}, _inputs()),
        ("no scores, no projection", {"scores": True}, _WITHOUT_PROJECTION),
        ("no weights", {"top_k": 2, "threshold": 0.1}, _inputs()),
        ("no weights, no projection", {"top_k": 2, "threshold": 0.1}, _WITHOUT_PROJECTION),
    )
}


def _pair(x, other, backend):
    return route(draw(2, 3, 8).to(x), draw(4, 8).to(other), None, backend=backend)


PAIRS = Pair(_pair, ANY, "")


def _bad(error, message, double=False, options=None, **changes):
    given = {**_inputs(), **changes}
    given = {n: t.double() if double else t for n, t in given.items()}
    return Bad(lambda: _weights(*given.values(), **(options or {})), error, message)


BAD = {
    "keys": _bad(ValueError, r"keys: .*expected \[K, 33\]", keys=torch.zeros(3, 5)),
    "temperature": _bad(ValueError, "temperature: got 0.0", options={"temperature": 0.0}),
    "up": _bad(ValueError, r"projection.up: .*expected \(33, 5\)", up=torch.zeros(5, 33)),
    "down device": _bad(
        ValueError, "projection.down: got device", down=torch.zeros(5, 33, device="meta")
    ),
    "float64": _bad(dispatch.BackendError, "float64", double=True, options={"backend": "triton"}),
    "backend": _bad(ValueError, "rocket", options={"backend": "rocket"}),
    "no such kernel": _bad(dispatch.BackendError, "cpu", options={"backend": "cpu"}),
    "top_k": Bad(lambda: sparsify(torch.ones(1, 2), top_k=0), ValueError, "top_k: got 0"),
    "threshold": Bad(
        lambda: sparsify(torch.ones(1, 2), threshold=1.5), ValueError, "threshold: got 1.5"
    ),
    "target": Bad(
        lambda: reflection_loss(torch.zeros(2, 3), torch.zeros(4)), ValueError, "target: got shape"
    ),
    "target rows": Bad(
        lambda: reflection_loss(torch.zeros(2, 3), torch.zeros(3, 3)),
        ValueError,
        "target: got shape",
    ),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    if backend == "reference":
        return  # plain torch, not registered
    for given in (_inputs(), _WITHOUT_PROJECTION):
        tensors = [t.to(device(backend)).requires_grad_() for t in given.values()]
        tensors += [None] * (6 - len(tensors))
        yield op._scores_op, (*tensors, 1e-5, 3.0, backend, "dot")
        for top_k, threshold in ((None, None), (2, 0.1)):
            yield (
                op._route_op,
                (*tensors, 1e-5, 3.0, top_k, threshold, backend, "softmax", "dot", True),
            )
