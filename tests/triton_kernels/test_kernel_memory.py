"""Faults put into kernels are seen by `kernel_memory` or by their results."""
# ruff: noqa: N803 - kernel arguments

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

import sapt_fast.triton_kernels
from sapt_fast.ops import QueryProjection, TaskProjections
from sapt_fast.ops.gates import Gate
from sapt_fast.triton_kernels.blocks import common

pytestmark = pytest.mark.skipif(not common.INTERPRETED, reason="needs TRITON_INTERPRET=1")


# --- one small kernel for each fault ------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, y_ptr, size, first, shift, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = x from `first` on, each program of 8 `STEP` and in x `shift` further than the last."""
    offsets = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + first + tl.program_id(0) * shift + offsets, mask=mask)
    tl.store(y_ptr + offsets, x, mask=mask)


@triton.jit
def _reverse_kernel(
    x_ptr, y_ptr, size, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x; x = y backwards."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(y_ptr + offsets, x, mask=offsets < size)
    if BEFORE:
        tl.debug_barrier()
    y = tl.load(y_ptr + (size - 1 - offsets), mask=offsets < size)
    if AFTER:
        tl.debug_barrier()
    tl.store(x_ptr + offsets, y, mask=offsets < size)


def _copy(x: Tensor, y: Tensor, size: int, first: int = 0, step: int = 8, shift: int = 0) -> None:
    _copy_kernel[(triton.cdiv(size, 8),)](x, y, size, first, shift, STEP=step, BLOCK=8)


def test_what_is_right_passes():
    x, y = torch.arange(20.0), torch.empty(20)
    _copy(x, y, 20)
    assert torch.equal(x, y)
    _copy(x[5:15], y[3:13], 10)
    assert torch.equal(y[3:13], x[5:15])
    _copy(x.view(4, 5)[1:3], y, 10)
    assert torch.equal(y[:10], x[5:15])
    _copy(x, y, 16, step=4)  # two programs store the same bits
    assert torch.equal(y[:12], x[:12])
    _reverse_kernel[(1,)](x, y, 20, BEFORE=True, AFTER=True, BLOCK=32)
    assert torch.equal(x, torch.arange(19.0, -1, -1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: _copy(x, y, 21), "load of x_ptr .* at element 20"),
        (lambda x, y: _copy(x, y, 20, -1), "load of x_ptr .* at element -1"),
        (lambda x, y: _copy(x, y, 20, 1), "load of x_ptr .* at element 20"),
        (lambda x, y: _copy(x, y[:18], 20), "store of y_ptr .* at element 18"),
        # Another argument follows in memory, and rows have gaps.
        (lambda x, y: _copy(x[:10], x[10:], 20), "load of x_ptr .* at element 10"),
        (lambda x, y: _copy(x.view(4, 5)[:, :4], y, 16), "load of x_ptr .* at element 4"),
        (lambda x, y: _copy(x[:0], y, 1), "load of x_ptr .* at element 0"),
        (lambda x, y: _copy(x, y, 16, step=4, shift=1), "store of y_ptr .* another program"),
        (lambda x, y: _copy(x, x[8:], 12), "load of x_ptr .* another program"),
    ],
)
def test_an_access_at_fault_is_named(call, words):
    x, y = torch.arange(20.0), torch.empty(20)
    with pytest.raises(InterpreterError, match=f"_copy_kernel: {words}"):
        call(x, y)


def test_a_missing_barrier_is_seen():
    x, y = torch.arange(20.0), torch.empty(20)
    with pytest.raises(InterpreterError, match=r"load of y_ptr .* stored before"):
        _reverse_kernel[(1,)](x, y, 20, BEFORE=False, AFTER=True, BLOCK=32)
    # Lane for lane x is stored where it was loaded.
    _reverse_kernel[(1,)](x, y, 20, BEFORE=True, AFTER=False, BLOCK=32)
    with pytest.raises(InterpreterError, match=r"store of x_ptr .* loaded before"):
        _reverse_kernel[(1,)](x, x, 20, BEFORE=True, AFTER=False, BLOCK=32)


