"""Indexes of keys against brute force in float64."""

import copy
import sys

import pytest
import torch

from sapt_fast.pools.key_index import KINDS, key_index
from sapt_fast.pools.key_index.product import ProductIndex

N, D, M, K = 64, 10, 7, 5
# Options with which an approximate index finds everything.
ALL = {"ivf": {"lists": 4, "probes": 4}, "hnsw": {"search_candidates": 200}}
TABLES = [kind for kind in KINDS if kind != "product"]
APPROXIMATE = ["ivf", "hnsw"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(kind, keys=None, num_keys=N, **options):
    """An index with these keys in its first rows [default: N random ones]."""
    torch.manual_seed(1)
    if kind in APPROXIMATE:
        pytest.importorskip("faiss")
    index = key_index(kind, num_keys, D, **ALL.get(kind, {}), **options)
    if kind != "product":
        keys = draw(num_keys, D, seed=1) if keys is None else keys
        index.set_rows(torch.arange(keys.shape[0]), keys)
    return index


def scores_of(query, keys, metric):
    query, keys = query.double(), keys.double()
    if metric == "l2":
        return -(query.unsqueeze(1) - keys).square().sum(-1)
    if metric == "cosine":
        query = torch.nn.functional.normalize(query, dim=1)
        keys = torch.nn.functional.normalize(keys, dim=1)
    return query @ keys.t()


def brute_force(query, keys, k, metric="dot"):
    scores, index = scores_of(query, keys, metric).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], index[:, :k]


def require_equal(found, expected):
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].dtype == torch.int64
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_search_equals_brute_force(kind, dtype):
    for metric in KINDS[kind].METRICS:
        index = made(kind, metric=metric, dtype=dtype)
        keys, rows = index.present_keys()
        assert keys.dtype == dtype
        assert torch.equal(rows, torch.arange(N))
        strided = draw(D, 2 * M, dtype=dtype).t()[::2]
        require_equal(index.search(strided, K), brute_force(strided, keys, K, metric))
        scores, _ = index.search(draw(0, D), K)
        assert scores.shape == (0, K)
        assert scores.dtype == torch.float32
        assert index.recall(strided, K) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_keys_than_k(kind):
    one = made(kind, num_keys=1)
    query = draw(M, D)
    scores, index = one.search(query, 3)
    torch.testing.assert_close(scores[:, :1], query @ one.present_keys()[0].t())
    assert torch.equal(index, torch.tensor([[0, -1, -1]]).expand(M, 3))
    assert (scores[:, 1:] == float("-inf")).all()
    assert one.recall(query, 3) == 1.0


def test_all_pairs_of_product_keys():
    """Every k up to N: the pairs that are tried contain the k best."""
    index = made("product", num_keys=16)
    query = draw(M, D)
    for k in range(1, 17):
        require_equal(index.search(query, k), brute_force(query, index.present_keys()[0], k))


@pytest.mark.parametrize("kind", TABLES)
def test_rows_that_are_absent(kind):
    index = made(kind, draw(5, D), num_keys=9)
    query, more = draw(M, D, seed=3), draw(2, D, seed=4)
    index.remove_rows(torch.tensor([1, 8]))
    index.set_rows(torch.tensor([7, 0]), more)
    keys, rows = index.present_keys()
    assert rows.tolist() == [0, 2, 3, 4, 7]
    assert torch.equal(keys[0], more[1])
    scores, at = brute_force(query, keys, 5)
    query.requires_grad_()
    found = index.search(query, 6)
    require_equal([part[:, :5] for part in found], (scores, rows[at]))
    assert (found[1][:, 5] == -1).all()
    found[0][:, :5].sum().backward()
    torch.testing.assert_close(query.grad, keys.sum(0).expand(M, D))
    index.remove_rows(rows)
    index.build()
    assert (index.search(query, 2)[1] == -1).all()
    with pytest.raises(ValueError, match="has no keys"):
        index.recall(query, 2)


@pytest.mark.parametrize("kind", TABLES)
def test_equal_keys_are_ordered_by_index(kind):
    keys = draw(3, D)[torch.tensor([2, 0, 1, 0, 2, 1])]
    index = made(kind, keys, num_keys=6)
    query = draw(M, D, seed=2)
    require_equal(index.search(query, 6), brute_force(query, keys, 6))
    assert index.recall(query, 3) == 1.0


