"""Op `nearest_key`: sizes, traffic and launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from op_case import Draw, Inputs, NewTensor, OpCase, Timed
from passes import INT64, Pass, Passes, Row
from torch import Tensor

from cases._keys import FLOOR, Search
from sapt_fast import dispatch
from sapt_fast.ops import nearest_key


@dataclass(frozen=True)
class NearestKeyCase(OpCase):
    """The nearest key; half of the queries lie inside the radius of theirs."""

    queries: int
    keys: int
    width: int
    op: str = "nearest_key"
    trains: tuple[str, ...] = ("query", "keys")
    floor = FLOOR

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = Draw(dtype, device)
        keys, noise = draw(self.keys, self.width), draw(self.queries, self.width, scale=0.1)
        noise[: self.queries // 2] *= 2
        near = keys[draw.integers(self.keys, self.queries)]
        radius = torch.full((self.keys,), 0.15 * self.width**0.5, device=device)
        return {"query": near + noise, "keys": keys, "radius": radius}

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        index, distance = nearest_key(*inputs.values(), backend=backend)
        return {"distance": distance, "index": index}

    def incoming(self, output: Tensor) -> Tensor:
        """The distance: keys that rounding cannot tell apart receive the same."""
        return output.detach()

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        query, keys, radius = inputs.values()

        def plain() -> Tensor:
            distance, index = torch.cdist(query.float(), keys.float()).min(1)
            return torch.where(distance <= radius[index], index, -1)

        return {"torch": plain}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        return (self.keys + self.queries) * self.width * dtype.itemsize + self.queries * 12


CHECKED = (NearestKeyCase(16, 100_000, 1024), NearestKeyCase(200, 1003, 100))
CHECKED_QUICK = (NearestKeyCase(4, 50, 32),)
TIMED = (
    Timed(
        NearestKeyCase(16, 100_000, 1024),
        CHECKED_QUICK[0],
        "nearest_key",
        share={"ours": 0.6, "cuda": 0.6},
        over_torch=1.0,
    ),
)
CPU_CHECKED = (NearestKeyCase(16, 20_000, 256), NearestKeyCase(200, 1003, 100))
CPU_TIMED = (
    (NearestKeyCase(16, 100_000, 1024), torch.float32),
    (NearestKeyCase(16, 100_000, 1024), torch.bfloat16),
    (NearestKeyCase(1, 137, 1024), torch.float32),
)
CPU_TIMED_QUICK = ((CHECKED_QUICK[0], torch.float32),)


# --- traffic -----------------------------------------------------------------------------------


def nearest_key_passes(c: Search) -> Passes:
    """Every key once, 2 M N D FLOPs; then the winners' distances.

    The norms, 2 N D FLOPs, come from a pass before if there are several tiles of queries.
    """
    best = {"best": INT64 * c.m * c.splits}
    found = c.m if c.found is None else c.found
    squares = {"squares": 4 * c.n} if c.tiles_m > 1 else {}
    norms = 2 * c.n * c.d
    passes = [Pass("squares", {"keys": c.keys}, squares, norms)] if squares else []
    flops = 2 * c.m * c.n * c.d + (0 if squares else norms)
    return [
        *passes,
        Pass(
            "stream",
            {"query": c.query, "keys": c.keys, **squares},
            best,
            flops,
            rereads=c.rereads(-(-c.n // c.tile_n)),
        ),
        Pass(
            "merge",
            {**best, "query": c.query, "keys": found * c.d * c.itemsize, "radius": 4 * found},
            {"index": INT64 * c.m, "distance": 4 * c.m, "nearest": INT64 * c.m},
            3 * c.m * c.d,
        ),
    ]


def roofline() -> Iterable[Row]:
    """A search in a million keys."""
    for m, tile_m, tile_n in ((64, 64, 512), (8192, 128, 256)):
        passes = nearest_key_passes(Search(m, 1_000_000, 512, tile_m=tile_m, tile_n=tile_n))
        yield Row("nearest_key", f"M {m}, N 1e6, D 512", passes)


# --- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Sizes of one search."""

    name: str
    m: int
    n: int
    d: int
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """The search."""
        kernels = dispatch.kernels("nearest_key", "triton")
        query, keys = tensor(self.m, self.d), tensor(self.n, self.d)
        kernels.nearest_key_fwd(query, keys, tensor(self.n, dtype=torch.float32))


LAUNCHES = (
    Launch("keys, M 16", 16, 1_000_000, 512, quick=True),
    Launch("keys, M 64", 64, 1_000_000, 512, quick=True),
    Launch("keys, M 8192", 8192, 1_000_000, 512, quick=True),
    Launch("keys, few keys", 64, 1000, 512),
    Launch("keys, float16", 64, 1_000_000, 512, dtype=torch.float16),
    Launch("keys, float32", 64, 1_000_000, 512, dtype=torch.float32),
    Launch("keys, odd width", 64, 1_000_000, 100, aligned=False),
)
