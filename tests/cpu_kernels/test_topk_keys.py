"""The cpu backend of topk_keys against all scores in float64, on every instruction set."""

import json
import math
import subprocess
import sys

import pytest
import torch

_C = pytest.importorskip("sapt_fast._C", reason="built without native kernels")
from sapt_fast.cpu_kernels.topk_keys import topk_keys_fwd  # noqa: E402
from sapt_fast.ops.topk_keys import METRICS  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-14}  # of the largest score; that of float32 for the others
# (M, N, D, k): blocks of queries and keys, chunks and tasks of keys, whole and in parts
SHAPES = [
    (1, 1, 1, 1),
    (1, 9, 16, 9),
    (2, 10, 3, 4),
    (3, 37, 19, 37),
    (4, 64, 32, 33),
    (5, 131, 24, 1),
    (16, 2100, 8, 70),
    (17, 1500, 40, 200),
    (35, 300, 100, 7),
    (2, 40, 5000, 3),
    (1, 70_000, 2, 5),
    # one query, for which keys of odd widths are not copied
    (1, 333, 100, 9),
    (1, 1003, 45, 20),
    (1, 50, 32, 7),
]


def make(m, n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return query.to(dtype), torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def all_scores(query, keys, metric):
    query, keys = query.double(), keys.double()
    if metric == "l2":
        return -torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    product = query @ keys.t()
    if metric == "cosine":
        norms = query.norm(dim=1, keepdim=True) * keys.norm(dim=1)
        return torch.where(norms == 0, 0.0, product / norms)
    return product


def check(query, keys, k, metric):
    scores, index = topk_keys_fwd(query, keys, k, metric)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    assert (scores.dtype, index.dtype) == (wide, torch.int64)
    assert scores.shape == index.shape == (len(query), k)
    exact = all_scores(query, keys, metric)
    best = exact.sort(dim=1, descending=True, stable=True).values[:, :k]
    size = max(exact.abs().max().item(), 1e-30)
    tolerance = TOLERANCE.get(query.dtype, 1e-6) * math.sqrt(query.shape[1]) * size
    torch.testing.assert_close(scores.double(), best, rtol=0, atol=tolerance)
    torch.testing.assert_close(exact.gather(1, index), scores.double(), rtol=0, atol=tolerance)
    assert (index.sort(1).values.diff(dim=1) > 0).all(), "a key was returned twice"
    follows = (scores[:, 1:] < scores[:, :-1]) | (index[:, 1:] > index[:, :-1])
    assert follows.all(), "not in the order of scores and indices"
    return scores, index


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("capability")
def test_scores_and_order(shape, dtype, metric):
    m, n, d, k = shape
    check(*make(m, n, d, dtype), k, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "d"), [(7, 21), (1, 43)])
@pytest.mark.usefixtures("capability")
def test_equal_keys_have_equal_scores_wherever_they_stand(m, d, dtype, metric, with_threads):
    """In whole tiles and at the ends of chunks, for queries of whole blocks and in parts."""
    query, keys = make(m, 3001, d, dtype)
    query[:] = query[0]
    keys[::3] = query[0]
    keys[1::3] = keys[1]
    scores, index = with_threads(3, lambda: topk_keys_fwd(query, keys, 1700, metric))
    assert (scores == scores[0]).all()
    assert (index == index[0]).all()
    assert index[0, :1001].tolist() == list(range(0, 3001, 3))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(1, 30_000, 16, 9), (40, 9000, 33, 300)], ids=str)