def test_equal_product_keys_are_ordered_by_rank():
    index = made("product")
    with torch.no_grad():
        index.first.copy_(index.first[0].clone())
        index.second.copy_(index.second[0].clone())
    assert index.search(draw(M, D), 9)[1].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]] * M


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_gradients_of_product_keys(metric):
    index = made("product", metric=metric, dtype=torch.float64)
    query, weight = draw(M, D, dtype=torch.float64).requires_grad_(), draw(M, K)
    scores, at = index.search(query, K)
    inputs = [query, index.first, index.second]
    found = torch.autograd.grad((scores * weight).sum(), inputs)
    n = index.halves
    pairs = [index.first[:, None].expand(n, n, -1), index.second.expand(n, n, -1)]
    keys = torch.cat(pairs, 2).flatten(0, 1)
    expected = torch.autograd.grad(
        (scores_of(query, keys, metric).gather(1, at) * weight).sum(), inputs
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_keys_that_train_have_a_sparse_gradient(metric):
    index = made("exact", metric=metric, trainable=True)
    query, weight = draw(M, D).requires_grad_(), draw(M, K)
    scores, at = index.search(query, K)
    keys = index.keys.detach().clone().requires_grad_()
    require_equal((scores, at), brute_force(query, keys, K, metric))
    found = torch.autograd.grad((scores * weight).sum(), [query, index.keys])
    expected = torch.autograd.grad(
        (scores_of(query, keys, metric).gather(1, at) * weight).sum(), [query, keys]
    )
    assert found[1].is_sparse
    assert found[1].coalesce().indices().flatten().tolist() == at.unique().tolist()
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1].to_dense(), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_index_older_than_its_keys_is_refused(kind):
    index = made(kind)
    query = draw(M, D)
    before = index.search(query, K)
    with torch.inference_mode():
        index.set_rows(torch.tensor([int(before[1][0, 0])]), -query[:1])
    assert index.stale
    with pytest.raises(RuntimeError, match=f"the {kind} index is older than its keys"):
        index.search(query, K)
    index.build()
    require_equal(index.search(query, K), brute_force(query, index.present_keys()[0], K))
    index.load_state_dict(made(kind).state_dict())
    require_equal(index.search(query, K), (before[0].double(), before[1]))


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_recall_is_measured(kind):
    few = {"ivf": {"lists": 16, "probes": 1}, "hnsw": {"links": 2, "search_candidates": 1}}
    pytest.importorskip("faiss")
    index = key_index(kind, 500, D, **few[kind])
    keys, query = draw(500, D), draw(40, D, seed=5)
    index.set_rows(torch.arange(500), keys)
    found, best = index.search(query, K)[1], brute_force(query, keys, K)[1]
    expected = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), best.tolist(), strict=True))
    assert 0 < expected < 40 * K
    assert index.recall(query, K) == expected / (40 * K)
    again = copy.deepcopy(index)  # which is built again
    assert torch.equal(again.search(query, K)[1], found)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_built_index_is_saved_and_loaded(kind, tmp_path):
    index, path, query = made(kind), tmp_path / "index.safetensors", draw(M, D)
    with pytest.raises(RuntimeError, match="is not built"):
        index.save(path)
    expected = index.search(query, K)
    index.save(path)
    other = made(kind)
    other.build = lambda: pytest.fail("built again")
    other.load(path)
    require_equal(other.search(query, K), (expected[0].double(), expected[1]))
    index.set_rows(torch.tensor([3]), query[:1])
    with pytest.raises(ValueError, match=r"other keys or options \(keys\)"):
        index.load(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}: damaged"):
        other.load(path)
    path.write_bytes(data[:-9])
    with pytest.raises(ValueError, match=f"{path.name}: truncated"):
        other.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_dtype_of_keys(kind):
    index, query = made(kind), draw(M, D)
    expected = index.search(query, K)
    index.half()
    assert index.present_keys()[0].dtype == torch.float32
    state = index.state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    torch.manual_seed(2)
    other = key_index(kind, N, D, **ALL.get(kind, {}))
    other.load_state_dict(state)
    require_equal(other.search(query, K), (expected[0].double(), expected[1]))
    index.load_state_dict(state)  # which may be the table itself
    require_equal(index.search(query, K), (expected[0].double(), expected[1]))


