"""Products in which a pair may be absent, so that its infinities and NaNs have no effect.

A mixture weight or a scaling of exactly 0 means that the adapter is absent for the sample. In a
plain matrix product, 0 times an infinity or a NaN would be NaN. Any other 0 is an ordinary number:
if an adapter has a weight, a 0 of its matrices times an infinity is NaN.
"""

import torch
from torch import Tensor


def present_product(coefficients: Tensor, present: Tensor, factors: Tensor) -> Tensor:
    """Computes `coefficients @ factors`, summed over the pairs that are present.

    For finite factors it is the plain product. An output with an infinity or a NaN among its
    present pairs is the sum over these pairs. No branch depends on values, so it can be traced.

    Args:
        coefficients: [M, R], exactly 0 for pairs that are not present.
        present: [M, R], boolean.
        factors: [R, N], in coefficients' dtype.

    Returns:
        [M, N], in coefficients' dtype.
    """
    undefined = ~factors.isfinite()
    y = coefficients @ factors.masked_fill(undefined, 0.0)
    counted = torch.promote_types(y.dtype, torch.float32)
    with torch.no_grad():
        # The number of undefined factors of an output, and how many more are +inf than -inf.
        met = present.to(counted) @ undefined.to(counted)
        infinite = factors.sign().masked_fill(~factors.isinf(), 0.0).to(counted)
        surplus = coefficients.sign().masked_fill(~present, 0.0).to(counted) @ infinite
        limit = torch.where(surplus.abs() == met, surplus * float("inf"), float("nan"))
        limit = torch.where(met == 0, 0.0, limit).to(y.dtype)
    return y + limit


def rank_weights(mixture: Tensor, row_adapter: Tensor, row_scale: Tensor) -> Tensor:
    """Returns the weight of each rank row in each sample, [S, R].

    It is exactly 0 if the mixture is 0, for any scaling: the adapter is then absent.
    """
    w = mixture.index_select(1, row_adapter)
    return torch.where(w == 0, 0.0, w * row_scale)


def present_ranks(mixture: Tensor, row_adapter: Tensor, row_scale: Tensor, rows: int) -> Tensor:
    """Returns which rank rows have weight in each of M = `rows` rows, [M, R], boolean."""
    present = rank_weights(mixture, row_adapter, row_scale) != 0
    return present.repeat_interleave(rows // max(len(mixture), 1), 0)


def without_undefined(gradient: Tensor, weights: Tensor) -> Tensor:
    """Returns the gradient of `weights`, with 0 if it is not finite and the weight is 0."""
    return torch.where((weights == 0) & ~gradient.isfinite(), 0.0, gradient)