def test_the_number_of_threads_changes_nothing(shape, metric, with_threads):
    m, n, d, k = shape
    query, keys = (t.mul(2).round() for t in make(m, n, d))  # full of ties
    first, *others = (
        with_threads(count, lambda: topk_keys_fwd(query, keys, k, metric)) for count in (1, 2, 3, 5)
    )
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("of_query", "of_keys"), [(2.0**-50, 2.0**40), (2.0**-40, 2.0**-44)])
@pytest.mark.usefixtures("capability")
def test_sizes_far_from_one(of_query, of_keys, dtype):
    query, keys = make(5, 70, 40, dtype)
    given = query * of_query, keys * of_keys
    check(*given, 9, "dot")
    scores, index = check(*given, 9, "cosine")
    same_scores, same_index = topk_keys_fwd(query, keys, 9, "cosine")
    assert torch.equal(index, same_index)
    torch.testing.assert_close(scores, same_scores, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("capability")
def test_subnormal_elements_weigh_no_more_than_they_are():
    query, keys = make(3, 40, 33, torch.bfloat16)
    query[:, ::2] = 2.0**-130
    keys[:, 1::4] = -(2.0**-133)
    check(query, keys, 7, "dot")


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
@pytest.mark.usefixtures("capability")
def test_orders_of_keys_that_fill_the_lists(order):
    keys = torch.arange(5000.0).unsqueeze(1)
    keys = {"ascending": keys, "descending": keys.flip(0), "equal": keys.fill_(1.0)}[order]
    check(torch.tensor([[1.0], [-1.0], [0.0]]), keys, 100, "dot")


@pytest.mark.usefixtures("capability")
def test_undefined_and_infinite_scores():
    nan, inf = float("nan"), float("inf")
    keys = torch.tensor([nan, -inf, 1.0, nan, inf] + [nan] * 200 + [2.0, -inf]).unsqueeze(1)
    scores, index = topk_keys_fwd(torch.tensor([[1.0], [nan]]), keys, 8, "dot")
    assert index.tolist() == [[4, 205, 2, 1, 206, 0, 3, 5], list(range(8))]
    assert scores[0, :5].tolist() == [inf, 2.0, 1.0, -inf, -inf]
    assert scores[0, 5:].isnan().all()
    assert scores[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.usefixtures("capability")
def test_one_query_meets_every_element_of_an_odd_width_once(value, dtype):
    """The vector at the end of a row holds elements of the vector before it too."""
    query, keys = torch.ones(1, 45, dtype=dtype), torch.ones(45, 45, dtype=dtype)
    keys.fill_diagonal_(value)
    scores, index = topk_keys_fwd(query, keys, 45, "dot")
    assert index.tolist() == [list(range(45))]
    assert scores.isnan().all() if value != value else (scores == value).all()
    keys.fill_diagonal_(3.0)
    assert (topk_keys_fwd(query, keys, 45, "dot")[0] == 47.0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("m", "d"), [(3, 32), (1, 37)])
@pytest.mark.usefixtures("capability")
def test_non_contiguous(m, d, metric):
    query, keys = make(m, 50, d)
    want = topk_keys_fwd(query, keys, 5, metric)
    wide = torch.full((50, 70), float("nan"))
    wide[:, 3 : 3 + d] = keys
    for given in (wide[:, 3 : 3 + d], keys.t().contiguous().t(), keys.repeat_interleave(2, 0)[::2]):
        got = topk_keys_fwd(query.t().contiguous().t(), given, 5, metric)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    _, index = topk_keys_fwd(query[:1].expand(4, d), keys[:1].expand(6, d), 6, metric)
    assert index.tolist() == [list(range(6))] * 4


def test_no_queries():
    scores, index = topk_keys_fwd(torch.zeros(0, 4), torch.zeros(3, 4), 2, "dot")
    assert scores.shape == index.shape == (0, 2)


def test_more_queries_than_one_pass_takes():
    """By their number, and by the memory of their lists."""
    check(*make(1500, 40, 6), 40, "dot")
    check(*make(40, 30_000, 2), 29_000, "dot")


MEMORY = """
import json, re, sys, torch
from pathlib import Path
from sapt_fast.cpu_kernels.topk_keys import topk_keys_fwd

def resident(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(2)
query, keys = torch.randn(64, 16), torch.randn(400_000, 16)
topk_keys_fwd(query, keys[:5000], 32, "dot")
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
topk_keys_fwd(query, keys, 32, "dot")
print(json.dumps(resident("VmHWM") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_keys():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) < 4 * 2**20  # the scores would take 100 MB


OUT_OF_MEMORY = """
import resource, torch
from sapt_fast.cpu_kernels.topk_keys import topk_keys_fwd

query, keys = torch.ones(4, 1), torch.ones(1, 1).expand(20_000_000, 1)
results = topk_keys_fwd(query, keys, 2, "dot")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 4 * 20_000_000 * 12 + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    topk_keys_fwd(query, keys, 20_000_000, "dot")
except MemoryError as error:
    print(error)
print(topk_keys_fwd(query, keys, 2, "dot")[1].tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_memory_is_an_error_that_says_what_to_do():
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    message, after = run.stdout.splitlines()
    assert "smaller k" in message
    assert after == str([[0, 1]] * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 9}, "dtype"),
        ({"metric": 3}, "metric"),
        ({"k": 6}, "k: not"),
        ({"k": 0}, "k: not"),
        ({"keys": torch.zeros(4, 5, dtype=torch.float64)}, "keys: got 2 dimensions"),
        ({"keys": torch.zeros(5, 4).t()}, "last stride 4"),
        ({"keys": torch.zeros(4, 6)}, "keys: not as wide"),
        ({"keys": torch.zeros(5)}, "keys: got 1 dimensions"),
        ({"scores": None}, "scores: got no memory"),
        ({"scores": torch.zeros(2, 1)}, r"scores: got 8 bytes, expected 4 for each of \[3, 1\]"),
        ({"index": torch.zeros(3, 1)}, r"index: got 12 bytes, expected 8 for each"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "dtype": _C.FLOAT32, "metric": _C.METRIC_DOT, "query": torch.zeros(3, 5),
        "keys": torch.zeros(4, 5), "scores": torch.zeros(3, 1),
        "index": torch.zeros(3, 1, dtype=torch.int64), "k": 1, "threads": 1,
    }  # fmt: skip
    _C.topk_keys(**arguments)
    with pytest.raises(ValueError, match=message):
        _C.topk_keys(**{**arguments, **change})
