"""Which backend runs: by name, by preference, and the CUDA kernels for few rows."""

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.cuda_kernels import common
from sapt_fast.triton_kernels.blocks import common as triton_common

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """As if a GPU were here and ran everything; gives the record of what ran correctly."""
    recorded = {}
    monkeypatch.setattr(dispatch, "_import_failure", lambda *_: None)
    monkeypatch.setattr(common, "unavailable", lambda: None)
    monkeypatch.setattr(common, "unrecorded", lambda op: recorded.get(op, "not recorded"))
    caches = (dispatch._resolve, dispatch.unchosen, dispatch._cuda_unavailable)
    for cached in caches:
        cached.cache_clear()
    yield recorded
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("op", sorted(dispatch._FEW_ROWS))
def test_cuda_kernels_are_chosen_for_few_rows_once_they_ran_correctly(gpu, op):
    narrow, wide = dispatch._FEW_ROWS[op]
    half, single = torch.bfloat16, torch.float32
    assert dispatch.resolve(op, CUDA, None, half, 1) == "triton"
    gpu[op] = None
    dispatch._resolve.cache_clear()
    dispatch.unchosen.cache_clear()
    assert dispatch.resolve(op, CUDA, None, half, narrow) == "cuda"
    assert dispatch.resolve(op, CUDA, None, half, narrow + 1) == "triton"
    assert dispatch.resolve(op, CUDA, None, single, wide) == "cuda"
    assert dispatch.resolve(op, CUDA, None, single, wide + 1) == "triton"
    assert dispatch.resolve(op, CUDA, None, half) == "triton"  # a gradient may be wanted


@pytest.mark.parametrize("op", sorted(dispatch._FEW_ROWS))
def test_cuda_by_name_runs_whatever_is_recorded(gpu, op):
    assert dispatch.resolve(op, CUDA, "cuda", torch.bfloat16, 10**6) == "cuda"
    with pytest.raises(dispatch.BackendError, match="float64"):
        dispatch.resolve(op, CUDA, "cuda", torch.float64, 1)
    with pytest.raises(dispatch.BackendError, match="move them to a GPU"):
        dispatch.resolve(op, torch.device("cpu"), "cuda", torch.float32, 1)


def test_an_op_without_cuda_kernels_says_so(gpu):
    with pytest.raises(dispatch.BackendError, match="no cuda kernel"):
        dispatch.resolve("mix_experts", CUDA, "cuda", torch.float32)


def test_cuda_without_a_gpu_or_a_build_says_why(monkeypatch):
    monkeypatch.setattr(common, "unavailable", lambda: "built without CUDA")
    dispatch._cuda_unavailable.cache_clear()
    try:
        with pytest.raises(dispatch.BackendError, match="built without CUDA"):
            dispatch.resolve("mixed_lora", CUDA, "cuda", torch.float32)
    finally:
        dispatch._cuda_unavailable.cache_clear()


def test_interpreted_triton_is_taken_by_name_only(monkeypatch):
    assert triton_common.INTERPRETED or torch.cuda.is_available()
    cpu = torch.device("cpu")
    assert dispatch.resolve("mix_prompts", cpu, None, torch.float32) == "reference"
    if triton_common.INTERPRETED:
        assert dispatch.resolve("mix_prompts", cpu, "triton", torch.float32) == "triton"
