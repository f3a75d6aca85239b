"""When kernels read their inputs, the device of a launch, the size of a grid, seeded faults."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.cuda_kernels import common
from sapt_fast.ops.projection import Projection
from sapt_fast.ops.route import QueryProjection

OPS = [op for op in dispatch.ops() if "cuda" in dispatch.backends(op)]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(op: str, rows: int) -> tuple[list[Tensor], Callable[[Any], Sequence[Tensor]]]:
    """All inputs of an op, and what runs it by its kernels' module."""
    if op == "mixed_lora":
        owners = torch.arange(3, dtype=torch.int32).repeat_interleave(100)  # two turns of a block
        tensors = [_normal(*s) for s in ((19, 24), (19,), (300, 24), (300, 19), (300,))]
        weight, bias, a, b, scale = tensors
        projection = Projection(weight, bias, a, b, owners, scale)
        given = [_normal(rows, 24, seed=1), torch.softmax(_normal(rows, 3, seed=2), -1)]
        return [*given, *tensors, owners], lambda k: k.mixed_lora_fwd(*given, [projection])[0]
    if op in ("nearest_key", "topk_keys"):
        dtype = torch.float32 if rows == 3 else torch.bfloat16
        width = 264 if op == "nearest_key" and rows == 9 else 24  # work for more than one warp
        given = [_normal(rows, width).to(dtype), _normal(300, width, seed=1).to(dtype)]
        if op == "topk_keys":
            return given, lambda k: k.topk_keys_fwd(*given, 5, "cosine")
        given.append(torch.full((300,), 6.5))
        return given, lambda k: k.nearest_key_fwd(*given)
    if op == "route":
        keys = _normal(47, 24, seed=1).repeat(1 if rows == 1 else 3, 1)  # equal scores
        given = [_normal(rows, 24), keys]
        parts = [_normal(*s, seed=3) for s in ((5, 24), (24, 5), (24,), (24,))]
        projection = QueryProjection(*parts)
        return [*given, *parts], lambda k: (k.route_fwd(*given, projection, 5.0, 4, None),)
    given = [_normal(3, 2, 24), torch.softmax(_normal(rows, 3), -1), _normal(9, 24, seed=1)]
    ids = torch.arange(rows * 3).view(rows, 3) % 9
    return [*given, ids], lambda k: (k.mix_prompts_fwd(*given, ids),)


def _poison(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


class Late:
    """Launchers see a tensor poisoned until a kernel that was launched right before has ended."""

    late: Tensor

    def __init__(self, native: Any, module: ModuleType):
        self._native, self._module = native, module

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._native, name)
        if name.endswith("workspace") or not callable(call):
            return call

        def behind_a_copy(*arguments: Any) -> Any:
            kept = self.late.clone()
            _poison(self.late)
            self._module.copy_late(self.late.data_ptr(), kept.data_ptr(), kept.nbytes)
            return call(*arguments)

        return behind_a_copy


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("op", OPS)
def test_every_input_is_read_after_the_kernel_before(cuda, emulated_module, monkeypatch, op, rows):
    kernel = cuda(op)
    given, call = case(op, rows)
    want = call(kernel)
    native = Late(common.native(), emulated_module)
    monkeypatch.setattr(common, "native", lambda: native)
    emulated_module.set_order(0)  # every kernel starts as early as it may
    for i, tensor in enumerate(given):
        native.late = tensor
        for result, expected in zip(call(kernel), want, strict=True):
            assert torch.equal(result, expected), f"input {i}"


@pytest.mark.parametrize("op", OPS)
def test_kernels_run_on_the_device_of_their_tensors(cuda, emulated_module, monkeypatch, op):
    """The one that was current stays so, after an error too."""
    kernel = cuda(op)
    monkeypatch.setattr(common, "place", lambda device: (3, 0))
    _, call = case(op, 2)
    emulated_module.set_current_device(1)
    try:
        call(kernel)
        assert emulated_module.devices() == (1, 3)
        emulated_module.refuse_next(2)
        with pytest.raises(RuntimeError, match="refused"):
            call(kernel)
        assert emulated_module.devices() == (1, 3)
    finally:
        emulated_module.set_current_device(0)


@pytest.mark.parametrize("op", OPS)
def test_rows_do_not_exceed_a_grid(cuda, emulated_module, op):
    """Were there but one block in y and z: only x has room for more than 524280 rows."""
    kernel = cuda(op)
    emulated_module.limit_grid(1)
    try:
        _, call = case(op, 40)
        call(kernel)
    finally:
        emulated_module.limit_grid(65535)


@pytest.mark.slow
@pytest.mark.thorough
def test_every_seeded_fault_is_caught(faulty_module):
    """By an error, by a result that depends on the order, or as an access out of bounds."""
    module, faults = faulty_module
    for kind in ("__syncthreads", "wait_for_previous_kernel", "count", "rows", "columns"):
        assert any(kind in fault for fault in faults), kind
    users = {number: _users(fault) for number, fault in enumerate(faults, 1)}
    named = [f"{number}:{','.join(ops)}" for number, ops in users.items()]
    done = _run("faults_run.py", module, *named)
    assert done.returncode == 0, done.stderr
    hidden = [int(line) for line in done.stdout.split()]
    missed = [
        faults[number - 1]
        for number in hidden
        if all(
            _run("bounds_run.py", module, op, str(number)).returncode == 0 for op in users[number]
        )
    ]
    assert not missed


def _users(fault: str) -> list[str]:
    """The ops whose kernels are in a fault's file, or may include it."""
    stem = fault.partition(".")[0]
    if stem.startswith("decode_"):
        return ["mixed_lora"]
    return [stem] if stem in OPS else OPS


def _run(script: str, module: ModuleType, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name(script)), str(module.__file__)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
