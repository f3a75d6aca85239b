"""The cuda backend of nearest_key, its kernels on the emulator, against float64."""

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def check(cuda, emulated_module):
    kernel = cuda("nearest_key")

    def run(query: Tensor, keys: Tensor, radius: Tensor | None = None) -> Tensor:
        if radius is None:
            radius = torch.full((len(keys),), query.shape[1] ** 0.5 * 1.2)
        pairs = torch.cdist(query.double(), keys.double())
        want = pairs.min(1)
        first = None
        for seed in (0, 1, 2):
            emulated_module.set_order(seed)
            results = kernel.nearest_key_fwd(query, keys, radius)
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), seed
        distance, index, nearest = results
        assert distance.dtype == torch.float32
        assert index.dtype == nearest.dtype == torch.int64
        # The key found is the nearest one, but for rounding.
        torch.testing.assert_close(
            pairs.gather(1, nearest[:, None])[:, 0], want.values, rtol=2e-6, atol=1e-6
        )
        torch.testing.assert_close(distance.double(), want.values, rtol=2e-6, atol=1e-6)
        assert torch.equal(index, torch.where(distance <= radius[nearest], nearest, -1))
        return nearest

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 4, 5, 16, 17])
def test_queries(check, dtype, queries):
    check(_values(queries, 40, dtype=dtype), _values(150, 40, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("width", [1, 7, 31, 33, 129, 300])
def test_widths(check, dtype, queries, width):
    check(_values(queries, width, dtype=dtype), _values(37, width, dtype=dtype, seed=1))


@pytest.mark.parametrize("count", [1, 15, 17, 127, 129, 257, 1000])
@pytest.mark.parametrize("queries", [2, 9])
def test_counts(check, count, queries):
    dtype = torch.bfloat16
    check(_values(queries, 16, dtype=dtype), _values(count, 16, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_the_lowest_index_of_equal_keys(check, dtype, queries):
    keys = _values(7, 24, dtype=dtype).repeat(60, 1)
    query = keys[:queries] + (0 if queries < 8 else 1)
    nearest = check(query[:7].repeat(3, 1)[:queries], keys)
    assert (nearest < 7).all()


def test_radius(cuda):
    kernel = cuda("nearest_key")
    keys = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
    query = torch.tensor([[0.0, 1.0], [3.0, 2.0], [9.0, 9.0]])
    radius = torch.tensor([1.0, 1.9, float("nan")])
    distance, index, nearest = kernel.nearest_key_fwd(query, keys, radius)
    assert distance.tolist() == [1.0, 2.0, 0.0]
    assert index.tolist() == [0, -1, -1]
    assert nearest.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4, 6])
def test_keys_that_are_not_finite(cuda, dtype, queries):
    """They are never the nearest; with no others there is none."""
    kernel = cuda("nearest_key")
    keys = _values(20, 12, dtype=dtype)
    keys[0, 3], keys[1, 0], keys[2, 5] = float("nan"), float("inf"), float("-inf")
    query, radius = _values(queries, 12, dtype=dtype, seed=1), torch.full((20,), float("inf"))
    _, index, nearest = kernel.nearest_key_fwd(query, keys, radius)
    want = torch.cdist(query.double(), keys[3:].double()).argmin(1) + 3
    assert torch.equal(nearest, want)
    assert torch.equal(index, want)
    distance, index, nearest = kernel.nearest_key_fwd(query, keys[:3], radius[:3])
    assert (distance == float("inf")).all()
    assert (index == -1).all()
    assert (nearest == -1).all()
    query[0, 0] = float("nan")
    distance, _, nearest = kernel.nearest_key_fwd(query, keys, radius)
    assert nearest[0] == -1
    assert distance[0] == float("inf")
    assert torch.equal(nearest[1:], want[1:])


def test_nothing(cuda):
    kernel = cuda("nearest_key")
    distance, index, nearest = kernel.nearest_key_fwd(
        torch.ones(2, 3), torch.ones(0, 3), torch.ones(0)
    )
    assert distance.tolist() == [float("inf")] * 2
    assert index.tolist() == nearest.tolist() == [-1, -1]
    assert kernel.nearest_key_fwd(torch.ones(0, 3), torch.ones(2, 3), torch.ones(2))[0].shape == (
        0,
    )


def test_non_contiguous(check):
    keys = _values(24, 50, dtype=torch.float32).t()
    check(_values(24, 3, dtype=torch.float32, seed=1).t(), keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 3}, "float64"),
        ({"queries": -1}, "queries"),
        ({"count": 0}, "count"),
        ({"count": 1 << 32}, "count"),
        ({"keys": None}, "keys: got no memory"),
        ({"keys": torch.ones(1, 4)}, r"keys: got 16 bytes, expected 4 for each of \[1, 3\]"),
        ({"width": 4_000_000}, "query"),
        ({"radius": torch.ones(2)}, "radius"),
        ({"index": torch.ones(2)}, "index: got 8 bytes, expected 8 for each"),
        ({"workspace": torch.ones(1)}, "workspace: too small"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments(emulated_module, change, message):
    index = torch.zeros(2, dtype=torch.int64)
    arguments = {
        "dtype": 0, "query": torch.ones(2, 3), "keys": torch.ones(1, 3), "radius": torch.ones(1),
        "distance": torch.ones(2), "index": index, "nearest": index, "workspace": torch.ones(99),
        "queries": 2, "count": 1, "width": 3, "place": (0, 0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        emulated_module.cuda_nearest_key(**{**arguments, **change})
