"""The searches by groups of keys give what all scores give, bit for bit."""

import importlib
from collections.abc import Iterator

import pytest
import torch

topk = importlib.import_module("sapt_fast.triton_kernels.topk_keys")
nearest = importlib.import_module("sapt_fast.triton_kernels.nearest_key")
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(kind: str, queries: int = 3, keys: int = 61) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers tie often; `bad` has NaN, both infinities and overflowing squares."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-1, 2, (queries, 3), generator=generator).float()
    table = torch.randint(-1, 2, (keys, 3), generator=generator).float()
    if kind == "random":
        query = torch.randn(query.shape, generator=generator)
        table = torch.randn(table.shape, generator=generator)[torch.randperm(keys).clamp(max=50)]
    if kind == "bad":
        table[::3] = NAN
        table[[4, 31, 50, 59], [0, 1, 2, 0]] = torch.tensor([INF, -INF, 3e38, NAN])
        query[1] = NAN
    return query.to(GPU), table.to(GPU)


def _both(monkeypatch, query, keys, k, metric):
    """(by groups, by all scores)."""
    found = []
    for per_chosen in (1, 1 << 30):
        monkeypatch.setattr(topk, "_GROUPS_PER_CHOSEN", per_chosen)
        found.append(topk.topk_keys_fwd(query, keys, k, metric))
    return found


def _assert_same(got, expected):
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize(
    ("kind", "metric"),
    [("ties", "dot"), ("ties", "l2"), ("random", "cosine"), ("bad", "dot"), ("bad", "l2")],
)
def test_groups_give_what_all_scores_give(kind, metric, monkeypatch):
    query, keys = _inputs(kind)
    _assert_same(*_both(monkeypatch, query, keys, 5, metric))


def test_keys_that_are_all_equal_or_all_nan(monkeypatch):
    monkeypatch.setattr(topk, "_GROUPS_PER_CHOSEN", 1)
    for value in (1.0, NAN):
        query, keys = torch.ones(1, 3, device=GPU), torch.full((33, 3), value, device=GPU)
        _, index = topk.topk_keys_fwd(query, keys, 4, "dot")
        assert index.tolist() == [[0, 1, 2, 3]]


def test_more_groups_than_are_sorted_at_once(monkeypatch):
    monkeypatch.setattr(topk, "_GROUP", 2)
    query, keys = _inputs("ties", 1, 75)
    by_groups, by_scores = _both(monkeypatch, query, keys, 3, "l2")
    _assert_same(by_groups, by_scores)
    kernel = importlib.import_module("sapt_fast.ops.topk_keys")
    _assert_same(by_groups, kernel.topk_keys_fwd(query, keys, 3, "l2"))


def test_a_few_queries_at_a_time(monkeypatch):
    query, keys = _inputs("random")
    expected = _both(monkeypatch, query, keys, 3, "cosine")
    monkeypatch.setattr(topk, "_SCRATCH_BYTES", 500)  # two queries, or one
    for got, want in zip(_both(monkeypatch, query, keys, 3, "cosine"), expected, strict=True):
        _assert_same(got, want)


def test_one_tile_of_queries_sums_the_squares_on_the_way(monkeypatch):
    """The keys are not read once more for them."""
    query, keys = _inputs("random")
    sizes = []
    for module in (topk, nearest):
        right = module.row_squares
        monkeypatch.setattr(module, "row_squares", lambda x, r=right: sizes.append(len(x)) or r(x))
    for rows, expected in ((2, [2]), (3, [3, 61, 61])):
        sizes.clear()
        topk.topk_keys_fwd(query[:rows], keys, 3, "l2")
        nearest.nearest_key_fwd(query[:rows], keys, torch.ones(61, device=GPU))
        assert sizes == expected


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("kind", ["ties", "bad"])
def test_the_nearest_key_is_the_first_of_the_least_distances(kind):
    query, keys = _inputs(kind, keys=130)
    distance, _, at = nearest.nearest_key_fwd(query, keys, torch.ones(130, device=GPU))
    every = (query.unsqueeze(1) - keys).double().square().sum(-1).sqrt()
    every = torch.where(every < 1e30, every, INF)
    least, first = every.min(1)
    assert torch.equal(at, torch.where(least < INF, first, -1))
    torch.testing.assert_close(distance, least.float())
