"""Equal scores and NaN, on every backend: the order of keys, and the maximum over tokens."""

import pytest
import torch

from sapt_fast.ops import nearest_key, pool_tokens, topk_keys

BACKENDS = ["reference", "cpu", "triton"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("width", [3, 40])
def test_equal_keys_keep_their_order(backend, metric, width):
    """At every place among 37 keys, so that no block of a product rounds them differently."""
    generator = torch.Generator().manual_seed(width)
    one = torch.randn(width, generator=generator)
    keys = one.repeat(37, 1)
    query = torch.randn(5, width, generator=generator)
    scores, index = topk_keys(query, keys, 37, metric=metric, backend=backend)
    assert torch.equal(index, torch.arange(37).expand(5, 37))
    assert (scores == scores[:, :1]).all()
    found, _ = nearest_key(query, keys, torch.full((37,), INF), backend=backend)
    assert not found.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_keys_among_others(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(9, 33, generator=generator)[[0, 1, 2, 0, 3, 1, 2, 0, 8]].to(dtype)
    query = torch.randn(6, 33, generator=generator).to(dtype)
    _, index = topk_keys(query, keys, 9, backend=backend)
    for row in index.tolist():
        for equal in ([0, 3, 7], [1, 5], [2, 6]):
            assert [i for i in row if i in equal] == equal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_nan_scores_go_last_in_the_order_of_their_keys(backend, metric):
    keys = torch.tensor([[NAN, 1.0], [1.0, 1.0], [NAN, 2.0], [1.0, NAN], [1.0, 1.0], [2.0, 2.0]])
    scores, index = topk_keys(torch.tensor([[1.0, 1.0]]), keys, 6, metric=metric, backend=backend)
    assert index[0, 3:].tolist() == [0, 2, 3]
    assert scores[0, 3:].isnan().all()
    first = {"dot": [5, 1, 4], "cosine": [1, 4, 5], "l2": [1, 4, 5]}[metric]
    assert sorted(index[0, :3].tolist()) == sorted(first)
    if metric != "cosine":  # whose three scores are 1, but for rounding
        assert index[0, :3].tolist() == first


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_is_the_maximum_wherever_it_stands(backend, tokens, masked):
    generator = torch.Generator().manual_seed(tokens)
    table = torch.randn(100, 20, generator=generator)
    table[99, 3], table[98, 3], table[98, 5] = NAN, NAN, NAN
    mask = torch.ones(1, tokens) if masked else None
    for place in sorted({0, tokens // 2, tokens - 1}):
        ids = torch.arange(tokens)[None].clone()
        ids[0, place] = 99
        given = table.clone().requires_grad_()
        pooled = pool_tokens(ids, given, mask=mask, backend=backend)
        want = table[ids[0]].amax(0)
        torch.testing.assert_close(pooled[0], want, equal_nan=True)
        torch.testing.assert_close(
            pool_tokens(ids, table, mask=mask, backend=backend)[0], want, equal_nan=True
        )
        pooled.backward(torch.ones_like(pooled))
        assert given.grad[:, 3].nonzero().flatten().tolist() == [99]
        torch.testing.assert_close(given.grad.sum(0), torch.ones(20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_several_nan_gets_the_gradient(backend):
    table = torch.tensor([[1.0], [NAN], [NAN], [INF]])
    for ids, first in (([3, 2, 1], 2), ([0, 1, 2, 3], 1), ([1, 1, 2], 1)):
        given = table.clone().requires_grad_()
        pooled = pool_tokens(torch.tensor([ids]), given, backend=backend)
        assert pooled.isnan().all()
        pooled.backward(torch.ones(1, 1))
        assert given.grad.flatten().nonzero().tolist() == [[first]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_masked_tokens_are_not_seen(backend, pooling):
    """Whatever their embeddings hold."""
    table = torch.tensor([[1.0, -2.0], [NAN, INF], [3.0, -4.0]])
    ids, mask = torch.tensor([[1, 0, 2, 1], [1, 1, 1, 1]]), torch.tensor([[0, 1, 1, 0], [0] * 4])
    want = {"max": [3.0, -2.0], "mean": [2.0, -3.0]}[pooling]
    for grad in (False, True):
        given = table.clone().requires_grad_(grad)
        pooled = pool_tokens(ids, given, mask=mask, pooling=pooling, backend=backend)
        assert pooled.tolist() == [want, [0.0, 0.0]]
    pooled.sum().backward()
    assert given.grad.isfinite().all()
    assert not given.grad[1].any()
