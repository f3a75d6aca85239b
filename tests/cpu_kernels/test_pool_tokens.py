"""The cpu backend of pool_tokens against the formula in float64, on every instruction set."""

import pytest
import torch

pytest.importorskip("sapt_fast._C", reason="built without native kernels")
from sapt_fast.cpu_kernels.pool_tokens import pool_tokens_bwd, pool_tokens_fwd

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCABULARY = 23
# (B, T, D): parts of vectors, whole blocks of columns, and a rest of each
SHAPES = [(1, 1, 1), (3, 7, 12), (2, 37, 33), (4, 9, 128), (2, 5, 261), (1, 3, 1040)]


def make(shape, dtype=torch.float32, masked=True):
    batch, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, width, generator=generator).to(dtype)
    ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)
    mask = (torch.rand(batch, tokens, generator=generator) > 0.4).long() if masked else None
    if mask is not None:
        mask[0] = 0
    return ids, table, mask


def expected(ids, table, mask):
    """(maximum, its token's id): of equal values that of the first token."""
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    filled = table.double()[ids].masked_fill(~keep.unsqueeze(-1), float("-inf"))
    first = filled.argmax(1)
    any_token = keep.any(1, keepdim=True)
    best = filled.gather(1, first.unsqueeze(1)).squeeze(1)
    return torch.where(any_token, best, 0.0), torch.where(any_token, ids.gather(1, first), -1)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("capability")
def test_maximum_and_winner(shape, dtype, masked):
    ids, table, mask = make(shape, dtype, masked)
    best, first = expected(ids, table, mask)
    pooled, winner = pool_tokens_fwd(ids, table, mask, "max", True)
    assert (pooled.dtype, winner.dtype) == (dtype, torch.int32)
    assert torch.equal(pooled.double(), best)
    assert torch.equal(winner.long(), first)
    alone, nothing = pool_tokens_fwd(ids, table, mask, "max", False)
    assert torch.equal(alone, pooled)
    assert nothing is None


@pytest.mark.usefixtures("capability")
def test_undefined_and_infinite_values():
    nan, inf = float("nan"), float("inf")
    ids = torch.tensor([[0, 2, 1, 2], [3, 3, 3, 3], [1, 3, 4, 0]])
    for width in (1, 150):
        table = torch.tensor([1.0, nan, inf, -inf, nan]).unsqueeze(1).repeat(1, width)
        pooled, winner = pool_tokens_fwd(ids, table, None, "max", True)
        assert pooled[0].isnan().all()
        assert (pooled[1] == -inf).all()
        assert pooled[2].isnan().all()
        assert winner.unique(dim=1).flatten().tolist() == [1, 3, 1]
        pooled, _ = pool_tokens_fwd(ids, table, torch.tensor([[1, 1, 0, 1]] * 3), "max")
        assert (pooled[0] == inf).all()


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradient(dtype, masked, pooling):
    ids, table, mask = make((6, 11, 40), dtype, masked)
    dy = torch.randn(6, 40).to(dtype)
    winner = pool_tokens_fwd(ids, table, mask, pooling, pooling == "max")[1]
    got = pool_tokens_bwd(dy, ids, mask, winner, VOCABULARY, pooling)
    want = torch.zeros(VOCABULARY, 40, dtype=torch.float64)
    keep = torch.ones_like(ids) if mask is None else mask
    for b in range(6):
        if pooling == "max":
            for d, v in enumerate(expected(ids, table, mask)[1][b].tolist()):
                want[v, d] += dy[b, d].double() if v >= 0 else 0
        else:
            for v in ids[b][keep[b] != 0]:
                want[v] += dy[b].double() / keep[b].sum()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(got, pool_tokens_bwd(dy, ids, mask, winner, VOCABULARY, pooling))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_pool(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    pooled, winner = pool_tokens_fwd(ids, torch.randn(5, 70), None, "max", True)
    assert torch.equal(pooled, torch.zeros(shape[0], 70))
    assert torch.equal(winner, torch.full((shape[0], 70), -1, dtype=torch.int32))


@pytest.mark.usefixtures("capability")
def test_non_contiguous():
    ids, table, mask = make((3, 20, 100))
    want, _ = pool_tokens_fwd(ids, table, mask, "max")
    wide = torch.full((VOCABULARY, 130), float("nan"))
    wide[:, 7:107] = table
    turned = ids.t().contiguous().t(), mask.t().contiguous().t()
    for given in (wide[:, 7:107], table.t().contiguous().t()):
        got, _ = pool_tokens_fwd(turned[0].int(), given, turned[1].bfloat16(), "max")
        assert torch.equal(got, want)


def test_the_number_of_threads_changes_nothing(with_threads):
    ids, table, mask = make((5, 300, 200))
    results = [
        with_threads(count, lambda: pool_tokens_fwd(ids, table, mask, "max", True))
        for count in (1, 2, 5)
    ]
    for pooled, winner in results[1:]:
        assert torch.equal(pooled, results[0][0])
        assert torch.equal(winner, results[0][1])


def test_unknown_ids_raise_unless_they_are_masked():
    ids, table, _ = make((2, 4, 8))
    for bad in (-1, VOCABULARY):
        ids[1, 2] = bad
        with pytest.raises(ValueError, match="input_ids"):
            pool_tokens_fwd(ids, table, None, "max")
        mask = torch.ones(2, 4)
        mask[1, 2] = 0
        best, _ = expected(ids.clamp(0, VOCABULARY - 1), table, mask)
        assert torch.equal(pool_tokens_fwd(ids, table, mask, "max")[0].double(), best)
