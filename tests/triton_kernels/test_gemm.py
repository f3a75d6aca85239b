"""`two_source_gemm` by itself: what it must not see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_mixed_lora_cases import DEVICE

from sapt_fast.triton_kernels.blocks import common, gemm

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not common.INTERPRETED, reason="neither a GPU nor TRITON_INTERPRET=1"
)


def _drawn(*shapes: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes]
    return [each.to(dtype).to(DEVICE) for each in drawn]


@pytest.mark.parametrize("descriptors", [True, False])
def test_rank_rows_behind_the_window_are_not_read(descriptors: bool) -> None:
    """Bit for bit: a step of 64 ranks ends behind the 48 of the window."""
    a, b, p, q = _drawn((96, 32), (32, 40), (96, 80), (80, 40), dtype=torch.float16)
    results = []
    for behind in (0.0, float("inf")):
        q[64:] = behind
        y = torch.full((96, 40), float("nan"), dtype=a.dtype, device=DEVICE)
        gemm.two_source_gemm(a, b, p, q, None, (16, 64), y, descriptors=descriptors)
        results.append(y)
    assert torch.equal(*results)
    want = a.double() @ b.double() + p[:, 16:64].double() @ q[16:64].double()
    assert float((results[0].double() - want).norm() / want.norm()) < 1e-3
