"""The gates of `route` against their formulas, sample by sample and adapter by adapter."""

import itertools
import math

import pytest
import torch

from sapt_fast.ops import QueryProjection, TaskProjections, balance_loss, route
from sapt_fast.ops.gates import GATES, sparsify
from sapt_fast.ops.route import route_scores

B, T, D, H, K = 2, 3, 6, 4, 5
MASK = torch.tensor([[1, 0, 1], [1, 1, 0]])


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _projection(kind):
    if kind == "shared":
        return QueryProjection(_draw(H, D), _draw(D, H), _draw(D), _draw(D, seed=1))
    return TaskProjections(_draw(K, H, D), _draw(K, D + 1, H)) if kind == "tasks" else None


def _silu(z):
    return z / (1 + (-z).exp())


def _query(e, projection, k):
    """The query [D'] of an embedding [D] for adapter k."""
    if isinstance(projection, TaskProjections):
        return _silu(projection.up[k] @ _silu(projection.down[k] @ e))
    if projection is None:
        return e
    z = _silu(projection.up @ (projection.down @ e))
    normed = (z - z.mean()) / (z.var(correction=0) + projection.eps).sqrt()
    return normed * projection.norm_weight + projection.norm_bias


def _score(e, key, projection, k, similarity):
    q = _query(e, projection, k)
    norms = (q.square().sum() * key.square().sum()).sqrt() if similarity == "cosine" else 1
    return (q * key).sum() / norms


def _gated(s, gate, top_k=None, threshold=None, renormalize=None):
    """Weights [K] of scores [K]."""
    w = {
        "softmax": lambda: s.exp() / s.exp().sum(),
        "sigmoid": lambda: 1 / (1 + (-s).exp()),
        "abs_sigmoid": lambda: (2 / (1 + (-s).exp()) - 1).abs(),
        "relu": lambda: s.clamp(min=0),
    }[gate]()
    kept = sorted(range(len(w)), key=lambda k: (-w[k].item(), k))[:top_k]
    limit = min(threshold or 0, w.max().item())
    keep = torch.tensor([k in kept and w[k].item() >= limit for k in range(len(w))])
    w = torch.where(keep, w, 0.0)
    scales = gate == "softmax" if renormalize is None else renormalize
    return w / w.sum() if scales and w.sum() > 0 else w


def _expected(embeds, keys, projection, pooling, similarity, temperature, mask, **options):
    rows = []
    for b in range(embeds.shape[0]):
        tokens = embeds[b][mask[b].bool()]
        if pooling != "none":
            pooled = tokens.mean(0) if pooling == "mean" else tokens.amax(0)
            tokens = pooled.expand(1, -1)
        for e in tokens:
            s = [_score(e, key, projection, k, similarity) for k, key in enumerate(keys)]
            rows.append(_gated(torch.stack(s) / temperature, **options))
    return torch.stack(rows)


SPARSE = ({}, {"top_k": 2}, {"threshold": 0.3}, {"top_k": 3, "threshold": 0.2})


