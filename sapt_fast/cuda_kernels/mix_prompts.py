"""CUDA backend of op `mix_prompts`: see csrc/cuda/mix_prompts.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from sapt_fast.cuda_kernels import common


def mix_prompts_fwd(
    prompts: Tensor, mixture: Tensor, source: Tensor, input_ids: Tensor | None
) -> Tensor:
    """Inserts mixtures of prompts before embeddings, in one launch.

    Args:
        prompts: [K, P, D] in source's dtype or float32. A prompt of weight zero in all samples of
            a tile (1 or 4) is not read for that tile.
        mixture: [B, K] float32.
        source: embeddings [B, T, D], or with `input_ids` their table [V, D]; float32, float16 or
            bfloat16. Read in place if the last axis is contiguous.
        input_ids: [B, T] int32 or int64, or None. Ids outside of the table yield NaN.

    Returns:
        [B, P + T, D], contiguous, in source's dtype.

    Raises:
        TypeError: if source's dtype has no kernel.
        ValueError: if the tensors are not on a CUDA device.
        RuntimeError: if the launch failed.
    """
    adapters, length, width = prompts.shape
    samples, tokens = (source if input_ids is None else input_ids).shape[:2]
    out = source.new_empty((samples, length + tokens, width))
    if out.numel() == 0:
        return out
    if source.stride(-1) != 1:
        source = source.contiguous()
    prompts, mixture = prompts.contiguous(), mixture.contiguous()
    ids = None if input_ids is None else input_ids.contiguous()
    common.native().cuda_mix_prompts(
        common.typed(prompts), mixture, source, common.dtype_code(source.dtype),
        ids, ids is not None and ids.dtype == torch.int64,
        out, samples, adapters, length, tokens, width, common.place(source.device),
    )  # fmt: skip
    return out
