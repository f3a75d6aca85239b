"""Op `pool_tokens`."""

import importlib
from collections.abc import Iterator

import torch
from ops.cases import ANY, Bad, Case, Pair, Sample, device, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops import pool_tokens
from sapt_fast.ops.pool_tokens import pool_embeds

op = importlib.import_module("sapt_fast.ops.pool_tokens")

IDS = torch.tensor([[1, 4, 4], [0, 2, 5]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
X = draw(2, 3, 4)


def plain_pool(table, mask, pooling):
    rows = []
    for ids, kept in zip(IDS, mask, strict=True):
        e = table[ids[kept != 0]]
        rows.append(e.amax(0) if pooling == "max" else e.mean(0))
    return torch.stack(rows)


FORMULAS = {
    **{
        f"pool_tokens_{pooling}": Case(
            lambda t, pooling=pooling, **k: pool_tokens(IDS, t, mask=MASK, pooling=pooling, **k),
            lambda t, pooling=pooling: plain_pool(t, MASK, pooling),
            (draw(6, 4),),
        )
        for pooling in ("max", "mean")
    },
    "pool_tokens_unmasked": Case(
        lambda t, **k: pool_tokens(IDS, t, **k),
        lambda t: plain_pool(t, torch.ones(2, 3), "max"),
        (draw(6, 4),),
    ),
    "pool_embeds": Case(
        lambda e, backend=None: pool_embeds(e, mask=MASK),
        lambda e: torch.stack([e[0, :2].amax(0), e[1].amax(0)]),
        (X,),
    ),
}


def _tokens(rows, tokens, width=33, vocabulary=9):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    mask = (torch.rand(rows, tokens, generator=generator) > 0.4).long()
    mask[:1] = 0  # a sample none of whose tokens takes part
    return {**floats(table=(vocabulary, width)), "ids": ids, "mask": mask}


def _pooled(pooling):
    def run(table, ids, mask=None, backend=None):
        return pool_tokens(ids, table, mask=mask, pooling=pooling, backend=backend)

    return run


_ALL = {n: t for n, t in _tokens(2, 5).items() if n != "mask"}
SAMPLES = {
    f"{pooling}{where}": Sample(_pooled(pooling), given)
    for pooling in ("max", "mean")
    for where, given in (("", _tokens(3, 9, 20)), (", no mask", _ALL))
}
EMPTY = {  # zeros that depend on nothing
    f"{pooling}, no {what}": Sample(_pooled(pooling), _tokens(*shape), frozen=("table",))
    for pooling in ("max", "mean")
    for what, shape in (("samples", (0, 4)), ("tokens", (3, 0)))
}


def _pair(x, other, backend):
    ids, mask = torch.tensor([[1, 2, 0]]), torch.ones(1, 3).to(other)
    return pool_tokens(ids, draw(4, 8).to(x), mask=mask, pooling="mean", backend=backend)


PAIRS = Pair(_pair, ANY, "", keeps_dtype=True)


def _bad(error, message, **changes):
    given = {"input_ids": torch.zeros(2, 5).long(), "table": torch.zeros(9, 8), **changes}
    return Bad(lambda: pool_tokens(**given), error, message)


BAD = {
    "ids": _bad(ValueError, "input_ids: got shape", input_ids=torch.zeros(3)),
    "ids dtype": _bad(TypeError, "input_ids: got dtype", input_ids=torch.zeros(2, 5)),
    "table": _bad(ValueError, r"table: .*expected \[V, D\]", table=torch.zeros(8)),
    "mask": _bad(ValueError, "mask: got shape", mask=torch.ones(1, 2)),
    "device": _bad(ValueError, "mask: got device", mask=torch.ones(2, 5, device="meta")),
    "pooling": _bad(ValueError, "pooling", pooling="sum"),
    "embeds": Bad(lambda: pool_embeds(torch.zeros(3, 2)), ValueError, "embeds: got shape"),
    "float64": _bad(
        dispatch.BackendError, "float64", table=torch.zeros(9, 8).double(), backend="triton"
    ),
    "no such kernel": _bad(dispatch.BackendError, "cuda", backend="cuda"),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    if backend == "reference":
        return  # plain torch, not registered
    for masked in (True, False):
        table, ids, mask = (t.to(device(backend)) for t in _tokens(2, 5, 8).values())
        table.requires_grad_()
        for pooling in ("max", "mean"):
            given = (ids, table, mask if masked else None, pooling, pooling == "max", backend)
            _, winner = op._pool_op(*given)
            yield op._pool_op, given
            dy = torch.randn(2, 8, device=ids.device)
            yield op._pool_backward_op, (dy, ids, given[2], winner, 9, pooling, backend)
