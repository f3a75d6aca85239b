"""Every backend of the router against float64: pooling, scores, their gradients, registration."""

import importlib
import math

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops import QueryProjection, pool_tokens, route
from sapt_fast.ops.route import route_scores

op = importlib.import_module("sapt_fast.ops.route")
pool_op = importlib.import_module("sapt_fast.ops.pool_tokens")

BACKENDS = ["reference", "triton"]
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
VOCABULARY = 9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = dispatch.unavailable("route", request.param, _device(request.param))
    assert reason is None, reason
    return request.param


@pytest.fixture(params=["reference", "cpu", "triton"])
def pooler(request):
    """A backend of pool_tokens."""
    reason = dispatch.unavailable("pool_tokens", request.param, _device(request.param))
    assert reason is None, reason
    return request.param


def _device(backend):
    return GPU if backend == "triton" else "cpu"


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _tokens(shape, width, dtype=torch.float32, masked=True):
    """(ids, table, mask); the first row of the mask is all zero."""
    mask = (torch.rand(shape) > 0.4).long() if masked else None
    if mask is not None and shape[0]:
        mask[0] = 0
    return torch.randint(0, VOCABULARY, shape), torch.randn(VOCABULARY, width).to(dtype), mask


def _pooled(ids, table, mask, pooling, dy=None):
    """Pooled embeddings and the table's gradient in float64, by the formula."""
    table = table.double().requires_grad_()
    embeds = table[ids]
    keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask != 0
    if pooling == "mean":
        pooled = (embeds * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
    else:
        first = embeds.masked_fill(~keep[..., None], -math.inf).argmax(1, keepdim=True)
        pooled = torch.where(keep.any(1, keepdim=True), embeds.gather(1, first)[:, 0], 0.0)
    if dy is not None:
        pooled.backward(dy.double())
    return pooled.detach(), table.grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=_name)
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("shape", "width"), [((1, 1), 1), ((3, 7), 12), ((2, 37), 33)], ids=["one", "short", "split"]
)
def test_pooling_and_its_gradient(pooler, shape, width, masked, pooling, dtype):
    ids, table, mask = _tokens(shape, width, dtype, masked)
    dy = torch.randn(shape[0], width).to(dtype)
    exact, exact_grad = _pooled(ids, table, mask, pooling, dy)
    device = _device(pooler)
    leaf = table.to(device, copy=True).requires_grad_()
    mask = None if mask is None else mask.to(device)
    pooled = pool_tokens(ids.to(device), leaf, mask=mask, pooling=pooling, backend=pooler)
    pooled.backward(dy.to(device))
    tolerance = 0 if pooling == "max" else TOLERANCE[dtype]
    assert pooled.dtype == leaf.grad.dtype == dtype
    torch.testing.assert_close(pooled.double().cpu(), exact, rtol=tolerance, atol=tolerance)
    tolerance = TOLERANCE[dtype] * 4  # the reference sums in the table's dtype
    torch.testing.assert_close(leaf.grad.double().cpu(), exact_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_ids_and_masks_of_any_dtype_and_layout(pooler, mask_dtype, pooling):
    ids, table, mask = _tokens((3, 11), 12)
    exact, exact_grad = _pooled(ids, table, mask, pooling, torch.ones(3, 12))
    device = _device(pooler)
    ids = ids.to(device, torch.int32).t().contiguous().t()
    mask = mask.to(device, mask_dtype).t().contiguous().t()
    leaf = table.to(device).t().contiguous().t().requires_grad_()
    pooled = pool_tokens(ids, leaf, mask=mask, pooling=pooling, backend=pooler)
    pooled.sum().backward()  # an expanded gradient
    torch.testing.assert_close(pooled.double().cpu(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double().cpu(), exact_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_pool_gives_zeros(pooler, shape, pooling):
    ids, table, mask = (t.to(_device(pooler)) for t in _tokens(shape, 12))
    table.requires_grad_()
    for given in (None, mask):
        pooled = pool_tokens(ids, table, mask=given, pooling=pooling, backend=pooler)
        assert torch.equal(pooled, torch.zeros_like(pooled))
        assert pooled.shape == (shape[0], 12)
    if pooled.requires_grad:
        pooled.sum().backward()
        assert not table.grad.any()


def test_samples_that_share_a_winner_add_their_gradients(pooler):
    table = torch.zeros(VOCABULARY, 20)
    table[3] = 1
    table = table.to(_device(pooler)).requires_grad_()
    ids = torch.tensor([[1, 3, 3], [3, 2, 1], [0, 0, 3], [4, 4, 4]] * 5, device=table.device)
    dy = torch.randn(20, 20).to(table.device)
    pool_tokens(ids, table, backend=pooler).backward(dy)
    expected = torch.zeros(VOCABULARY, 20)
    shares = [b for b in range(20) if b % 4 != 3]
    expected[3], expected[4] = dy[shares].sum(0).cpu(), dy[3::4].sum(0).cpu()
    torch.testing.assert_close(table.grad.cpu(), expected)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_the_triton_kernel_gives_nan_for_unknown_ids_and_nan_embeddings(pooling):
    table = torch.randn(VOCABULARY, 12)
    table[7] = float("nan")
    ids = torch.randint(0, 7, (4, 40))
    ids[1, 30], ids[2, 1], ids[3, 35] = VOCABULARY, -1, 7
    ids, table, mask = ids.to(GPU), table.to(GPU), torch.ones(4, 40, device=GPU)
    # The op itself refuses such ids where it can read them without waiting for a device.
    kernel = dispatch.kernels("pool_tokens", "triton").pool_tokens_fwd
    pooled, _ = kernel(ids, table, mask, pooling)
    assert pooled.isnan().all(-1).tolist() == [False, True, True, True]
    mask[(ids >= 7) | (ids < 0)] = 0
    assert not pool_tokens(ids, table, mask=mask, pooling=pooling, backend="triton").isnan().any()


def test_the_winner_is_kept_only_for_a_table_that_trains(pooler):
    saved = []
    ids, table, _ = (t.to(_device(pooler)) for t in _tokens((2, 5), 12))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pool_tokens(ids, table, backend=pooler)
    assert not saved


# --- scores ------------------------------------------------------------------------------------

# name: (B, D, H, K); H None is no projection
SCORES = {
    "odd": (3, 33, 5, 7),
    "one_of_everything": (1, 1, 1, 1),
    "keys_and_bottleneck_beyond_a_tile": (2, 40, 19, 13),
    "no_projection": (2, 33, None, 5),
}


def _route_inputs(case, dtype=torch.float32):
    batch, width, hidden, count = SCORES[case]
    inputs = {"pooled": torch.randn(batch, width), "keys": torch.randn(count, width)}
    if hidden is not None:
        inputs["down"] = torch.randn(hidden, width) / width**0.5
        inputs["up"] = torch.randn(width, hidden)
        inputs["norm_weight"], inputs["norm_bias"] = torch.rand(width) + 0.5, torch.randn(width)
    return {n: t.to(dtype) for n, t in inputs.items()}


def _scores(inputs, **options):
    pooled, keys, *weights = inputs.values()
    projection = QueryProjection(*weights) if weights else None
    return route_scores(pooled, keys, projection, **options)


def _leaves(inputs, device, dtype=None):
    return {n: t.to(device, dtype, copy=True).requires_grad_() for n, t in inputs.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=_name)
@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("temperature", [None, 2.5])
def test_scores_and_every_gradient(backend, case, dtype, temperature):
    inputs = _route_inputs(case, dtype)
    exact = _leaves(inputs, "cpu", torch.float64)
    expected = _scores(exact, temperature=temperature)
    d_scores = torch.randn(expected.shape)
    expected.backward(d_scores.double())
    leaves = _leaves(inputs, _device(backend))
    scores = _scores(leaves, temperature=temperature, backend=backend)
    scores.backward(d_scores.to(scores.device))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == dtype
        scale = exact[name].grad.abs().max().item()
        tolerance = max(TOLERANCE[dtype], 1e-5) * max(scale, 1.0)
        torch.testing.assert_close(
            leaf.grad.double().cpu(), exact[name].grad, rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("case", ["odd", "no_projection"])
def test_the_written_out_gradient_is_that_of_autograd(case):
    leaves = _leaves(_route_inputs(case), "cpu", torch.float64)
    pooled, keys, *weights = leaves.values()
    projection = QueryProjection(*weights) if weights else None
    scores = op.route_scores_fwd(pooled, keys, projection, 1.7)
    d_scores = torch.randn_like(scores)
    scores.backward(d_scores)
    needs = tuple(i != 1 and i < len(leaves) for i in range(6))
    values = (t.detach() for t in (pooled, keys))
    grads = op.route_scores_bwd(d_scores, *values, projection, 1.7, needs)
    assert grads[1] is None
    assert all(grad is None for grad in grads[len(leaves) :])
    for grad, leaf, wanted in zip(grads, leaves.values(), needs, strict=False):
        if wanted:
            torch.testing.assert_close(grad, leaf.grad)


def test_mixed_dtypes_and_non_contiguous_inputs(backend):
    inputs = _route_inputs("odd")
    inputs["keys"] = inputs["keys"].bfloat16()
    expected = _scores({n: t.double() for n, t in inputs.items()})
    strided = {}
    for name, tensor in inputs.items():
        wide = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)
        wide[..., 0] = tensor
        strided[name] = wide.to(_device(backend))[..., 0]
    scores = _scores(strided, backend=backend)
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-5, atol=1e-5)


# --- weights -----------------------------------------------------------------------------------

SELECTIONS = {
    "all": {},
    "top_1": {"top_k": 1},
    "top_3": {"top_k": 3},
    "more_than_there_are": {"top_k": 200},
    "threshold": {"threshold": 0.1},
    "threshold_0": {"threshold": 0.0},
    "only_the_largest": {"threshold": 1.0},
    "both": {"top_k": 3, "threshold": 0.05},
}
SCORES["one_key"] = (1, 33, 5, 1)
SCORES["fifteen_keys"] = (2, 20, 5, 15)
SCORES["keys_beyond_the_small_tile"] = (2, 9, 3, 70)


def _weights(inputs, **options):
    pooled, keys, *weights = inputs.values()
    return route(pooled, keys, QueryProjection(*weights) if weights else None, **options)


def _exact_weights(scores, top_k=None, threshold=None):
    """Weights of float64 scores, one sample and adapter at a time; differentiable."""
    rows = []
    for row in torch.softmax(scores, -1):
        order = sorted(range(len(row)), key=lambda k: (-row[k].item(), k))
        keep = [k for k in order[:top_k] if row[k] >= (threshold or 0)] or order[:1]
        mask = torch.zeros_like(row).index_fill(0, torch.tensor(keep), 1)
        rows.append(row * mask / (row * mask).sum())
    return torch.stack(rows)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    "case",
    ["odd", "one_of_everything", "one_key", "fifteen_keys", "keys_beyond_the_small_tile",
     "no_projection"],
)  # fmt: skip
def test_weights_and_every_gradient(backend, case, selection):
    inputs, options = _route_inputs(case), SELECTIONS[selection]
    exact = _leaves(inputs, "cpu", torch.float64)
    expected = _exact_weights(_scores(exact), **options)
    d_weights = torch.randn(expected.shape)
    expected.backward(d_weights.double())
    leaves = _leaves(inputs, _device(backend))
    weights = _weights(leaves, backend=backend, **options)
    weights.backward(d_weights.to(weights.device))
    assert weights.dtype == torch.float32
    assert torch.equal(weights.cpu() == 0, expected == 0)
    torch.testing.assert_close(weights.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    for name, leaf in leaves.items():
        scale = max(exact[name].grad.abs().max().item(), 1.0)
        torch.testing.assert_close(
            leaf.grad.double().cpu(), exact[name].grad, rtol=0, atol=2e-5 * scale
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_name)
def test_weights_of_half_precision_inputs(backend, dtype):
    inputs = _route_inputs("fifteen_keys", dtype)
    expected = _exact_weights(_scores({n: t.double() for n, t in inputs.items()}), top_k=4)
    leaves = _leaves(inputs, _device(backend))
    weights = _weights(leaves, backend=backend, top_k=4)
    torch.testing.assert_close(weights.double().cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 15, 70])
def test_of_equal_scores_those_of_the_lower_index_stay(backend, count):
    device = _device(backend)
    pooled, keys = torch.ones(2, 8, device=device), torch.ones(count, 8, device=device)
    for top_k in (1, 3, count):
        kept = min(top_k, count)
        weights = route(pooled, keys, None, backend=backend, top_k=top_k)
        expected = torch.tensor([1 / kept] * kept + [0.0] * (count - kept)).expand(2, -1)
        torch.testing.assert_close(weights.cpu(), expected)


def test_a_weight_equal_to_the_threshold_stays(backend):
    device = _device(backend)
    # Two equal scores and two that vanish: weights of exactly a half.
    keys = torch.tensor([[40.0], [40.0], [-80.0], [-80.0]], device=device)
    ones = torch.ones(1, 1, device=device)
    at, above = (
        route(ones, keys, None, backend=backend, threshold=threshold).cpu()
        for threshold in (0.5, 0.51)
    )
    assert at.tolist() == above.tolist() == [[0.5, 0.5, 0.0, 0.0]]  # the largest always stay
    keys = torch.tensor([[2.0], [2.0], [2.0], [3.0]], device=device)
    low = torch.softmax(keys[:, 0], 0)[0].item()
    kept = route(ones, keys, None, backend=backend, threshold=low * (1 - 1e-5)).cpu()
    dropped = route(ones, keys, None, backend=backend, threshold=low * (1 + 1e-5)).cpu()
    assert (kept > 0).all()
    assert dropped.tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_more_keys_than_one_launch_takes(backend, monkeypatch):
    inputs = _route_inputs("fifteen_keys")
    fused = _weights({n: t.to(_device(backend)) for n, t in inputs.items()}, backend=backend)
    monkeypatch.setattr(op, "_FUSED_KEYS", 14)
    leaves = _leaves(inputs, _device(backend))
    exact = _leaves(inputs, "cpu", torch.float64)
    _weights(leaves, backend=backend, top_k=3).square().sum().backward()
    _exact_weights(_scores(exact), top_k=3).square().sum().backward()
    torch.testing.assert_close(
        leaves["keys"].grad.double().cpu(), exact["keys"].grad, rtol=1e-4, atol=1e-6
    )
    parted = _weights({n: t.to(_device(backend)) for n, t in inputs.items()}, backend=backend)
    torch.testing.assert_close(parted, fused, rtol=1e-6, atol=1e-7)


def test_weights_take_one_launch(monkeypatch):
    kernels = importlib.import_module("sapt_fast.triton_kernels.route")
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return real[grid]

    real = kernels._route_kernel
    monkeypatch.setattr(kernels, "_route_kernel", Counted())
    inputs = {n: t.to(GPU) for n, t in _route_inputs("odd").items()}

    class NoArithmetic(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    called = []
    with NoArithmetic():
        _weights(inputs, backend="triton", top_k=2, threshold=0.1)
    assert len(launches) == 1
    # The op itself; inside it Triton's interpreter copies the arguments, a GPU would not.
    assert {str(f).split(".")[0] for f in called} == {"sapt_fast"}


def test_what_the_backward_keeps_of_the_routing_is_its_weights():
    leaves = _leaves(_route_inputs("odd"), GPU)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weights = _weights(leaves, backend="triton", top_k=2)
    inputs = {t.data_ptr() for t in leaves.values()}
    (kept,) = (t for t in saved if t.data_ptr() not in inputs)
    assert torch.equal(kept, weights)


def test_routing_end_to_end(backend):
    inputs = _route_inputs("odd")
    pooled, keys, *weights = inputs.values()
    expected = route(
        pooled.double(), keys.double(), QueryProjection(*(t.double() for t in weights))
    )
    device = _device(backend)
    projection = QueryProjection(*(t.to(device) for t in weights))
    embeds = torch.stack([pooled, pooled - 1], 1).to(device)
    options = {"backend": backend, "top_k": 3}
    mixture = route(embeds, keys.to(device), projection, **options).cpu()
    kept = expected.topk(3).indices
    torch.testing.assert_close(
        mixture.double().gather(1, kept),
        expected.gather(1, kept) / expected.gather(1, kept).sum(-1, keepdim=True),
        rtol=1e-5,
        atol=1e-6,
    )


# --- as registered ops -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 50], ids=["aligned", "unaligned"])
def test_the_tiles_of_a_large_gpu(monkeypatch, width):
    """Interpreted kernels have small tiles of their own; here they run those of an H200."""
    common = pytest.importorskip("sapt_fast.triton_kernels.blocks.common")
    traits = common.DeviceTraits(capability=90, num_sms=132)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)
    ids, table, mask = _tokens((2, 150), width)
    for pooling in ("max", "mean"):
        dy = torch.randn(2, width)
        exact, exact_grad = _pooled(ids, table, mask, pooling, dy)
        leaf = table.to(GPU, copy=True).requires_grad_()
        arguments = {"mask": mask.to(GPU), "pooling": pooling, "backend": "triton"}
        pooled = pool_tokens(ids.to(GPU), leaf, **arguments)
        pooled.backward(dy.to(GPU))
        torch.testing.assert_close(pooled.double().cpu(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double().cpu(), exact_grad, rtol=1e-6, atol=1e-6)
    monkeypatch.setitem(SCORES, "large", (2, width, 20, 18))
    inputs = _route_inputs("large")
    expected = _scores({n: t.double() for n, t in inputs.items()})
    inputs = {n: t.to(GPU) for n, t in inputs.items()}
    scores = _scores(inputs, backend="triton")
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    weights = _weights(inputs, backend="triton", top_k=3, threshold=0.1).double().cpu()
    torch.testing.assert_close(weights, _exact_weights(expected, 3, 0.1), rtol=1e-5, atol=1e-5)


def test_autocast_leaves_the_kernels_in_float32():
    inputs = _route_inputs("odd")
    leaves, exact = _leaves(inputs, GPU), _leaves(inputs, "cpu", torch.float64)
    with torch.autocast(GPU, torch.bfloat16):
        scores = _scores(leaves, backend="triton")
        scores.sum().backward()
    expected = _scores(exact)
    expected.sum().backward()
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        leaves["up"].grad.double().cpu(), exact["up"].grad, rtol=1e-4, atol=1e-5
    )


def test_the_automatic_choice_on_a_cpu():
    cpu = torch.device("cpu")
    assert dispatch.resolve("route", cpu) == "reference"
    assert dispatch.resolve("pool_tokens", cpu) == "cpu"
    ids, table, mask = _tokens((3, 7), 12)
    direct = op.pool_tokens_fwd(ids, table, mask, "max")
    assert torch.equal(pool_tokens(ids, table, mask=mask), direct)
