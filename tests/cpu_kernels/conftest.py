"""Every instruction set of this CPU, numbers of threads, and memory that starts as NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["default", "avx2", "avx512", "avx512_bf16"])
def capability(request):
    from sapt_fast import _C

    if request.param not in _C.cpu_capabilities():
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture
def with_threads():
    """`with_threads(n, function)`: the result of the function where torch uses n threads."""

    def run(count, function):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return run
