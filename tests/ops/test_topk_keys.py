"""Every backend of `topk_keys` against the full float64 product: scores, order, gradients."""

import importlib

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops import topk_keys

op = importlib.import_module("sapt_fast.ops.topk_keys")

BACKENDS = ["reference", "cpu", "triton"]
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
METRICS = op.METRICS
# What one rounding of the result costs in a dtype, relative to the largest value.
ROUNDING = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# name: (M, N, D, k)
CASES = {
    "odd": (3, 35, 19, 5),
    "one_of_everything": (1, 1, 1, 1),
    "all_keys": (2, 9, 16, 9),
    "keys_in_parts": (1, 150, 8, 3),
}


def _inputs(case, dtype=torch.float32, seed=0):
    m, n, d = CASES[case][:3]
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)
    return query, torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def _device(backend):
    return GPU if backend == "triton" else "cpu"


def _search(query, keys, k, backend, **options):
    device = _device(backend)
    scores, index = topk_keys(query.to(device), keys.to(device), k, backend=backend, **options)
    return scores.cpu(), index.cpu()


def _all_scores(query, keys, metric):
    """[M, N] in the inputs' dtype, differentiable."""
    if metric == "l2":
        return -(query.unsqueeze(1) - keys).square().sum(-1)
    if metric == "cosine":
        return torch.nn.functional.cosine_similarity(query.unsqueeze(1), keys, dim=-1)
    return query @ keys.t()


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = dispatch.unavailable("topk_keys", request.param, _device(request.param))
    assert reason is None, reason
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_scores_and_order(backend, case, metric, dtype):
    query, keys = _inputs(case, dtype)
    k = CASES[case][3]
    exact = _all_scores(query.double(), keys.double(), metric)
    best = exact.sort(dim=1, descending=True, stable=True)
    scores, index = _search(query, keys, k, backend, metric=metric)
    assert (scores.dtype, index.dtype) == (torch.float32, torch.int64)
    assert scores.shape == index.shape == (len(query), k)
    tolerance = 3e-6 * max(1, exact.abs().max())
    torch.testing.assert_close(scores.double(), best.values[:, :k], rtol=0, atol=tolerance)
    # Half-precision inputs do tie; then the order must still be that of the scores.
    torch.testing.assert_close(exact.gather(1, index), scores.double(), rtol=0, atol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(index, best.indices[:, :k])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_through_the_chosen_pairs(backend, metric, dtype):
    query, keys = _inputs("odd", dtype)
    pairs = [[t.to(_device(backend), copy=True).requires_grad_() for t in (query, keys)]]
    pairs += [[t.double().requires_grad_() for t in (query, keys)]]
    scores, index = topk_keys(*pairs[0], 5, metric=metric, backend=backend)
    assert scores.requires_grad
    assert not index.requires_grad
    incoming = torch.linspace(-1, 2, scores.numel()).view(scores.shape)
    scores.backward(incoming.to(scores))
    chosen = _all_scores(*pairs[1], metric).gather(1, index.cpu())
    chosen.backward(incoming.double())
    for got, want in zip(pairs[0], pairs[1], strict=True):
        assert got.grad.dtype == dtype
        tolerance = ROUNDING[dtype] * want.grad.abs().max().item()
        torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=0, atol=tolerance)


def test_ties_go_to_the_lower_index(backend):
    keys = torch.zeros(40, 4)
    keys[[3, 8, 21, 39]] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    query = torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    for metric in METRICS:
        _, index = _search(query, keys, 6, backend, metric=metric)
        assert index[0].tolist() == [3, 8, 21, 39, 0, 1]
        assert index[1].tolist() == [0, 1, 2, 4, 5, 6]


def test_signed_zeros_tie(backend):
    keys = torch.tensor([[-1.0], [1.0], [-1.0]])
    _, index = _search(torch.tensor([[0.0]]), keys, 3, backend)
    assert index.tolist() == [[0, 1, 2]]


def test_nan_ranks_below_everything(backend):
    nan, inf = float("nan"), float("inf")
    keys = torch.tensor([[nan], [-inf], [1.0], [nan], [inf]])
    scores, index = _search(torch.tensor([[1.0], [nan]]), keys, 5, backend)
    assert index.tolist() == [[4, 2, 1, 0, 3], [0, 1, 2, 3, 4]]
    assert scores[0, :3].tolist() == [inf, 1.0, -inf]
    assert scores[0, 3:].isnan().all()
    assert scores[1].isnan().all()


def test_a_zero_vector_has_cosine_zero_and_no_gradient(backend):
    query = torch.tensor([[0.0, 0.0], [1.0, 1.0]], device=_device(backend)).requires_grad_()
    keys = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], device=_device(backend)).requires_grad_()
    scores, index = topk_keys(query, keys, 2, metric="cosine", backend=backend)
    scores.sum().backward()
    assert index.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(scores.cpu(), torch.tensor([[0.0, 0.0], [0.0, -(0.5**0.5)]]))
    assert not query.grad[0].any()
    assert not keys.grad[0].any()
    assert query.grad[1].isfinite().all()


def test_more_keys_than_the_kernel_selects():
    query, keys = torch.randint(-2, 3, (2, 3)).float(), torch.randint(-2, 3, (30, 3)).float()
    for k in (8, 20, 30):
        for expected, got in zip(
            _search(query, keys, k, "reference"), _search(query, keys, k, "triton"), strict=True
        ):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_change_nothing(metric, monkeypatch):
    query, keys = (t.requires_grad_() for t in _inputs("odd"))
    results = []
    for _ in range(2):
        scores, index = topk_keys(query, keys, 5, metric=metric, backend="reference")
        results.append((scores, index, *torch.autograd.grad(scores.sum(), (query, keys))))
        monkeypatch.setattr(op, "ROW_CHUNK", 2)
        monkeypatch.setattr(op, "KEY_CHUNK", 7)
        monkeypatch.setattr(op, "_GATHER_CHUNK", 100)
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked)


def test_autocast_takes_the_dtype_of_the_keys(backend):
    query, keys = _inputs("odd")
    expected = _search(query.bfloat16().float(), keys, 5, backend)
    with torch.autocast(_device(backend), torch.bfloat16):
        got = _search(query.bfloat16(), keys, 5, backend)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_more_keys_than_an_index_can_name():
    keys = torch.zeros(1, 1).expand(2**31 - 1, 1)
    with pytest.raises(ValueError, match="keys: got 2147483647 keys"):
        topk_keys(torch.zeros(1, 1), keys, 1, backend="triton")
