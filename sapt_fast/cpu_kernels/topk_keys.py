"""CPU backend of op `topk_keys`: see `ops.topk_keys` for what is computed.

The keys are streamed once for 16 to 1024 queries. Every thread keeps a short list of candidates
per query, and adds only scores above the list's worst; the lists are merged at the end. The order
of candidates is total, so the result does not depend on the number of threads.

Products of bfloat16 are summed in float32 on every CPU. CPUs that multiply bfloat16 (AVX512-BF16)
treat subnormal numbers as zero in these products. For "l2", such a CPU first multiplies to find
the keys that can be near enough, and then sums the differences of these in float32.
"""

import torch
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES, with_unit_column_stride
from sapt_fast.ops._keys import accumulation_dtype

_METRICS = {"dot": _C.METRIC_DOT, "cosine": _C.METRIC_COSINE, "l2": _C.METRIC_L2}


def topk_keys_fwd(query: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Finds the k best keys of every query, best first.

    Args:
        query: Of shape `[M, D]`, any of the floating-point dtypes, any strides.
        keys: Of shape `[N, D]`, query's dtype; copied unless its columns are adjacent in memory.
        k: 1 to N.
        metric: "dot", "cosine" or "l2", the last summed from the differences.

    Returns:
        scores `[M, k]` in float32, float64 for float64, and index `[M, k]` int64.
    """
    query, keys = with_unit_column_stride(query), with_unit_column_stride(keys)
    M = query.shape[0]
    scores = query.new_empty((M, k), dtype=accumulation_dtype(query.dtype))
    index = query.new_empty((M, k), dtype=torch.int64)
    _C.topk_keys(
        CODES[query.dtype], _METRICS[metric], query, keys, scores, index, k,
        torch.get_num_threads(),
    )  # fmt: skip
    return scores, index
