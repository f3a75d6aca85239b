"""`two_source_gemm` by itself: what it must not see, its parts and its precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernel_traffic import counted
from triton_mixed_lora_cases import DEVICE

from sapt_fast.triton_kernels.blocks import common, gemm
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.blocks.common import TileConfig

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


IN_PARTS = TileConfig(16, 32, 32, 4, 1, parts=2)
interpreted = pytest.mark.skipif(not common.INTERPRETED, reason="tiles of the interpreter")


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "transposed", "options"),
    [
        (10, 288, True, {}),
        (10, 288, False, {"bias": True}),
        (13, 290, True, {"accumulate": True}),
        (1, 257, False, {"bias": True}),
        (10, 288, True, {"rank": 0, "bias": True}),
        (10, 288, False, {"rank": 0, "accumulate": True}),
    ],
)
def test_a_split_product_is_the_whole_one(
    rows: int, depth: int, transposed: bool, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Two launches, in one order: the same as unsplit up to rounding, and twice the same bits."""
    rank = options.get("rank", 20)
    a, b, p, q, y = _drawn(
        (rows, depth), (depth, 40), (rows, 32), (20, 40), (rows, 40), dtype=dtype
    )
    if transposed:
        b = b.t().contiguous().t()
    p[:, 20:] = 0
    bias = q[0] if options.get("bias") else None
    accumulate = options.get("accumulate", False)
    factors = (p, q) if rank else (None, None)
    with counted() as recorder:
        made = []
        for tile in (None, IN_PARTS, IN_PARTS):
            out = y.clone() if accumulate else torch.full_like(y, float("nan"))
            gemm.two_source_gemm(
                a, b, *factors, bias, (0, 32), out, accumulate=accumulate, tile=tile
            )
            made.append(out)
    split = ["_split_kernel", "_gemm_kernel"]
    assert recorder.kernels == ["_gemm_kernel", *split, *split]
    want = a.double() @ b.double()
    want += p[:, :20].double() @ q.double() if rank else 0
    want += (0 if bias is None else bias.double()) + (y.double() if accumulate else 0)
    assert _error(made[1], want) <= 1.5 * _error(made[0], want) + 1e-7
    assert torch.equal(made[1], made[2])


@interpreted
def test_a_split_product_does_not_see_absent_adapters() -> None:
    a, b, p, q = _drawn((10, 288), (288, 40), (10, 32), (20, 40), dtype=torch.float16)
    p[:, 4:8], p[:, 20:] = 0, 0
    want = a.double() @ b.double() + p[:, :20].double() @ q.double()
    q[4:8] = float("inf")
    y = torch.full((10, 40), float("nan"), dtype=a.dtype, device=DEVICE)
    gemm.two_source_gemm(a, b, p, q, None, (0, 32), y, tile=IN_PARTS)
    assert _error(y, want) < 2e-3


def test_a_tile_that_is_no_candidate_is_not_taken() -> None:
    a, b = _drawn((10, 64), (64, 40), dtype=torch.float16)
    y = [torch.empty(10, 40, dtype=a.dtype, device=DEVICE) for _ in range(2)]
    for out, tile in zip(y, (None, TileConfig(7, 9, 11, 4, 1, 30)), strict=True):
        gemm.two_source_gemm(a, b, None, None, None, (0, 0), out, tile=tile)
    assert torch.equal(*y)


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


class _Launches:
    """Notes the precision of every launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.precisions: list[str] = []
        launch = gemm.launch

        def noted(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
            self.precisions.append(meta.get("PRECISION", ""))
            launch(kernel, grid, *args, **meta)

        monkeypatch.setattr(gemm, "launch", noted)


def _precisions(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, route: routes.Route) -> str:
    launches = _Launches(monkeypatch)
    a, b, p, q = _drawn((10, 64), (64, 40), (10, 16), (16, 40), dtype=dtype)
    y = torch.empty(10, 40, dtype=dtype, device=DEVICE)
    routes.run(routes.Variant(route), a, b, p, q, None, (0, 16), y)
    [precision] = launches.precisions
    return precision


def test_float32_is_in_full_unless_chosen_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for route in (routes.FUSED, routes.FUSED_POINTERS, routes.EXPAND_FIRST):
        assert _precisions(monkeypatch, torch.float32, route) == "ieee"
    assert _precisions(monkeypatch, torch.float32, routes.FUSED_TF32X3) == "tf32x3"
    assert _precisions(monkeypatch, torch.float16, routes.FUSED_TF32X3) == "ieee"


@pytest.mark.usefixtures("tf32_allowed")
def test_float32_is_tf32_where_torch_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for route in routes.ROUTES:
        assert _precisions(monkeypatch, torch.float32, route) == "tf32"
    assert _precisions(monkeypatch, torch.bfloat16, routes.FUSED) == "ieee"


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_second_setting_of_tf32_counts_too(setting: str) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting  # afterwards torch.get_float32_matmul_precision may raise
    try:
        assert common.float32_precision(torch.float32) == setting
        assert common.float32_precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"
