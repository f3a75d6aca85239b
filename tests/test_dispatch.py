"""Which backend runs: by name, by preference, and the CUDA kernels for few rows."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sapt_fast import dispatch, ops
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
    monkeypatch.setattr(common, "unavailable", lambda index=None: None)
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


@pytest.mark.parametrize(
    ("rows", "ranks", "few"),
    [(1, 8192, True), (1, 8193, False), (64, 128, True), (64, 129, False), (4, 60, True)],
)
def test_many_rows_of_many_ranks_are_not_few(gpu, rows, ranks, few):
    gpu |= dict.fromkeys(FEW_ROWS)
    chosen = dispatch.resolve("mixed_lora", CUDA, None, torch.bfloat16, rows, ranks)
    assert chosen == ("cuda" if few else "triton")
    assert dispatch.resolve("nearest_key", CUDA, None, torch.bfloat16, 1, ranks) == "cuda"


def test_the_ranks_of_a_call_reach_the_choice(monkeypatch):
    """Of the projection with the most."""
    calls = []
    monkeypatch.setattr(dispatch, "resolve", lambda *a: calls.append(a) or "reference")
    x, mixture = torch.ones(3, 8), torch.ones(3, 2)
    pools = [(torch.ones(8, 8), None, torch.ones(2 * r, 8), torch.ones(2 * r, 8)) for r in (3, 5)]
    with torch.no_grad():
        for weight, bias, a, b in pools:
            ops.mixed_lora_linear(x, weight, bias, a, b, mixture, ranks=len(a) // 2)
    assert [call[4:6] for call in calls] == [(3, 6), (3, 10)]


def test_each_gpu_for_itself(monkeypatch, caplog):
    """Beside a GPU that the build does not cover, others run its kernels; the log says why not."""
    devices = [{"name": name, "capability": of} for name, of in (("H", (9, 0)), ("old", (7, 5)))]
    report = {"compiled": True, "error": "", "architectures": ["sm_90a"], "devices": devices}
    native = types.SimpleNamespace(cuda_runtime=lambda: report)
    monkeypatch.setattr(common, "native", lambda: native)
    monkeypatch.setattr(common, "unrecorded", lambda *_: None)
    monkeypatch.setattr(dispatch, "import_failure", lambda *_: None)
    dispatch._resolve.cache_clear()
    good, old = torch.device("cuda:0"), torch.device("cuda:1")
    assert dispatch.resolve("route", good, "cuda", torch.bfloat16, 1) == "cuda"
    assert dispatch.resolve("route", good, None, torch.bfloat16, 1) == "cuda"
    with pytest.raises(dispatch.BackendError, match=r"old \(sm_75\): add 75 to SAPT"):
        dispatch.resolve("route", old, "cuda", torch.bfloat16, 1)
    with caplog.at_level("INFO", "sapt_fast.dispatch"):
        for _ in range(2):
            assert dispatch.resolve("route", old, None, torch.bfloat16, 1) == "triton"
    (record,) = caplog.records
    assert re.search(r"on cuda:1: backend triton; not cuda: .*\(sm_75\)", record.getMessage())
    assert dispatch.unavailable("route", "cuda", "cuda") is None
    assert "none with index 2" in str(dispatch.unavailable("route", "cuda", "cuda:2"))
    dispatch._resolve.cache_clear()


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
    monkeypatch.setattr(common, "unavailable", lambda index=None: "built without CUDA")
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
