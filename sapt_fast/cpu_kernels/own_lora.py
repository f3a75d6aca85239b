"""Every sample's own LoRA on the CPU: one call for few rows, torch's GEMMs for many.

The contract is that of the reference in `sapt_fast.ops.own_lora`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels import gemm
from sapt_fast.cpu_kernels.common import CODES
from sapt_fast.ops import own_lora as reference

if TYPE_CHECKING:
    from sapt_fast.ops.own_lora import Adapter, Base

# Up to so many rows per sample reading the adapters bounds the time, not the arithmetic.
_FEW_ROWS = 32


def own_lora_fwd(
    x: Tensor,
    base: "Base",
    adapters: "Sequence[Adapter]",
    owner: Sequence[int],
) -> Tensor:
    """Computes the base output [M, O] of x [M, I], plus each sample's adapter."""
    x = x.contiguous()
    y = base if isinstance(base, Tensor) else gemm.linear(x, *base)
    rows = x.shape[0]
    ranks = [a.shape[0] for a, _, _ in adapters]
    lora_dtype = adapters[0].a.dtype if adapters else x.dtype
    widens = x.dtype == torch.float64 != lora_dtype
    if widens or rows > _FEW_ROWS * len(owner) or max(ranks, default=0) > _C.MOST_OWN_RANKS:
        if gemm.widens(x.dtype):
            adapters = [reference.Adapter(a.float(), b.float(), scale) for a, b, scale in adapters]
        return reference.own_lora_fwd(x, y, adapters, owner)
    kept = [(a.contiguous(), b.contiguous()) for a, b, _ in adapters]
    _C.own_lora(
        CODES[x.dtype], CODES[lora_dtype], y, x, [a for a, _ in kept], [b for _, b in kept],
        ranks, [scaling for _, _, scaling in adapters], list(owner),
        rows, x.shape[1], y.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return y
