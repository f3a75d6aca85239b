"""`sapt-fast bench tune`: the grid, what is timed and recorded, and the command without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")

from sapt_fast import cli
from sapt_fast.commands import tune as route_tuning
from sapt_fast.commands.tune import Gpu, parse_grid, record_routes, time_routes
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks import gemm_variants as routes

GRID = [(48, 32, 20, 70, "float16"), (40, 24, 7, 9, "bfloat16")]
ROUTES_16 = [routes.FUSED, routes.FUSED_POINTERS, routes.EXPAND_FIRST]  # of 16 bits
interpreted = pytest.mark.skipif(not common.INTERPRETED, reason="needs TRITON_INTERPRET=1")


def _routes(variants: Iterable[routes.Variant]) -> list[routes.Route]:
    return [variant.route for variant in variants]


class Clock:
    """Runs every call once and tells times that grow with each."""

    def __init__(self) -> None:
        self.calls: list[torch.Tensor] = []

    def __call__(self, call: Callable[[], object]) -> float:
        made = call()
        assert isinstance(made, torch.Tensor)
        self.calls.append(made.clone())
        return 1e-6 * len(self.calls)


def test_grid() -> None:
    grid = parse_grid("64, 128x256,64", "4", "8,16", "bfloat16")
    assert grid == [
        (64, 64, 4, 8, "bfloat16"),
        (64, 64, 4, 16, "bfloat16"),
        (128, 256, 4, 8, "bfloat16"),
        (128, 256, 4, 16, "bfloat16"),
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("", "4", "8", "bfloat16"), "widths: got ''"),
        (("64x", "4", "8", "bfloat16"), "widths: got ''"),
        (("1x2x3", "4", "8", "bfloat16"), "widths: got '1x2x3'"),
        (("64", "0", "8", "bfloat16"), "ranks: got '0'"),
        (("64", "4", "8.5", "bfloat16"), "rows: got '8.5'"),
        (("64", "4", "8", "int8"), "dtypes: got 'int8'"),
    ],
)
def test_bad_grids_are_named(texts: tuple[str, str, str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_grid(*texts)
    assert message in str(error.value)


@interpreted
def test_every_route_is_timed_forward_and_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(routes.ENV_VARIABLE, str(tmp_path))
    clock = Clock()
    path, measurements = record_routes(GRID, Gpu(torch.device("cpu"), "NVIDIA H200", clock))
    assert path == tmp_path / "nvidia-h200.json"
    assert [m.size.direction for m in measurements] == ["forward", "backward"] * 2
    assert [(m.size.d_in, m.size.d_out) for m in measurements[:2]] == [(48, 32), (32, 48)]
    assert [_routes(m.seconds) for m in measurements] == [ROUTES_16] * 4
    assert len(clock.calls) == 4 * len(ROUTES_16)
    assert [y.shape for y in clock.calls[:6]] == [(70, 32)] * 3 + [(70, 48)] * 3
    # The clock calls the first route the fastest, and so does the table that is read now.
    traits = common.DeviceTraits(90, 132, "NVIDIA H200")
    assert routes.recorded("NVIDIA H200") == tuple(measurements)
    found = routes.choose(traits, "forward", 48, 32, 20, 70, torch.float16)
    assert found == (routes.FUSED, common.TileConfig(16, 32, 32, 4, 1))
    console = Console(width=100)
    with console.capture() as shown:
        console.print(route_tuning.routes_table(measurements))
    assert "32 x 48" in shown.get()
    assert "fused 16x32x32 1" in shown.get()
    routes.forget()


@interpreted
def test_a_gpu_without_descriptors_has_no_route_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = routes.Size("forward", 40, 24, 7, 9, "float16")
    gpu = Gpu(torch.device("cpu"), "", Clock())
    assert _routes(time_routes(size, gpu)) == ROUTES_16
    monkeypatch.setattr(common.DeviceTraits, "has_tma", False)
    assert _routes(time_routes(size, gpu)) == [routes.FUSED, routes.EXPAND_FIRST]


@interpreted
def test_tiles_are_timed_and_tf32x3_in_float32() -> None:
    size = routes.Size("forward", 320, 24, 7, 9, "float32")
    timed = time_routes(size, Gpu(torch.device("cpu"), "", Clock()))
    ours = [route for route in routes.ROUTES if route != routes.EXPAND_FIRST]
    assert _routes(timed) == [route for r in ours for route in (r, r)] + [routes.EXPAND_FIRST]
    assert [variant.tile.parts for variant in timed if variant.tile] == [1, 2] * 3
    assert route_tuning._name(list(timed)[1]) == "fused 16x32x32 in 2"


@interpreted
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_routes_that_disagree_are_not_recorded(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = routes.expand_first_group

    def wrong(members: Any, window: Any, ys: list[torch.Tensor], **options: Any) -> None:
        original(members, window, ys, **options)
        ys[0].mul_(1.1)

    monkeypatch.setattr(routes, "expand_first_group", wrong)
    gpu = Gpu(torch.device("cpu"), "NVIDIA H200", Clock())
    with pytest.raises(RuntimeError, match="differ by"):
        record_routes([(40, 24, 7, 9, dtype)], gpu, tmp_path / "table.json")
    assert list(tmp_path.iterdir()) == []


@interpreted
def test_measured_products_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = routes.run

    def run(variant: routes.Variant, *operands: torch.Tensor) -> torch.Tensor:
        y = original(variant, *operands)
        a, b, p, q = (t.double() for t in operands[:4])
        want = a @ b + p[:, : q.shape[0]] @ q
        seen.append((variant.route, float((y.double() - want).norm() / want.norm())))
        return y

    monkeypatch.setattr(routes, "run", run)
    gpu = Gpu(torch.device("cpu"), "", Clock())
    time_routes(routes.Size("backward", 40, 24, 7, 9, "float16"), gpu)
    assert {route for route, _ in seen} == set(ROUTES_16)
    assert max(error for _, error in seen) < 2e-3


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["bench", "tune", "--output", str(tmp_path / "t.json")])
    assert result.exit_code == 2
    assert result.output.startswith("error: bench tune needs a GPU")
    assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_says_where_the_table_goes() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "tune", "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert routes.ENV_VARIABLE in result.output
