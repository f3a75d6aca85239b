"""Products in which a pair may be absent, so that what is not finite there is not seen.

A mixture weight of exactly 0 means that the adapter is not there for that sample, and so does a
scaling of exactly 0. A matrix product alone does not know that: 0 times an infinity or a NaN is
NaN. Any other 0 is a number: where an adapter has a weight, its own 0 times an infinity is NaN.
"""

import torch
from torch import Tensor


def present_product(coefficients: Tensor, present: Tensor, factors: Tensor) -> Tensor:
    """`coefficients @ factors`, summed over the pairs that are present.

    For finite factors it is the plain product. An output that meets an infinity or a NaN becomes
    what the sum over its present pairs is. Nothing depends on values, so it can be traced.

    Args:
        coefficients: [M, R], exactly 0 where they are not present.
        present: [M, R], boolean. factors: [R, N] in coefficients' dtype.

    Returns:
        [M, N] in that dtype.
    """
    undefined = ~factors.isfinite()
    y = coefficients @ factors.masked_fill(undefined, 0.0)
    counted = torch.promote_types(y.dtype, torch.float32)
    with torch.no_grad():
        # How many undefined factors an output meets, and how many more of them are +inf than -inf.
        met = present.to(counted) @ undefined.to(counted)
        infinite = factors.sign().masked_fill(~factors.isinf(), 0.0).to(counted)
        surplus = coefficients.sign().masked_fill(~present, 0.0).to(counted) @ infinite
        limit = torch.where(surplus.abs() == met, surplus * float("inf"), float("nan"))
        limit = torch.where(met == 0, 0.0, limit).to(y.dtype)
    return y + limit


def rank_weights(mixture: Tensor, row_adapter: Tensor, row_scale: Tensor) -> Tensor:
    """[S, R]: the weight of each rank row in each sample; 0 where the mixture is, at any scale.

    Where it is exactly 0 the adapter is not there.
    """
    w = mixture.index_select(1, row_adapter)
    return torch.where(w == 0, 0.0, w * row_scale)


def present_ranks(mixture: Tensor, row_adapter: Tensor, row_scale: Tensor, rows: int) -> Tensor:
    """[M, R], boolean: which rank rows have weight in each of `rows` rows."""
    present = rank_weights(mixture, row_adapter, row_scale) != 0
    return present.repeat_interleave(rows // max(len(mixture), 1), 0)


def without_undefined(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient of `weights`, 0 where it is not finite and the weight is exactly 0."""
    return torch.where((weights == 0) & ~gradient.isfinite(), 0.0, gradient)
