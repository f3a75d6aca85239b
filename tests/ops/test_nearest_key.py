"""Every backend of `nearest_key` against all distances in float64."""

import importlib

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops import nearest_key

op = importlib.import_module("sapt_fast.ops.nearest_key")

BACKENDS = ["reference", "cpu", "triton"]
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# name: (M, N, D)
CASES = {
    "odd": (3, 50, 19),
    "one_of_everything": (1, 1, 1),
    "keys_in_parts": (5, 300, 8),
    "wide": (2, 5, 600),
}


def _inputs(case, dtype=torch.float32, seed=0):
    m, n, d = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    radius = 2 * d**0.5 * torch.rand(n, generator=generator)
    return query, keys, radius


def _device(backend):
    return GPU if backend == "triton" else "cpu"


def _search(inputs, backend):
    index, distance = nearest_key(*(t.to(_device(backend)) for t in inputs), backend=backend)
    return index.cpu(), distance.cpu()


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = dispatch.unavailable("nearest_key", request.param, _device(request.param))
    assert reason is None, reason
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_index_and_distance(backend, case, dtype):
    query, keys, radius = _inputs(case, dtype)
    every = (query.double().unsqueeze(1) - keys.double()).norm(dim=-1)
    least, at = every.min(1)
    index, distance = _search((query, keys, radius), backend)
    assert (index.dtype, distance.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(distance.double(), least, rtol=1e-6, atol=1e-6)
    assert torch.equal(index, torch.where(least <= radius[at], at, -1))


def test_both_outcomes_occur():
    index, _ = _search(_inputs("keys_in_parts"), "reference")
    assert (index >= 0).any()
    assert (index < 0).any()


def test_only_the_nearest_key_is_asked(backend):
    keys, radius = torch.tensor([[0.0], [10.0]]), torch.tensor([1.0, 100.0])
    index, distance = _search((torch.tensor([[2.0], [-1.0], [1.5]]), keys, radius), backend)
    assert index.tolist() == [-1, 0, -1]
    assert distance.tolist() == [2.0, 1.0, 1.5]


def test_a_key_far_from_the_origin_is_found_at_distance_zero(backend):
    keys = 1000 + torch.arange(12.0).view(4, 3)
    index, distance = _search((keys[[2, 0]].clone(), keys, torch.zeros(4)), backend)
    assert index.tolist() == [2, 0]
    assert distance.tolist() == [0.0, 0.0]


def test_ties_go_to_the_lower_index(backend):
    keys = torch.ones(300, 2)
    keys[[7, 90, 299]] = 0
    index, _ = _search((torch.zeros(1, 2), keys, torch.ones(300)), backend)
    assert index.tolist() == [7]


def test_nan_and_infinity_are_never_nearest(backend):
    nan, inf = float("nan"), float("inf")
    keys = torch.tensor([[nan, 0.0], [inf, 0.0], [3.0, 4.0]])
    query = torch.tensor([[0.0, 0.0], [nan, 0.0]])
    index, distance = _search((query, keys, torch.full((3,), 9.0)), backend)
    assert index.tolist() == [2, -1]
    assert distance.tolist() == [5.0, inf]


def test_no_key_is_near_an_infinite_query(backend):
    inf = float("inf")
    query = torch.tensor([[inf, 0.0], [-inf, 1.0], [3e38, 0.0], [1e20, 0.0], [1.0, 0.0]])
    keys = torch.tensor([[-1.0, 2.0], [1.0, 2.0], [2.0, 2.0]], requires_grad=True)
    index, distance = nearest_key(
        query.to(_device(backend)), keys.to(_device(backend)), query.new_full((3,), inf),
        backend=backend,
    )  # fmt: skip
    assert index.tolist() == [-1, -1, -1, -1, 1]
    assert distance.tolist() == [inf, inf, inf, inf, 2.0]
    distance.sum().backward()
    assert keys.grad.tolist() == [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_nan_and_negative_radii_accept_nothing(backend):
    keys = torch.tensor([[0.0], [5.0]])
    radius = torch.tensor([float("nan"), -1.0])
    index, distance = _search((keys.clone(), keys, radius), backend)
    assert index.tolist() == [-1, -1]
    assert distance.tolist() == [0.0, 0.0]


def test_no_keys_and_no_queries(backend):
    index, distance = _search((torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(0)), backend)
    assert index.tolist() == [-1, -1]
    assert distance.tolist() == [float("inf")] * 2
    index, distance = _search((torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(3)), backend)
    assert index.shape == distance.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_gradient_of_the_distance(backend, dtype):
    query, keys, radius = _inputs("odd", dtype)
    leaves = [t.to(_device(backend), copy=True).requires_grad_() for t in (query, keys)]
    index, distance = nearest_key(*leaves, radius.to(_device(backend)), backend=backend)
    assert not index.requires_grad
    incoming = torch.tensor([0.5, -1.0, 2.0])
    distance.backward(incoming.to(distance))
    exact = [t.double().requires_grad_() for t in (query, keys)]
    (exact[0].unsqueeze(1) - exact[1]).norm(dim=-1).amin(1).backward(incoming.double())
    for got, want in zip(leaves, exact, strict=True):
        assert got.grad.dtype == dtype
        torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=0, atol=ROUNDING[dtype])


def test_no_gradient_at_distance_zero_or_without_keys(backend):
    for count in (0, 3):
        keys = torch.zeros(count, 4, device=_device(backend)).requires_grad_()
        query = torch.zeros(2, 4, device=_device(backend)).requires_grad_()
        radius = torch.ones(count, device=_device(backend))
        nearest_key(query, keys, radius, backend=backend)[1].sum().backward()
        assert not query.grad.any()
        assert not keys.grad.any()


def test_chunks_change_nothing(monkeypatch):
    inputs = _inputs("odd")
    expected = _search(inputs, "reference")
    monkeypatch.setattr(op, "ROW_CHUNK", 2)
    monkeypatch.setattr(op, "KEY_CHUNK", 7)
    got = _search(inputs, "reference")
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
