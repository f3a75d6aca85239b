"""Op `topk_keys`: sizes, traffic and launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from op_case import Draw, Extra, Inputs, NewTensor, OpCase, Timed
from passes import INT64, Pass, Passes, Row
from torch import Tensor

from cases._keys import FLOOR, Search
from sapt_fast import dispatch
from sapt_fast.ops import topk_keys


@dataclass(frozen=True)
class TopKeysCase(OpCase):
    """The k best keys."""

    queries: int
    keys: int
    width: int
    k: int
    metric: str = "dot"
    op: str = "topk_keys"
    trains: tuple[str, ...] = ("query", "keys")
    floor = FLOOR

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = Draw(dtype, device)
        return {"query": draw(self.queries, self.width), "keys": draw(self.keys, self.width)}

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        """The scores, and those of the keys that the index names."""
        query, keys = inputs.values()
        scores, index = topk_keys(query, keys, self.k, metric=self.metric, backend=backend)
        with torch.no_grad():
            q, chosen = query.double().unsqueeze(1), keys[index].double()
            if self.metric == "l2":
                named = -(q - chosen).square().sum(-1)
            else:
                named = (q * chosen).sum(-1)
                if self.metric == "cosine":
                    named /= q.norm(dim=-1) * chosen.norm(dim=-1)
            # A key that is named twice is no answer.
            ordered = index.sort(-1).values
            twice = (ordered[:, 1:] == ordered[:, :-1]).any()
        return {"scores": scores, "scores of index": named.where(~twice, float("nan"))}

    def bare(self, inputs: Inputs, backend: str) -> Callable[[], object]:
        query, keys = inputs.values()
        return lambda: topk_keys(query, keys, self.k, metric=self.metric, backend=backend)

    def incoming(self, output: Tensor) -> Tensor:
        """The scores over the last one.

        Keys whose scores rounding cannot tell apart may change places, and the last its place with
        the best that is left out: so what a key receives depends on its score alone and vanishes
        at the last place.
        """
        scores = output.detach()
        return scores - scores[:, -1:]

    def fits(self, backend: str) -> bool:
        return backend != "cuda" or self.k <= 32

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        query, keys = inputs.values()
        return {"torch": lambda: (query @ keys.t()).topk(self.k)} if self.metric == "dot" else {}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        return (self.keys + self.queries) * self.width * dtype.itemsize + self.queries * self.k * 12


CHECKED = (
    TopKeysCase(64, 100_000, 512, 32),
    TopKeysCase(64, 100_000, 512, 32, "cosine"),
    TopKeysCase(17, 100_000, 512, 100, "l2"),
    TopKeysCase(5, 1003, 100, 32),
)
CHECKED_QUICK = tuple(TopKeysCase(3, 70, 16, 5, metric) for metric in ("dot", "cosine", "l2"))
TIMED = (
    Timed(
        TopKeysCase(64, 1_000_000, 512, 32),
        TopKeysCase(3, 130, 16, 5),
        "topk_keys",
        share={"ours": 0.7},
        extra=Extra(
            "topk_keys: extra memory / that of the scores",
            lambda case: 4 * case.queries * case.keys,
            0.05,
        ),
    ),
)
CPU_CHECKED = (
    *(TopKeysCase(17, 3001, 100, 32, metric) for metric in ("dot", "cosine", "l2")),
    TopKeysCase(64, 20_000, 256, 100),
)
CPU_TIMED = (  # the first is that of the search targets
    (TopKeysCase(16, 1_000_000, 256, 32), torch.float32),
    (TopKeysCase(16, 1_000_000, 256, 32), torch.bfloat16),
    (TopKeysCase(1, 1_000_000, 256, 32), torch.float32),
    (TopKeysCase(1, 10_000, 100, 8), torch.float32),
    (TopKeysCase(64, 100, 768, 5), torch.float32),
)
CPU_TIMED_QUICK = ((TopKeysCase(3, 700, 16, 5), torch.float32),)


# --- traffic -----------------------------------------------------------------------------------


def topk_keys_passes(c: Search) -> Passes:
    """Every key once, 2 M N D FLOPs, and once more those of the k chosen groups of each query.

    The maxima of the groups are written and read: M N is stored only for groups of one key.
    Cosine and l2 need squared norms: those of the keys from the product if it has one tile of
    queries, else from a pass of their own.
    """
    passes: Passes = []
    if c.metric != "dot":
        passes.append(Pass("squares", {"query": c.query}, {"squares": 4 * c.m}, 2 * c.m * c.d))
        if c.tiles_m > 1:
            passes.append(Pass("norms", {"keys": c.keys}, {"norms": 4 * c.n}, 2 * c.n * c.d))
    sums = c.metric != "dot" and c.tiles_m == 1
    step = c.step or c.m
    for first in range(0, c.m, step):
        passes += _queries_passes(replace(c, m=min(step, c.m - first)), sums)
    return passes


def _queries_passes(c: Search, sums: bool) -> Passes:
    """The launches on as many queries as are searched at a time."""
    squares = {} if c.metric == "dot" else {"squares": 4 * c.m}
    norms = {} if c.metric == "dot" else {"norms": 4 * c.n}
    maxima = {"maxima": 4 * c.m * -(-c.n // c.group)}
    best = {"scores": 4 * c.m * c.k, "index": INT64 * c.m * c.k}
    flops = 2 * c.m * c.n * c.d + (2 * c.n * c.d if sums else 0)
    reads = {"query": c.query, "keys": c.keys, **squares, **({} if sums else norms)}
    written = maxima | (norms if sums else {})
    rereads = c.rereads(-(-c.n // c.tile_n))
    passes = [Pass("maxima", reads, written, flops, rereads=rereads), Pass("best", maxima, best)]
    if c.group == 1:
        return passes
    candidates = c.k * c.group
    tiles = -(-candidates // c.tile_n)
    found = min(c.n, c.m * candidates) if c.found is None else c.found
    row = c.d * c.itemsize
    again = {
        "keys": (c.m * tiles * c.tile_n - found) * row,
        "query": sum(min(c.tile_m, c.m - m // c.tile_m * c.tile_m) for m in range(c.m))
        * tiles
        * row
        - c.query,
    }
    pairs = {"pairs": INT64 * c.m * candidates}
    reads = {"query": c.query, "keys": found * row, "index": INT64 * c.m * c.k, **squares}
    reads |= {"norms": 4 * found} if norms else {}
    # A query is multiplied in the tile in which its maxima were.
    flops = 2 * c.m * c.tile_m * tiles * c.tile_n * c.d
    return [
        *passes,
        Pass("scores", reads, pairs, flops, rereads=again),
        Pass("best", pairs, best),
    ]


def roofline() -> Iterable[Row]:
    """A search in a million keys."""
    passes = topk_keys_passes(Search(64, 1_000_000, 512, 32))
    yield Row("topk_keys", "M 64, N 1e6, D 512, k 32", passes)
    # 64 MiB hold the maxima and the pairs of 128 queries, four times.
    many = Search(8192, 1_000_000, 512, 32, tile_m=128, tile_n=256, step=384)
    yield Row("topk_keys", "M 8192, N 1e6, D 512, k 32", topk_keys_passes(many))


# --- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Sizes of one search."""

    name: str
    m: int
    n: int
    d: int
    k: int
    metrics: tuple[str, ...] = ("dot",)
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """The search."""
        kernels = dispatch.kernels("topk_keys", "triton")
        query, keys = tensor(self.m, self.d), tensor(self.n, self.d)
        for metric in self.metrics:
            kernels.topk_keys_fwd(query, keys, self.k, metric)


LAUNCHES = (
    Launch("keys, M 16", 16, 1_000_000, 512, 32, ("dot", "cosine", "l2"), quick=True),
    Launch("keys, M 64", 64, 1_000_000, 512, 32, ("dot", "cosine", "l2"), quick=True),
    Launch("keys, M 8192", 8192, 1_000_000, 512, 32, ("dot", "l2"), quick=True),
    Launch("keys, few keys", 64, 1000, 512, 5, ("dot", "l2"), quick=True),
    Launch("keys, k 200", 64, 1_000_000, 512, 200, ("dot", "l2")),
    Launch("keys, float16", 64, 1_000_000, 512, 32, dtype=torch.float16),
    Launch("keys, float32", 64, 1_000_000, 512, 64, ("dot", "l2"), torch.float32),
    Launch("keys, float32, k 32", 64, 1_000_000, 512, 32, ("dot", "cosine", "l2"), torch.float32),
    Launch("keys, odd width", 64, 1_000_000, 100, 64, ("l2",), aligned=False),
    Launch("keys, odd width, k 32", 64, 1_000_000, 100, 32, ("dot", "l2"), aligned=False),
)
