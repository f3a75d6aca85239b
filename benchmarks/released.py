"""The published aggregation, step by step as the release computes it, to measure against."""

from collections.abc import Sequence

import torch
from torch import Tensor


def released_mixture(
    x: Tensor,
    earlier: Sequence[tuple[Tensor, Tensor]],
    newest: tuple[Tensor, Tensor],
    mixture: Tensor,
    scaling: float,
) -> Tensor:
    """What the release adds to the base product.

    Every adapter runs in turn, the earlier ones without a graph; the K outputs are gathered, put
    sample by sample into one [B, K, T * O] tensor and multiplied by the weights.

    Args:
        x: [B, T, I]. earlier, newest: (A [r, I], B [r, O]) of each adapter.
        mixture: [B, K], the newest adapter last.
    """

    def run(adapter: tuple[Tensor, Tensor]) -> Tensor:
        a, b = adapter
        return ((x @ a.t()) @ b * scaling).unsqueeze(0)

    outputs = run(newest)
    if earlier:
        with torch.no_grad():
            frozen = torch.cat([run(adapter) for adapter in earlier], 0)
        outputs = torch.cat([frozen, outputs], 0)
    by_sample = outputs.transpose(0, 1).reshape(x.shape[0], mixture.shape[1], -1)
    mixed = torch.matmul(mixture.to(x.dtype).unsqueeze(1), by_sample)
    return mixed.view(*x.shape[:-1], -1)