# --- every single fault of the kernels in a file ------------------------------------------------


class _Fault(ast.NodeTransformer):
    """Makes the fault of one number in the kernels of a module, and counts those there are."""

    def __init__(self, number: int) -> None:
        self.number, self.seen, self.made = number, 0, ""
        self.in_kernel = False

    def _is_next(self, node: ast.AST, what: str) -> bool:
        self.seen += 1
        if self.seen - 1 == self.number:
            self.made = f"{what}: {ast.unparse(node)}"
        return self.seen - 1 == self.number

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.in_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if self.in_kernel and ast.unparse(node) == "tl.debug_barrier()":
            return ast.Pass() if self._is_next(node, "dropped") else node
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        masks = [k for k in node.keywords if k.arg == "mask"]
        if self.in_kernel and masks and self._is_next(node, "no mask"):
            node.keywords = [k for k in node.keywords if k.arg not in ("mask", "other")]
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if self.in_kernel and isinstance(node.ops[0], ast.Lt) and self._is_next(node, "one more"):
            node.ops = [ast.LtE()]
        return node


def _faulty(module: ModuleType, folder: Path) -> Iterator[tuple[str, ModuleType]]:
    """A copy of the module for each fault, with the fault in words."""
    source = Path(str(module.__file__)).read_text()
    number = 0
    while True:
        fault = _Fault(number)
        tree = ast.fix_missing_locations(fault.visit(ast.parse(source)))
        if not fault.made:
            return
        name = f"faulty_{module.__name__.rpartition('.')[2]}_{number}"
        file = folder / f"{name}.py"
        file.write_text(ast.unparse(tree))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        yield fault.made, copy
        number += 1


def _route(kernels: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    projection = QueryProjection(draw(7, 37), draw(37, 7), draw(37), draw(37))
    pooled, keys = draw(3, 37), draw(6, 37)
    tasks = TaskProjections(draw(2, 7, 37) / 6, draw(2, 20, 7) / 6)
    return [
        kernels.route_fwd(pooled, keys, projection, 6.0, 2, 0.1),
        kernels.route_fwd(pooled, keys, None, 6.0, None, None),
        kernels.route_fwd(pooled[:2], keys[:2, :20], tasks, 1.0, 1, None),
    ]


def _route_tokens(kernels: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    results: list[Tensor] = []
    for width in (32, 37):
        x = torch.randn((19, width), generator=generator)
        keys = torch.randn((5, width), generator=generator)
        results += kernels.route_tokens(x, keys, 0.2, True, None)[:1]
        results += kernels.route_tokens(x, keys, 2.0, False, Gate("sigmoid", 2, 0.1, True))[1:]
    return results


def _mix_prompts(kernels: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts, table = (torch.randn(s, generator=generator) for s in ((5, 3, 37), (9, 37)))
    mixture = torch.rand(2, 5, generator=generator)
    ids = torch.randint(0, 9, (2, 7), generator=generator)
    ids[0, 0], ids[1, 6] = 9, 8  # out of range, and the last row
    y = kernels.mix_prompts_fwd(prompts, mixture, table, ids)
    return [
        y,
        kernels.mix_prompts_fwd(prompts, mixture, table[:8].view(2, 4, 37), None),
        *kernels.mix_prompts_bwd(torch.ones_like(y), prompts, mixture, True, True),
    ]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("route", _route),
        ("blocks.route_tokens", _route_tokens),
        pytest.param("mix_prompts", _mix_prompts, marks=pytest.mark.thorough),
    ],
)
def test_every_fault_in_a_kernel_is_seen(name, run, tmp_path):
    """Each mask lost, each bound one too far and each barrier dropped, one at a time."""
    module = importlib.import_module(f"{sapt_fast.triton_kernels.__name__}.{name}")
    want, faults, unseen = run(module), 0, []
    for fault, faulty in _faulty(module, tmp_path):
        faults += 1
        try:
            got = run(faulty)
        except InterpreterError:
            continue
        pairs = zip(got, want, strict=True)
        if all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in pairs):
            unseen.append(fault)
    assert faults > 10
    assert unseen == []
