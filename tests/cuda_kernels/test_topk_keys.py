"""The cuda backend of topk_keys, its kernels on the emulator, against float64."""

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METRICS = ["dot", "cosine", "l2"]


def _values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _all_scores(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    q, k = query.double(), keys.double()
    if metric == "l2":
        return -torch.cdist(q, k).square()
    scores = q @ k.t()
    if metric == "cosine":
        norms = q.norm(dim=1)[:, None] * k.norm(dim=1)
        scores = torch.where(norms == 0, 0.0, scores / norms)
    return scores


@pytest.fixture
def check(cuda, emulated_module):
    kernel = cuda("topk_keys")

    def run(query: Tensor, keys: Tensor, k: int, metric: str = "dot") -> tuple[Tensor, Tensor]:
        exact = _all_scores(query, keys, metric)
        first = None
        for seed in (0, 1, 2):
            emulated_module.set_order(seed)
            results = kernel.topk_keys_fwd(query, keys, k, metric)
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), seed
        scores, index = results
        assert scores.dtype == torch.float32
        assert index.dtype == torch.int64
        limit = 3e-6 * max(1.0, exact.abs().max().item())
        want = exact.sort(dim=1, descending=True).values[:, :k]
        torch.testing.assert_close(scores.double(), want, rtol=0, atol=limit)
        torch.testing.assert_close(exact.gather(1, index), scores.double(), rtol=0, atol=limit)
        for row, places in zip(scores, index, strict=True):
            assert len(set(places.tolist())) == k
            assert (row.diff() <= 0).all()
            assert (places.diff()[row.diff() == 0] > 0).all()
        return results

    return run


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 5, 17])
def test_queries(check, queries, dtype, metric):
    query, keys = _values(queries, 24, dtype=dtype), _values(300, 24, dtype=dtype, seed=1)
    check(query, keys, 5, metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 6])
@pytest.mark.parametrize("k", [1, 2, 31, 32])
def test_k(check, queries, dtype, k):
    check(_values(queries, 16, dtype=dtype), _values(700, 16, dtype=dtype, seed=1), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("width", [1, 7, 33, 129, 300])
def test_widths(check, width, queries, dtype):
    check(_values(queries, width, dtype=dtype), _values(40, width, dtype=dtype, seed=1), 4, "l2")


@pytest.mark.parametrize("queries", [2, 9])
@pytest.mark.parametrize("count", [1, 5, 17, 255, 257, 1000])
def test_counts(check, count, queries):
    dtype = torch.bfloat16
    query, keys = _values(queries, 16, dtype=dtype), _values(count, 16, dtype=dtype, seed=1)
    check(query, keys, min(count, 32))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [1, 4, 8])
def test_equal_scores_lower_index_first(check, queries, metric):
    """The same few keys again and again: the best one's copies, in order."""
    dtype = torch.float16
    keys = _values(6, 16, dtype=dtype).repeat(100, 1)
    _, index = check(_values(queries, 16, dtype=dtype, seed=1), keys, 20, metric)
    for row in index:
        assert row.tolist() == [row[0].item() % 6 + 6 * i for i in range(20)]


def test_keys_in_ascending_order(check):
    """Every key is better than all before it, so that all of them are inserted."""
    keys = torch.linspace(0, 1, 900)[:, None].repeat(1, 3)
    for queries in (1, 2):
        _, index = check(torch.ones(queries, 3), keys, 32)
        assert torch.equal(index[0], torch.arange(899, 867, -1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [1, 4, 6])
def test_nan_comes_last(cuda, queries, metric):
    dtype = torch.bfloat16
    keys = _values(12, 8, dtype=dtype)
    keys[[1, 7]] = float("nan")
    scores, index = cuda("topk_keys").topk_keys_fwd(
        _values(queries, 8, dtype=dtype, seed=1), keys, 12, metric
    )
    assert torch.equal(index[:, -2:], torch.tensor([[1, 7]]).expand(queries, 2))
    assert scores[:, -2:].isnan().all()
    assert not scores[:, :-2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 6])
def test_infinite_products(cuda, queries, dtype):
    keys = _values(12, 8, dtype=dtype).abs() + 1
    keys[3, 0], keys[5, 0] = float("inf"), float("-inf")
    scores, index = cuda("topk_keys").topk_keys_fwd(
        torch.ones(queries, 8, dtype=dtype), keys, 12, "dot"
    )
    assert (index[:, 0] == 3).all()
    assert (scores[:, 0] == float("inf")).all()
    assert (index[:, -1] == 5).all()
    assert (scores[:, -1] == float("-inf")).all()


@pytest.mark.parametrize("queries", [1, 3, 6])
def test_cosine_with_zeros(check, queries):
    dtype = torch.float16
    query, keys = _values(queries, 8, dtype=dtype), _values(9, 8, dtype=dtype, seed=1)
    query[-1] = keys[4] = 0
    scores, index = check(query, keys, 9, "cosine")
    assert not scores[-1].any()
    assert torch.equal(index[-1], torch.arange(9))


def test_more_than_a_warp_keeps(cuda):
    with pytest.raises(ValueError, match="k: got 33, expected at most 32: choose backend 'triton'"):
        cuda("topk_keys").topk_keys_fwd(torch.ones(1, 3), torch.ones(99, 3), 33, "dot")


def test_no_queries(cuda):
    scores, index = cuda("topk_keys").topk_keys_fwd(torch.ones(0, 3), torch.ones(9, 3), 4, "dot")
    assert scores.shape == index.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 3}, "float64"),
        ({"metric": 3}, "metric"),
        ({"k": 0}, "k: "),
        ({"k": 33}, "MAX_TOP_K"),
        ({"k": 41}, "k: "),
        ({"count": 0}, "count"),
        ({"keys": None}, "keys: got no memory"),
        ({"keys": torch.ones(40, 2)}, r"keys: got 320 bytes, expected 4 for each of \[40, 3\]"),
        ({"width": 4_000_000}, "query"),
        ({"scores": torch.ones(2, 3)}, "scores"),
        ({"index": torch.ones(2, 2)}, "index"),
        ({"workspace": torch.ones(1)}, "workspace: too small"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments(emulated_module, change, message):
    arguments = {
        "dtype": 0, "metric": 0, "query": torch.ones(2, 3), "keys": torch.ones(40, 3),
        "scores": torch.ones(2, 2), "index": torch.zeros(2, 2, dtype=torch.int64),
        "workspace": torch.ones(9999), "queries": 2, "count": 40, "width": 3, "k": 2,
        "place": (0, 0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        emulated_module.cuda_topk_keys(**{**arguments, **change})
