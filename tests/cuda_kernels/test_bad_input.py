"""What the kernels cannot do is an error that says what to do; the caller's tensors survive."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sapt_fast import dispatch, ops
from sapt_fast.cuda_kernels import common
from sapt_fast.ops.route import QueryProjection

CUDA = torch.device("cuda")
OPS = [op for op in dispatch.ops() if "cuda" in dispatch.backends(op)]
OUT_OF_MEMORY, NO_KERNEL_IMAGE = 2, 209  # cudaError_t


@pytest.fixture
def runtime(monkeypatch) -> dict:
    """What the compiled module says of itself and of the devices; a CPU-only build."""
    report = {"compiled": False, "error": "", "architectures": [], "devices": [], "sources": {}}
    module = SimpleNamespace(cuda_runtime=lambda: report)
    monkeypatch.setitem(sys.modules, "sapt_fast._C", module)
    caches = common.native, dispatch._resolve
    for cached in caches:
        cached.cache_clear()
    yield report
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("op", OPS)
class TestDispatch:
    def test_a_build_for_the_cpu_alone(self, runtime, op):
        with pytest.raises(dispatch.BackendError, match=r"without CUDA.*SAPT_FAST_BUILD=cuda"):
            dispatch.resolve(op, CUDA, "cuda", torch.float32)
        assert dispatch.resolve(op, CUDA, None, torch.float32, 1) in ("triton", "reference")

    def test_a_device_without_support(self, runtime, op):
        device = {"name": "an old GPU", "capability": (7, 5)}
        runtime |= {"compiled": True, "architectures": ["sm_80"], "devices": [device]}
        with pytest.raises(dispatch.BackendError, match=r"an old GPU \(sm_75\): add 75 to SAPT"):
            dispatch.resolve(op, CUDA, "cuda", torch.float32)
        assert dispatch.resolve(op, CUDA, None, torch.float32, 1) in ("triton", "reference")

    def test_no_driver(self, runtime, op):
        runtime |= {"compiled": True, "architectures": ["sm_80"], "error": "no driver"}
        with pytest.raises(dispatch.BackendError, match="the CUDA runtime says: no driver"):
            dispatch.resolve(op, CUDA, "cuda", torch.float32)

    def test_a_dtype_without_kernels(self, runtime, op):
        with pytest.raises(dispatch.BackendError, match="float64 runs in the reference"):
            dispatch.resolve(op, CUDA, "cuda", torch.float64)


def test_cuda_tensors_on_the_cpu_backend():
    with FakeTensorMode():
        x, weight = torch.zeros(2, 8, device=CUDA), torch.zeros(6, 8, device=CUDA)
        a, b, mixture = (torch.zeros(*s, device=CUDA) for s in ((4, 8), (4, 6), (2, 1)))
        with pytest.raises(dispatch.BackendError, match="are on 'cuda': move them to the CPU"):
            ops.mixed_lora_linear(x, weight, None, a, b, mixture, ranks=4, backend="cpu")


def _call(op: str) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The caller's tensors, and the op on them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if op == "mixed_lora":
        given = [normal(2, 24), normal(20, 24), normal(20), normal(8, 24), normal(8, 20)]
        given.append(torch.softmax(normal(2, 2), -1))
        return given, lambda: ops.mixed_lora_linear(*given, ranks=4)
    if op == "nearest_key":
        given = [normal(3, 8), normal(20, 8), torch.ones(20)]
        return given, lambda: ops.nearest_key(*given)[1]
    if op == "topk_keys":
        given = [normal(3, 8), normal(20, 8)]
        return given, lambda: ops.topk_keys(*given, 4)[0]
    if op == "route":
        given = [normal(3, 16), normal(5, 16), normal(4, 16), normal(16, 4), normal(16), normal(16)]
        return given, lambda: ops.route(*given[:2], QueryProjection(*given[2:]), top_k=3)
    given = [normal(3, 2, 8), torch.softmax(normal(2, 3), -1), normal(2, 4, 8)]
    return given, lambda: ops.mix_prompts(*given)


@pytest.mark.parametrize("op", OPS)
class TestFailures:
    @pytest.fixture
    def on_cuda(self, cuda, monkeypatch):
        for op in OPS:
            cuda(op)
        monkeypatch.setattr(dispatch, "resolve", lambda op, *_, **__: "cuda")
        with torch.no_grad():
            yield

    @pytest.mark.parametrize(
        ("status", "advice"),
        [
            (OUT_OF_MEMORY, "free GPU memory, or pass fewer rows"),
            (NO_KERNEL_IMAGE, "add it to SAPT_FAST_CUDA_ARCHS and reinstall"),
        ],
    )
    def test_a_launch_that_fails(self, on_cuda, emulated_module, op, status, advice):
        given, call = _call(op)
        kept, want = [t.clone() for t in given], call()
        emulated_module.refuse_next(status)
        with pytest.raises(RuntimeError, match=f"{op.split('_')[0]}.*: refused; .*{advice}"):
            call()
        assert all(torch.equal(t, k) for t, k in zip(given, kept, strict=True))
        assert torch.equal(call(), want)

    def test_memory_that_runs_out(self, on_cuda, op, monkeypatch):
        """Of each allocation in turn."""
        given, call = _call(op)
        kept, want, allocate = [t.clone() for t in given], call(), Tensor.new_empty
        left = 0

        def new_empty(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return allocate(*arguments, **named)

        failures = 0
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "new_empty", new_empty)
            for allowed in range(10):
                left = allowed
                try:
                    got = call()
                    break
                except torch.OutOfMemoryError:
                    failures += 1
                assert all(torch.equal(t, k) for t, k in zip(given, kept, strict=True))
        assert failures > 0
        assert torch.equal(got, want)
