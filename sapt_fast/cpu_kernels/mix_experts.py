"""CPU backend of op `mix_experts`: see `ops.mix_experts` for what is computed.

The selected experts are read in place; the gradient of an expert is one sum over its pairs, in
their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES
from sapt_fast.ops._presence import without_undefined

if TYPE_CHECKING:
    from sapt_fast.ops.mix_experts import PairGroups


def mix_experts_fwd(
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    scaling: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the forward.

    Args:
        x: Of shape `[M, I]`, any of the floating-point dtypes.
        bank_a: Of shape `[N, r, I]` in x's dtype or float32; copied unless the elements of an
            expert are adjacent in memory.
        bank_b: Of shape `[N, r, O]` in bank_a's dtype; copied likewise.
        index: Of shape `[M, k]`, int64; values out of range yield zeros.
        weights: Of shape `[M, k]`, float32, float64 for float64.
        scaling: Of all experts.
        order: Not read.

    Returns:
        delta `[M, O]` in x's dtype and h = x A^T, `[M, k, r]` in weights' dtype.
    """
    x, index = x.contiguous(), index.contiguous()
    h = _products(x, bank_a, index)
    return _mixture(x, h * (weights * scaling).unsqueeze(-1), bank_b, _present(index, weights)), h


def mix_experts_bwd(
    dy: Tensor,
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    h: Tensor,
    scaling: float,
    groups: PairGroups | None,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients.

    Args:
        dy: Of shape `[M, O]`, any strides.
        h: Of shape `[M, k, r]`, as the forward returned it.
        groups: The rows of the banks' gradients; None if these are not needed.

    Returns:
        dx `[M, I]`, d_weights `[M, k]`, d_a `[rows, r, I]`, d_b `[rows, r, O]`, None for what is
        not needed. Every sum has a fixed order.
    """
    x, dy, index = x.contiguous(), dy.contiguous(), index.contiguous()
    by = (weights * scaling).unsqueeze(-1)
    g = _products(dy, bank_b, index)
    d_weights = None
    if needs_weights:
        d_weights = without_undefined((g * h).sum(-1).mul_(scaling), weights)
    gw = g.mul_(by)
    dx = _mixture(x, gw, bank_a, _present(index, weights)) if needs_x else None
    if groups is None:
        return dx, d_weights, None, None
    d_a, d_b = _bank_grad(gw, x, groups, bank_a), _bank_grad(h * by, dy, groups, bank_b)
    return dx, d_weights, d_a, d_b


def _present(index: Tensor, weights: Tensor) -> Tensor:
    """Returns the index, with -1 if the weight is exactly 0: that expert is absent."""
    return index.masked_fill(weights == 0, -1)


def _products(values: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Computes [M, k, r], products of values [M, D] with rows of the selected experts [N, r, D]."""
    wide = torch.promote_types(values.dtype, torch.float32)
    bank = _whole_experts(bank, values.dtype)
    out = values.new_empty((*index.shape, bank.shape[1]), dtype=wide)
    _C.experts_dot(
        CODES[values.dtype], CODES[bank.dtype], out, values, bank, index, *index.shape,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _mixture(x: Tensor, coefficients: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Computes [M, D] in x's dtype: the sum of coefficients [M, k, r] times the experts' rows."""
    bank, coefficients = _whole_experts(bank, x.dtype), coefficients.contiguous()
    out = x.new_empty(x.shape[0], bank.shape[2])
    _C.experts_sum(
        CODES[x.dtype], CODES[bank.dtype], out, coefficients, bank, index, *index.shape,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _bank_grad(coefficients: Tensor, values: Tensor, groups: PairGroups, bank: Tensor) -> Tensor:
    M, k, rank = coefficients.shape
    coefficients = coefficients.contiguous()
    order, target = groups.order.contiguous(), groups.target.contiguous()
    dtype = _bank_dtype(bank, values.dtype)
    out = bank.new_zeros((groups.rows, *bank.shape[1:]), dtype=dtype)
    _C.experts_grad(
        CODES[values.dtype], CODES[dtype], out, coefficients, values, order, target,
        len(order), groups.rows, M, k, rank, bank.shape[2], torch.get_num_threads(),
    )  # fmt: skip
    return out.to(bank.dtype)


def _bank_dtype(bank: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which the kernels read the bank: its own, or float64 with float64."""
    return dtype if dtype == torch.float64 else bank.dtype


def _whole_experts(bank: Tensor, dtype: torch.dtype) -> Tensor:
    bank = bank.to(_bank_dtype(bank, dtype))
    side_by_side = bank.stride(2) == 1 and bank.stride(1) == bank.shape[2]
    return bank if side_by_side else bank.contiguous()
