"""The cpu backend of nearest_key against all distances in float64, on every instruction set."""

import pytest
import torch

_C = pytest.importorskip("sapt_fast._C", reason="built without native kernels")
from sapt_fast.cpu_kernels.nearest_key import nearest_key_fwd  # noqa: E402
from sapt_fast.cpu_kernels.topk_keys import topk_keys_fwd  # noqa: E402
from sapt_fast.ops.nearest_key import nearest_key_fwd as reference  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RTOL = {torch.float64: 1e-14}
SHAPES = [(1, 1, 1), (1, 137, 64), (3, 50, 19), (16, 2100, 8), (21, 1500, 40), (1, 30_000, 2)]


def make(m, n, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return query, keys, (2 * d**0.5 * torch.rand(n, generator=generator)).to(wide)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("capability")
def test_distance_index_and_nearest(shape, dtype):
    query, keys, radius = make(*shape, dtype)
    distance, index, nearest = nearest_key_fwd(query, keys, radius)
    assert distance.dtype == radius.dtype
    assert index.dtype == nearest.dtype == torch.int64
    every = (query.double().unsqueeze(1) - keys.double()).square().sum(-1).sqrt()
    rtol = RTOL.get(dtype, 1e-6)
    torch.testing.assert_close(distance.double(), every.amin(1), rtol=rtol, atol=rtol)
    chosen = every.gather(1, nearest.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, distance.double(), rtol=rtol, atol=rtol)
    assert torch.equal(index, torch.where(distance <= radius[nearest], nearest, -1))
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(nearest, every.argmin(1))


@pytest.mark.usefixtures("capability")
def test_ties_go_to_the_lower_index():
    keys = torch.ones(5000, 3)
    keys[[7, 90, 4999]] = 0
    for dtype in DTYPES:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        args = torch.zeros(5, 3, dtype=dtype), keys.to(dtype), torch.ones(5000, dtype=wide)
        assert nearest_key_fwd(*args)[1].tolist() == [7] * 5


@pytest.mark.usefixtures("capability")
def test_near_neighbours_far_from_the_origin_are_told_apart():
    keys = 4096 + torch.arange(600.0).view(200, 3) / 1024
    distance, index, _ = nearest_key_fwd(keys.clone(), keys, torch.zeros(200))
    assert index.tolist() == list(range(200))
    assert not distance.any()


@pytest.mark.usefixtures("capability")
def test_undefined_and_infinite_values_as_in_the_reference():
    nan, inf = float("nan"), float("inf")
    keys = torch.tensor([[nan, 0.0], [inf, 0.0], [3.0, 4.0], [-inf, nan], [1e30, 0.0]])
    query = torch.tensor([[0.0, 0.0], [nan, 0.0], [inf, 0.0], [3.0, 4.0], [1e30, 0.0]])
    for radius in (torch.full((5,), 9.0), torch.full((5,), nan), torch.full((5,), -1.0)):
        assert_same(nearest_key_fwd(query, keys, radius), reference(query, keys, radius))
    bad = keys[[0, 1, 3]]
    got = nearest_key_fwd(query, bad, torch.full((3,), inf))
    assert_same(got, reference(query, bad, torch.full((3,), inf)))
    assert got[2].tolist() == [-1] * 5


@pytest.mark.parametrize("size", [1.0, 2.0**-60, 2.0**40])
@pytest.mark.usefixtures("capability")
def test_many_keys_on_a_lattice_far_from_the_origin(size, with_threads):
    """Every squared distance is exact, and small beside the squares it is the difference of."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(200, 255, (2000,), generator=generator)
    lattice = corner + torch.randint(2, (6_007, 2000), generator=generator)
    keys = (lattice * size).bfloat16()
    query = keys[[5, 3000, 6_006]]
    query[:, 3] += 4 * size
    exact = torch.stack([(q.double() - keys.double()).square().sum(-1) for q in query])
    radius = torch.full((len(keys),), 5 * size)
    got = with_threads(2, lambda: nearest_key_fwd(query, keys, radius))
    assert torch.equal(got[2], exact.argmin(1))
    torch.testing.assert_close(got[0].double(), exact.amin(1).sqrt(), rtol=1e-7, atol=0)
    scores, index = with_threads(2, lambda: topk_keys_fwd(query, keys, 9, "l2"))
    best, want = exact.sort(dim=1, stable=True)
    assert torch.equal(index, want[:, :9])
    assert torch.equal(scores.double(), -best[:, :9])


@pytest.mark.usefixtures("capability")
def test_undefined_and_infinite_values_among_many_keys():
    nan, inf = float("nan"), float("inf")
    keys = torch.arange(20_000).remainder(251).to(torch.bfloat16).unsqueeze(1).repeat(1, 3)
    keys[9_000:9_003, 1] = torch.tensor([nan, inf, -inf]).bfloat16()
    keys[19_000] = 2.0**100
    query = torch.tensor([[7.0] * 3, [nan, 0.0, 0.0], [inf, 0.0, 0.0], [2.0**100] * 3]).bfloat16()
    radius = torch.ones(20_000)
    assert_same(nearest_key_fwd(query, keys, radius), reference(query, keys, radius))


def test_no_keys_and_no_queries():
    distance, index, nearest = nearest_key_fwd(torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(0))
    assert distance.tolist() == [float("inf")] * 2
    assert index.tolist() == nearest.tolist() == [-1, -1]
    for result in nearest_key_fwd(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(3)):
        assert result.shape == (0,)


@pytest.mark.usefixtures("capability")
def test_non_contiguous():
    query, keys, radius = make(3, 50, 32)
    wide = torch.full((50, 70), float("nan"))
    wide[:, 3:35] = keys
    given = query.t().contiguous().t(), wide[:, 3:35], radius.repeat_interleave(2)[::2]
    assert_same(nearest_key_fwd(*given), nearest_key_fwd(query, keys, radius))


def test_the_number_of_threads_changes_nothing(with_threads):
    query, keys, radius = make(9, 30_000, 5)
    query, keys = query.round(), keys.round()  # full of ties
    results = [
        with_threads(count, lambda: nearest_key_fwd(query, keys, radius)) for count in (1, 2, 3, 5)
    ]
    for result in results[1:]:
        assert_same(result, results[0])


def test_bad_arguments():
    index = torch.zeros(3, dtype=torch.int64)
    good = {
        "dtype": _C.FLOAT32, "query": torch.zeros(3, 5), "keys": torch.zeros(4, 5),
        "radius": torch.zeros(4), "distance": torch.zeros(3), "index": index, "nearest": index,
        "threads": 1,
    }  # fmt: skip
    _C.nearest_key(**good)
    for name, bad in {
        "dtype": 9,
        "threads": 0,
        "query": torch.zeros(3, 6),
        "keys": torch.zeros(4, 5, dtype=torch.float64),
        "radius": torch.zeros(3),
        "distance": torch.zeros(2),
        "index": index[:2],
        "nearest": None,
    }.items():
        with pytest.raises(ValueError, match="keys" if name == "query" else name):
            _C.nearest_key(**{**good, name: bad})