def test_damaged_state_changes_nothing():
    index = made("exact")
    before, state = index.keys.clone(), index.state_dict()
    state["keys"] = state["keys"][:, :-1]
    with pytest.raises(RuntimeError, match=r"keys: got shape \(64, 9\), expected \[64, 10\]"):
        index.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        index.load_state_dict({"keys": before})
    assert torch.equal(index.keys, before)


def test_bad_input():
    with pytest.raises(ValueError, match="kind: got 'flat'"):
        key_index("flat", N, D)
    with pytest.raises(ValueError, match=r"num_keys: got 65, expected a square \(64 or 81\)"):
        ProductIndex(65, D)
    with pytest.raises(ValueError, match="width: got 9, expected an even number"):
        ProductIndex(N, 9)
    with pytest.raises(ValueError, match="metric: got 'cosine', expected one of dot, l2"):
        ProductIndex(N, D, metric="cosine")
    for change in ("set_rows", "remove_rows"):
        rows = (torch.zeros(1, dtype=torch.int64), draw(1, D))[: 2 if change == "set_rows" else 1]
        with pytest.raises(TypeError, match='kind "product"'):
            getattr(made("product"), change)(*rows)
    index = made("exact", dtype=torch.float16)
    for query, error, message in [
        (draw(M), ValueError, r"query: got shape \(7,\), expected \[M, 10\]"),
        (draw(M, D + 1), ValueError, r"query: got shape \(7, 11\)"),
        (torch.ones(M, D, dtype=torch.int64), TypeError, "query: got dtype torch.int64"),
        (draw(M, D).to("meta"), ValueError, "query: got device meta, expected cpu"),
    ]:
        with pytest.raises(error, match=message):
            index.search(query, K)
    with pytest.raises(ValueError, match="k: got 0"):
        index.search(draw(M, D), 0)
    with pytest.raises(ValueError, match="query: got no rows"):
        index.recall(draw(0, D), K)
    before = index.keys.clone()
    for rows, keys, error, message in [
        ([0, 0], draw(2, D), ValueError, "rows: got a row twice"),
        ([-1], draw(1, D), ValueError, "rows: got values from -1 to -1, expected 0 to 63"),
        ([0, N], draw(2, D), ValueError, "rows: got values from 0 to 64"),
        ([[0]], draw(1, D), ValueError, r"rows: got shape \(1, 1\), expected \[U\]"),
        ([0.0], draw(1, D), TypeError, "rows: got dtype torch.float32"),
        ([0], draw(2, D), ValueError, r"keys: got shape \(2, 10\), expected \[1, 10\]"),
        ([0], torch.ones(1, D, dtype=torch.int64), TypeError, "keys: got dtype torch.int64"),
        ([0], torch.full((1, D), 1e6), ValueError, "keys: got NaN or infinite values"),
    ]:
        with pytest.raises(error, match=message):
            index.set_rows(torch.tensor(rows), keys)
    assert torch.equal(index.keys, before)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_faiss_is_named_where_it_cannot_run(kind, monkeypatch):
    pytest.importorskip("faiss")
    index = key_index(kind, N, D, device="meta")
    with pytest.raises(RuntimeError, match=f"the {kind} index cannot read keys on meta"):
        index.build()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="need the extra 'faiss': pip install faiss-cpu"):
        key_index(kind, N, D)


@pytest.mark.parametrize("kind", ["exact", pytest.param("product", marks=pytest.mark.thorough)])
def test_compiled_search(kind):
    index, query = made(kind), draw(M, D)
    expected = index.search(query, K)
    compiled = torch.compile(index.search, backend="eager", fullgraph=True)
    with torch.no_grad():
        require_equal(compiled(query, K), (expected[0].double(), expected[1]))
        if kind == "exact":
            index.remove_rows(torch.arange(N))
            assert (compiled(query, 1)[1] == -1).all()
            index.set_rows(torch.tensor([N - 1]), query[:1])
            assert (compiled(query, 1)[1] == N - 1).all()
