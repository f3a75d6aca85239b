"""Settings that must be made before the libraries under test are imported."""

import os

# Two threads in each process that shares the tests, so that kernels still split their work, but
# none that waits for work by spinning on another's core. Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton decides at import whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import importlib.util
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

# Files with many cases of one kind: of each test's cases about one in n runs by default, the same
# ones every time; the others are `thorough`.
_ONE_IN = {
    "cpu_kernels/test_mixed_lora.py": 4,
    "cpu_kernels/test_topk_keys.py": 4,
    "cuda_kernels/test_compiled.py": 100,
    "cuda_kernels/test_nearest_key.py": 3,
    "cuda_kernels/test_topk_keys.py": 3,
    "editing/test_editors.py": 2,
    "methods/test_edits_in_use.py": 2,
    "methods/test_melo.py": 2,
    "methods/test_warmup.py": 2,
    "ops/test_contract.py": 2,
    "ops/test_dtypes.py": 3,
    "ops/test_mix_experts.py": 3,
    "ops/test_projections.py": 3,
    "ops/test_route_backends.py": 3,
    "ops/test_topk_keys.py": 3,
    "ops/test_zero_weights.py": 3,
    "ops/test_zeros_and_empties.py": 2,
    "peft_models/test_changes.py": 2,
    "prompts/test_generation.py": 3,
    "sites/test_device_maps.py": 3,
    "routing/test_generation.py": 3,
    "sites/test_layer_inputs.py": 3,
    "commands/test_options.py": 3,
    "routing/test_packed_rows.py": 3,
    "roofline/test_mixed_lora.py": 3,
    "storage/test_storage_checkpoint.py": 3,
    "triton_kernels/test_mixed_lora.py": 5,
    "triton_kernels/test_plans.py": 2,
    "triton_kernels/test_searches.py": 2,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks further cases as `thorough`; the first case of every test runs."""
    root, seen = Path(__file__).parent, set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        share = _ONE_IN.get(item.path.relative_to(root).as_posix(), 1)
        first = test not in seen
        seen.add(test)
        if not first and zlib.crc32(item.nodeid.encode()) % share:
            item.add_marker(pytest.mark.thorough)


def pytest_collectstart() -> None:
    """Collects no garbage while the tests are imported: there is next to none."""
    gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keeps what is imported out of later garbage collections.

    accelerate collects at the end of every training. Over all imported libraries that would take
    as long as the training of a tiny model.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Lets the interpreter free everything at its end, as nanobind asks."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _checked_kernels() -> Iterator[None]:
    """Checks each access to memory of the kernels that Triton's interpreter runs, and speeds it."""
    if "TRITON_INTERPRET" not in os.environ or importlib.util.find_spec("triton") is None:
        yield
        return
    import kernel_memory
    import quick_interpreter

    with kernel_memory.checked(), quick_interpreter.quick():
        yield


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Gives torch the threads back that a test has changed: sums depend on them in the last bit."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
