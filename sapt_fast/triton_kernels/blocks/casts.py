"""float32 factors on a 16-bit base, cast once in a call instead of in the kernels' loops.

A loop that casts its operands waits for each copy before the next product. So a call on many rows
casts all factors by one launch first. The copies live as long as the call: kept longer they would
have to be found stale, and torch counts no write through `.data`, as some optimisers do.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import cdiv, pointer_of
from sapt_fast.triton_kernels.blocks.plans import launch
from sapt_fast.triton_kernels.blocks.shrink_tiles import MAX_GROUP

_LAUNCH_SECONDS = 2e-6  # from the end of one kernel to full speed of the next

_BLOCK = 2048


@triton.jit
def _cast_kernel(source_ptrs, out_ptrs, sizes, BLOCK: tl.constexpr):
    """out = source, of each pair, in out's dtype."""
    number = tl.program_id(1)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < pointer_of(number, sizes)
    values = tl.load(pointer_of(number, source_ptrs) + offsets, mask=mask)
    out_ptr = pointer_of(number, out_ptrs)
    tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=mask)


def in_dtype_of(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the factors, those of another dtype in x's where x is large.

    Args:
        x: What the factors multiply. A launch pays where reading x takes longer than it.
        factors: Of any shapes and strides.
    """
    found = [*factors]
    traits = common.device_traits(x.device)
    if x.nbytes <= _LAUNCH_SECONDS * traits.bandwidth:
        return found
    others = [i for i, t in enumerate(factors) if t.dtype != x.dtype and t.numel() > 0]
    for start in range(0, len(others), 2 * MAX_GROUP):
        numbers = others[start : start + 2 * MAX_GROUP]
        sources = [factors[i].contiguous() for i in numbers]
        outs = [x.new_empty(source.shape) for source in sources]
        sizes = [source.numel() for source in sources]
        with torch.cuda.device_of(x):
            launch(
                _cast_kernel, (cdiv(max(sizes), _BLOCK), len(sizes)),
                tuple(sources), tuple(outs), tuple(sizes), BLOCK=_BLOCK,
            )  # fmt: skip
        for i, out in zip(numbers, outs, strict=True):
            found[i] = out
    return found
