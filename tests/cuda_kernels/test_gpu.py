"""The CUDA kernels on a GPU: against the reference in float64, in CUDA graphs, on other streams."""

import importlib
from collections.abc import Callable, Iterator

import checks
import pytest
import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.cuda_kernels import common
from sapt_fast.ops.gates import GATES, sparsify
from sapt_fast.ops.projection import Projection
from sapt_fast.ops.queries import QueryProjection, TaskProjections

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
OPS = [op for op in dispatch.ops() if "cuda" in dispatch.backends(op)]


@pytest.fixture(autouse=True)
def kernels_that_run() -> Iterator[None]:
    reason = common.unavailable(torch.cuda.current_device())
    if reason is not None:
        pytest.fail(reason)  # a skip would pass for a run
    with checks.without_tf32():
        yield
    torch.cuda.synchronize()


def _kernel(op: str):
    return importlib.import_module(f"sapt_fast.cuda_kernels.{op}")


def _reference(op: str):
    return importlib.import_module(f"sapt_fast.ops.{op}")


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def _close(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * max(1.0, exact.abs().max().item())
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=limit)


class Decode:
    """A pair of projections with one input, as in attention."""

    def __init__(
        self,
        samples: int,
        width: int,
        adapters: int,
        rank: int,
        dtype: torch.dtype,
        lora_dtype: torch.dtype | None = None,
        without_weight: tuple[int, ...] = (),
    ):
        owners = torch.arange(adapters, device=DEVICE).repeat_interleave(rank).to(torch.int32)
        scale = torch.full((adapters * rank,), 0.7, device=DEVICE)
        self.x = _normal(samples, width, dtype=dtype)
        self.mixture = torch.softmax(_normal(samples, adapters, seed=1), -1)
        self.mixture[:, list(without_weight)] = 0
        self.projections = []
        for p in range(2):
            a = _normal(adapters * rank, width, seed=10 + p) / width**0.5
            b = _normal(adapters * rank, width, seed=20 + p)
            a.view(adapters, -1)[list(without_weight)] = float("nan")
            b.view(adapters, -1)[list(without_weight)] = float("nan")
            self.projections.append(
                Projection(
                    (_normal(width, width, seed=30 + p) / width**0.5).to(dtype),
                    _normal(width, dtype=dtype, seed=40 + p),
                    a.to(lora_dtype or dtype),
                    b.to(lora_dtype or dtype),
                    owners,
                    scale,
                )
            )

    def run(self) -> list[Tensor]:
        results = _kernel("mixed_lora").mixed_lora_fwd(self.x, self.mixture, self.projections)
        return [y for y, _ in results]

    def exact(self) -> list[Tensor]:
        wide = [
            Projection(*(t.double() if t.is_floating_point() else t for t in p))
            for p in self.projections
        ]
        wide = [p._replace(lora_a=p[2].nan_to_num(0), lora_b=p[3].nan_to_num(0)) for p in wide]
        forward = _reference("mixed_lora").mixed_lora_fwd
        return [y for y, _ in forward(self.x.double(), self.mixture.double(), wide)]


@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 5, 16, 64])
@pytest.mark.kernels("mixed_lora", rows="samples")
def test_decode(samples, dtype, lora_dtype):
    for width, adapters, rank in ((64, 3, 4), (63, 5, 1), (4096, 15, 4)):
        case = Decode(samples, width, adapters, rank, dtype, lora_dtype)
        first = case.run()
        for y, exact in zip(first, case.exact(), strict=True):
            _close(y, exact, dtype)
        for _ in range(3):
            assert all(torch.equal(y, again) for y, again in zip(first, case.run(), strict=True))


@pytest.mark.kernels("mixed_lora")
def test_decode_reads_nothing_of_adapters_without_weight():
    idle = tuple(k for k in range(64) if k % 16)
    case = Decode(4, 1024, 64, 4, torch.bfloat16, without_weight=idle)
    for y, exact in zip(case.run(), case.exact(), strict=True):
        _close(y, exact, torch.bfloat16)


@pytest.mark.kernels("mixed_lora")
def test_overlapping_launches():
    """Kernels that start early read nothing of a predecessor that has not finished."""
    cases = [Decode(s, 2048, 15, 4, torch.bfloat16) for s in (1, 3, 8)]
    alone = []
    for case in cases:
        alone.append(case.run())
        torch.cuda.synchronize()
    for _ in range(50):
        together = [case.run() for case in cases]
        for ys, expected in zip(together, alone, strict=True):
            assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4, 5, 16, 33])
@pytest.mark.kernels("nearest_key", rows="queries")
def test_nearest_key(queries, dtype):
    for count, width in ((1000, 63), (20000, 256)):
        query, keys = _normal(queries, width, dtype=dtype), _normal(count, width, seed=1).to(dtype)
        radius = torch.full((count,), 1.4 * width**0.5, device=DEVICE)
        distance, index, nearest = _kernel("nearest_key").nearest_key_fwd(query, keys, radius)
        pairs = torch.cdist(query.double(), keys.double())
        _close(distance, pairs.amin(1), torch.float32)
        _close(pairs.gather(1, nearest[:, None])[:, 0], pairs.amin(1), torch.float32)
        assert torch.equal(index, torch.where(distance <= radius[nearest], nearest, -1))


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4, 5, 16, 33])
@pytest.mark.kernels("topk_keys", rows="queries")
def test_topk_keys(queries, dtype, metric):
    for count, width, k in ((1000, 63, 7), (100000, 128, 32)):
        query, keys = _normal(queries, width, dtype=dtype), _normal(count, width, seed=1).to(dtype)
        scores, index = _kernel("topk_keys").topk_keys_fwd(query, keys, k, metric)
        exact = _reference("topk_keys")._all_scores(query.double(), keys.double(), metric)
        _close(scores, exact.topk(k).values, torch.float32)
        _close(exact.gather(1, index), scores.double(), torch.float32)
        assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.kernels("route", rows="samples")
