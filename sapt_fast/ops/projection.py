"""The linear layers that op `mixed_lora` computes from the same input."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """The tensors of one linear layer and its pool; x is [M, I], and R is the total rank.

    Attributes:
        weight: [O, I] in x's dtype, any strides; None to compute only the mixture.
        bias: [O], or [M, O] for rows of their own, in x's dtype; or None.
        lora_a: [R, I], in x's dtype or float32.
        lora_b: [R, O], in x's dtype or float32.
        row_adapter: [R] int32, ascending: the adapter of each rank row.
        row_scale: [R] in the mixture's dtype: the scaling of that adapter.
    """

    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    row_adapter: Tensor
    row_scale: Tensor


class PooledProjection(NamedTuple):
    """A projection and its rank rows that train.

    Attributes:
        projection: the projection; its lora_a and lora_b get no gradient.
        train_a, train_b: the rows that train, as tensors that share lora_a's and lora_b's memory;
            those that require a gradient get one.
        train_rows: [start, stop] of each of them in the stack, flattened, ascending.
    """

    projection: Projection
    train_a: list[Tensor]
    train_b: list[Tensor]
    train_rows: list[int]


def require_sizes(rows: Tensor, mixture: Tensor, projections: Sequence[PooledProjection]) -> None:
    """Raises ValueError if the sizes of a layer's input do not fit the layer's tensors."""
    count, width = rows.shape
    samples = mixture.shape[0]
    if count % samples if samples else count:
        raise ValueError(
            f"mixture: got weights of {samples} samples, expected as many as divide the {count} "
            "rows of x"
        )
    for (weight, bias, lora_a, lora_b, _, _), *_ in projections:
        inputs, outputs = lora_a.shape[1], lora_b.shape[1]
        if inputs != width:
            raise ValueError(f"x: got width {width}, expected {inputs} (that of lora_a)")
        if weight is not None and weight.shape != (outputs, width):
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}, expected [{outputs}, {width}]"
            )
        if bias is not None and (
            bias.shape[-1] != outputs or (bias.dim() == 2 and bias.shape[0] != count)
        ):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [{outputs}]")


def in_dtype(given: Projection, dtype: torch.dtype, accumulate: torch.dtype) -> Projection:
    """Returns the projection with weight, bias and 16-bit factors in `dtype`.

    Args:
        given: the projection; factors in float32 stay.
        dtype: of the products.
        accumulate: of row_scale.
    """
    weight, bias, lora_a, lora_b, row_adapter, row_scale = given
    if (
        (weight is None or weight.dtype == dtype)
        and (bias is None or bias.dtype == dtype)
        and lora_a.dtype in (dtype, torch.float32)
        and row_scale.dtype == accumulate
    ):
        return given
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if lora_a.dtype not in (dtype, torch.float32):
        lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    if row_scale.dtype != accumulate:
        row_scale = row_scale.to(accumulate)
    return Projection(weight, bias, lora_a, lora_b, row_adapter, row_scale)
