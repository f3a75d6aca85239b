"""Which route a product takes: recorded tables, their files, and the cost model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from sapt_fast.triton_kernels.blocks import gemm_tiles, shrink_tiles
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.blocks.common import DeviceTraits, TileConfig
from sapt_fast.triton_kernels.blocks.gemm_variants import (
    EXPAND_FIRST,
    FUSED,
    Measurement,
    Size,
    Variant,
)

VERSIONS = {"torch": torch.__version__, "triton": triton.__version__}
H200 = DeviceTraits(90, 132, "NVIDIA H200")
DEVICES = [
    H200,
    DeviceTraits(80, 108, "NVIDIA A100", clock=1.41e9, bandwidth=2.0e12, shared=166912),
    DeviceTraits(89, 128, "NVIDIA GeForce RTX 4090", clock=2.52e9, bandwidth=1.0e12, shared=101376),
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
    return choose_variant(traits, d, rank, rows, **other).route


def choose_variant(traits: DeviceTraits, d: int, rank: int, rows: int, **other: Any) -> Variant:
    options = {"direction": "forward", "d_out": d, "dtype": torch.bfloat16, **other}
    return routes.choose(traits, d_in=d, rank=rank, rows=rows, **options)


def measured(fused: float, expand_first: float, **other: Any) -> Measurement:
    size = {"d_in": 1024, "d_out": 1024, "rank": 64, "rows": 8192, **other}
    direction, dtype = size.pop("direction", "forward"), size.pop("dtype", "bfloat16")
    seconds = {Variant(FUSED): fused, Variant(EXPAND_FIRST): expand_first}
    return Measurement(Size(direction, **size, dtype=dtype), seconds)


def record(folder: Path, *measurements: Measurement, device: str = H200.name) -> Path:
    path = folder / routes.table_file(device)
    routes.write_table(path, device, measurements, VERSIONS)
    routes.forget()
    return path


def test_model_fuses_narrow_layers_and_expands_wide_ones() -> None:
    assert choose(H200, 512, 60) == choose(H200, 1024, 4) == FUSED
    assert choose(H200, 2048, 60) == choose(H200, 8192, 1024) == EXPAND_FIRST
    # Many ranks take the expansion as long as its traffic, which then costs nothing.
    assert choose(H200, 512, 60, rows=32768) == FUSED
    assert choose(H200, 512, 2048, rows=32768) == EXPAND_FIRST


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
    arithmetic, bandwidth = 4096 * 1e9 * 0.75, 1e12 * 0.875  # the first of one multiprocessor
    rows, d_in, d_out, rank = 4096, 8192, 2048, 512
    size = Size("forward", d_in, d_out, rank, rows, "bfloat16")
    # 32 x 8 tiles of 128 x 256 on 100 multiprocessors
    waves, flops = 3, 2 * 128 * 256
    fused = waves * (flops * (d_in + rank) / (0.95 * arithmetic) + 2e-6)
    assert routes.estimate_fused(traits, size) == pytest.approx(fused)
    expand = max(
        waves * flops * rank / (0.95 * arithmetic),
        2 * (rows * rank + rank * d_out + rows * d_out) / bandwidth,
    )
    want = 2e-6 + expand + waves * flops * d_in / arithmetic
    assert routes.estimate_expand_first(traits, size) == pytest.approx(want)
    # A tile fewer than multiprocessors is bound by what those that work can fetch.
    narrow = Size("forward", 64, 32 * 50, 4, 4, "bfloat16")
    moved = 2 * ((4 + 32 * 50) * 68 + 4 * 32 * 50)
    slow = traits._replace(bandwidth=1e9)
    want = 2 * moved / (1e9 * 0.875)
    assert routes.estimate_fused(slow, narrow) == pytest.approx(want)


def test_parts_are_estimated_with_the_launch_and_the_sums() -> None:
    product = gemm_tiles.Product(128, 1024, 8192, 0, 2, descriptors=False)
    whole, split = TileConfig(64, 64, 64, 4, 4), TileConfig(64, 64, 64, 4, 4, parts=4)
    took = [gemm_tiles.seconds(H200, tile, product) for tile in (whole, split)]
    sums = 2e-6 + 4 * 2 * 4 * 128 * 1024 / (H200.bandwidth * 0.875)
    assert took[1] == pytest.approx(took[0] / 4 + sums)  # 32 tiles: one wave either way


@pytest.mark.parametrize("rows", [65, 128, 256, 512, 1024])
@pytest.mark.parametrize("descriptors", [True, False])
def test_few_tiles_become_smaller_or_are_split(rows: int, descriptors: bool) -> None:
    """About half of the multiprocessors work, where tiles of 128 x 128 leave most idle."""
    for d in (1024, 4096):
        product = gemm_tiles.Product(rows, 1024, d, 60, 2, descriptors=descriptors)
        tile = gemm_tiles.chosen(H200, product)
        programs = -(-rows // tile.m) * -(-1024 // tile.n) * tile.parts
        assert programs >= min(64, -(-rows // 64) * 16 * (d // 1024))


def test_a_part_has_work(folder: Path) -> None:
    for rows in (1, 64, 128, 700):
        for d_in, d_out in ((32, 4096), (1024, 64), (4096, 100), (11008, 4096)):
            for itemsize in (2, 4):
                product = gemm_tiles.Product(rows, d_out, d_in, 60, itemsize)
                for traits in DEVICES:
                    for tile in gemm_tiles.candidates(traits, product):
                        steps = -(-d_in // tile.k)
                        assert tile.parts == 1 or -(-steps // tile.parts) >= 4
                        assert (tile.parts - 1) * -(-steps // tile.parts) < steps


@pytest.mark.parametrize("shared", [232448, 101376, 65536])
def test_tiles_fit_into_the_shared_memory(shared: int) -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        traits = DeviceTraits(capability, 132, shared=shared)
        for rows, itemsize, aligned in itertools.product((4, 500, 8192), (2, 4), (True, False)):
            product = gemm_tiles.Product(rows, 4096, 4096, 60, itemsize, aligned)
            tiles = [(t, itemsize, itemsize) for t in gemm_tiles.candidates(traits, product)]
            for segments, backward, widths in itertools.product(
                (0, 1, 4), (True, False), ([16], [64, 256])
            ):
                given = traits, (itemsize, 4), rows, widths, segments, backward
                tiles.append((shrink_tiles._shrink_config(*given), itemsize, 4))
            for tile, row_bytes, column_bytes in tiles:
                step = tile.k * (tile.m * row_bytes + tile.n * column_bytes)
                assert tile.num_stages * step <= shared
                assert tile.num_stages >= 2


def test_table_overrules_the_model(folder: Path) -> None:
    narrow = measured(2e-5, 1e-5, d_in=512, d_out=512)
    record(folder, narrow, measured(1e-5, 2e-5, d_in=8192, d_out=8192))
    assert choose(H200, 512, 60) == EXPAND_FIRST
    assert choose(H200, 8192, 60) == FUSED
    # Far from what was measured, for another pass, dtype or GPU, the model decides.
    assert choose(H200, 512, 4) == FUSED
    assert choose(H200, 512, 60, direction="backward") == FUSED
    assert choose(H200, 512, 60, dtype=torch.float16) == FUSED
    assert choose(H200._replace(name="NVIDIA H100"), 512, 60) == FUSED


def test_a_measured_tile_comes_with_its_route(folder: Path) -> None:
    tile = TileConfig(64, 64, 64, 4, 4, parts=3)
    faster = measured(2e-5, 3e-5, rows=256)
    faster.seconds[Variant(FUSED, tile)] = 1e-5
    record(folder, faster)
    assert choose_variant(H200, 1024, 64, 256) == (FUSED, tile)


def test_a_table_of_another_triton_is_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = record(folder, measured(2e-5, 1e-5, d_in=512, d_out=512))
    assert choose(H200, 512, 60) == EXPAND_FIRST
    path.write_text(path.read_text().replace(f'"{triton.__version__}"', '"3.0.1"'))
    routes.forget()
    assert choose(H200, 512, 60) == choose(H200, 512, 64) == FUSED
    [message] = caplog.messages
    assert "measured with triton 3.0.1" in message
    assert str(path) in message


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_with_tf32_allowed_the_float32_table_does_not_count(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    record(folder, measured(1e-5, 2e-5, d_in=8192, d_out=8192, dtype="float32"))
    before = routes.setting()
    assert choose(H200, 8192, 60, dtype=torch.float32) == FUSED
    request.getfixturevalue("tf32_allowed")
    assert choose(H200, 8192, 60, dtype=torch.float32) == EXPAND_FIRST
    assert routes.setting() != before


def test_pointers_are_taken_only_where_they_were_measured(folder: Path) -> None:
    by_pointers = measured(2e-5, 3e-5)
    by_pointers.seconds[Variant(routes.FUSED_POINTERS)] = 1e-5
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
    assert routes.read_table(path, H200.name) == (table, triton.__version__)
    assert json.loads(path.read_text())["versions"] == VERSIONS
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
    "dtype": "bfloat16", "seconds": [[FUSED, None, 1e-5], [EXPAND_FIRST, None, 2e-5]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("\udcff", "no JSON"),
        ([], "format: got 'list', expected 2"),
        ({"format": 1}, "format: got 1, expected 2"),
        ({"versions": {"torch": "2.11"}}, "versions: got {'torch': '2.11'}, expected that of"),
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
        ({"measurements": [{**ROW, "seconds": {FUSED: 1.0}}]}, "expected a list"),
        ({"measurements": [{**ROW, "seconds": [[FUSED, None, 1.0]]}]}, "expected those of fused"),
        ({"measurements": [{**ROW, "seconds": [[FUSED, 1.0]]}]}, "expected [route, tile, seconds]"),
        ({"measurements": [{**ROW, "seconds": [["magic", None, 1.0]]}]}, "got 'magic', expected"),
        ({"measurements": [{**ROW, "seconds": [[FUSED, [64, 64], 1.0]]}]}, "tile [64, 64]"),
        ({"measurements": [{**ROW, "seconds": [[FUSED, [64] * 5 + [0], 1.0]]}]}, "the tile [64"),
        ({"measurements": [{**ROW, "seconds": [[FUSED, None, 0]]}]}, "got 0, expected"),
        (
            {"measurements": [{**ROW, "seconds": [[FUSED, None, float("nan")]]}]},
            "got nan, expected a positive number",
        ),
    ],
)
def test_bad_tables_are_named(folder: Path, content: Any, message: str) -> None:
    path = folder / "nvidia-h200.json"
    if isinstance(content, dict):
        given = {"format": 2, "device": H200.name, "versions": VERSIONS, "measurements": []}
        content = given | content
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