def test_router(samples, dtype):
    for width, hidden, count in ((63, 5, 9), (4096, 100, 15), (512, 64, 1000)):
        pooled, keys = _normal(samples, width, dtype=dtype), _normal(count, width, seed=1).to(dtype)
        parts = [
            _normal(*shape, dtype=dtype, seed=s)
            for s, shape in enumerate(((hidden, width), (width, hidden), (width,), (width,)))
        ]
        given = (pooled, keys, QueryProjection(*parts), width**0.5)
        wide = QueryProjection(*(t.double() for t in parts))
        scores = _kernel("route").route_scores_fwd(*given)
        exact = _reference("route").route_scores_fwd(pooled.double(), keys.double(), wide, given[3])
        _close(scores, exact, torch.float32)
        weights = _kernel("route").route_fwd(*given, 3, 0.1)
        want = sparsify(torch.softmax(scores.double(), -1), top_k=3, threshold=0.1)
        _close(weights, want, torch.float32)
        shapes = (count, hidden, width), (count, 24, hidden)
        projections = [_normal(*s, seed=2).mul(s[-1] ** -0.5).to(dtype) for s in shapes]
        keys = _normal(count, 24, seed=1).to(dtype)
        for gate in GATES:
            further = None, None, gate, "cosine", True
            given = pooled, keys, TaskProjections(*projections), 0.25
            weights = _kernel("route").route_fwd(*given, *further)
            wide = TaskProjections(*(t.double() for t in projections))
            exact = _reference("route").route_fwd(
                pooled.double(), keys.double(), wide, 0.25, *further
            )
            _close(weights, exact, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 3, 6])
@pytest.mark.kernels("mix_prompts", rows="samples")
def test_mix_prompts(samples, dtype):
    for adapters, length, tokens, width in ((3, 4, 5, 63), (15, 100, 64, 1024)):
        prompts = _normal(adapters, length, width, dtype=dtype)
        mixture = torch.softmax(_normal(samples, adapters, seed=1), -1)
        source = _normal(samples, tokens, width, dtype=dtype, seed=2)
        y = _kernel("mix_prompts").mix_prompts_fwd(prompts, mixture, source, None)
        wide = (prompts.double(), mixture.double(), source.double())
        _close(y, _reference("mix_prompts").mix_prompts_fwd(*wide, None), dtype)


def _calls() -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Of each op an input and a function of it."""
    decode = Decode(3, 256, 5, 4, torch.bfloat16)
    keys = _normal(500, 64, dtype=torch.bfloat16, seed=1)
    radius = torch.full((500,), 9.0, device=DEVICE)
    parts = [_normal(*s, seed=2) for s in ((8, 64), (64, 8), (64,), (64,))]
    router_keys = _normal(9, 64, seed=3)

    def mixed_lora(x: Tensor) -> Tensor:
        return _kernel("mixed_lora").mixed_lora_fwd(x, decode.mixture, decode.projections)[0][0]

    return {
        "mixed_lora": (decode.x, mixed_lora),
        "nearest_key": (
            _normal(6, 64, dtype=torch.bfloat16),
            lambda q: _kernel("nearest_key").nearest_key_fwd(q, keys, radius)[0],
        ),
        "topk_keys": (
            _normal(6, 64, dtype=torch.bfloat16),
            lambda q: _kernel("topk_keys").topk_keys_fwd(q, keys, 5, "dot")[0],
        ),
        "route": (
            _normal(2, 64),
            lambda e: _kernel("route").route_fwd(
                e, router_keys, QueryProjection(*parts), 8.0, 2, None
            ),
        ),
        "mix_prompts": (
            torch.softmax(_normal(2, 4), -1),
            lambda w: _kernel("mix_prompts").mix_prompts_fwd(
                keys[:40].view(4, 10, 64), w, keys[:6].view(2, 3, 64), None
            ),
        ),
    }


@pytest.mark.parametrize("op", OPS)
@pytest.mark.kernels
def test_a_captured_graph_follows_its_input(op):
    given, call = _calls()[op]
    other = given.flip(0)
    want, want_other = call(given), call(other)
    held = given.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(held.clone())  # right behind a copy, which is no kernel
    for values, expected in ((given, want), (other, want_other), (given, want)):
        held.copy_(values)
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.kernels
def test_the_current_stream_is_used(op):
    """The input is written by slow work on another stream, on which the op must wait its turn."""
    given, call = _calls()[op]
    want = call(given)
    late = torch.zeros_like(given)
    square = _normal(2048, 2048)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            square = square @ square / 2048**0.5
        late.copy_(given)
        result = call(late)
    stream.synchronize()
    assert torch.equal(result, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.kernels
def test_nothing_waits_for_the_device(op):
    given, call = _calls()[op]
    call(given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_gpu_that_is_not_current():
    with torch.cuda.device(1):
        here = Decode(3, 256, 5, 4, torch.bfloat16)
        want = here.run()
    torch.cuda.synchronize(1)
    assert here.x.device.index == 1
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(y, w) for y, w in zip(here.run(), want, strict=True))
    assert torch.cuda.current_device() == 0
