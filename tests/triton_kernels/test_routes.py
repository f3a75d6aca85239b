"""Which route a product takes: recorded tables, their files, and the cost model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.blocks.common import DeviceTraits
from sapt_fast.triton_kernels.blocks.gemm_variants import EXPAND_FIRST, FUSED, Measurement, Size

H200 = DeviceTraits(90, 132, "NVIDIA H200")
DEVICES = [
    H200,
    DeviceTraits(80, 108, "NVIDIA A100", clock=1.41e9, bandwidth=2.0e12),
    DeviceTraits(89, 128, "NVIDIA GeForce RTX 4090", clock=2.52e9, bandwidth=1.0e12),
    DeviceTraits(100, 148, "NVIDIA B200", clock=1.85e9, bandwidth=8.0e12),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for tables; nothing read before or after it counts."""
    monkeypatch.setenv(routes.ENV_VARIABLE, str(tmp_path))
    routes.forget()
    yield tmp_path
    routes.forget()


def choose(traits: DeviceTraits, d: int, rank: int, rows: int = 8192, **other: Any) -> str:
    options = {"direction": "forward", "d_out": d, "dtype": torch.bfloat16, **other}
    return routes.choose(traits, d_in=d, rank=rank, rows=rows, **options)


def measured(fused: float, expand_first: float, **other: Any) -> Measurement:
    size = {"d_in": 1024, "d_out": 1024, "rank": 64, "rows": 8192, **other}
    direction, dtype = size.pop("direction", "forward"), size.pop("dtype", "bfloat16")
    seconds = {FUSED: fused, EXPAND_FIRST: expand_first}
    return Measurement(Size(direction, **size, dtype=dtype), seconds)


def record(folder: Path, *measurements: Measurement, device: str = H200.name) -> Path:
    path = folder / routes.table_file(device)
    routes.write_table(path, device, measurements, {"torch": torch.__version__})
    routes.forget()
    return path


def test_model_fuses_narrow_layers_and_expands_wide_ones() -> None:
    assert choose(H200, 1024, 60) == choose(H200, 2048, 60) == FUSED
    assert choose(H200, 8192, 60) == choose(H200, 8192, 1024) == EXPAND_FIRST
    # Many ranks take the expansion as long as its traffic, which then costs nothing.
    assert choose(H200, 1024, 4, rows=32768) == FUSED
    assert choose(H200, 1024, 2048, rows=32768) == EXPAND_FIRST


@pytest.mark.parametrize("traits", DEVICES, ids=lambda t: t.name)
def test_model_changes_its_mind_once(traits: DeviceTraits) -> None:
    """From narrow to wide, and from few ranks to many, the route goes from fused to expanded."""
    by_width = [choose(traits, d, 60) for d in (512, 1024, 2048, 4096, 8192, 16384)]
    by_rank = [choose(traits, 1024, rank) for rank in (16, 64, 256, 1024, 2048)]
    for row in (by_width, by_rank):
        assert row == sorted(row, key=[FUSED, EXPAND_FIRST].index)
    assert choose(traits, 4096, 60, rows=4) == FUSED, "a launch more costs more than it gains"


def test_estimate_follows_its_formula() -> None:
    traits = DeviceTraits(90, 100, clock=1e9, bandwidth=1e12)
    arithmetic, bandwidth = 100 * 4096 * 1e9 * 0.75, 1e12 * 0.875
    rows, d_in, d_out, rank = 4096, 8192, 2048, 512
    size = Size("forward", d_in, d_out, rank, rows, "bfloat16")
    flops = 2 * rows * d_out
    fused = flops * (d_in + rank) / (0.95 * arithmetic)
    assert routes.estimate_fused(traits, size) == pytest.approx(fused)
    expand = max(
        flops * rank / (0.95 * arithmetic),
        2 * (rows * rank + rank * d_out + rows * d_out) / bandwidth,
    )
    want = 2e-6 + expand + flops * d_in / arithmetic
    assert routes.estimate_expand_first(traits, size) == pytest.approx(want)


def test_table_overrules_the_model(folder: Path) -> None:
    record(folder, measured(2e-5, 1e-5), measured(1e-5, 2e-5, d_in=8192, d_out=8192))
    assert choose(H200, 1024, 60) == EXPAND_FIRST
    assert choose(H200, 8192, 60) == FUSED
    # Far from what was measured, for another pass, dtype or GPU, the model decides.
    assert choose(H200, 1024, 4) == FUSED
    assert choose(H200, 1024, 60, direction="backward") == FUSED
    assert choose(H200, 1024, 60, dtype=torch.float16) == FUSED
    assert choose(H200._replace(name="NVIDIA H100"), 1024, 60) == FUSED


