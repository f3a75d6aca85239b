"""Which backend runs: by name, by preference, and the CUDA kernels for few rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.cuda_kernels import common
from sapt_fast.triton_kernels.blocks import common as triton_common

CUDA = torch.device("cuda")
FEW_ROWS = {op: row.few_rows for op, row in dispatch._rows().items() if any(row.few_rows)}


def test_ops_and_backends_are_what_the_folders_hold():
    """An op is a module of sapt_fast.ops with a row; a backend has it by a module of its name."""
    package = Path(dispatch.__file__).parent
    texts = {p.stem: p.read_text() for p in (package / "ops").glob("*.py")}
    assert set(dispatch.ops()) == {op for op, text in texts.items() if "DISPATCH =" in text}
    assert {f"{b}_kernels" for b in dispatch.BACKENDS[1:]} == {
        folder.name for folder in package.glob("*_kernels")
    }
    for op in dispatch.ops():
        for backend in dispatch.BACKENDS[1:]:
            module = package / f"{backend}_kernels" / f"{op}.py"
            assert (backend in dispatch.backends(op)) == module.exists(), (op, backend)


def test_a_gradient_is_computed_by_a_backend_that_has_it():
    for op in ("mixed_lora", "mix_prompts"):
        assert dispatch.backward(op, "cuda") == "triton"
        assert dispatch.backward(op, "triton") == "triton"
    assert dispatch.backward("mixed_lora", "cpu") == "cpu"


@pytest.mark.parametrize(
    "first", ["import sapt_fast.ops.route", "from sapt_fast.ops.route import QueryProjection"]
)
def test_an_op_named_like_its_module_is_the_function(first):
    code = f"{first}\nfrom sapt_fast import dispatch\ndispatch.ops()\n"
    code += "import sapt_fast.ops as ops\nfrom sapt_fast.ops import route\n"
    code += "assert all(callable(getattr(ops, name)) for name in ops.__all__)\n"
    code += "assert callable(route) and dispatch.kernels('route', 'reference').route is route"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def gpu(monkeypatch):
    """As if a GPU were here and ran everything; gives the record of what ran correctly."""
    recorded = {}
    monkeypatch.setattr(dispatch, "import_failure", lambda *_: None)
    monkeypatch.setattr(common, "unavailable", lambda: None)
    monkeypatch.setattr(common, "unrecorded", lambda op, *_: recorded.get(op, "not recorded"))
    dispatch._resolve.cache_clear()
    yield recorded
    dispatch._resolve.cache_clear()


@pytest.mark.parametrize("op", FEW_ROWS)
def test_cuda_kernels_are_chosen_for_few_rows_once_they_ran_correctly(gpu, op):
    narrow, wide = FEW_ROWS[op]
    half, single = torch.bfloat16, torch.float32
    assert dispatch.resolve(op, CUDA, None, half, 1) == "triton"
    gpu[op] = None
    dispatch._resolve.cache_clear()
    assert dispatch.resolve(op, CUDA, None, half, narrow) == "cuda"
    assert dispatch.resolve(op, CUDA, None, half, narrow + 1) == "triton"
    assert dispatch.resolve(op, CUDA, None, single, wide) == "cuda"
    assert dispatch.resolve(op, CUDA, None, single, wide + 1) == "triton"
    assert dispatch.resolve(op, CUDA, None, half) == "triton"  # a gradient may be wanted


@pytest.mark.parametrize("op", FEW_ROWS)
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
    dispatch._resolve.cache_clear()
    with pytest.raises(dispatch.BackendError, match="built without CUDA"):
        dispatch.resolve("mixed_lora", CUDA, "cuda", torch.float32)


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.8.0", "2.10.0", True)],
)
def test_an_interpreter_that_numpy_breaks_says_so(monkeypatch, triton, numpy, runs):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, version in (("triton", triton), ("numpy", numpy)):
        monkeypatch.setattr(f"{name}.__version__", version)
    reason = dispatch.unavailable("mixed_lora", "triton", "cpu", torch.float32)
    assert (reason is None) == runs
    assert runs or "numpy<2.4" in str(reason)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert dispatch.unavailable("mixed_lora", "triton", "cuda", torch.float32) is None


@pytest.mark.parametrize("op", FEW_ROWS)
def test_cuda_kernels_are_chosen_for_the_calls_that_ran_correctly(gpu, op, monkeypatch):
    """Of bfloat16 up to four rows: no other dtype, no more rows."""
    known = lambda _, dtype, rows: None if dtype == torch.bfloat16 and rows <= 4 else "no"  # noqa: E731
    monkeypatch.setattr(common, "unrecorded", known)
    assert dispatch.resolve(op, CUDA, None, torch.bfloat16, 4) == "cuda"
    assert dispatch.resolve(op, CUDA, None, torch.bfloat16, 5) == "triton"
    assert dispatch.resolve(op, CUDA, None, torch.float16, 4) == "triton"
    assert dispatch.resolve(op, CUDA, None, torch.bfloat16) == "triton"


def test_interpreted_triton_is_taken_by_name_only(monkeypatch):
    assert triton_common.INTERPRETED or torch.cuda.is_available()
    cpu = torch.device("cpu")
    assert dispatch.resolve("mix_prompts", cpu, None, torch.float32) == "reference"
    if triton_common.INTERPRETED:
        assert dispatch.resolve("mix_prompts", cpu, "triton", torch.float32) == "triton"
