"""Pooling, routing and the reflection loss against the formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from sapt_fast.ops import QueryProjection, pool_tokens, reflection_loss, route
from sapt_fast.ops.route import pool_embeds, query, route_scores, sparsify


def _projection(width=12, hidden=5, dtype=torch.float64):
    draw = lambda *size: torch.randn(*size, dtype=dtype)  # noqa: E731
    return QueryProjection(draw(hidden, width), draw(width, hidden), draw(width), draw(width))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 33)])
def test_pooling_token_ids_equals_pooling_their_embeddings(shape, masked, pooling, dtype):
    table = torch.randn(20, 12).to(dtype)
    ids = torch.randint(0, 20, shape)
    mask = (torch.rand(shape) > 0.4).long() if masked else None
    embeds = table[ids].double()
    if mask is not None:
        mask[0] = 0  # a row without any token
        keep = mask.bool()[..., None]
        filled = embeds.masked_fill(~keep, -math.inf).amax(1)
        expected = {
            "max": torch.where(keep.any(1), filled, 0.0),
            "mean": (embeds * keep).sum(1) / keep.sum(1).clamp(min=1),
        }[pooling]
    else:
        expected = embeds.amax(1) if pooling == "max" else embeds.mean(1)
    tolerance = 0 if pooling == "max" else {torch.float32: 1e-6}.get(dtype, 2e-2)
    for pooled in (
        pool_tokens(ids, table, mask=mask, pooling=pooling),
        pool_embeds(table[ids], mask=mask, pooling=pooling),
    ):
        assert pooled.dtype == dtype
        torch.testing.assert_close(pooled.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_pooling_is_differentiable_in_the_table(masked, pooling):
    ids, weights = torch.randint(0, 20, (3, 7)), torch.randn(3, 12)
    mask = (torch.rand(3, 7) > 0.4).long() if masked else None
    grads = []
    for pool in (
        lambda t: pool_tokens(ids, t, mask=mask, pooling=pooling),
        lambda t: pool_embeds(t[ids], mask=mask, pooling=pooling),
    ):
        table = torch.randn(20, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
        (pool(table) * weights).sum().backward()
        grads.append(table.grad)
    torch.testing.assert_close(*grads)


def test_the_gathered_embeddings_are_never_stored():
    table, ids = torch.randn(50, 64), torch.randint(0, 50, (8, 512))
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            flat = out if isinstance(out, tuple) else (out,)
            largest.extend(t.numel() for t in flat if isinstance(t, torch.Tensor))
            return out

    for pooling in ("max", "mean"):
        for mask in (None, torch.ones(8, 512)):
            with Watch():
                pool_tokens(ids, table, mask=mask, pooling=pooling)
    assert max(largest) <= 8 * 512
    assert len(largest) > 4


def test_weights_are_the_softmax_of_query_times_keys():
    embeds, keys, p = torch.randn(4, 6, 12).double(), torch.randn(3, 12).double(), _projection()
    e = embeds.amax(1)
    hidden = e @ p.down.t() @ p.up.t()
    hidden = hidden * torch.sigmoid(hidden)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    q = normed * p.norm_weight + p.norm_bias
    expected = torch.softmax(q @ keys.t() / math.sqrt(12), -1)
    torch.testing.assert_close(route(embeds, keys, p), expected)
    torch.testing.assert_close(query(e, p), q)
    hotter = torch.softmax(q @ keys.t() / 7.0, -1)
    torch.testing.assert_close(route(e, keys, p, temperature=7.0), hotter)
    identity = torch.softmax(embeds.mean(1) @ keys.t() / math.sqrt(12), -1)
    torch.testing.assert_close(route(embeds, keys, None, pooling="mean"), identity)


def test_half_precision_inputs_are_routed_in_float32():
    embeds, keys = torch.randn(4, 6, 12).bfloat16(), torch.randn(3, 12).bfloat16()
    p = QueryProjection(*(t.bfloat16() for t in _projection(dtype=torch.float32)[:4]))
    weights = route(embeds, keys, p)
    exact = route(embeds.double(), keys.double(), QueryProjection(*(t.double() for t in p[:4])))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_reach_the_router():
    embeds, keys = torch.randn(4, 6, 64), torch.randn(3, 64)
    p = _projection(64, dtype=torch.float32)
    expected = route(embeds, keys, p, temperature=1.0)
    target = torch.softmax(torch.randn(4, 3), -1)
    loss = reflection_loss(route_scores(embeds, keys, p), target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(route(embeds, keys, p, temperature=1.0), expected)
        assert torch.equal(reflection_loss(route_scores(embeds, keys, p), target), loss)
    assert reflection_loss(target.log().bfloat16(), target).dtype == torch.float32


def test_a_masked_mean_does_not_overflow_in_float16():
    embeds = torch.full((1, 4096, 2), 20.0, dtype=torch.float16)
    pooled = pool_embeds(embeds, mask=torch.ones(1, 4096), pooling="mean")
    torch.testing.assert_close(pooled, torch.full((1, 2), 20.0, dtype=torch.float16))


def test_gradcheck_through_everything():
    embeds = torch.randn(2, 4, 12).double().requires_grad_()
    keys = torch.randn(3, 12).double().requires_grad_()
    p = [t.requires_grad_() for t in _projection()[:4]]

    def weights(embeds, keys, *projection):
        return route(embeds, keys, QueryProjection(*projection))

    assert torch.autograd.gradcheck(weights, (embeds, keys, *p))
    scores = torch.randn(3, 4).double().requires_grad_()
    target = torch.softmax(torch.randn(3, 3).double(), -1)
    assert torch.autograd.gradcheck(lambda s: reflection_loss(s, target), (scores,))


def test_top_k_and_threshold():
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(sparsify(weights, top_k=2)[0], torch.tensor([0.625, 0.375, 0, 0]))
    assert (sparsify(weights, top_k=2)[1] > 0).sum() == 2
    torch.testing.assert_close(
        sparsify(weights, threshold=0.1)[0], torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95
    )
    # The largest stays even below the threshold; here all four tie for it.
    torch.testing.assert_close(sparsify(weights, threshold=0.4)[1], weights[1])
    torch.testing.assert_close(
        sparsify(weights, top_k=3, threshold=0.2)[0], torch.tensor([0.625, 0.375, 0, 0])
    )
    assert sparsify(weights, top_k=9) is weights
    torch.testing.assert_close(sparsify(weights, top_k=1, threshold=0.9).sum(-1), torch.ones(2))


def test_of_equal_weights_those_of_the_lower_index_stay():
    weights = torch.full((2, 40), 1 / 40)
    kept = sparsify(weights, top_k=3)
    assert kept.nonzero()[:, 1].tolist() == [0, 1, 2] * 2
    weights = torch.tensor([[0.1, 0.3, 0.2, 0.2, 0.2]])
    assert sparsify(weights, top_k=3).nonzero()[:, 1].tolist() == [1, 2, 3]
    weights = torch.randint(0, 3, (50, 9)).double()  # many are equal
    order = weights.sort(dim=-1, descending=True, stable=True).indices
    for k in range(1, 9):
        kept = torch.zeros_like(weights).scatter(-1, order[:, :k], 1.0) * weights
        assert torch.equal(sparsify(weights, top_k=k, renormalize=False), kept)


def test_gradcheck_of_dropped_weights():
    scores = torch.randn(4, 6).double().requires_grad_()
    for options in ({"top_k": 2}, {"threshold": 0.15}, {"top_k": 3, "threshold": 0.2}):

        def weights(scores, options=options):
            return sparsify(torch.softmax(scores, -1), **options)

        assert torch.autograd.gradcheck(weights, (scores,))


def test_reflection_loss_pads_newer_tasks_with_zeros():
    scores = torch.randn(5, 4)
    target = torch.softmax(torch.randn(2), -1)
    logp = torch.log_softmax(scores, -1)
    expected = (target * (target.log() - logp[:, :2])).sum(-1).mean()
    torch.testing.assert_close(reflection_loss(scores, target), expected)
    per_row = target.expand(5, 2).clone()
    torch.testing.assert_close(reflection_loss(scores, per_row), expected)
    official = F.kl_div(logp, F.pad(per_row, (0, 2)), reduction="batchmean")
    torch.testing.assert_close(reflection_loss(scores, target), official)


def test_a_zero_target_pushes_weight_off_the_newer_adapter():
    scores = torch.zeros(1, 2, requires_grad=True)
    reflection_loss(scores, torch.tensor([1.0])).backward()
    assert scores.grad[0, 1] > 0
    assert scores.grad[0, 0] < 0