def test_pointers_are_taken_only_where_they_were_measured(folder: Path) -> None:
    by_pointers = measured(2e-5, 3e-5)
    by_pointers.seconds[routes.FUSED_POINTERS] = 1e-5
    record(folder, by_pointers, measured(1e-5, 2e-5, rows=64))
    assert choose(H200, 1024, 64) == routes.FUSED_POINTERS
    assert choose(H200, 1024, 64, rows=64) == FUSED
    assert choose(H200, 4096, 64) in (FUSED, EXPAND_FIRST)


def test_growing_ranks_follow_the_nearest_measurement(folder: Path) -> None:
    record(folder, measured(1e-5, 2e-5, rank=16), measured(2e-5, 1e-5, rank=64))
    found = {rank: choose(H200, 1024, rank) for rank in (8, 16, 31, 33, 64, 128)}
    assert found == {
        8: FUSED, 16: FUSED, 31: FUSED, 33: EXPAND_FIRST, 64: EXPAND_FIRST, 128: EXPAND_FIRST,
    }  # fmt: skip


def test_of_equally_near_measurements_the_first_counts() -> None:
    table = [measured(1.0, 2.0, rank=16), measured(2.0, 1.0, rank=64)]
    between = Size("forward", 1024, 1024, 32, 8192, "bfloat16")
    assert routes.nearest(table, between) is table[0]
    assert routes.nearest(table[::-1], between) is table[1]
    assert routes.nearest([], between) is None


def test_a_table_comes_back_as_it_was_written(folder: Path) -> None:
    table = (measured(1.25e-5, 2e-5), measured(1e-4, 3e-5, direction="backward", rows=16))
    path = record(folder, *table)
    assert path.name == "nvidia-h200.json"
    assert routes.read_table(path, H200.name) == table
    assert json.loads(path.read_text())["versions"] == {"torch": torch.__version__}
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_tables_of_the_package_come_after_the_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = folder / "shipped"
    monkeypatch.setattr(routes, "_SHIPPED", shipped)
    record(shipped, measured(2e-5, 1e-5))
    assert choose(H200, 1024, 60) == EXPAND_FIRST
    record(folder, measured(1e-5, 2e-5))
    assert choose(H200, 1024, 60) == FUSED


def test_user_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(routes.ENV_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert routes.user_folder() == tmp_path / "sapt_fast" / "routes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert routes.user_folder() == Path.home() / ".cache" / "sapt_fast" / "routes"


ROW: dict[str, Any] = {
    "direction": "forward", "d_in": 1024, "d_out": 1024, "rank": 64, "rows": 8192,
    "dtype": "bfloat16", "seconds": {FUSED: 1e-5, EXPAND_FIRST: 2e-5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("\udcff", "no JSON"),
        ([], "expected an object of format 1"),
        ({"format": 2}, "expected an object of format 1"),
        ({"device": "NVIDIA A100"}, "got the device 'NVIDIA A100', expected 'NVIDIA H200'"),
        ({"measurements": {}}, "measurements: got dict, expected a list"),
        ({"measurements": [3]}, "measurement 0: got 3, expected the keys direction"),
        ({"measurements": [ROW, {**ROW, "more": 1}]}, "measurement 1: got"),
        ({"measurements": [{**ROW, "direction": "up"}]}, "direction: got 'up'"),
        ({"measurements": [{**ROW, "dtype": "int8"}]}, "dtype: got 'int8'"),
        ({"measurements": [{**ROW, "dtype": ["int8"]}]}, "dtype: got"),
        ({"measurements": [{**ROW, "rank": 0}]}, "rank: got 0, expected an integer"),
        ({"measurements": [{**ROW, "rows": 2.5}]}, "rows: got 2.5"),
        ({"measurements": [{**ROW, "d_in": True}]}, "d_in: got True"),
        ({"measurements": [{**ROW, "seconds": {FUSED: 1.0}}]}, "expected those of fused, fused"),
        ({"measurements": [{**ROW, "seconds": {**ROW["seconds"], "magic": 1}}]}, "magic"),
        ({"measurements": [{**ROW, "seconds": {FUSED: 1.0, EXPAND_FIRST: 0}}]}, "got 0, expected"),
        (
            {"measurements": [{**ROW, "seconds": {FUSED: 1.0, EXPAND_FIRST: float("nan")}}]},
            "got nan, expected a positive number",
        ),
    ],
)
def test_bad_tables_are_named(folder: Path, content: Any, message: str) -> None:
    path = folder / "nvidia-h200.json"
    if isinstance(content, dict):
        content = {"format": 1, "device": H200.name, "measurements": [], **content}
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="bench tune") as error:
        choose(H200, 1024, 60)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_forced_route_ends_with_its_block(folder: Path) -> None:
    record(folder, measured(1e-5, 2e-5))
    seen = []

    def fail() -> None:
        with routes.forced(EXPAND_FIRST):
            seen.append(choose(H200, 1024, 60))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [*seen, choose(H200, 1024, 60)] == [EXPAND_FIRST, FUSED]
