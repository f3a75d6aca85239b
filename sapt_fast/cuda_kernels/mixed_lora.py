"""CUDA backend of op `mixed_lora`, for the few rows of a decoding step.

Two launches for all projections: one multiplies x by the weights and by A, the other expands onto
the outputs with the mixture applied on load. For more than `MAX_BASE_ROWS` rows torch computes the
base products before that. Adapters without weight are not read. See csrc/cuda/mixed_lora.cu.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.cuda_kernels import common
from sapt_fast.ops.projection import Projection


def empty_h(x: Tensor, total_rank: int) -> Tensor:
    """Returns the h of `mixed_lora_fwd`: none is kept, `[M, 0]`."""
    return x.new_empty(x.shape[0], 0)


def mixed_lora_fwd(
    x: Tensor, mixture: Tensor, projections: Sequence[Projection], keep_h: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Linear layers with one input, each with the mixture of all adapters of its pool.

    Args:
        x: [M, I]; float32, float16 or bfloat16. Meant for M up to 64, right for any.
        mixture: [S, K] float32; S divides M, sample s owns rows s * M/S and on. An adapter whose
            weight is zero in all rows of a tile (of 1, 4 or 8 rows) is not read for it.
        projections: weights in x's dtype or None; factors in x's dtype or float32.
        keep_h: without effect.

    Returns:
        Of each projection y [M, O] in x's dtype and an empty h: h has holes where adapters have
        no weight, so that the backward computes its own.

    Raises:
        TypeError: if a dtype has no kernel.
        ValueError: if the tensors are not on a CUDA device.
        RuntimeError: if a launch failed.
    """
    x, mixture = x.contiguous(), mixture.contiguous()
    fused = [_is_fused(x, projection) for projection in projections]
    ys = [
        x.new_empty(x.shape[0], projection.lora_b.shape[1]) if fuses else _base(x, projection)
        for projection, fuses in zip(projections, fused, strict=True)
    ]
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, projection in enumerate(projections):
        # With neither ranks nor a base product y is zero, which takes a launch too.
        if ys[i].numel() and (projection.lora_a.shape[0] or _has_no_base(projection)):
            by_dtype.setdefault(projection.lora_a.dtype, []).append(i)
    for members in by_dtype.values():
        for first in range(0, len(members), common.native().MAX_PROJECTIONS):
            chunk = members[first : first + common.native().MAX_PROJECTIONS]
            group = [(projections[i], ys[i], fused[i]) for i in chunk]
            _launch(x, mixture, group)
    return [(y, empty_h(x, 0)) for y in ys]


def _is_fused(x: Tensor, projection: Projection) -> bool:
    """Returns whether the base product is computed in the same launch as x A^T."""
    return (
        projection.weight is not None
        and 0 < x.shape[0] <= common.native().MAX_BASE_ROWS
        and projection.lora_a.numel() > 0
        and projection.weight.is_contiguous()
        and (projection.bias is None or projection.bias.dim() == 1)
    )


def _has_no_base(projection: Projection) -> bool:
    return projection.weight is None and projection.bias is None


def _base(x: Tensor, projection: Projection) -> Tensor:
    """Returns the tensor to which the mixture is added; uninitialised without a base product."""
    outputs = projection.lora_b.shape[1]
    if projection.weight is not None:
        return F.linear(x, projection.weight, projection.bias)
    if projection.bias is not None:
        return projection.bias.expand(x.shape[0], outputs).clone(
            memory_format=torch.contiguous_format
        )
    return x.new_empty(x.shape[0], outputs)


def _launch(x: Tensor, mixture: Tensor, group: Sequence[tuple[Projection, Tensor, bool]]) -> None:
    """Fills each projection's y: from nothing if its base product is fused, else adds to it."""
    native = common.native()
    members = []  # of copies too: none may be freed, and its memory taken again, before the launch
    for projection, y, fuses in group:
        base, factors = projection[:2], projection[2:]
        tensors = [t.contiguous() if fuses and t is not None else None for t in base]
        tensors += [t.contiguous() for t in factors if t is not None]
        adds = not fuses and not _has_no_base(projection)
        members.append((y, *tensors, *projection.lora_b.shape, adds))
    (rows, inputs), (samples, adapters) = x.shape, mixture.shape
    total = sum(projection.lora_a.shape[0] for projection, _, _ in group)
    size = native.cuda_mixed_lora_workspace(rows, inputs, total)
    workspace = x.new_empty(size, dtype=torch.float32)
    native.cuda_mixed_lora_decode(
        common.dtype_code(x.dtype), common.dtype_code(group[0][0].lora_a.dtype),
        x, mixture, members, workspace, rows, inputs, samples, adapters,
        common.place(x.device),
    )  # fmt: skip