@pytest.mark.parametrize("pooling", ["mean", "max", "none"])
@pytest.mark.parametrize("projection", ["none", "shared", "tasks"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("gate", GATES)
def test_weights_and_gradients_are_the_formula(gate, similarity, projection, pooling):
    given = _projection(projection)
    width = D + (projection == "tasks")
    embeds, keys = _draw(B, T, D).requires_grad_(), _draw(K, width).requires_grad_()
    leaves = [embeds, keys, *(t.requires_grad_() for t in (given or ())[:4])]
    default = math.sqrt(width) if similarity == "dot" else 1.0
    for i, sparse in enumerate(SPARSE):
        options = {"gate": gate, **sparse, "renormalize": (None, True, False)[i % 3]}
        temperature = (None, 0.4)[i % 2]
        shared = {"mask": MASK, "pooling": pooling, "similarity": similarity}
        weights = route(embeds, keys, given, **shared, temperature=temperature, **options)
        want = _expected(
            embeds, keys, given, temperature=temperature or default, **shared, **options
        )
        got = weights
        if pooling == "none":
            assert weights.shape == (B, T, K)
            assert not weights[MASK == 0].any()
            got = weights[MASK != 0]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        dw = _draw(*want.shape)
        grads = [torch.autograd.grad((w * dw).sum(), leaves, retain_graph=True)
                 for w in (got, want)]  # fmt: skip
        for got_grad, exact in zip(*grads, strict=True):
            torch.testing.assert_close(got_grad, exact, rtol=1e-8, atol=1e-10)


def test_gainlora_s_weights():
    embeds, keys, projections = _draw(B, T, D), _draw(K, D + 1), _projection("tasks")
    weights = route(
        embeds, keys, projections, mask=MASK, pooling="mean",
        gate="abs_sigmoid", similarity="cosine", temperature=0.25,
    )  # fmt: skip
    pooled = (embeds * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    silu = torch.nn.functional.silu
    for k, key in enumerate(keys):
        x = silu(silu(pooled @ projections.down[k].t()) @ projections.up[k].t())
        cosine = torch.nn.functional.cosine_similarity(x, key, dim=-1)
        expected = (torch.sigmoid(cosine * 4) * 2 - 1).abs()
        torch.testing.assert_close(weights[:, k], expected)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate):
    keys, projections = _draw(3, 3), (_draw(3, 2, 4), _draw(3, 3, 2))

    def weights(embeds, keys, down, up, renormalize):
        return route(
            embeds, keys, TaskProjections(down, up), pooling="none", gate=gate, top_k=2,
            similarity="cosine", temperature=0.3, renormalize=renormalize,
        )  # fmt: skip

    leaves = [t.requires_grad_() for t in (_draw(2, 4), keys, *projections)]
    for renormalize in (False, True):
        call = lambda *t, r=renormalize: weights(*t, r)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("renormalize", [False, True])
def test_rows_of_zeros_stay_zeros(renormalize):
    keys = torch.ones(K, D, requires_grad=True)
    embeds = -torch.ones(2, D, requires_grad=True)
    embeds = torch.cat([embeds, torch.zeros(1, D)])
    for gate, options in itertools.product(("relu", "abs_sigmoid"), ({}, {"top_k": 2})):
        rows = embeds if gate == "relu" else embeds[2:]
        weights = route(rows, keys, None, gate=gate, renormalize=renormalize, **options)
        assert torch.equal(weights, torch.zeros(len(rows), K))
        assert not torch.signbit(weights).any()
        [d_keys] = torch.autograd.grad(weights.sum(), keys)
        assert not d_keys.any()


@pytest.mark.parametrize("gate", GATES)
def test_large_scores_do_not_overflow(gate):
    embeds = torch.tensor([[1e18], [-1e18]], requires_grad=True)
    keys = torch.tensor([[1e18], [-1e18], [0.0]], requires_grad=True)
    weights = route(embeds, keys, None, gate=gate)
    ends = {
        "softmax": [[1, 0, 0], [0, 1, 0]],
        "sigmoid": [[1, 0, 0.5], [0, 1, 0.5]],
        "abs_sigmoid": [[1, 1, 0], [1, 1, 0]],
        "relu": [[1e36, 0, 0], [0, 1e36, 0]],
    }
    torch.testing.assert_close(weights, torch.tensor(ends[gate], dtype=torch.float32))
    grads = torch.autograd.grad(weights.sum(), [embeds, keys])
    assert all(g.isfinite().all() for g in grads)


def test_masked_tokens_are_not_seen():
    keys = _draw(K, D).requires_grad_()
    clean = _draw(B, T, D)
    embeds = clean.masked_fill((MASK == 0)[..., None], math.nan).requires_grad_()
    for gate, similarity in itertools.product(GATES, ("dot", "cosine")):
        options = {"mask": MASK, "pooling": "none", "gate": gate, "similarity": similarity}
        weights = route(embeds, keys, None, **options)
        assert torch.equal(weights, route(clean, keys, None, **options))
        grads = torch.autograd.grad(weights.square().sum(), [embeds, keys])
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][MASK == 0].any()


def test_tokens_without_a_batch_have_the_same_weights():
    embeds, keys = _draw(B, T, D), _draw(K, D)
    per_token = route(embeds, keys, None, pooling="none", mask=MASK)
    single = route(embeds.view(-1, D), keys, None, pooling="none", mask=MASK.view(-1))
    assert torch.equal(per_token.view(-1, K), single)
    scores = route_scores(embeds, keys, None, pooling="none")
    assert torch.equal(route(embeds, keys, None, pooling="none"), torch.softmax(scores, -1))
    for shape in ((0, T, D), (B, 0, D), (0, D)):
        empty = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        weights = route(empty, keys, None, pooling="none", gate="relu", top_k=2, renormalize=True)
        assert weights.shape == (*shape[:-1], K)
        weights.sum().backward()


def test_equal_weights_keep_the_lower_index_where_sigmoids_saturate():
    keys = torch.tensor([[50.0], [90.0], [70.0], [-1.0]])
    weights = route(torch.ones(1, 1), keys, None, gate="sigmoid", top_k=2)
    assert torch.equal(weights, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_the_balance_loss_is_that_of_the_papers():
    weights = torch.softmax(_draw(B, T, K), -1).requires_grad_()
    chosen = sparsify(weights, top_k=2)
    loss = balance_loss(weights, chosen, mask=MASK)
    kept, used = weights[MASK != 0], chosen[MASK != 0] > 0
    expected = K * sum(used[:, k].double().mean() * kept[:, k].mean() for k in range(K))
    torch.testing.assert_close(loss, expected)
    [grad] = torch.autograd.grad(loss, weights)
    assert not grad[MASK == 0].any()
    assert grad[MASK != 0].any()
    even = torch.full((K, K), 1 / K)
    torch.testing.assert_close(balance_loss(even, torch.eye(K)), torch.tensor(1.0))
    assert balance_loss(weights, chosen, mask=torch.zeros(B, T)) == 0
    assert balance_loss(even.bfloat16(), torch.eye(K)).dtype == torch.float32
    poisoned = weights.detach().masked_fill((MASK == 0)[..., None], math.nan)
    torch.testing.assert_close(balance_loss(poisoned, chosen, mask=MASK), loss.detach())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gate": "step"}, ValueError, "gate: got 'step'"),
        ({"similarity": "l2"}, ValueError, "similarity: got 'l2'"),
        ({"pooling": "sum"}, ValueError, "pooling: got 'sum'"),
        ({"renormalize": 1}, TypeError, "renormalize: got 1"),
        ({"gate": "sigmoid", "threshold": 1.5}, ValueError, "threshold: got 1.5"),
        ({"gate": "relu", "threshold": -1.0}, ValueError, "threshold: got -1.0"),
        ({"pooling": "none", "mask": MASK[0]}, ValueError, "mask: got shape"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        route(_draw(B, T, D), _draw(K, D), None, **options)


def test_bad_projections_and_loads():
    embeds, keys = _draw(B, D), _draw(K, D)
    for bad in (
        TaskProjections(_draw(K + 1, H, D), _draw(K, D, H)),
        TaskProjections(_draw(K, H, D), _draw(K, D + 1, H)),
        TaskProjections(_draw(H, D), _draw(K, D, H)),
    ):
        with pytest.raises(ValueError, match=r"projection\."):
            route(embeds, keys, bad)
    with pytest.raises(ValueError, match="chosen: got shape"):
        balance_loss(_draw(B, K), _draw(B, K + 1))
    with pytest.raises(ValueError, match="mask: got shape"):
        balance_loss(_draw(B, K), _draw(B, K), mask=_draw(B, K))
