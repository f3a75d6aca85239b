"""The linear layers that op `mixed_lora` computes from the same input."""

from typing import NamedTuple

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
