"""The cuda backend of router, its kernels on the emulator, against the float64 reference."""

import importlib

import pytest
import torch
from torch import Tensor

from sapt_fast.ops.gates import GATES, Gate, gate_fwd
from sapt_fast.ops.queries import AnyProjection, QueryProjection, TaskProjections

reference = importlib.import_module("sapt_fast.ops.route")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _case(
    samples: int = 2,
    width: int = 40,
    hidden: int | None = 12,
    count: int = 5,
    dtype: torch.dtype = torch.float32,
    dtypes: tuple[torch.dtype, ...] = (),
) -> tuple[Tensor, Tensor, AnyProjection]:
    """pooled, keys and projection; `dtypes` of the six tensors where they differ."""
    generator = torch.Generator().manual_seed(0)
    kinds = iter(dtypes or (dtype,) * 6)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(next(kinds))

    pooled, keys = normal(samples, width), normal(count, width)
    if hidden is None:
        return pooled, keys, None
    parts = normal(hidden, width), normal(width, hidden), normal(width), normal(width)
    return pooled, keys, QueryProjection(*parts, 1e-5)


def _wide(case: tuple[Tensor, Tensor, AnyProjection]):
    pooled, keys, projection = case
    if projection is not None:
        parts = [t.double() if isinstance(t, Tensor) else t for t in projection]
        projection = type(projection)(*parts)
    return pooled.double(), keys.double(), projection


@pytest.fixture
def check(cuda, emulated_module):
    kernel = cuda("route")

    def run(
        case, top_k=None, threshold=None, gate="softmax", similarity="dot", renormalize=True
    ) -> Tensor:
        pooled, keys, projection = case
        divisor = keys.shape[1] ** 0.5 if similarity == "dot" else 0.25
        exact = reference.route_scores_fwd(*_wide(case), divisor, similarity)
        how = gate, similarity, renormalize
        first = None
        for seed in (0, 1, 2, 3):
            emulated_module.set_order(seed)
            scores = kernel.route_scores_fwd(pooled, keys, projection, divisor, similarity)
            weights = kernel.route_fwd(pooled, keys, projection, divisor, top_k, threshold, *how)
            first = first or (scores, weights)
            assert torch.equal(scores, first[0]), f"the order of seed {seed} changes the result"
            assert torch.equal(weights, first[1]), f"the order of seed {seed} changes the result"
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=3e-6 * scale)
        # From the scores as they are, so that rounding moves no adapter over a limit.
        want = gate_fwd(scores.double(), Gate(gate, top_k, threshold, renormalize))
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), want, rtol=2e-6, atol=1e-7)
        return weights

    return run


@pytest.mark.parametrize("hidden", [None, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(check, dtype, hidden):
    check(_case(hidden=hidden, dtype=dtype))


def test_dtypes_that_differ(check):
    check(_case(dtypes=(*DTYPES, *DTYPES)))
    check(_case(dtypes=(*DTYPES[::-1], *DTYPES[::-1])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("samples", "width", "hidden", "count"),
    [(1, 1, 1, 1), (3, 63, 5, 9), (2, 257, 33, 17), (1, 2049, 3, 8), (5, 520, 1, 2)],
)
def test_sizes(check, samples, width, hidden, count, dtype):
    check(_case(samples, width, hidden, count, dtype))


@pytest.mark.parametrize("count", [1, 2, 255, 257, 1024])
@pytest.mark.parametrize(("top_k", "threshold"), [(None, None), (1, None), (3, 0.01), (None, 0.2)])
def test_what_is_kept(check, count, top_k, threshold):
    weights = check(_case(width=8, hidden=None, count=count), top_k, threshold)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    if top_k is not None:
        assert ((weights != 0).sum(-1) <= top_k).all()


def test_equal_scores_keep_the_lower_index(check):
    pooled, keys, _ = _case(hidden=None, count=3)
    weights = check((pooled, keys.repeat(4, 1), None), top_k=5)
    for row in weights:
        per_key = row.view(4, 3)
        for column in per_key.t():
            kept = column != 0
            assert torch.equal(kept, kept.sort(descending=True, stable=True).values)


@pytest.mark.parametrize("top_k", [1, 4, 100, 255, 257, 299])
def test_equal_scores_of_many_keys_keep_the_lower_index(check, top_k):
    """More than are compared with each other; three scores, each a hundred times."""
    pooled, keys, _ = _case(hidden=None, count=3)
    weights = check((pooled, keys.repeat(100, 1), None), top_k=top_k)
    for row in weights:
        assert (row != 0).sum() == top_k
        for column in row.view(100, 3).t():
            kept = column != 0
            assert torch.equal(kept, kept.sort(descending=True, stable=True).values)


@pytest.mark.parametrize("count", [100, 300])
@pytest.mark.parametrize("top_k", [1, 7])
def test_most_weights_vanish(check, count, top_k):
    """Below the smallest float: zeros are not among the largest before others."""
    pooled, keys, _ = _case(samples=1, hidden=None, count=count)
    keys[::2] *= 1e3
    check((pooled, keys, None), top_k)


def test_threshold_above_every_weight_keeps_the_largest(check):
    weights = check(_case(count=20), threshold=1.0)
    assert torch.equal((weights == 1).sum(-1), torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("gate", GATES)
def test_gates_and_cosines(check, gate):
    for count, top_k, renormalize in ((5, 2, False), (300, 7, True)):
        case = _case(width=8, hidden=3 if gate == "relu" else None, count=count)
        check(case, top_k, 0.05, gate, "cosine", renormalize)
    pooled, keys, _ = _case(hidden=None, count=6)
    if gate == "relu":
        weights = check((pooled.abs(), -keys.abs(), None), 2, None, gate)
        assert torch.equal(weights, torch.zeros_like(weights))
        assert not torch.signbit(weights).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "hidden", "key_width"), [(40, 12, 40), (63, 3, 9), (8, 30, 1)])
def test_projections_of_keys(check, width, hidden, key_width, dtype):
    pooled, _, _ = _case(width=width, hidden=None, dtype=dtype)
    keys = _case(width=key_width, count=3, hidden=None, dtype=dtype)[1]
    generator = torch.Generator().manual_seed(1)
    shapes = (3, hidden, width), (3, key_width, hidden)
    parts = [torch.randn(s, generator=generator).mul(s[-1] ** -0.5).to(dtype) for s in shapes]
    case = pooled, keys, TaskProjections(*parts)
    check(case, None, None, "abs_sigmoid", "cosine", False)
    check(case, 2)


def test_scores_of_more_keys_than_are_chosen_from(cuda):
    kernel = cuda("route")
    case = _case(width=8, hidden=None, count=1030)
    scores = kernel.route_scores_fwd(*case, 2.0)
    exact = reference.route_scores_fwd(*_wide(case), 2.0)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="MAX_ROUTED_KEYS"):
        kernel.route_fwd(*case, 2.0, None, None)


def test_the_limit_of_the_op(emulated_module):
    assert emulated_module.MAX_ROUTED_KEYS >= reference._FUSED_KEYS


def test_nothing(cuda):
    kernel = cuda("route")
    assert kernel.route_fwd(*_case(samples=0), 1.0, 1, None).shape == (0, 5)
    assert kernel.route_scores_fwd(*_case(count=0), 1.0).shape == (2, 0)
